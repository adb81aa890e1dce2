package wsman

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Namespaces of the envelopes.
const (
	nsSOAP      = "http://www.w3.org/2003/05/soap-envelope"
	nsAddress   = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
	nsWSMan     = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
	nsEnum      = "http://schemas.xmlsoap.org/ws/2004/09/enumeration"
	nsTransfer  = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
	nsMicrosoft = "http://schemas.microsoft.com/wbem/wsman/1/wsman.xsd"
	nsFault     = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
	nsIdentity  = "http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd"
	nsInstance  = "http://www.w3.org/2001/XMLSchema-instance"
	nsCIM       = "http://schemas.dmtf.org/wbem/wscim/1/common"

	anonymous = nsAddress + "/role/anonymous"
	wmiURI    = "http://schemas.microsoft.com/wbem/wsman/1/wmi/"
	dialect   = "http://schemas.microsoft.com/wbem/wsman/1/WQL"
)

// Bounds of a request's XML.
const (
	maxDepth = 64
	maxNodes = 100_000
)

// A node is an element with what it holds.
type node struct {
	name     xml.Name
	attrs    []xml.Attr
	text     string
	children []*node
}

func parseXML(p []byte) (*node, error) {
	d := xml.NewDecoder(bytes.NewReader(p))
	var root *node
	var stack []*node
	for n := 0; ; {
		t, err := d.Token()
		if errors.Is(err, io.EOF) && root != nil && len(stack) == 0 {
			return root, nil
		}
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.StartElement:
			if n++; n > maxNodes || len(stack) >= maxDepth {
				return nil, errors.New("too many elements")
			}
			e := &node{name: t.Name, attrs: t.Attr}
			switch {
			case len(stack) > 0:
				parent := stack[len(stack)-1]
				parent.children = append(parent.children, e)
			case root != nil:
				return nil, errors.New("two elements at the top")
			default:
				root = e
			}
			stack = append(stack, e)
		case xml.EndElement:
			stack = stack[:len(stack)-1]
		case xml.CharData:
			if len(stack) > 0 {
				stack[len(stack)-1].text += string(t)
			}
		case xml.Directive:
			return nil, errors.New("a document type")
		}
	}
}

func (n *node) child(space, local string) *node {
	if n == nil {
		return nil
	}
	for _, c := range n.children {
		if c.name.Space == space && c.name.Local == local {
			return c
		}
	}
	return nil
}

func (n *node) attr(space, local string) string {
	for _, a := range n.attrs {
		if a.Name.Space == space && a.Name.Local == local {
			return a.Value
		}
	}
	return ""
}

// value is the text without blanks around it; "" if there is no n.
func (n *node) value() string {
	if n == nil {
		return ""
	}
	return strings.TrimSpace(n.text)
}

func (n *node) isNil() bool {
	v := n.attr(nsInstance, "nil")
	return v == "true" || v == "1"
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}

func element(name, text string) string {
	return fmt.Sprintf("<%s>%s</%s>", name, escape(text), name)
}
