package cim

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
)

// ErrType says that an embedded instance has a value of another type than its
// class's property.
var ErrType = errors.New("the type is not that of the class")

// maxEmbedded bounds the text of one embedded instance.
const maxEmbedded = 1 << 20

type xmlInstance struct {
	XMLName    xml.Name      `xml:"INSTANCE"`
	Class      string        `xml:"CLASSNAME,attr"`
	Properties []xmlProperty `xml:"PROPERTY"`
	Arrays     []xmlArray    `xml:"PROPERTY.ARRAY"`
	Qualifiers []xmlIgnored  `xml:"QUALIFIER"`
	Other      []xmlIgnored  `xml:",any"`
}

type xmlIgnored struct {
	XMLName xml.Name
}

type xmlProperty struct {
	Name  string    `xml:"NAME,attr"`
	Type  string    `xml:"TYPE,attr"`
	Value *xmlValue `xml:"VALUE"`
}

type xmlArray struct {
	Name   string `xml:"NAME,attr"`
	Type   string `xml:"TYPE,attr"`
	Values *struct {
		Values []xmlValue `xml:"VALUE"`
	} `xml:"VALUE.ARRAY"`
}

type xmlValue struct {
	Text string `xml:",chardata"`
}

// ParseEmbedded reads an instance in CIM-XML, as embedded instances are handed
// to Hyper-V. Unknown properties and TYPEs that are not the class's are
// refused, with ErrType.
func ParseEmbedded(namespace, text string) (*Instance, error) {
	if len(text) > maxEmbedded {
		return nil, fmt.Errorf("an embedded instance of %d bytes", len(text))
	}
	var x xmlInstance
	d := xml.NewDecoder(strings.NewReader(text))
	if err := d.Decode(&x); err != nil {
		return nil, fmt.Errorf("embedded instance: %w", err)
	}
	if t, err := d.Token(); !(errors.Is(err, io.EOF) && t == nil) {
		if s, ok := t.(xml.CharData); !ok || strings.TrimSpace(string(s)) != "" {
			return nil, errors.New("embedded instance: more than one element")
		}
	}
	if len(x.Other) > 0 {
		return nil, fmt.Errorf("embedded instance: element %s", x.Other[0].XMLName.Local)
	}
	c := Lookup(namespace, x.Class)
	if c == nil {
		return nil, fmt.Errorf("embedded instance of class %q, which is unknown", x.Class)
	}
	inst := &Instance{Class: c, values: map[string]Value{}}
	put := func(name, typ string, array bool, v Value) error {
		f, ok := c.Property(name)
		if !ok {
			return fmt.Errorf("%w: %s has no property %q", ErrType, c.Name, name)
		}
		if f.Type != typ || f.Array != array {
			return fmt.Errorf("%w: %s.%s is %s, not %s", ErrType, c.Name, f.Name, f.Type, typ)
		}
		if err := Check(f, v); err != nil {
			return fmt.Errorf("%w: %s.%s: %w", ErrType, c.Name, f.Name, err)
		}
		inst.values[f.Name] = v
		return nil
	}
	for _, p := range x.Properties {
		var v Value
		if p.Value != nil {
			v = Text(p.Value.Text)
		}
		if err := put(p.Name, p.Type, false, v); err != nil {
			return nil, err
		}
	}
	for _, p := range x.Arrays {
		var v Value
		if p.Values != nil {
			v.Set = true
			for _, item := range p.Values.Values {
				v.Items = append(v.Items, item.Text)
			}
		}
		if err := put(p.Name, p.Type, true, v); err != nil {
			return nil, err
		}
	}
	return inst, nil
}

// Embedded writes i in CIM-XML. NULL properties have no VALUE.
func (i *Instance) Embedded() string {
	var b strings.Builder
	fmt.Fprintf(&b, `<INSTANCE CLASSNAME="%s">`, i.Class.Name)
	value := func(s string) {
		b.WriteString("<VALUE>")
		_ = xml.EscapeText(&b, []byte(s))
		b.WriteString("</VALUE>")
	}
	for _, f := range i.Class.Properties {
		if f.Type == "reference" {
			continue
		}
		v := i.values[f.Name]
		element := "PROPERTY"
		if f.Array {
			element = "PROPERTY.ARRAY"
		}
		fmt.Fprintf(&b, `<%s NAME="%s" TYPE="%s">`, element, f.Name, f.Type)
		if v.Set && f.Array {
			b.WriteString("<VALUE.ARRAY>")
			for _, item := range v.Items {
				value(item)
			}
			b.WriteString("</VALUE.ARRAY>")
		} else if v.Set {
			value(v.String())
		}
		fmt.Fprintf(&b, "</%s>", element)
	}
	b.WriteString("</INSTANCE>")
	return b.String()
}
