package wsman

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// target is the instance that selectors name. All keys are needed, except of a
// service: its CreationClassName is enough.
func (s *Server) target(r *request) (*cim.Instance, *Fault) {
	if r.uri == "" {
		return nil, &Fault{Subcode: "a:DestinationUnreachable", Code: codeUnreachable, Detail: detailInvalidResourceURI, Text: "The request has no resource URI."}
	}
	return s.lookup(cim.Ref{Namespace: r.namespace, Class: r.class, Keys: r.selectors})
}

func (s *Server) lookup(ref cim.Ref) (*cim.Instance, *Fault) {
	c := cim.Lookup(ref.Namespace, ref.Class)
	if c == nil {
		return nil, unknownClass(ref.Class)
	}
	named := map[string]bool{}
	for name := range ref.Keys {
		f, ok := c.Property(name)
		if !ok || !f.Key {
			return nil, NotFound(c.Name + " has no key " + name)
		}
		named[f.Name] = true
	}
	service := strings.HasSuffix(c.Name, "Service") && named["CreationClassName"]
	for _, f := range c.Properties {
		if f.Key && !named[f.Name] && !service {
			return nil, &Fault{Subcode: "w:InvalidSelectors", Code: codeInsufficient, Text: "The request contains too few selectors: " + f.Name + " is missing."}
		}
	}
	for _, inst := range s.Provider.Instances(ref.Namespace, ref.Class) {
		matches := true
		for name, value := range ref.Keys {
			matches = matches && strings.EqualFold(inst.Get(name).String(), value)
		}
		if matches && strings.EqualFold(inst.Class.Name, c.Name) {
			return inst, nil
		}
	}
	return nil, NotFound("there is no such " + c.Name)
}

func (s *Server) get(r *request) (string, *Fault) {
	inst, f := s.target(r)
	if f != nil {
		return "", f
	}
	return instance(inst, nil), nil
}

// put hands the properties that the body has to the provider, and answers with
// what the instance is then.
func (s *Server) put(r *request) (string, *Fault) {
	inst, f := s.target(r)
	if f != nil {
		return "", f
	}
	if len(r.body.children) != 1 || r.body.children[0].name.Local != inst.Class.Name || r.body.children[0].name.Space != classURI(r.namespace, inst.Class.Name) {
		return "", schemaFault("the body is not one %s", inst.Class.Name)
	}
	changed := inst.Clone()
	values, f := s.values(r.body.children[0], inst.Class.Properties)
	if f != nil {
		return "", f
	}
	for name, v := range values {
		changed.Put(name, v)
	}
	if err := s.Provider.Put(inst, changed); err != nil {
		return "", asFault(err)
	}
	return s.get(r)
}

func (s *Server) invoke(ctx context.Context, r *request) (action, body string, f *Fault) {
	name, ok := strings.CutPrefix(r.action, r.uri+"/")
	if !ok || r.uri == "" {
		return "", "", &Fault{Subcode: "a:ActionNotSupported", Code: codeInvalidAction, Text: "The action " + r.action + " is not supported by the service."}
	}
	inst, f := s.target(r)
	if f != nil {
		return "", "", f
	}
	method, ok := inst.Class.Method(name)
	if !ok {
		return "", "", &Fault{Subcode: "a:ActionNotSupported", Code: codeInvalidAction, Text: inst.Class.Name + " has no method " + name + "."}
	}
	if len(r.body.children) != 1 || r.body.children[0].name.Local != name+"_INPUT" || r.body.children[0].name.Space != r.uri {
		return "", "", schemaFault("the body is not one %s_INPUT", name)
	}
	var in []cim.Field
	for _, p := range method.Params {
		if p.In {
			in = append(in, p)
		}
	}
	args, f := s.values(r.body.children[0], in)
	if f != nil {
		return "", "", f
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	out, result, err := s.Provider.Invoke(ctx, inst, method, args)
	if ctx.Err() != nil {
		return "", "", &Fault{Receiver: true, Subcode: "w:TimedOut", Code: codeTimedOut, Text: "The WS-Management service cannot complete the operation within the time specified in OperationTimeout."}
	}
	if err != nil {
		return "", "", asFault(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<p:%s_OUTPUT xmlns:xsi="%s" xmlns:p="%s" xmlns:cim="%s">`, name, nsInstance, r.uri, nsCIM)
	for _, p := range method.Params {
		if !p.Out {
			continue
		}
		v := out[p.Name]
		if err := cim.Check(p, v); err != nil {
			return "", "", &Fault{Receiver: true, Subcode: "w:InternalError", Code: codeProviderFailure, Text: p.Name + ": " + err.Error()}
		}
		b.WriteString(property(p, v))
	}
	fmt.Fprintf(&b, "<p:ReturnValue>%d</p:ReturnValue></p:%s_OUTPUT>", result, name)
	return r.action + "Response", b.String(), nil
}

func asFault(err error) *Fault {
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	return &Fault{Receiver: true, Subcode: "w:InternalError", Code: codeProviderFailure, Text: err.Error()}
}

// values reads the children of n, which are of the types of fields. What is
// not there is not in the map.
func (s *Server) values(n *node, fields []cim.Field) (map[string]cim.Value, *Fault) {
	out := map[string]cim.Value{}
	for _, c := range n.children {
		var f cim.Field
		for _, candidate := range fields {
			if candidate.Name == c.name.Local {
				f = candidate
			}
		}
		if f.Name == "" || c.name.Space != n.name.Space {
			return nil, schemaFault("%s has no %s", n.name.Local, c.name.Local)
		}
		v, twice := out[f.Name]
		if twice && !f.Array {
			return nil, schemaFault("%s is there twice", f.Name)
		}
		if c.isNil() {
			out[f.Name] = v
			continue
		}
		v.Set = true
		if f.Type == "reference" {
			ref, fault := referenceOf(c)
			if fault != nil {
				return nil, fault
			}
			if !f.Array {
				v.Ref = ref
			} else {
				v.Items = append(v.Items, ref.Path())
			}
			out[f.Name] = v
			continue
		}
		text := c.text
		if f.Type != "string" {
			text = strings.TrimSpace(text)
		}
		if f.Type == "datetime" && len(c.children) == 1 && c.children[0].name.Space == nsCIM {
			text = c.children[0].value()
		} else if len(c.children) > 0 {
			return nil, schemaFault("%s holds the element %s where text is expected", f.Name, c.children[0].name.Local)
		}
		if f.Type == "boolean" && (text == "0" || text == "1") {
			text = map[string]string{"0": "false", "1": "true"}[text]
		}
		if err := cim.Lexical(f.Type, text); err != nil {
			return nil, schemaFault("%s: %v", f.Name, err)
		}
		v.Items = append(v.Items, text)
		out[f.Name] = v
	}
	return out, nil
}

// referenceOf reads a:Address and a:ReferenceParameters, which must stand in
// the parameter itself: hosts refuse an a:EndpointReference around them.
func referenceOf(n *node) (*cim.Ref, *Fault) {
	params := n.child(nsAddress, "ReferenceParameters")
	if n.child(nsAddress, "Address") == nil || params == nil {
		what := "nothing"
		if len(n.children) > 0 {
			what = n.children[0].name.Local
		}
		return nil, schemaFault("%s holds %s where Address and ReferenceParameters are expected", n.name.Local, what)
	}
	uri := params.child(nsWSMan, "ResourceURI").value()
	set := params.child(nsWSMan, "SelectorSet")
	if uri == "" || set == nil {
		return nil, schemaFault("the reference in %s has no resource URI or no selectors", n.name.Local)
	}
	namespace, class, ok := splitURI(uri)
	if !ok {
		return nil, schemaFault("the reference in %s has the resource URI %q", n.name.Local, uri)
	}
	keys, f := selectorsOf(set)
	if f != nil {
		return nil, f
	}
	return &cim.Ref{Namespace: namespace, Class: class, Keys: keys}, nil
}
