package wsman

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// Bounds of enumerations.
const (
	enumerationLife  = 10 * time.Minute
	maxEnumerations  = 200
	envelopeOverhead = 1600 // of an answer, without its items
)

// enumerations are those that clients have begun and not ended.
type enumerations struct {
	mu   sync.Mutex
	open map[string]*enumeration
}

type enumeration struct {
	items []string // still to be handed out
	ends  time.Time
}

func (s *Server) enumerate(r *request) (string, *Fault) {
	e := r.body.child(nsEnum, "Enumerate")
	if e == nil {
		return "", schemaFault("the body has no Enumerate")
	}
	for _, c := range e.children {
		switch c.name.Space + " " + c.name.Local {
		case nsWSMan + " OptimizeEnumeration", nsWSMan + " MaxElements", nsWSMan + " Filter", nsWSMan + " EnumerationMode", nsWSMan + " PolymorphismMode",
			nsEnum + " Expires", nsEnum + " EndTo", nsEnum + " Filter":
		default:
			return "", schemaFault("an Enumerate holds %s", c.name.Local)
		}
	}
	found, columns, f := s.find(r, e)
	if f != nil {
		return "", f
	}
	mode := e.child(nsWSMan, "EnumerationMode").value()
	var items []string
	for _, inst := range found {
		epr := fmt.Sprintf("<a:EndpointReference>%s</a:EndpointReference>", reference(inst.Ref()))
		switch mode {
		case "", "EnumerateObject":
			items = append(items, instance(inst, columns))
		case "EnumerateEPR":
			items = append(items, epr)
		case "EnumerateObjectAndEPR":
			items = append(items, "<w:Item>"+instance(inst, columns)+epr+"</w:Item>")
		default:
			return "", &Fault{Subcode: "w:UnsupportedFeature", Code: codeMode, Text: "The enumeration mode " + mode + " is not supported."}
		}
	}
	if e.child(nsWSMan, "OptimizeEnumeration") == nil {
		return fmt.Sprintf("<n:EnumerateResponse>%s</n:EnumerateResponse>", element("n:EnumerationContext", "uuid:"+s.keep(items))), nil
	}
	most, f := maxElements(e.child(nsWSMan, "MaxElements"))
	if f != nil {
		return "", f
	}
	part, rest, f := fit(items, most, r.envelope)
	if f != nil {
		return "", f
	}
	context, end := "", "<w:EndOfSequence/>"
	if len(rest) > 0 {
		context, end = "uuid:"+s.keep(rest), ""
	}
	return fmt.Sprintf("<n:EnumerateResponse>%s<w:Items>%s</w:Items>%s</n:EnumerateResponse>", element("n:EnumerationContext", context), strings.Join(part, ""), end), nil
}

// find is what an Enumerate asks for: a class, or a query over the star.
func (s *Server) find(r *request, e *node) ([]*cim.Instance, []string, *Fault) {
	filter := e.child(nsWSMan, "Filter")
	if filter == nil {
		filter = e.child(nsEnum, "Filter")
	}
	if filter == nil {
		c := cim.Lookup(r.namespace, r.class)
		if c == nil {
			return nil, nil, unknownClass(r.class)
		}
		if len(r.selectors) > 0 {
			return nil, nil, &Fault{Subcode: "w:InvalidSelectors", Code: codeSelectors, Text: "An enumeration takes no selectors."}
		}
		return s.Provider.Instances(r.namespace, r.class), nil, nil
	}
	if d := filter.attr("", "Dialect"); d != dialect {
		return nil, nil, &Fault{Subcode: "n:FilterDialectRequestedUnavailable", Code: codeDialect, Text: "The filter dialect " + d + " is not supported."}
	}
	if r.class != "*" {
		return nil, nil, &Fault{Subcode: "n:CannotProcessFilter", Code: codeQueryNeedsStar, Text: "The WS-Management service cannot process the request. The class name in the resource URI of an enumeration with a WQL filter must be \"*\"."}
	}
	q, err := cim.ParseQuery(r.namespace, filter.value())
	if err != nil {
		return nil, nil, &Fault{Subcode: "n:CannotProcessFilter", Code: codeFilter, WMI: wbemInvalidQuery, Text: "The WS-Management service cannot process the request. The WQL query is invalid: " + err.Error() + "."}
	}
	return q.Run(s.Provider), q.Columns, nil
}

func (s *Server) pull(r *request) (string, *Fault) {
	p := r.body.child(nsEnum, "Pull")
	if p == nil {
		return "", schemaFault("the body has no Pull")
	}
	most, f := maxElements(p.child(nsEnum, "MaxElements"))
	if f != nil {
		return "", f
	}
	s.enumerations.mu.Lock()
	defer s.enumerations.mu.Unlock()
	id := strings.TrimPrefix(p.child(nsEnum, "EnumerationContext").value(), "uuid:")
	e := s.enumerations.open[id]
	if e == nil || s.Now().After(e.ends) {
		delete(s.enumerations.open, id)
		return "", invalidContext()
	}
	part, rest, f := fit(e.items, most, r.envelope)
	if f != nil {
		return "", f
	}
	e.items = rest
	if len(rest) > 0 {
		return fmt.Sprintf("<n:PullResponse>%s<n:Items>%s</n:Items></n:PullResponse>", element("n:EnumerationContext", "uuid:"+id), strings.Join(part, "")), nil
	}
	delete(s.enumerations.open, id)
	return fmt.Sprintf("<n:PullResponse><n:Items>%s</n:Items><n:EndOfSequence/></n:PullResponse>", strings.Join(part, "")), nil
}

func (s *Server) release(r *request) (string, *Fault) {
	e := r.body.child(nsEnum, "Release")
	id := strings.TrimPrefix(e.child(nsEnum, "EnumerationContext").value(), "uuid:")
	s.enumerations.mu.Lock()
	defer s.enumerations.mu.Unlock()
	if s.enumerations.open[id] == nil {
		return "", invalidContext()
	}
	delete(s.enumerations.open, id)
	return "", nil
}

func invalidContext() *Fault {
	return &Fault{Subcode: "n:InvalidEnumerationContext", Code: codeContext, Text: "The supplied enumeration context is invalid."}
}

func unknownClass(name string) *Fault {
	return &Fault{Subcode: "a:DestinationUnreachable", Code: codeUnreachable, Detail: detailInvalidResourceURI, WMI: wbemInvalidClass, Text: "The WS-Management service cannot process the request. The class " + name + " does not exist in the given namespace."}
}

// keep remembers items under a new context. The oldest goes if there are many.
func (s *Server) keep(items []string) string {
	s.enumerations.mu.Lock()
	defer s.enumerations.mu.Unlock()
	now, oldest := s.Now(), ""
	for id, e := range s.enumerations.open {
		if now.After(e.ends) {
			delete(s.enumerations.open, id)
		} else if oldest == "" || e.ends.Before(s.enumerations.open[oldest].ends) {
			oldest = id
		}
	}
	if len(s.enumerations.open) >= maxEnumerations {
		delete(s.enumerations.open, oldest)
	}
	id := newID()
	s.enumerations.open[id] = &enumeration{items: items, ends: now.Add(enumerationLife)}
	return id
}

// maxElements is how many items are asked for: one, if nothing is said.
func maxElements(n *node) (int, *Fault) {
	if n == nil {
		return 1, nil
	}
	most, err := strconv.Atoi(n.value())
	if err != nil || most < 1 {
		return 0, schemaFault("MaxElements is %q", n.value())
	}
	return most, nil
}

// fit cuts items at what one envelope takes.
func fit(items []string, most, envelope int) (part, rest []string, f *Fault) {
	bytes := envelopeOverhead
	n := 0
	for n < min(len(items), most) && bytes+len(items[n]) <= envelope {
		bytes += len(items[n])
		n++
	}
	if n == 0 && len(items) > 0 {
		return nil, nil, tooLarge()
	}
	return items[:n], items[n:], nil
}

func tooLarge() *Fault {
	return &Fault{Subcode: "w:EncodingLimit", Code: codeEnvelopeTooLarge, Detail: detailMaxEnvelope, Text: "The WS-Management service cannot process the response because it is larger than the maximum size allowed."}
}
