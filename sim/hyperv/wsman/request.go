package wsman

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Limits of a service that nobody configured.
const (
	defaultEnvelope = 500 << 10
	minEnvelope     = 8 << 10
	defaultTimeout  = 60 * time.Second
)

// A request is an envelope's headers, understood, and its body.
type request struct {
	action    string
	messageID string
	namespace string // of WMI, from the resource URI
	class     string // or "*"
	uri       string
	selectors map[string]string
	envelope  int
	timeout   time.Duration
	body      *node
}

// known are the headers that a host understands.
var known = map[string]bool{
	nsAddress + " Action": true, nsAddress + " To": true, nsAddress + " MessageID": true, nsAddress + " ReplyTo": true, nsAddress + " From": true, nsAddress + " FaultTo": true,
	nsWSMan + " ResourceURI": true, nsWSMan + " SelectorSet": true, nsWSMan + " MaxEnvelopeSize": true, nsWSMan + " OperationTimeout": true, nsWSMan + " Locale": true, nsWSMan + " OptionSet": true, nsWSMan + " FragmentTransfer": true,
	nsMicrosoft + " DataLocale": true, nsMicrosoft + " SessionId": true, nsMicrosoft + " OperationID": true, nsMicrosoft + " SequenceId": true, nsMicrosoft + " ActivityId": true,
}

// parseRequest understands an envelope. Where it returns a Fault, the request
// has what was understood before, so that the answer can relate to it.
func parseRequest(p []byte, limit int) (*request, *Fault) {
	r := &request{selectors: map[string]string{}, envelope: limit, timeout: defaultTimeout}
	root, err := parseXML(p)
	if err != nil {
		return r, &Fault{Subcode: "w:InvalidBody", Code: codeXML, Text: "The WS-Management service cannot process the request because the XML is invalid: " + err.Error() + "."}
	}
	if root.name.Space != nsSOAP || root.name.Local != "Envelope" {
		return r, &Fault{Subcode: "s:VersionMismatch", Code: codeXML, Text: "The message is no SOAP 1.2 envelope."}
	}
	header := root.child(nsSOAP, "Header")
	r.body = root.child(nsSOAP, "Body")
	if r.body == nil {
		return r, &Fault{Subcode: "w:InvalidBody", Code: codeBody, Text: "The WS-Management service cannot process the request because the request packet does not have a valid SOAP body."}
	}
	if header == nil {
		header = &node{}
	}
	r.messageID = header.child(nsAddress, "MessageID").value()
	for _, h := range header.children {
		must := h.attr(nsSOAP, "mustUnderstand")
		if (must == "true" || must == "1") && !known[h.name.Space+" "+h.name.Local] {
			return r, &Fault{Subcode: "s:MustUnderstand", Code: codeHeaderRequired, Text: "The header " + h.name.Local + " is not understood."}
		}
	}
	r.action = header.child(nsAddress, "Action").value()
	for _, name := range []string{"Action", "To", "MessageID", "ReplyTo"} {
		if header.child(nsAddress, name) == nil {
			if r.body.child(nsIdentity, "Identify") != nil {
				continue // an Identify has no headers
			}
			return r, &Fault{Subcode: "a:MessageInformationHeaderRequired", Code: codeHeaderRequired, Text: "A required message information header, " + name + ", is not present."}
		}
	}
	if f := r.limits(header, limit); f != nil {
		return r, f
	}
	if f := r.resource(header); f != nil {
		return r, f
	}
	return r, nil
}

func (r *request) limits(header *node, limit int) *Fault {
	if h := header.child(nsWSMan, "MaxEnvelopeSize"); h != nil {
		n, err := strconv.Atoi(h.value())
		if err != nil || n < minEnvelope {
			return &Fault{Subcode: "w:EncodingLimit", Code: codeMinEnvelope, Detail: detailMinEnvelope, Text: "The MaxEnvelopeSize is below the minimum of 8192 octets."}
		}
		r.envelope = min(n, limit)
	}
	if h := header.child(nsWSMan, "OperationTimeout"); h != nil {
		t, err := duration(h.value())
		if err != nil {
			return &Fault{Subcode: "a:InvalidMessageInformationHeader", Code: codeTimeoutHeader, Text: "The OperationTimeout " + h.value() + " is no duration."}
		}
		r.timeout = t
	}
	return nil
}

func (r *request) resource(header *node) *Fault {
	h := header.child(nsWSMan, "ResourceURI")
	if h == nil {
		return nil // whoever needs one says so
	}
	r.uri = h.value()
	if set := header.child(nsWSMan, "SelectorSet"); set != nil {
		s, f := selectorsOf(set)
		if f != nil {
			return f
		}
		r.selectors = s
	}
	var ok bool
	if r.namespace, r.class, ok = splitURI(r.uri); !ok {
		return &Fault{Subcode: "a:DestinationUnreachable", Code: codeUnreachable, Detail: detailInvalidResourceURI, Text: "The WS-Management service cannot process the request. The resource URI " + r.uri + " was not found."}
	}
	if ns, ok := r.selectors["__cimnamespace"]; ok {
		return &Fault{Subcode: "w:InvalidSelectors", Code: codeDifferentNamespace, Text: "The namespace " + ns + " of the selectors does not match that of the resource URI."}
	}
	return nil
}

func splitURI(uri string) (namespace, class string, ok bool) {
	rest, ok := strings.CutPrefix(uri, wmiURI)
	i := strings.LastIndexByte(rest, '/')
	if !ok || i < 0 || rest[i+1:] == "" {
		return "", "", false
	}
	return rest[:i], rest[i+1:], true
}

func selectorsOf(set *node) (map[string]string, *Fault) {
	out := map[string]string{}
	for _, s := range set.children {
		name := s.attr("", "Name")
		if s.name.Space != nsWSMan || s.name.Local != "Selector" || name == "" {
			return nil, schemaFault("a SelectorSet holds %s", s.name.Local)
		}
		if _, twice := out[name]; twice {
			return nil, &Fault{Subcode: "w:InvalidSelectors", Code: codeSelectors, Text: "The selector " + name + " is there twice."}
		}
		out[name] = s.value()
	}
	return out, nil
}

// duration reads PnDTnHnMn.nS.
func duration(s string) (time.Duration, error) {
	wrong := fmt.Errorf("%q is no duration", s)
	rest, ok := strings.CutPrefix(s, "P")
	if !ok || rest == "" {
		return 0, wrong
	}
	date, clock, _ := strings.Cut(rest, "T")
	var sum time.Duration
	for _, part := range []struct {
		text  string
		units map[byte]time.Duration
	}{
		{date, map[byte]time.Duration{'D': 24 * time.Hour}},
		{clock, map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second}},
	} {
		for text := part.text; text != ""; {
			i := strings.IndexAny(text, "YMDHS")
			if i < 1 || part.units[text[i]] == 0 {
				return 0, wrong
			}
			v, err := strconv.ParseFloat(text[:i], 64)
			if err != nil || v < 0 || v > 1e6 {
				return 0, wrong
			}
			sum += time.Duration(v * float64(part.units[text[i]]))
			text = text[i+1:]
		}
	}
	return sum, nil
}
