package wsman

import (
	"fmt"
)

// Codes of WSManFault, from the SDK's list of WS-Management errors.
const (
	codeInvalidAction        = 2150858753
	codeProviderFailure      = 2150858755
	codeHeaderRequired       = 2150858769
	codeUnreachable          = 2150858770
	codeDialect              = 2150858777
	codeFilter               = 2150858778
	codeContext              = 2150858779
	codeEnvelopeTooLarge     = 2150858790
	codeBody                 = 2150858791
	codeTimedOut             = 2150858793
	codeSelectors            = 2150858813
	codeSchema               = 2150858817
	codeXML                  = 2150858819
	codeEnvelopeSize         = 2150858824
	codeInsufficient         = 2150858842
	codeMinEnvelope          = 2150858878
	codeTimeoutHeader        = 2150858881
	codeMode                 = 2150858886
	codeWMI                  = 2150859010
	codeQueryNeedsStar       = 2150859003
	codeDifferentNamespace   = 2150859067
	codeAccessDenied         = 5
	wbemNotFound             = 0x80041002
	wbemProviderNotCapable   = 0x80041024
	wbemInvalidQuery         = 0x80041017
	wbemInvalidClass         = 0x80041010
	wbemInvalidNamespace     = 0x8004100e
	wbemAccessDenied         = 0x80041003
	detailInvalidResourceURI = "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/InvalidResourceURI"
	detailMaxEnvelope        = "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/MaxEnvelopeSize"
	detailMaxExceeded        = "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/MaxEnvelopeSizeExceeded"
	detailMinEnvelope        = "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/MinimumEnvelopeLimit"
)

// A Fault is an answer that says what was wrong. A Provider may return one as
// its error.
type Fault struct {
	Receiver bool // the host's fault, not the request's
	Subcode  string
	Code     uint32 // of WSManFault
	Text     string
	Detail   string // a URI of a fault detail, or ""
	WMI      uint32 // what WMI said, or 0
}

func (f *Fault) Error() string { return fmt.Sprintf("%s: %s", f.Subcode, f.Text) }

// NotFound is WMI's "there is no such object".
func NotFound(what string) *Fault {
	return &Fault{Subcode: "w:InvalidSelectors", Code: codeSelectors, WMI: wbemNotFound, Text: "The WS-Management service cannot process the request because the request contained invalid selectors for the resource: " + what + "."}
}

// NoNamespace is what WMI says of a namespace that the host has not.
func NoNamespace(name string) *Fault {
	return &Fault{Subcode: "a:DestinationUnreachable", Code: codeUnreachable, Detail: detailInvalidResourceURI, WMI: wbemInvalidNamespace, Text: "The WS-Management service cannot process the request. The WMI namespace " + name + " does not exist."}
}

// Denied is what WMI says to who may not ask.
func Denied(what string) *Fault {
	return &Fault{Subcode: "w:AccessDenied", Code: codeAccessDenied, WMI: wbemAccessDenied, Text: "Access is denied: " + what + "."}
}

// NotSupported is what a class answers to Put.
func NotSupported(what string) *Fault {
	return &Fault{Subcode: "w:UnsupportedFeature", Code: codeWMI, WMI: wbemProviderNotCapable, Text: "The WS-Management service cannot process the request. The WMI service reported that the WMI provider could not perform the requested operation: " + what + "."}
}

func schemaFault(format string, args ...any) *Fault {
	return &Fault{Subcode: "w:SchemaValidationError", Code: codeSchema, Text: "The SOAP XML in the message does not match the corresponding XML schema definition: " + fmt.Sprintf(format, args...) + "."}
}

func (f *Fault) body(machine string) string {
	value := "s:Sender"
	if f.Receiver {
		value = "s:Receiver"
	}
	detail := ""
	if f.Detail != "" {
		detail = element("w:FaultDetail", f.Detail)
	}
	message := escape(f.Text)
	if f.WMI != 0 {
		message = fmt.Sprintf(`<f:ProviderFault provider="WMI Provider" path="%%systemroot%%\system32\WsmWmiPl.dll"><f:WSManFault xmlns:f="%s" Code="%d" Machine="%s"><f:Message>%s</f:Message></f:WSManFault><f:ExtendedError><p:__ExtendedStatus xmlns:p="%sroot/virtualization/v2/__ExtendedStatus" xmlns:xsi="%s" xsi:type="p:__ExtendedStatus_Type"><p:Description xsi:nil="true"/><p:StatusCode>%d</p:StatusCode></p:__ExtendedStatus></f:ExtendedError></f:ProviderFault>`,
			nsFault, f.Code, escape(machine), escape(f.Text), wmiURI, nsInstance, f.WMI)
	}
	return fmt.Sprintf(`<s:Fault><s:Code><s:Value>%s</s:Value><s:Subcode><s:Value>%s</s:Value></s:Subcode></s:Code><s:Reason><s:Text xml:lang="en-US">%s</s:Text></s:Reason><s:Detail>%s<f:WSManFault xmlns:f="%s" Code="%d" Machine="%s"><f:Message>%s</f:Message></f:WSManFault></s:Detail></s:Fault>`,
		value, f.Subcode, escape(f.Text), detail, nsFault, f.Code, escape(machine), message)
}
