package wsman

import (
	"crypto/rand"
	"fmt"
	"strconv"
	"time"
)

// Namespaces.
const (
	nsSOAP        = "http://www.w3.org/2003/05/soap-envelope"
	nsAddressing  = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
	nsWSMan       = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
	nsEnumeration = "http://schemas.xmlsoap.org/ws/2004/09/enumeration"
	nsCIM         = "http://schemas.dmtf.org/wbem/wscim/1/common"
	nsInstance    = "http://www.w3.org/2001/XMLSchema-instance"
	nsFault       = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
	nsWMI         = "http://schemas.microsoft.com/wbem/wsman/1/wmi/"
)

// Actions and other fixed URIs.
const (
	actionGet        = "http://schemas.xmlsoap.org/ws/2004/09/transfer/Get"
	actionPut        = "http://schemas.xmlsoap.org/ws/2004/09/transfer/Put"
	actionEnumerate  = nsEnumeration + "/Enumerate"
	actionPull       = nsEnumeration + "/Pull"
	actionRelease    = nsEnumeration + "/Release"
	addressAnonymous = nsAddressing + "/role/anonymous"
	dialectWQL       = "http://schemas.microsoft.com/wbem/wsman/1/WQL"
)

// A request is one that can be written again with another id.
type request struct {
	action   string
	resource string
	ref      *Ref            // the instance that is meant, nil for all of the resource
	body     func(w *writer) // what lies in the body, or nil
	repeat   bool            // it changes nothing, so it may be sent twice
}

// envelope writes a request.
func (c *Client) envelope(r request, id string) ([]byte, error) {
	var w writer
	w.raw(`<s:Envelope xmlns:s="`, nsSOAP, `" xmlns:a="`, nsAddressing, `" xmlns:w="`, nsWSMan, `" xmlns:n="`, nsEnumeration,
		`" xmlns:cim="`, nsCIM, `" xmlns:xsi="`, nsInstance, `"><s:Header><a:Action s:mustUnderstand="true">`)
	w.esc(r.action)
	w.raw(`</a:Action><w:ResourceURI s:mustUnderstand="true">`)
	w.esc(r.resource)
	w.raw(`</w:ResourceURI><a:To s:mustUnderstand="true">`)
	w.esc(c.url)
	w.raw(`</a:To><a:MessageID s:mustUnderstand="true">`, id, `</a:MessageID><a:ReplyTo><a:Address s:mustUnderstand="true">`,
		addressAnonymous, `</a:Address></a:ReplyTo><w:MaxEnvelopeSize s:mustUnderstand="true">`, strconv.Itoa(c.maxEnvelope),
		`</w:MaxEnvelopeSize><w:OperationTimeout>`, duration(c.timeout), `</w:OperationTimeout>`,
		`<w:Locale s:mustUnderstand="false" xml:lang="en-US"/>`)
	if r.ref != nil {
		if err := r.ref.check(); err != nil {
			return nil, err
		}
		w.selectors(r.ref.Keys, c.namespace)
	}
	w.raw("</s:Header><s:Body>")
	if r.body != nil {
		r.body(&w)
	}
	w.raw("</s:Body></s:Envelope>")
	return w.Bytes(), w.err
}

// duration writes a length of time as XML does.
func duration(d time.Duration) string {
	return "PT" + strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "S"
}

// newID makes the id of a message.
func newID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("uuid:%X-%X-%X-%X-%X", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// readEnvelope gives what lies in the body of the answer to message id, nil if
// nothing does. A fault is an error.
func readEnvelope(data []byte, id string, status int) (*element, error) {
	root, err := parseXML(data)
	if err != nil {
		return nil, fmt.Errorf("%w: its XML is broken: %w", ErrProtocol, err)
	}
	body := root.child(nsSOAP, "Body")
	if root.space != nsSOAP || root.name != "Envelope" || body == nil {
		return nil, fmt.Errorf("%w: it is no SOAP 1.2 envelope but %q of %q", ErrProtocol, root.name, root.space)
	}
	related := root.child(nsSOAP, "Header").child(nsAddressing, "RelatesTo").trimmed()
	answer := body.first()
	isFault := answer != nil && answer.space == nsSOAP && answer.name == "Fault"
	// A host that could not read the request cannot say to what it relates.
	if related != id && !(isFault && related == "") {
		return nil, fmt.Errorf("%w: it relates to %s, not to the request %s", ErrProtocol, shorten(related), id)
	}
	if isFault {
		return nil, readFault(answer, status)
	}
	if status != 200 {
		return nil, fmt.Errorf("%w: HTTP status %d without a fault", ErrProtocol, status)
	}
	return answer, nil
}

func (e *element) first() *element {
	if len(e.children) == 0 {
		return nil
	}
	return e.children[0]
}
