// Package wsman is the WS-Management service of a simulated Windows host, as
// strict as a real one: SOAP over HTTP, connections that must authenticate, and
// the classes of a Provider.
package wsman

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/ntlm"
)

// A Provider has the instances and carries out their methods. It is called
// from many goroutines at once. Its errors may be Faults.
type Provider interface {
	cim.Source
	Invoke(ctx context.Context, target *cim.Instance, method cim.Method, args map[string]cim.Value) (out map[string]cim.Value, result uint32, err error)
	Put(old, changed *cim.Instance) error
}

// A Guard is a Provider that does not have, or does not show to this user, all
// namespaces of the class table.
type Guard interface {
	// Admit gives nil, NoNamespace or Denied.
	Admit(namespace string) *Fault
}

// A Server answers WS-Management requests. Its fields are not changed after
// Serve.
type Server struct {
	Provider    Provider
	Account     ntlm.Account
	Machine     string      // the host's name, in faults and challenges
	TLS         *tls.Config // nil for HTTP, where messages must be sealed
	Certificate []byte      // the hash of the TLS certificate that clients bind to
	Basic       bool        // allow it, over TLS
	// RequireBinding refuses NTLM without channel binding over TLS, as hosts
	// do whose CbtHardeningLevel is Strict.
	RequireBinding bool
	EnvelopeBytes  int // the largest request and answer; 0 for 500 KB
	Now            func() time.Time
	Log            func(format string, args ...any)
	// Fault is asked before each request that came in, with its action; what it
	// returns spoils the request. Nil for none.
	Fault func(action string) Trouble

	ntlm         ntlm.Server
	enumerations enumerations
}

// Trouble is what goes wrong with one request besides what a Provider says.
type Trouble int

// The kinds of trouble.
const (
	None         Trouble = iota
	Drop                 // the connection ends without an answer, and nothing was done
	Unauthorized         // 401: the host has forgotten who it was
	HTML                 // 200 and a page of a proxy
	Unavailable          // 503: the service restarts
	Hang                 // no answer until the client gives up
	DropAnswer           // the connection ends without an answer, and it was done
)

// Serve answers what comes in on l until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.enumerations.open = map[string]*enumeration{}
	s.ntlm = ntlm.Server{Computer: s.Machine, Account: s.Account, RequireBinding: s.RequireBinding, Now: s.Now}
	if s.tls() {
		s.ntlm.Binding = s.Certificate
		l = tls.NewListener(l, s.TLS)
	}
	h := &http.Server{
		Handler:           http.HandlerFunc(s.handle),
		ConnContext:       withConnection,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0), // clients that break off are not this host's trouble
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		h.Close()
	}()
	err := h.Serve(l)
	if ctx.Err() != nil {
		<-done
		return nil
	}
	return err
}

func (s *Server) tls() bool { return s.TLS != nil }

func (s *Server) logf(format string, args ...any) {
	if s.Log != nil {
		s.Log(format, args...)
	}
}

func (s *Server) limit() int {
	if s.EnvelopeBytes > 0 {
		return s.EnvelopeBytes
	}
	return defaultEnvelope
}

func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Server", "Microsoft-HTTPAPI/2.0")
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, int64(s.limit())+4096))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	case err != nil:
		return
	case strings.TrimRight(r.URL.Path, "/") != "/wsman":
		w.WriteHeader(http.StatusNotFound)
		return
	case r.Method != http.MethodPost:
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	c := r.Context().Value(connectionKey{}).(*connection)
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.Header.Get("WSMANIDENTIFY") == "unauthenticated" {
		s.answer(w, nil, http.StatusOK, []byte(envelope("", newID(), "", s.identity())))
		return
	}
	if !s.authenticate(c, w, r) {
		return
	}
	if len(body) == 0 {
		w.WriteHeader(http.StatusOK) // the end of a handshake without a message
		return
	}
	session := c.session
	contentType := r.Header.Get("Content-Type")
	switch {
	case s.tls():
		session = nil // messages are not sealed within TLS
	case !strings.HasPrefix(contentType, "multipart/"):
		s.logf("a message in the clear: %s", contentType)
		w.WriteHeader(http.StatusInternalServerError)
		return
	default:
		if body, err = unseal(session, contentType, body); err != nil {
			s.logf("unsealing: %v", err)
			c.session = nil
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		contentType = soapType
	}
	if !strings.HasPrefix(strings.ToLower(contentType), "application/soap+xml") {
		w.WriteHeader(http.StatusUnsupportedMediaType)
		return
	}
	status, answer := s.serve(r.Context(), c, w, body)
	if answer != "" {
		s.answer(w, session, status, []byte(answer))
	}
}

func (s *Server) answer(w http.ResponseWriter, session *ntlm.Session, status int, message []byte) {
	w.Header().Set("Content-Type", soapType)
	if session != nil {
		w.Header().Set("Content-Type", sealedType)
		message = seal(session, message)
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(message)))
	w.WriteHeader(status)
	_, _ = w.Write(message) // a client that is gone needs no answer
}

// serve answers one envelope. An empty answer was given already.
func (s *Server) serve(ctx context.Context, c *connection, w http.ResponseWriter, body []byte) (status int, answer string) {
	r, f := parseRequest(body, s.limit())
	if f == nil && len(body) > s.limit() {
		f = &Fault{Subcode: "w:EncodingLimit", Code: codeEnvelopeSize, Detail: detailMaxExceeded, Text: "The size of the request exceeds the configured MaxEnvelopeSize quota."}
	}
	spoilt := None
	if f == nil && s.Fault != nil {
		spoilt = s.Fault(r.action)
	}
	if s.trouble(ctx, c, w, spoilt) {
		return 0, ""
	}
	action, content := "", ""
	if g, ok := s.Provider.(Guard); ok && f == nil && r.namespace != "" {
		f = g.Admit(r.namespace)
	}
	if f == nil {
		action, content, f = s.dispatch(ctx, r)
	}
	if spoilt == DropAnswer {
		panic(http.ErrAbortHandler)
	}
	if f == nil {
		answer = envelope(action, newID(), r.messageID, content)
		if len(answer) <= r.envelope {
			s.logf("%s: %d bytes", r.action, len(answer))
			return http.StatusOK, answer
		}
		f = tooLarge()
	}
	s.logf("%s %s: %v", r.action, r.class, f)
	return http.StatusInternalServerError, envelope("http://schemas.dmtf.org/wbem/wsman/1/wsman/fault", newID(), r.messageID, f.body(s.Machine))
}

func (s *Server) dispatch(ctx context.Context, r *request) (action, body string, f *Fault) {
	switch r.action {
	case nsTransfer + "/Get":
		body, f = s.get(r)
	case nsTransfer + "/Put":
		body, f = s.put(r)
	case nsEnum + "/Enumerate":
		body, f = s.enumerate(r)
	case nsEnum + "/Pull":
		body, f = s.pull(r)
	case nsEnum + "/Release":
		body, f = s.release(r)
	default:
		if r.body.child(nsIdentity, "Identify") != nil {
			return "", s.identity(), nil
		}
		return s.invoke(ctx, r)
	}
	return r.action + "Response", body, f
}

func (s *Server) identity() string {
	return fmt.Sprintf(`<i:IdentifyResponse xmlns:i="%s">%s%s%s</i:IdentifyResponse>`, nsIdentity,
		element("i:ProtocolVersion", nsWSMan), element("i:ProductVendor", "Microsoft Corporation"), element("i:ProductVersion", "OS: 10.0.20348 SP: 0.0 Stack: 3.0"))
}

// trouble spoils the request if it should be, and says so.
func (s *Server) trouble(ctx context.Context, c *connection, w http.ResponseWriter, which Trouble) bool {
	switch which {
	case None, DropAnswer:
		return false
	case Unauthorized:
		c.session, c.conversation = nil, nil
		s.unauthorized(w, "")
	case HTML:
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<html><body><h1>Welcome to the proxy</h1></body></html>")
	case Unavailable:
		w.WriteHeader(http.StatusServiceUnavailable)
	case Hang:
		<-ctx.Done()
		panic(http.ErrAbortHandler)
	default:
		panic(http.ErrAbortHandler) // net/http's way to end a connection
	}
	return true
}

// newID is a random GUID, as Windows writes them.
func newID() string {
	var p [16]byte
	rand.Read(p[:])
	p[6], p[8] = p[6]&0x0f|0x40, p[8]&0x3f|0x80
	return fmt.Sprintf("%X-%X-%X-%X-%X", p[0:4], p[4:6], p[6:8], p[8:10], p[10:16])
}
