package wsman

import (
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// envelope wraps a body in an answer to r.
func envelope(action, id, relatesTo, body string) string {
	relates := ""
	if relatesTo != "" {
		relates = element("a:RelatesTo", relatesTo)
	}
	return fmt.Sprintf(`<s:Envelope xml:lang="en-US" xmlns:s="%s" xmlns:a="%s" xmlns:n="%s" xmlns:x="%s" xmlns:w="%s"><s:Header>%s%s%s%s</s:Header><s:Body>%s</s:Body></s:Envelope>`,
		nsSOAP, nsAddress, nsEnum, nsTransfer, nsWSMan,
		element("a:Action", action), element("a:MessageID", "uuid:"+id), element("a:To", anonymous), relates, body)
}

func classURI(namespace, class string) string { return wmiURI + namespace + "/" + class }

// reference is what stands in an element that refers to an instance.
func reference(r cim.Ref) string {
	names := make([]string, 0, len(r.Keys))
	for k := range r.Keys {
		names = append(names, k)
	}
	slices.Sort(names)
	var b strings.Builder
	fmt.Fprintf(&b, "%s<a:ReferenceParameters>%s<w:SelectorSet>", element("a:Address", anonymous), element("w:ResourceURI", classURI(r.Namespace, r.Class)))
	for _, k := range names {
		fmt.Fprintf(&b, `<w:Selector Name="%s">%s</w:Selector>`, escape(k), escape(r.Keys[k]))
	}
	b.WriteString("</w:SelectorSet></a:ReferenceParameters>")
	return b.String()
}

// instance is an instance as an element of its class. With columns it is a
// fragment that has no others.
func instance(i *cim.Instance, columns []string) string {
	var b strings.Builder
	uri := classURI(i.Class.Namespace, i.Class.Name)
	if columns == nil {
		fmt.Fprintf(&b, `<p:%s xmlns:xsi="%s" xmlns:p="%s" xmlns:cim="%s" xsi:type="p:%s_Type">`, i.Class.Name, nsInstance, uri, nsCIM, i.Class.Name)
	} else {
		fmt.Fprintf(&b, `<w:XmlFragment xmlns:xsi="%s" xmlns:p="%s" xmlns:cim="%s">`, nsInstance, uri, nsCIM)
	}
	for _, f := range i.Class.Properties {
		if columns == nil || slices.ContainsFunc(columns, func(c string) bool { return strings.EqualFold(c, f.Name) }) {
			b.WriteString(property(f, i.Get(f.Name)))
		}
	}
	if columns == nil {
		fmt.Fprintf(&b, "</p:%s>", i.Class.Name)
	} else {
		b.WriteString("</w:XmlFragment>")
	}
	return b.String()
}

func property(f cim.Field, v cim.Value) string {
	name := "p:" + f.Name
	switch {
	case !v.Set:
		return fmt.Sprintf(`<%s xsi:nil="true"/>`, name)
	case v.Ref != nil:
		return fmt.Sprintf("<%s>%s</%s>", name, reference(*v.Ref), name)
	case v.Object != nil:
		var b strings.Builder
		c := v.Object.Class
		fmt.Fprintf(&b, `<%s xmlns:p="%s" xsi:type="p:%s_Type">`, name, classURI(c.Namespace, c.Name), c.Name)
		for _, f := range c.Properties {
			b.WriteString(property(f, v.Object.Get(f.Name)))
		}
		return b.String() + "</" + name + ">"
	}
	var b strings.Builder
	for _, item := range v.Items {
		if f.Type == "datetime" {
			fmt.Fprintf(&b, "<%s>%s</%s>", name, datetime(item), name)
		} else {
			b.WriteString(element(name, item))
		}
	}
	return b.String()
}

// datetime is an instant in ISO 8601, or CIM's ddddddddHHMMSS.mmmmmm:000 as a
// duration.
func datetime(s string) string {
	if len(s) != 25 || s[21] != ':' {
		return element("cim:Datetime", s)
	}
	days := strings.TrimLeft(s[:8], "0")
	if days == "" {
		days = "0"
	}
	number := func(p string) string {
		if p = strings.TrimLeft(p, "0"); p == "" || p[0] == '.' {
			p = "0" + p
		}
		return p
	}
	return element("cim:Interval", fmt.Sprintf("P%sDT%sH%sM%sS", days, number(s[8:10]), number(s[10:12]), number(strings.TrimRight(strings.TrimRight(s[12:21], "0"), "."))))
}
