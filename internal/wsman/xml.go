package wsman

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
)

// maxDepth bounds how deep elements may lie in each other. An envelope with
// an embedded instance in it needs about a dozen.
const maxDepth = 64

// An element is one of a parsed document. Names are resolved: space is the
// namespace, not the prefix.
type element struct {
	space, name string
	attr        []xml.Attr
	children    []*element
	text        string // all character data directly in it
}

// parseXML reads one document. There are no entities to expand: a document
// type is refused. The size is the caller's to bound; memory is a small
// multiple of it.
func parseXML(data []byte) (*element, error) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	d := xml.NewDecoder(bytes.NewReader(data))
	var root *element
	var open []*element
	var texts [][]byte
	for {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			if len(open) == maxDepth {
				return nil, fmt.Errorf("elements lie more than %d deep", maxDepth)
			}
			e := &element{space: tok.Name.Space, name: tok.Name.Local, attr: tok.Attr}
			switch {
			case len(open) > 0:
				parent := open[len(open)-1]
				parent.children = append(parent.children, e)
			case root != nil:
				return nil, errors.New("there is more than one document")
			default:
				root = e
			}
			open, texts = append(open, e), append(texts, nil)
		case xml.EndElement:
			last := len(open) - 1
			open[last].text = string(texts[last])
			open, texts = open[:last], texts[:last]
		case xml.CharData:
			if len(open) > 0 {
				texts[len(open)-1] = append(texts[len(open)-1], tok...)
			} else if len(bytes.TrimSpace(tok)) > 0 {
				return nil, errors.New("there is text outside of the document")
			}
		case xml.Directive:
			return nil, errors.New("it has a document type")
		}
	}
	if root == nil {
		return nil, errors.New("it is empty")
	}
	return root, nil
}

// child is the first child of that name, or nil. It may be asked of nil.
func (e *element) child(space, name string) *element {
	if e == nil {
		return nil
	}
	for _, c := range e.children {
		if c.name == name && c.space == space {
			return c
		}
	}
	return nil
}

// named is the first child of that name in any namespace, or nil.
func (e *element) named(name string) *element {
	if e == nil {
		return nil
	}
	for _, c := range e.children {
		if c.name == name {
			return c
		}
	}
	return nil
}

// attribute is the value of an attribute, in any namespace.
func (e *element) attribute(name string) string {
	if e == nil {
		return ""
	}
	for _, a := range e.attr {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

// trimmed is the text without white space around it. It may be asked of nil.
func (e *element) trimmed() string {
	if e == nil {
		return ""
	}
	return strings.TrimSpace(e.text)
}

// isNil says whether an element stands for null.
func (e *element) isNil() bool {
	for _, a := range e.attr {
		if a.Name.Local == "nil" && a.Name.Space == nsInstance {
			v := strings.TrimSpace(a.Value)
			return v == "true" || v == "1"
		}
	}
	return false
}

// A writer builds XML. Its first error stays, and is for the end.
type writer struct {
	bytes.Buffer
	err error
}

// raw writes what is XML already.
func (w *writer) raw(parts ...string) {
	for _, p := range parts {
		w.WriteString(p)
	}
}

// esc writes text, or the value of an attribute.
func (w *writer) esc(s string) {
	w.check(s)
	xml.EscapeText(&w.Buffer, []byte(s))
}

// cdata writes text that holds XML, so that people can read it.
func (w *writer) cdata(s string) {
	w.check(s)
	w.raw("<![CDATA[", strings.ReplaceAll(s, "]]>", "]]]]><![CDATA[>"), "]]>")
}

// name writes the name of an element or attribute.
func (w *writer) name(s string) {
	if !isName(s) {
		w.fail(fmt.Errorf("%q is no name of a class, a property or a method", s))
		s = "x"
	}
	w.WriteString(s)
}

func (w *writer) fail(err error) {
	if w.err == nil {
		w.err = err
	}
}

// check refuses what no XML can hold. It would be replaced without a word, and
// a name that is another one is worse than none.
func (w *writer) check(s string) {
	for i, r := range s {
		ok := r == '\t' || r == '\n' || r == '\r' || r >= 0x20 && r < 0xd800 || r >= 0xe000 && r < 0xfffe || r >= 0x10000
		if ok && r == '\ufffd' {
			ok = strings.HasPrefix(s[i:], "\ufffd") // and not a broken byte
		}
		if !ok {
			w.fail(fmt.Errorf("%q has a character that XML cannot hold", s))
			return
		}
	}
}

// isName says whether s can name a class, a property or a method of WMI.
func isName(s string) bool {
	for i, r := range s {
		letter := r == '_' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		if !letter && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != ""
}
