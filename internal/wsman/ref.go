package wsman

import (
	"fmt"
	"slices"
	"strings"
)

// A Ref names an instance: its class and the values of its key properties. The
// keys may be fewer where they are enough to tell, and none for a class that
// has one instance. Do not change a Ref that others hold.
type Ref struct {
	Namespace string // "root/virtualization/v2"; empty is the client's own
	Class     string
	Keys      []Key
}

// A Key is one key property. Values are text, whatever the property's type.
type Key struct {
	Name  string
	Value string
	Ref   *Ref // instead of Value, in the keys of associations
}

// NewRef names an instance by pairs of a key's name and its value:
//
//	NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", guid)
func NewRef(class string, keys ...string) Ref {
	r := Ref{Class: class}
	for i := 0; i+1 < len(keys); i += 2 {
		r.Keys = append(r.Keys, Key{Name: keys[i], Value: keys[i+1]})
	}
	return r
}

// Key gives the value of a key property, or nothing.
func (r Ref) Key(name string) string {
	for _, k := range r.Keys {
		if strings.EqualFold(k.Name, name) {
			return k.Value
		}
	}
	return ""
}

// Equal says whether both name the same instance. As in WMI the order of keys
// and the case of names and values do not count, and host and namespace do not
// where one of them is empty.
func (r Ref) Equal(o Ref) bool {
	if !strings.EqualFold(r.Class, o.Class) || len(r.Keys) != len(o.Keys) {
		return false
	}
	if r.Namespace != "" && o.Namespace != "" && !strings.EqualFold(r.Namespace, o.Namespace) {
		return false
	}
	for _, k := range r.Keys {
		same := func(l Key) bool {
			if !strings.EqualFold(k.Name, l.Name) || (k.Ref == nil) != (l.Ref == nil) {
				return false
			}
			return k.Ref == nil && strings.EqualFold(k.Value, l.Value) || k.Ref != nil && k.Ref.Equal(*l.Ref)
		}
		if !slices.ContainsFunc(o.Keys, same) {
			return false
		}
	}
	return true
}

// String is the object path, as properties of type string hold it:
//
//	root/virtualization/v2:Msvm_ResourcePool.InstanceID="Microsoft:A\\B"
func (r Ref) String() string {
	if r.Namespace == "" {
		return r.Path()
	}
	return r.Namespace + ":" + r.Path()
}

// Path is the object path without the namespace, as ASSOCIATORS OF {…} takes
// it.
func (r Ref) Path() string {
	var b strings.Builder
	b.WriteString(r.Class)
	for i, k := range r.Keys {
		b.WriteByte(".,"[min(i, 1)])
		v := k.Value
		if k.Ref != nil {
			v = k.Ref.String()
		}
		b.WriteString(k.Name + `="` + pathEscaper.Replace(v) + `"`)
	}
	return b.String()
}

var pathEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// Quote writes a string literal of WQL, quotes and all.
func Quote(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// ParseRef reads an object path. It may begin with a host, which is dropped:
//
//	\\HV01\root\virtualization\v2:Msvm_ComputerSystem.CreationClassName="…",Name="…"
func ParseRef(path string) (Ref, error) {
	bad := func(why string) (Ref, error) { return Ref{}, fmt.Errorf("object path %q: %s", path, why) }
	rest := path
	var r Ref
	// The namespace ends at the first colon, if that comes before any value.
	if head, _, _ := strings.Cut(rest, `"`); strings.Contains(head, ":") {
		r.Namespace, rest, _ = strings.Cut(rest, ":")
		r.Namespace = strings.ReplaceAll(r.Namespace, `\`, "/")
		if host, ok := strings.CutPrefix(r.Namespace, "//"); ok {
			_, r.Namespace, _ = strings.Cut(host, "/")
		}
		if r.Namespace = strings.Trim(r.Namespace, "/"); r.Namespace == "" {
			return bad("no namespace before the colon")
		}
		if !isNamespace(r.Namespace) {
			return bad("that is no namespace")
		}
	}
	end := strings.IndexAny(rest, ".=")
	if end < 0 {
		end = len(rest)
	}
	if r.Class, rest = rest[:end], rest[end:]; !isName(r.Class) {
		return bad("that is no class")
	}
	if rest == "" || rest == "=@" {
		return r, nil
	}
	if rest[0] == '=' {
		return bad("the key has no name")
	}
	for rest != "" {
		name, value, ok := strings.Cut(rest[1:], "=")
		if name = strings.TrimSpace(name); !ok || !isName(name) {
			return bad("a key has no name or no value")
		}
		k := Key{Name: name}
		if k.Value, rest, ok = pathValue(value); !ok {
			return bad("the value of " + name + " does not end")
		}
		if rest != "" && rest[0] != ',' {
			return bad("something follows the value of " + name)
		}
		if slices.ContainsFunc(r.Keys, func(o Key) bool { return strings.EqualFold(o.Name, name) }) {
			return bad(name + " is there twice")
		}
		r.Keys = append(r.Keys, k)
	}
	return r, nil
}

// pathValue cuts a key's value off: quoted with escapes, or a bare number or
// truth.
func pathValue(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexByte(s, ',')
		if end < 0 {
			end = len(s)
		}
		return s[:end], s[end:], end > 0 && !strings.ContainsAny(s[:end], `"\`)
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:], true
		case c == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", "", false
}

func isNamespace(s string) bool {
	for part := range strings.SplitSeq(s, "/") {
		if !isName(part) {
			return false
		}
	}
	return true
}

// resource is the URI of a class, or of all of a namespace for "*".
func resource(namespace, class string) string { return nsWMI + namespace + "/" + class }

// endpoint writes a reference as the children of the element that holds it.
// Windows refuses an EndpointReference around them.
func (w *writer) endpoint(r Ref, namespace string) {
	if err := r.check(); err != nil {
		w.fail(err)
	}
	w.raw("<a:Address>", addressAnonymous, "</a:Address><a:ReferenceParameters><w:ResourceURI>")
	w.esc(r.resource(namespace))
	w.raw("</w:ResourceURI>")
	w.selectors(r.Keys, namespace)
	w.raw("</a:ReferenceParameters>")
}

func (w *writer) selectors(keys []Key, namespace string) {
	if len(keys) == 0 {
		return
	}
	w.raw("<w:SelectorSet>")
	for _, k := range keys {
		w.raw(`<w:Selector Name="`)
		w.name(k.Name)
		w.raw(`">`)
		if k.Ref != nil {
			w.raw("<a:EndpointReference>")
			w.endpoint(*k.Ref, namespace)
			w.raw("</a:EndpointReference>")
		} else {
			w.esc(k.Value)
		}
		w.raw("</w:Selector>")
	}
	w.raw("</w:SelectorSet>")
}

func (r Ref) check() error {
	if !isName(r.Class) || r.Namespace != "" && !isNamespace(r.Namespace) {
		return fmt.Errorf("%q is no class", r.Namespace+":"+r.Class)
	}
	return nil
}

func (r Ref) resource(namespace string) string {
	if r.Namespace != "" {
		namespace = r.Namespace
	}
	return resource(namespace, r.Class)
}

// readEndpoint reads a reference from the element that holds it, with or
// without an EndpointReference around it. It is nil if the element holds none.
func readEndpoint(e *element) (*Ref, error) {
	if inner := e.child(nsAddressing, "EndpointReference"); inner != nil {
		e = inner
	}
	params := e.child(nsAddressing, "ReferenceParameters")
	if params == nil {
		return nil, nil
	}
	uri := params.child(nsWSMan, "ResourceURI").trimmed()
	tail, ok := strings.CutPrefix(uri, nsWMI)
	slash := strings.LastIndexByte(tail, '/')
	if !ok || slash < 0 || !isName(tail[slash+1:]) || !isNamespace(tail[:slash]) {
		return nil, fmt.Errorf("a reference names the resource %q, which is no class", uri)
	}
	r := &Ref{Namespace: tail[:slash], Class: tail[slash+1:]}
	set := params.child(nsWSMan, "SelectorSet")
	if set == nil {
		return r, nil
	}
	for _, s := range set.children {
		if s.name != "Selector" {
			continue
		}
		k := Key{Name: s.attribute("Name")}
		if !isName(k.Name) {
			return nil, fmt.Errorf("a reference to %s has a selector with the name %q", r.Class, k.Name)
		}
		if strings.HasPrefix(k.Name, "__") {
			continue // __cimnamespace and its kin: no keys
		}
		inner, err := readEndpoint(s)
		if err != nil {
			return nil, err
		}
		if k.Ref = inner; inner == nil {
			k.Value = s.text
		}
		r.Keys = append(r.Keys, k)
	}
	return r, nil
}
