package wsman

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/fault"
)

var (
	// ErrEnvelope is the class of every answer that is, or would be, larger
	// than the envelope that was asked for. Ask for less.
	ErrEnvelope = errors.New("the answer does not fit into the envelope")

	// ErrTimedOut is the class of what the host, or the way there, did not do
	// in time.
	ErrTimedOut = errors.New("timed out")

	// ErrBusy is the class of a host that has too much to do at present: a
	// quota reached, a service that starts. Try later.
	ErrBusy = errors.New("the host is busy")

	// ErrNoClass is the class of a host that knows the class or the namespace
	// not: it never had it, or its provider is not there at present. It says
	// nothing of whether an instance exists.
	ErrNoClass = errors.New("no such class or namespace")

	// ErrProtocol is the class of every answer that is not WS-Management, or
	// not the answer to what was asked.
	ErrProtocol = errors.New("not a WS-Management answer")
)

// A Fault is what a host answers to a request that it refuses or cannot
// fulfil. Its classes are fault.ErrDenied, fault.ErrNotFound,
// fault.ErrUnsupported, ErrNoClass, ErrEnvelope, ErrTimedOut and ErrBusy.
type Fault struct {
	Subcode string // without prefix: "AccessDenied", "InvalidSelectors"
	Detail  string // the URI of a further detail, or empty
	Code    uint32 // of WSManFault: a Windows error or 0x80338…, 0 if not given
	WMI     uint32 // WMI's own error, 0x8004…, 0 if not given
	Machine string // as the host calls itself
	Reason  string // the most telling text
	Status  int    // of HTTP
}

func (f *Fault) Error() string {
	var b strings.Builder
	b.WriteString("the host answers " + f.Subcode)
	switch {
	case f.WMI != 0:
		fmt.Fprintf(&b, " (%#x)", f.WMI)
	case f.Code >= 1<<31:
		fmt.Fprintf(&b, " (%#x)", f.Code)
	case f.Code != 0:
		fmt.Fprintf(&b, " (%d)", f.Code)
	}
	if f.Reason != "" {
		b.WriteString(": " + f.Reason)
	}
	return b.String()
}

// The numbers of one class. Subcodes alone are too coarse: EncodingLimit is a
// matter of envelopes or of selectors.
var faultClasses = []struct {
	class    error
	subcodes []string
	codes    []uint32 // of WSManFault
	wmi      []uint32
}{
	{fault.ErrDenied, []string{"AccessDenied"}, []uint32{5}, []uint32{0x80041003}},
	{ErrEnvelope, nil, []uint32{0x80338026, 0x80338047, 0x80338048, 0x80338049}, nil},
	{ErrTimedOut, []string{"TimedOut"}, []uint32{0x80338029, 0x8033801c}, []uint32{0x80041069}},
	{ErrBusy, []string{"QuotaLimit", "Concurrency", "EndpointUnavailable"}, []uint32{0x80338014}, []uint32{0x80041045, 0x8004106c}},
	{fault.ErrUnsupported, []string{"UnsupportedFeature", "ActionNotSupported", "FilteringNotSupported", "FilterDialectRequestedUnavailable", "CannotProcessFilter"},
		nil, []uint32{0x8004100c}},
}

// What WMI says of what is not there.
const (
	wmiNotFound         = 0x80041002
	wmiInvalidNamespace = 0x8004100e
	wmiInvalidClass     = 0x80041010
)

// missing is fault.ErrNotFound of an instance that is not there, ErrNoClass of
// a class, nil of a fault of another kind. WMI's word counts most. Selectors
// that do not fit the class say nothing of an instance.
func (f *Fault) missing() error {
	switch f.WMI {
	case wmiNotFound:
		return fault.ErrNotFound
	case wmiInvalidNamespace, wmiInvalidClass:
		return ErrNoClass
	case 0:
	default:
		return nil
	}
	switch f.Code {
	case 0x80338000, 0x8033805b: // resource, shell not found
		return fault.ErrNotFound
	case 0x80338012, 0x8033803b: // unreachable, no such resource URI
		return ErrNoClass
	}
	detail := f.Detail[strings.LastIndexByte(f.Detail, '/')+1:]
	switch {
	case f.Subcode == "DestinationUnreachable":
		return ErrNoClass
	case f.Subcode == "InvalidSelectors" && (detail == "" || detail == "InvalidValue"):
		return fault.ErrNotFound
	}
	return nil
}

// Is says to which classes the fault belongs.
func (f *Fault) Is(target error) bool {
	if target == fault.ErrNotFound || target == ErrNoClass {
		return f.missing() == target
	}
	if target == ErrEnvelope && f.Subcode == "EncodingLimit" && strings.Contains(f.Detail, "Envelope") {
		return true
	}
	for _, c := range faultClasses {
		if c.class == target {
			return slices.Contains(c.subcodes, f.Subcode) || f.Code != 0 && slices.Contains(c.codes, f.Code) || f.WMI != 0 && slices.Contains(c.wmi, f.WMI)
		}
	}
	return false
}

// readFault reads a SOAP fault.
func readFault(e *element, status int) *Fault {
	code := e.child(nsSOAP, "Code")
	f := &Fault{Status: status, Subcode: localPart(code.child(nsSOAP, "Subcode").child(nsSOAP, "Value").trimmed())}
	if f.Subcode == "" {
		f.Subcode = localPart(code.child(nsSOAP, "Value").trimmed())
	}
	if f.Subcode == "" {
		f.Subcode = "a fault without a code"
	}
	f.Reason = oneLine(e.child(nsSOAP, "Reason").child(nsSOAP, "Text").trimmed())
	detail := e.child(nsSOAP, "Detail")
	f.Detail = detail.child(nsWSMan, "FaultDetail").trimmed()
	f.read(detail)
	return f
}

// read looks through a detail for what says most: the innermost text and the
// innermost number, as providers wrap each other's faults.
func (f *Fault) read(e *element) {
	for _, c := range e.all() {
		switch {
		case c.space == nsFault && c.name == "WSManFault":
			if n, err := strconv.ParseUint(c.attribute("Code"), 10, 32); err == nil && n != 0 {
				f.Code = uint32(n)
			}
			if m := c.attribute("Machine"); m != "" {
				f.Machine = m
			}
		case c.space == nsFault && (c.name == "Message" || c.name == "ProviderFault") && c.trimmed() != "":
			f.Reason = oneLine(c.text)
		case c.name == "__ExtendedStatus":
			if n, err := strconv.ParseInt(c.named("StatusCode").trimmed(), 10, 64); err == nil {
				f.WMI = uint32(n) // some hosts write it with its sign
			}
			if d := c.named("Description").trimmed(); d != "" {
				f.Reason = oneLine(f.Reason + " " + d)
			}
		case c.name == "MSFT_WmiError":
			if m := c.named("Message").trimmed(); m != "" {
				f.Reason = oneLine(m)
			}
			if hex, ok := strings.CutPrefix(c.named("MessageID").trimmed(), "HRESULT 0x"); ok {
				if n, err := strconv.ParseUint(hex, 16, 32); err == nil {
					f.WMI = uint32(n)
				}
			}
		}
		f.read(c)
	}
}

func localPart(qname string) string {
	if _, local, ok := strings.Cut(qname, ":"); ok {
		return local
	}
	return qname
}

// oneLine is a host's text fit for a message: on one line, of bounded length.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	const most = 500
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// A SignInError says that the host does not let the user in. It is in class
// fault.ErrDenied, or in fault.ErrUnsupported if the host does not offer the
// way that was asked for.
type SignInError struct {
	User   string
	Wanted string   // "NTLM" or "Basic"
	Offers []string // the host's schemes: "Negotiate", "Kerberos"
	Err    error    // why, if more is known than that it refused
}

func (e *SignInError) Error() string {
	offers := "nothing"
	if len(e.Offers) > 0 {
		offers = strings.Join(e.Offers, ", ")
	}
	if errors.Is(e.Err, fault.ErrUnsupported) {
		return fmt.Sprintf("sign-in as %q with %s: %v (it offers %s)", e.User, e.Wanted, e.Err, offers)
	}
	if e.Err != nil {
		return fmt.Sprintf("sign-in as %q with %s: %v", e.User, e.Wanted, e.Err)
	}
	return fmt.Sprintf("sign-in as %q with %s was refused (the host offers %s)", e.User, e.Wanted, offers)
}

// Unwrap gives the reason, or nil.
func (e *SignInError) Unwrap() error { return e.Err }

// Is puts a refused sign-in in the class fault.ErrDenied.
func (e *SignInError) Is(target error) bool {
	return target == fault.ErrDenied && !errors.Is(e.Err, fault.ErrUnsupported)
}

// A ConnectionError says that a request got no answer because of the way to
// the host. Sent says whether the host may have got it whole, and so may have
// done what it asks.
type ConnectionError struct {
	Host string
	Sent bool
	Err  error
}

func (e *ConnectionError) Error() string {
	what := "no connection to "
	if e.Sent {
		what = "no answer from "
	}
	return what + e.Host + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *ConnectionError) Unwrap() error { return e.Err }

// Is puts those that took too long in the class ErrTimedOut.
func (e *ConnectionError) Is(target error) bool {
	return target == ErrTimedOut && (errors.Is(e.Err, os.ErrDeadlineExceeded) || errors.Is(e.Err, context.DeadlineExceeded))
}

// A CertificateError says that the host's certificate is not to be trusted,
// and which one it is, so that a person can compare and pin it.
type CertificateError struct {
	Host        string
	Fingerprint Fingerprint
	Err         error
}

func (e *CertificateError) Error() string {
	return fmt.Sprintf("the certificate of %s is not trusted: %v (its SHA-256 fingerprint is %s)", e.Host, e.Err, e.Fingerprint)
}

// Unwrap gives the reason.
func (e *CertificateError) Unwrap() error { return e.Err }

// An AnswerError is an HTTP answer that has no envelope. It is in class
// ErrProtocol, and in fault.ErrDenied or ErrBusy where its status says so.
type AnswerError struct {
	Status      int
	ContentType string
	Location    string // where the host would rather be asked, or empty
	Start       string // the beginning of the answer
}

func (e *AnswerError) Error() string {
	s := fmt.Sprintf("the host answers HTTP %d", e.Status)
	if e.Location != "" {
		return s + " and points to " + shorten(e.Location) + ": is this the address of WinRM?"
	}
	if e.ContentType != "" {
		s += " with " + e.ContentType
	}
	s += " instead of an envelope"
	if e.Start != "" {
		s += ": " + shorten(e.Start)
	}
	return s
}

// Is says to which classes the answer belongs.
func (e *AnswerError) Is(target error) bool {
	return target == ErrProtocol || target == fault.ErrDenied && e.Status == 403 || target == ErrBusy && e.Status == 503
}
