package wsman

import (
	"encoding/xml"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/fault"
)

// MarshalText writes the instance as CIM-XML, which is how methods take an
// embedded instance: as text. Only the properties that were set are in it, with
// the types that their values have. References and instances within are not
// supported; Windows' classes hold them as text.
func (in *Instance) MarshalText() ([]byte, error) {
	var w writer
	w.raw(`<INSTANCE CLASSNAME="`)
	w.name(in.Class)
	w.raw(`">`)
	for _, p := range in.props {
		w.property(p)
		if w.err != nil {
			return nil, fmt.Errorf("embedded %s: property %s: %w", in.Class, p.name, w.err)
		}
	}
	w.raw("</INSTANCE>")
	return w.Bytes(), w.err
}

func (w *writer) property(p prop) {
	switch v := p.value; {
	case v.typ == typeReference || v.typ == typeInstance:
		w.fail(fmt.Errorf("a %s in an embedded instance is %w", v.typ, fault.ErrUnsupported))
	case v.typ == "" && v.IsNull():
		return // null is what a property is that nobody gives
	case v.typ == "":
		w.fail(fmt.Errorf("its type is unknown, because it was read from an envelope"))
	case v.array:
		w.raw(`<PROPERTY.ARRAY NAME="`)
		w.name(p.name)
		w.raw(`" TYPE="`, string(v.typ), `"><VALUE.ARRAY>`)
		for _, it := range v.items {
			w.value(v.typ, it)
		}
		w.raw("</VALUE.ARRAY></PROPERTY.ARRAY>")
	default:
		w.raw(`<PROPERTY NAME="`)
		w.name(p.name)
		w.raw(`" TYPE="`, string(v.typ), `">`)
		w.value(v.typ, v.items[0])
		w.raw("</PROPERTY>")
	}
}

func (w *writer) value(typ Type, it item) {
	text := it.text
	if typ == typeDatetime {
		// What was read from an envelope has XML's form.
		if t, err := parseTime(text); err == nil {
			text = formatTime(t)
		} else if d, err := parseInterval(text); err == nil {
			text = formatInterval(d)
		} else {
			w.fail(err)
		}
	}
	w.raw("<VALUE>")
	w.esc(text)
	w.raw("</VALUE>")
}

// ParseInstance reads an instance from CIM-XML, as hosts put it into text: the
// errors of a job, for one.
func ParseInstance(text string) (*Instance, error) {
	root, err := parseXML([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("%s is no CIM-XML: %w", shorten(text), err)
	}
	return readInstance(root)
}

func readInstance(e *element) (*Instance, error) {
	in := &Instance{Class: e.attribute("CLASSNAME")}
	if e.name != "INSTANCE" || in.Class == "" {
		return nil, fmt.Errorf("the CIM-XML begins with %q, not with an instance of a class", e.name)
	}
	for _, c := range e.children {
		var err error
		p := prop{name: c.attribute("NAME")}
		p.value.typ = Type(c.attribute("TYPE"))
		switch c.name {
		case "PROPERTY":
			err = p.value.read(c)
		case "PROPERTY.ARRAY", "PROPERTY.OBJECTARRAY":
			p.value.array = true
			for _, list := range c.children {
				if list.name == "VALUE.ARRAY" || list.name == "VALUE.OBJECTARRAY" {
					err = p.value.read(list)
				}
			}
		case "PROPERTY.OBJECT", "PROPERTY.REFERENCE":
			err = p.value.read(c)
		default:
			continue // qualifiers
		}
		if err == nil && p.name == "" {
			err = fmt.Errorf("it has no name")
		}
		if err != nil {
			return nil, fmt.Errorf("CIM-XML of %s: property %s: %w", in.Class, p.name, err)
		}
		in.props = append(in.props, p)
	}
	return in, nil
}

// read takes all values that are children of e.
func (v *Value) read(e *element) error {
	for _, c := range e.children {
		var it item
		var err error
		switch c.name {
		case "VALUE":
			it.text = c.text
			if n := c.named("INSTANCE"); n != nil {
				it.instance, err = readInstance(n)
			}
		case "VALUE.NULL":
			it.null = true
		case "VALUE.OBJECT":
			if n := c.named("INSTANCE"); n != nil {
				it.instance, err = readInstance(n)
			} else {
				err = fmt.Errorf("an object without an instance")
			}
		case "VALUE.REFERENCE":
			it.ref, err = readReference(c)
		default:
			continue
		}
		if err != nil {
			return err
		}
		v.items = append(v.items, it)
	}
	return nil
}

// readReference reads the keys of a VALUE.REFERENCE, which lie under one of
// three names.
func readReference(e *element) (*Ref, error) {
	r := &Ref{}
	for name := e; ; {
		switch {
		case name.named("INSTANCEPATH") != nil:
			name = name.named("INSTANCEPATH")
		case name.named("LOCALINSTANCEPATH") != nil:
			name = name.named("LOCALINSTANCEPATH")
		case name.named("INSTANCENAME") != nil:
			e, name = name, name.named("INSTANCENAME")
			path := e.named("NAMESPACEPATH")
			if path == nil {
				path = e
			}
			var parts []string
			for _, n := range path.named("LOCALNAMESPACEPATH").all() {
				parts = append(parts, n.attribute("NAME"))
			}
			r.Namespace, r.Class = strings.Join(parts, "/"), name.attribute("CLASSNAME")
			for _, k := range name.children {
				if k.name == "KEYBINDING" {
					r.Keys = append(r.Keys, Key{Name: k.attribute("NAME"), Value: k.named("KEYVALUE").trimmed()})
				}
			}
			return r, nil
		default:
			return nil, fmt.Errorf("a reference without the name of an instance")
		}
	}
}

func (e *element) all() []*element {
	if e == nil {
		return nil
	}
	return e.children
}

// decodeObject reads an instance, or the results of a method, from its element
// in an envelope.
func decodeObject(e *element) (*Instance, error) {
	in := &Instance{Class: e.name}
	if e.space == nsWSMan && e.name == "XmlFragment" {
		in.Class = ""
	}
	if tail, ok := strings.CutPrefix(e.space, nsWMI); ok {
		if slash := strings.LastIndexByte(tail, '/'); slash > 0 {
			in.Namespace = tail[:slash]
		}
	}
	index := map[string]int{}
	for _, c := range e.children {
		it, typ, err := decodeItem(c)
		if err != nil {
			return nil, fmt.Errorf("property %s.%s: %w", in.Class, c.name, err)
		}
		key := strings.ToLower(c.name)
		i, again := index[key]
		if !again {
			i = len(in.props)
			index[key] = i
			in.props = append(in.props, prop{name: c.name})
		}
		p := &in.props[i].value
		p.items = append(p.items, it)
		p.array = again
		if typ != "" {
			p.typ = typ
		}
	}
	return in, nil
}

// decodeItem also gives the type where the element tells it.
func decodeItem(e *element) (item, Type, error) {
	if e.isNil() {
		return item{null: true}, "", nil
	}
	ref, err := readEndpoint(e)
	if err != nil || ref != nil {
		return item{ref: ref}, typeReference, err
	}
	if len(e.children) == 0 {
		return item{text: e.text}, "", nil
	}
	if len(e.children) == 1 {
		switch c := e.children[0]; c.name {
		case "Datetime", "Interval", "Date", "Time", "CIM_DateTime":
			if len(c.children) == 0 {
				return item{text: strings.TrimSpace(c.text)}, typeDatetime, nil
			}
		}
	}
	in, err := decodeObject(e)
	if err != nil {
		return item{}, "", err
	}
	// The element is named after the property; its type says the class.
	in.Class, in.Namespace = "", ""
	for _, a := range e.attr {
		if a.Name == (xml.Name{Space: nsInstance, Local: "type"}) {
			_, local, found := strings.Cut(a.Value, ":")
			if !found {
				local = a.Value
			}
			in.Class = strings.TrimSuffix(local, "_Type")
		}
	}
	return item{instance: in}, typeInstance, nil
}

// argument writes a parameter of a method or a property of a Put. An embedded
// instance goes as text; Windows refuses it as elements.
func (w *writer) argument(name string, v Value, namespace string) {
	if v.IsNull() {
		if v.array {
			return
		}
		w.raw("<p:")
		w.name(name)
		w.raw(` xsi:nil="true"/>`)
		return
	}
	for _, it := range v.items {
		w.raw("<p:")
		w.name(name)
		w.raw(">")
		switch {
		case it.null:
			w.fail(fmt.Errorf("%s has null among its values", name))
		case it.ref != nil:
			w.endpoint(*it.ref, namespace)
		case it.instance != nil:
			text, err := it.instance.MarshalText()
			if err != nil {
				w.fail(err)
			}
			w.cdata(string(text))
		case v.typ == typeDatetime:
			w.datetime(it.text)
		default:
			w.esc(it.text)
		}
		w.raw("</p:")
		w.name(name)
		w.raw(">")
	}
}

// datetime writes CIM's form of a moment or an interval in XML's.
func (w *writer) datetime(s string) {
	if t, err := parseTime(s); err == nil {
		w.raw("<cim:Datetime>", t.UTC().Format("2006-01-02T15:04:05.999999Z"), "</cim:Datetime>")
		return
	}
	d, err := parseInterval(s)
	if err != nil {
		w.fail(err)
	}
	w.raw("<cim:Interval>", fmt.Sprintf("P%dDT%gS", d/(24*60*60*1e9), (d%(24*60*60*1e9)).Seconds()), "</cim:Interval>")
}
