package wsman

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
)

// A fault as WinRM writes it.
func faultBody(subcode, detail string) string {
	return `<env:Fault><env:Code><env:Value>env:Sender</env:Value><env:Subcode><env:Value>` + subcode + `</env:Value></env:Subcode></env:Code><env:Reason><env:Text xml:lang="en-US">The reason of SOAP. </env:Text></env:Reason><env:Detail>` + detail + `</env:Detail></env:Fault>`
}

func wsmanFault(code uint32, message string) string {
	return fmt.Sprintf(`<f:WSManFault xmlns:f="http://schemas.microsoft.com/wbem/wsman/1/wsmanfault" Code="%d" Machine="HV01"><f:Message>%s</f:Message></f:WSManFault>`, code, message)
}

func wmiStatus(code uint32) string {
	return fmt.Sprintf(`<p:__ExtendedStatus xmlns:p="http://schemas.microsoft.com/wbem/wsman/1/wmi/root/wmi/__ExtendedStatus"><p:StatusCode>%d</p:StatusCode></p:__ExtendedStatus>`, code)
}

func TestFaultsHaveTheirClass(t *testing.T) {
	classes := []error{fault.ErrDenied, fault.ErrNotFound, ErrNoClass, fault.ErrUnsupported, ErrEnvelope, ErrTimedOut, ErrBusy}
	faultDetail := func(s string) string {
		return `<wsman:FaultDetail>http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/` + s + `</wsman:FaultDetail>`
	}
	for _, tc := range []struct {
		name, body string
		class      error // or nil
		want       Fault
	}{
		{"access denied", faultBody("w:AccessDenied", wsmanFault(5, "Access is denied. ")), fault.ErrDenied,
			Fault{Subcode: "AccessDenied", Code: 5, Machine: "HV01", Reason: "Access is denied."}},
		{"no such instance", faultBody("wsman:InvalidSelectors", faultDetail("UnexpectedSelectors")+wsmanFault(0x8033805b, "not there")), fault.ErrNotFound,
			Fault{Subcode: "InvalidSelectors", Code: 0x8033805b, Machine: "HV01", Reason: "not there", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/UnexpectedSelectors"}},
		{"no such resource, of which this host does not say more", faultBody("a:DestinationUnreachable", faultDetail("InvalidResourceURI")+wsmanFault(0x80338000, `<f:ProviderFault xmlns:f="http://schemas.microsoft.com/wbem/wsman/1/wsmanfault" provider="WMI Provider" path="x.dll"><f:WSManFault Code="2150858752" Machine="HV01"><f:Message>cannot find the resource</f:Message></f:WSManFault></f:ProviderFault>`)), fault.ErrNotFound,
			Fault{Subcode: "DestinationUnreachable", Code: 0x80338000, Machine: "HV01", Reason: "cannot find the resource", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/InvalidResourceURI"}},
		{"no such class", faultBody("a:DestinationUnreachable", faultDetail("InvalidResourceURI")+wsmanFault(0x80338012, "")+wmiStatus(0x80041010)), ErrNoClass,
			Fault{Subcode: "DestinationUnreachable", Code: 0x80338012, WMI: 0x80041010, Machine: "HV01", Reason: "The reason of SOAP.", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/InvalidResourceURI"}},
		{"no such namespace, as of WMI that restarts", faultBody("w:InvalidSelectors", wsmanFault(2150859010, "")+wmiStatus(0x8004100e)), ErrNoClass,
			Fault{Subcode: "InvalidSelectors", Code: 2150859010, WMI: 0x8004100e, Machine: "HV01", Reason: "The reason of SOAP."}},
		{"no such resource URI", faultBody("a:DestinationUnreachable", faultDetail("InvalidResourceURI")), ErrNoClass,
			Fault{Subcode: "DestinationUnreachable", Reason: "The reason of SOAP.", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/InvalidResourceURI"}},
		{"keys that the class has not", faultBody("w:InvalidSelectors", faultDetail("UnexpectedSelectors")), nil,
			Fault{Subcode: "InvalidSelectors", Reason: "The reason of SOAP.", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/UnexpectedSelectors"}},
		{"WMI fails otherwise", faultBody("w:InvalidSelectors", wmiStatus(0x80041001)), nil,
			Fault{Subcode: "InvalidSelectors", WMI: 0x80041001, Reason: "The reason of SOAP."}},
		{"WMI says not found", faultBody("w:InternalError", `<p:MSFT_WmiError xmlns:p="http://schemas.microsoft.com/wbem/wsman/1/wmi/root/cimv2/MSFT_WmiError"><p:CIMStatusCode>6</p:CIMStatusCode><p:Message>Not found </p:Message><p:MessageID>HRESULT 0x80041002</p:MessageID></p:MSFT_WmiError>`), fault.ErrNotFound,
			Fault{Subcode: "InternalError", WMI: 0x80041002, Reason: "Not found"}},
		{"WMI's extended status", faultBody("w:InternalError", wsmanFault(2150859010, `<f:ProviderFault provider="WMI Provider"><f:WSManFault Code="2150859010" Machine="HV01"><f:Message>could not. </f:Message></f:WSManFault><f:ExtendedError><p:__ExtendedStatus xmlns:p="http://schemas.microsoft.com/wbem/wsman/1/wmi/root/wmi/__ExtendedStatus"><p:Description>code: 4200
 </p:Description><p:Operation>ExecQuery</p:Operation><p:StatusCode>-2147217406</p:StatusCode></p:__ExtendedStatus></f:ExtendedError></f:ProviderFault>`)), fault.ErrNotFound,
			Fault{Subcode: "InternalError", Code: 2150859010, WMI: 0x80041002, Machine: "HV01", Reason: "could not. code: 4200"}},
		{"envelope too small for the answer", faultBody("w:EncodingLimit", faultDetail("MaxEnvelopeSizeExceeded")+wsmanFault(0x80338048, "exceeds")), ErrEnvelope,
			Fault{Subcode: "EncodingLimit", Code: 0x80338048, Machine: "HV01", Reason: "exceeds", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/MaxEnvelopeSizeExceeded"}},
		{"another encoding limit", faultBody("w:EncodingLimit", faultDetail("SelectorLimit")), nil,
			Fault{Subcode: "EncodingLimit", Reason: "The reason of SOAP.", Detail: "http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail/SelectorLimit"}},
		{"operation timed out", faultBody("w:TimedOut", wsmanFault(0x80338029, "too long")), ErrTimedOut,
			Fault{Subcode: "TimedOut", Code: 0x80338029, Machine: "HV01", Reason: "too long"}},
		{"quota", faultBody("w:QuotaLimit", wsmanFault(2150859174, "too many")), ErrBusy,
			Fault{Subcode: "QuotaLimit", Code: 2150859174, Machine: "HV01", Reason: "too many"}},
		{"filter on a class", faultBody("n:FilteringNotSupported", ""), fault.ErrUnsupported, Fault{Subcode: "FilteringNotSupported", Reason: "The reason of SOAP."}},
		{"schema", faultBody("w:SchemaValidationError", wsmanFault(0x80338041, "schema")), nil, Fault{Subcode: "SchemaValidationError", Code: 0x80338041, Machine: "HV01", Reason: "schema"}},
		{"no subcode, no detail", `<env:Fault><env:Code><env:Value>env:Receiver</env:Value></env:Code></env:Fault>`, nil, Fault{Subcode: "Receiver"}},
		{"nothing in it", `<env:Fault/>`, nil, Fault{Subcode: "a fault without a code"}},
	} {
		h := newHost(t, false, func(_ *host, a *asked) reply { r := soap(a, tc.body); r.status = 500; return r })
		_, err := h.client().Get(ctx, NewRef("C"))
		var got *Fault
		if !errors.As(err, &got) {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		tc.want.Status = 500
		if *got != tc.want {
			t.Errorf("%s: %+v", tc.name, *got)
		}
		for _, c := range classes {
			if errors.Is(err, c) != (c == tc.class) {
				t.Errorf("%s: in class %q: %v", tc.name, c, errors.Is(err, c))
			}
		}
	}
}

// A host that cannot read a request cannot say to what its fault relates.
func TestFaultWithoutRelation(t *testing.T) {
	h := newHost(t, false, func(_ *host, a *asked) reply {
		a.id = ""
		return soap(a, faultBody("s:Sender", wsmanFault(5, "x")))
	})
	if _, err := h.client().Get(ctx, NewRef("C")); !errors.Is(err, fault.ErrDenied) {
		t.Error(err)
	}
}

// One clear message each, and never an instance.
func TestAnswersThatAreNone(t *testing.T) {
	edit := func(old, new string) func(*host, *asked) reply {
		return func(_ *host, a *asked) reply {
			r := soap(a, vm("x"))
			if !strings.Contains(r.body, old) {
				panic(old)
			}
			r.body = strings.ReplaceAll(r.body, old, new)
			return r
		}
	}
	say := func(r reply) func(*host, *asked) reply { return func(*host, *asked) reply { return r } }
	for _, tc := range []struct {
		name   string
		answer func(*host, *asked) reply
		class  error
		text   string
	}{
		{"HTML", say(reply{contentType: "text/html; charset=us-ascii", body: "<html><title>Welcome</title>"}), ErrProtocol, `HTTP 200 with text/html; charset=us-ascii instead of an envelope: "<html><title>Welcome</title>"`},
		{"wrong path", say(reply{status: 404, contentType: "text/plain"}), ErrProtocol, "HTTP 404"},
		{"service starts", say(reply{status: 503, contentType: "text/plain"}), ErrBusy, "HTTP 503"},
		{"forbidden", say(reply{status: 403, contentType: "text/plain"}), fault.ErrDenied, "HTTP 403"},
		{"answer to another request", edit("<wsa:RelatesTo>uuid:", "<wsa:RelatesTo>uuid:0"), ErrProtocol, "it relates to"},
		{"related to nothing", edit("wsa:RelatesTo>", "wsa:MessageID>"), ErrProtocol, "it relates to \"\""},
		{"empty", say(reply{}), ErrProtocol, "its XML is broken: it is empty"},
		{"cut off", edit("</env:Envelope>", ""), ErrProtocol, "unexpected EOF"},
		{"SOAP 1.1", edit("http://www.w3.org/2003/05/soap-envelope", "http://schemas.xmlsoap.org/soap/envelope/"), ErrProtocol, "no SOAP 1.2 envelope"},
		{"document type", edit("?>", `?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>`), ErrProtocol, "document type"},
		{"entity", edit("<x:Name>x", "<x:Name>&b;"), ErrProtocol, "invalid character entity"},
		{"too deep", edit("<x:Name>x", "<x:Name>"+strings.Repeat("<d>", 70)+strings.Repeat("</d>", 70)), ErrProtocol, "more than 64 deep"},
		{"two documents", edit("</env:Envelope>", "</env:Envelope><x/>"), ErrProtocol, "more than one document"},
		{"text after", edit("</env:Envelope>", "</env:Envelope>boo"), ErrProtocol, "outside"},
		{"UTF-16", edit(`encoding="UTF-8"`, `encoding="UTF-16"`), ErrProtocol, "encoding"},
		{"empty body", func(_ *host, a *asked) reply { return soap(a, "") }, ErrProtocol, "holds no instance"},
		{"error without a fault", func(_ *host, a *asked) reply { r := soap(a, vm("x")); r.status = 500; return r }, ErrProtocol, "500 without a fault"},
		{"larger than asked for", func(_ *host, a *asked) reply { return soap(a, vm(strings.Repeat("x", 10000))) }, ErrEnvelope, "more than 10000 bytes"},
		{"much larger", func(_ *host, a *asked) reply { return soap(a, vm(strings.Repeat("x", 100000))) }, ErrEnvelope, "more than 10000 bytes"},
		{"reference to no class", edit("<x:Name>x", `<x:Name><wsa:ReferenceParameters><wsman:ResourceURI>http://elsewhere/x</wsman:ResourceURI></wsa:ReferenceParameters>`), nil, "no class"},
	} {
		// What a server of another kind says is never sealed.
		other := strings.Contains(tc.text, "HTTP ")
		h := newHost(t, other, tc.answer)
		in, err := h.client(func(c *Config) { c.MaxEnvelope = 10000 }).Get(ctx, NewRef("Msvm_X", "Name", "x"))
		switch {
		case err == nil || in != nil:
			t.Errorf("%s: %v", tc.name, in)
		case tc.class != nil && !errors.Is(err, tc.class), !strings.HasPrefix(err.Error(), `get Msvm_X.Name="x": `), !strings.Contains(err.Error(), tc.text),
			strings.Contains(err.Error(), "\n"), len(err.Error()) > 800:
			t.Errorf("%s: %v", tc.name, err)
		case len(h.log()) != 1:
			t.Errorf("%s: asked %d times", tc.name, len(h.log()))
		}
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	h := newHost(t, true, func(_ *host, a *asked) reply {
		a.w.Header().Set("Location", "https://elsewhere.example/")
		return reply{status: 302, contentType: "text/html"}
	})
	_, err := h.client().Get(ctx, NewRef("C"))
	if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), `points to "https://elsewhere.example/"`) {
		t.Error(err)
	}
}

func TestMethodWithoutItsResults(t *testing.T) {
	h := newHost(t, false, always(`<x:Other_OUTPUT xmlns:x="`+r2+`C"/>`))
	if _, err := h.client().Invoke(ctx, NewRef("C"), "M"); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "M_OUTPUT") {
		t.Error(err)
	}
}

// Over HTTP whoever sits between could answer in clear.
func TestAnswersInClearAreRefusedWhereSealed(t *testing.T) {
	for _, status := range []int{200, 500} {
		h := newHost(t, false, func(_ *host, a *asked) reply { r := soap(a, vm("forged")); r.status = status; return r })
		h.clear = true
		if in, err := h.client().Get(ctx, NewRef("C")); in != nil || !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "not sealed") {
			t.Errorf("%v, %v", in, err)
		}
	}
}

// A wrong password is tried once: hosts lock accounts.
func TestWrongPasswordIsTriedOnce(t *testing.T) {
	h := newHost(t, true, always(vm("x")))
	c := h.client(func(cfg *Config) { cfg.Password = secret.New([]byte("wrong")) })
	for range 3 {
		_, err := c.Get(ctx, NewRef("C"))
		if !errors.Is(err, fault.ErrDenied) || !strings.Contains(err.Error(), `sign-in as "LAB\\backup" with NTLM was refused (the host offers Negotiate, Kerberos)`) {
			t.Error(err)
		}
	}
	if h.signIns != 1 {
		t.Errorf("%d sign-ins", h.signIns)
	}
}

func TestHostThatDoesNotOfferNTLM(t *testing.T) {
	for name, offers := range map[string][]string{"Basic alone": {`Basic realm="WSMAN"`}, "Kerberos alone": {"Kerberos"}, "Negotiate without a challenge": {"Negotiate"}, "nothing": {}} {
		h := newHost(t, false, always(vm("x")))
		h.offers = offers
		_, err := h.client().Get(ctx, NewRef("C"))
		var refused *SignInError
		if !errors.As(err, &refused) || !errors.Is(err, fault.ErrUnsupported) || errors.Is(err, fault.ErrDenied) || len(refused.Offers) != len(offers) {
			t.Errorf("%s: %v", name, err)
		}
	}
	h := newHost(t, false, always(vm("x")))
	h.ntlm.Without = 0x20000000 // 128-bit keys
	if _, err := h.client().Get(ctx, NewRef("C")); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("weak keys: %v", err)
	}
}

func TestBasicOverHTTPS(t *testing.T) {
	h := newHost(t, true, always(vm("x")))
	h.basic = true
	c := h.client(func(cfg *Config) { cfg.Auth = Basic })
	for range 2 {
		if _, err := c.Get(ctx, NewRef("C")); err != nil {
			t.Error(err)
		}
	}
	if h.conns != 1 {
		t.Errorf("%d connections", h.conns)
	}
}

// A host may forget a connection's sign-in; it has done nothing then, so even
// a method is called again, once.
func TestSignInThatTheHostForgets(t *testing.T) {
	for _, tls := range ways() {
		h := newHost(t, tls, func(_ *host, a *asked) reply {
			if a.number == 1 {
				return reply{forget: true}
			}
			return soap(a, `<x:M_OUTPUT xmlns:x="`+r2+`C"><x:ReturnValue>0</x:ReturnValue></x:M_OUTPUT>`)
		})
		c := h.client()
		for range 2 {
			if _, err := c.Invoke(ctx, NewRef("C"), "M"); err != nil {
				t.Errorf("tls %v: %v", tls, err)
			}
		}
		if h.signIns != 2 || len(h.log()) != 3 {
			t.Errorf("tls %v: %d sign-ins for %v", tls, h.signIns, h.log())
		}
	}
	h := newHost(t, true, func(*host, *asked) reply { return reply{forget: true} })
	if _, err := h.client().Invoke(ctx, NewRef("C"), "M"); !errors.Is(err, fault.ErrDenied) || len(h.log()) != 2 {
		t.Errorf("a host that always forgets: %v after %v", err, h.log())
	}
}

func TestCertificates(t *testing.T) {
	h := newHost(t, true, always(vm("x")))
	real := sha256.Sum256(h.srv.Certificate().Raw)
	known := x509.NewCertPool()
	known.AddCert(h.srv.Certificate())
	get := func(f func(*Config)) error {
		_, err := h.client(f).Get(ctx, NewRef("C"))
		return err
	}
	var cert *CertificateError

	if err := get(func(c *Config) { c.Pin, c.Roots = nil, known }); err != nil {
		t.Errorf("known authority: %v", err)
	}
	if err := get(func(c *Config) { c.Pin, c.Roots = nil, x509.NewCertPool() }); !errors.As(err, &cert) || cert.Fingerprint != real || !strings.Contains(err.Error(), cert.Fingerprint.String()) {
		t.Errorf("unknown authority: %v", err)
	}
	if err := get(func(c *Config) { c.Pin, c.Pins = &Fingerprint{1, 2, 3}, []Fingerprint{real} }); err != nil {
		t.Errorf("one of two pinned: %v", err)
	}
	if err := get(func(c *Config) { c.Pin = &Fingerprint{1, 2, 3} }); !errors.As(err, &cert) || cert.Fingerprint != real || !strings.Contains(err.Error(), "the pinned fingerprint is 01:02:03:00") {
		t.Errorf("wrong pin: %v", err)
	}
	if err := get(func(c *Config) { c.URL = strings.Replace(c.URL, "https", "http", 1); c.Pin = nil }); err == nil || errors.As(err, &cert) {
		t.Errorf("HTTP to a TLS port: %v", err)
	}
	plain := newHost(t, false, always(vm("x")))
	if err := get(func(c *Config) { c.URL = strings.Replace(plain.srv.URL, "http", "https", 1) }); err == nil || !strings.Contains(err.Error(), "no TLS at this address") {
		t.Errorf("TLS to an HTTP port: %v", err)
	}
	if h.signIns != 2 { // the known authority, and one of two pins
		t.Errorf("%d sign-ins, over connections that are not trusted", h.signIns)
	}
}

// An expired certificate is refused even if its authority is known, and taken
// if it is pinned. It is bound to the sign-in by the hash of its own kind.
func TestExpiredCertificate(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hv01"}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, SignatureAlgorithm: x509.ECDSAWithSHA384, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			nc.(*tls.Conn).Handshake()
			nc.Close()
		}
	}()
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	cfg := Config{URL: "https://" + l.Addr().String(), User: "u", Password: secret.New([]byte("p")), Roots: roots}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var bad *CertificateError
	var why x509.CertificateInvalidError
	if _, err = c.dial(ctx); !errors.As(err, &bad) || !errors.As(err, &why) || why.Reason != x509.Expired {
		t.Errorf("expired: %v", err)
	}
	pin := Fingerprint(sha256.Sum256(der))
	cfg.Roots, cfg.Pin = nil, &pin
	if c, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	conn, err := c.dial(ctx)
	if err != nil {
		t.Fatalf("pinned: %v", err)
	}
	if conn.binding == [16]byte{} || conn.binding == binding([]*x509.Certificate{{Raw: der, SignatureAlgorithm: x509.ECDSAWithSHA256}}) {
		t.Error("the binding is not by SHA-384")
	}
	conn.close()
}

func TestFingerprintsAsPeopleWriteThem(t *testing.T) {
	f := Fingerprint(sha256.Sum256([]byte("x")))
	for _, s := range []string{f.String(), strings.ToLower(f.String()), strings.ReplaceAll(f.String(), ":", ""), strings.ReplaceAll(f.String(), ":", " "), "sha256:" + f.String()} {
		if got, err := ParseFingerprint(s); err != nil || got != f {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", "AB:CD", f.String() + ":00", strings.Repeat("g", 64)} {
		if _, err := ParseFingerprint(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}
