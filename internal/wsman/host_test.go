package wsman

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/wsman/internal/ntlmtest"
)

const testPassword = "c0rrect hörse"

// A host is a strict responder: it signs in each connection, refuses two
// requests on one at a time, and answers as the test says.
type host struct {
	t    *testing.T
	srv  *httptest.Server
	ntlm *ntlmtest.Host

	basic    bool     // asks for Basic instead of NTLM
	offers   []string // of a 401, in place of the usual one
	clear    bool     // answers in clear where it has to seal
	answer   func(h *host, r *asked) reply
	mu       sync.Mutex
	actions  []string // of the requests that were signed in, by their last part
	conns    int
	signIns  int // that were tried
	problems []string
}

// asked is a request as the host got it.
type asked struct {
	number     int // from 0
	envelope   string
	action, id string
	conn       *hostConn
	w          http.ResponseWriter
	method     string
}

type reply struct {
	status      int    // 0 is 200
	contentType string // empty is SOAP's
	body        string
	drop        bool // closes the connection instead
	forget      bool // says 401 and forgets the connection
}

type hostConn struct {
	busy    sync.Mutex
	context *ntlmtest.Context
	in      bool
}

type connKey struct{}

// testCertificate is one whose key is quick, unlike httptest's own.
var testCertificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

// newHost starts one over HTTPS, or over HTTP with sealing.
func newHost(t *testing.T, https bool, answer func(h *host, r *asked) reply) *host {
	h := &host{t: t, answer: answer, ntlm: &ntlmtest.Host{Domain: "LAB", User: "backup", Password: testPassword}}
	h.srv = httptest.NewUnstartedServer(h)
	h.srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	h.srv.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
		h.mu.Lock()
		h.conns++
		h.mu.Unlock()
		return context.WithValue(ctx, connKey{}, &hostConn{})
	}
	if https {
		h.srv.TLS = &tls.Config{Certificates: []tls.Certificate{testCertificate()}}
		h.srv.StartTLS()
		// RFC 5929 and the structure that is hashed, written out once more.
		sum := sha256.Sum256(h.srv.Certificate().Raw)
		data := "tls-server-end-point:" + string(sum[:])
		h.ntlm.Binding = md5.Sum(append(binary.LittleEndian.AppendUint32(make([]byte, 16), uint32(len(data))), data...))
	} else {
		h.srv.Start()
	}
	t.Cleanup(func() {
		h.srv.CloseClientConnections()
		h.srv.Close()
		for _, p := range h.problems {
			t.Error(p)
		}
	})
	return h
}

func (h *host) problem(format string, args ...any) {
	h.mu.Lock()
	h.problems = append(h.problems, fmt.Sprintf(format, args...))
	h.mu.Unlock()
}

// ways says over what a test that holds for both is done: HTTPS or not.
func ways() []bool {
	if testing.Short() {
		return []bool{false} // the race detector makes TLS slow
	}
	return []bool{true, false}
}

// log is what was asked so far.
func (h *host) log() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.actions)
}

func (h *host) config() Config {
	cfg := Config{URL: h.srv.URL, User: `LAB\backup`, Password: secret.New([]byte(testPassword))}
	if c := h.srv.Certificate(); c != nil {
		pin := Fingerprint(sha256.Sum256(c.Raw))
		cfg.Pin = &pin
	}
	return cfg
}

func (h *host) client(change ...func(*Config)) *Client {
	h.t.Helper()
	cfg := h.config()
	for _, f := range change {
		f(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	c.wait = []time.Duration{time.Millisecond, time.Millisecond}
	h.t.Cleanup(func() { c.Close() })
	return c
}

func (h *host) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn := r.Context().Value(connKey{}).(*hostConn)
	if !conn.busy.TryLock() {
		h.problem("two requests on one connection at a time")
		return
	}
	defer conn.busy.Unlock()
	body, _ := io.ReadAll(r.Body)
	if r.Method != "POST" || r.URL.Path != "/wsman" || r.Header.Get("Content-Type") == "" {
		h.problem("%s %s with %q", r.Method, r.URL, r.Header.Get("Content-Type"))
	}
	if !h.signedIn(conn, w, r, body) {
		return
	}
	if conn.context != nil && r.TLS == nil {
		if body = h.unseal(conn, r.Header.Get("Content-Type"), body); body == nil {
			return
		}
	} else if ct := r.Header.Get("Content-Type"); ct != "application/soap+xml;charset=UTF-8" {
		h.problem("content type %q", ct)
	}
	a := &asked{envelope: string(body), conn: conn, w: w, action: between(string(body), `<a:Action s:mustUnderstand="true">`), id: between(string(body), `<a:MessageID s:mustUnderstand="true">`)}
	a.method = a.action[strings.LastIndexByte(a.action, '/')+1:]
	h.mu.Lock()
	a.number = len(h.actions)
	h.actions = append(h.actions, a.method)
	h.mu.Unlock()
	if _, err := parseXML(body); err != nil {
		h.problem("%v in %s", err, body)
	}
	h.reply(a, h.answer(h, a), r.TLS != nil)
}

func (h *host) reply(a *asked, r reply, tls bool) {
	if r.forget {
		a.conn.in = false
		h.challenge(a.w, "Negotiate")
		return
	}
	if r.drop {
		if nc, _, err := http.NewResponseController(a.w).Hijack(); err == nil {
			nc.Close()
		}
		return
	}
	if r.contentType == "" {
		r.contentType = "application/soap+xml;charset=UTF-8"
	}
	body := []byte(r.body)
	if a.conn.context != nil && !tls && !h.clear {
		sig, sealed := a.conn.context.Session.Seal(body)
		var b bytes.Buffer
		fmt.Fprintf(&b, "--Encrypted Boundary\r\nContent-Type: application/HTTP-SPNEGO-session-encrypted\r\nOriginalContent: type=%s;Length=%d\r\n--Encrypted Boundary\r\nContent-Type: application/octet-stream\r\n\x10\x00\x00\x00", r.contentType, len(body))
		b.Write(sig)
		b.Write(sealed)
		b.WriteString("--Encrypted Boundary--\r\n")
		body, r.contentType = b.Bytes(), `multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted";boundary="Encrypted Boundary"`
	}
	a.w.Header().Set("Content-Type", r.contentType)
	if r.status == 0 {
		r.status = 200
	}
	a.w.WriteHeader(r.status)
	a.w.Write(body)
}

func (h *host) challenge(w http.ResponseWriter, values ...string) {
	if h.offers != nil {
		values = h.offers
	}
	for _, v := range values {
		w.Header().Add("WWW-Authenticate", v)
	}
	w.WriteHeader(401)
}

func (h *host) signedIn(conn *hostConn, w http.ResponseWriter, r *http.Request, body []byte) bool {
	auth := r.Header.Get("Authorization")
	if h.basic {
		if auth == "Basic "+base64.StdEncoding.EncodeToString([]byte(`LAB\backup:`+h.ntlm.Password)) {
			return true
		}
		h.challenge(w, "Negotiate", `Basic realm="WSMAN"`)
		return false
	}
	if auth == "" {
		if !conn.in {
			h.challenge(w, "Negotiate", "Kerberos")
		}
		return conn.in
	}
	if len(body) > 0 {
		h.problem("a body of %d bytes while signing in", len(body))
	}
	token, ok := strings.CutPrefix(auth, "Negotiate ")
	msg, err := base64.StdEncoding.DecodeString(token)
	if !ok || err != nil || conn.in || len(msg) < 12 {
		h.problem("authorization %q", auth)
		return false
	}
	if msg[8] == 1 {
		h.mu.Lock()
		h.signIns++
		h.mu.Unlock()
		c, challenge, err := h.ntlm.Challenge(msg)
		if err != nil {
			h.problem("%v", err)
		}
		conn.context = c
		h.challenge(w, "Negotiate "+base64.StdEncoding.EncodeToString(challenge), "Kerberos")
		return false
	}
	if err := conn.context.Accept(msg); err != nil {
		if err != ntlmtest.ErrRefused {
			h.problem("%v", err)
		}
		conn.context = nil
		h.challenge(w, "Negotiate", "Kerberos")
		return false
	}
	conn.in = true
	w.WriteHeader(200)
	return false
}

// What a client has to send over HTTP, to the byte.
var sealedRequest = regexp.MustCompile(`(?s)^--Encrypted Boundary\r\n\tContent-Type: application/HTTP-SPNEGO-session-encrypted\r\n\tOriginalContent: type=application/soap\+xml;charset=UTF-8;Length=(\d+)\r\n--Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n\x10\x00\x00\x00(.*)--Encrypted Boundary--\r\n$`)

func (h *host) unseal(conn *hostConn, contentType string, body []byte) []byte {
	m := sealedRequest.FindSubmatch(body)
	if m == nil || contentType != `multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted";boundary="Encrypted Boundary"` {
		h.problem("sealed request with %q: %q", contentType, body)
		return nil
	}
	plain, err := conn.context.Session.Open(m[2][:16], m[2][16:])
	if err != nil || fmt.Sprint(len(plain)) != string(m[1]) {
		h.problem("sealed request of %s bytes: %v", m[1], err)
		return nil
	}
	return plain
}

// between gives what lies between a start tag and the next tag.
func between(s, start string) string {
	_, rest, _ := strings.Cut(s, start)
	in, _, _ := strings.Cut(rest, "<")
	return in
}

const r2 = "http://schemas.microsoft.com/wbem/wsman/1/wmi/root/virtualization/v2/"

// soap is an answer to a, with body in it. It uses other prefixes than we do.
func soap(a *asked, body string) reply {
	return reply{body: `<?xml version="1.0" encoding="UTF-8"?><env:Envelope xmlns:env="http://www.w3.org/2003/05/soap-envelope" xmlns:wsa="http://schemas.xmlsoap.org/ws/2004/08/addressing" xmlns:wsman="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:wsen="http://schemas.xmlsoap.org/ws/2004/09/enumeration" xmlns:i="http://www.w3.org/2001/XMLSchema-instance" xmlns:c="http://schemas.dmtf.org/wbem/wscim/1/common"><env:Header><wsa:To>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</wsa:To><wsa:RelatesTo>` + a.id + `</wsa:RelatesTo></env:Header><env:Body>` + body + `</env:Body></env:Envelope>`}
}

// vm is an instance in an answer.
func vm(name string) string {
	return `<x:Msvm_ComputerSystem xmlns:x="` + r2 + `Msvm_ComputerSystem" i:type="x:Msvm_ComputerSystem_Type"><x:Name>` + name + `</x:Name></x:Msvm_ComputerSystem>`
}

func always(body string) func(*host, *asked) reply {
	return func(_ *host, a *asked) reply { return soap(a, body) }
}
