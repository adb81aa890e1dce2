package wsman

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/wsman/internal/ntlm"
)

const (
	// maxHeader bounds the header of an HTTP answer, in bytes.
	maxHeader = 64 << 10
	// sealSlack is what sealing adds to an envelope, and more.
	sealSlack = 4 << 10
	// idleLimit is how long a connection may lie unused. Hosts drop them after
	// two minutes.
	idleLimit = time.Minute
	// freshLimit is how long one is taken to be alive after an answer: looking
	// costs a millisecond.
	freshLimit = 100 * time.Millisecond
	soapType   = "application/soap+xml;charset=UTF-8"
)

// A conn is one connection to the host, and who we are on it. The HTTP is
// written here rather than left to net/http: NTLM signs in a connection, not a
// request, so a request has to know on which it goes, and one that is not to
// happen twice must not be repeated by a transport that means well.
type conn struct {
	nc      net.Conn
	in      *bufio.Reader
	left    *io.LimitedReader // under in
	binding [16]byte          // of the TLS connection
	used    time.Time
	session *ntlm.Session // for sealing, nil over TLS
	broken  bool          // not to be used again
}

// dial connects, and checks the certificate.
func (c *core) dial(ctx context.Context) (*conn, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.host)
	if err != nil {
		return nil, err
	}
	out := &conn{}
	if c.tls != nil {
		tc := tls.Client(nc, c.tls)
		if err := tc.HandshakeContext(ctx); err != nil {
			nc.Close()
			return nil, c.certificateError(err)
		}
		nc, out.binding = tc, binding(tc.ConnectionState().PeerCertificates)
	}
	out.nc = nc
	out.left = &io.LimitedReader{R: nc}
	out.in = bufio.NewReader(out.left)
	return out, nil
}

// certificateError turns what TLS says about a certificate into ours.
func (c *core) certificateError(err error) error {
	var ours *CertificateError
	var theirs *tls.CertificateVerificationError
	switch {
	case errors.As(err, &ours):
		return ours
	case errors.As(err, &theirs) && len(theirs.UnverifiedCertificates) > 0:
		return &CertificateError{c.host, sha256.Sum256(theirs.UnverifiedCertificates[0].Raw), theirs.Err}
	}
	var record tls.RecordHeaderError
	if errors.As(err, &record) {
		return fmt.Errorf("there is no TLS at this address: %w", err)
	}
	return err
}

// tlsConfig checks by the system's roots or those given, or by the fingerprints
// that are pinned and by nothing else.
func tlsConfig(host string, roots *x509.CertPool, pins []Fingerprint) *tls.Config {
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, RootCAs: roots}
	if len(pins) > 0 {
		t.InsecureSkipVerify = true // VerifyConnection does it
		t.VerifyConnection = func(s tls.ConnectionState) error {
			if got := Fingerprint(sha256.Sum256(s.PeerCertificates[0].Raw)); !slices.Contains(pins, got) {
				all := make([]string, len(pins))
				for i, p := range pins {
					all[i] = p.String()
				}
				return &CertificateError{host, got, fmt.Errorf("the pinned fingerprint is %s", strings.Join(all, " or "))}
			}
			return nil
		}
	}
	return t
}

// A Fingerprint is the SHA-256 of a certificate.
type Fingerprint [sha256.Size]byte

// String is the fingerprint as Windows and OpenSSL show it.
func (f Fingerprint) String() string {
	var parts []string
	for _, b := range f {
		parts = append(parts, hex.EncodeToString([]byte{b}))
	}
	return strings.ToUpper(strings.Join(parts, ":"))
}

// ParseFingerprint reads 64 hexadecimal digits, with or without colons or
// spaces between them, and "sha256:" before them or not.
func ParseFingerprint(s string) (Fingerprint, error) {
	digits := strings.TrimPrefix(strings.ToLower(s), "sha256:")
	b, err := hex.DecodeString(strings.NewReplacer(":", "", " ", "").Replace(digits))
	if err != nil || len(b) != sha256.Size {
		return Fingerprint{}, fmt.Errorf("%q is no SHA-256 fingerprint of a certificate", s)
	}
	return Fingerprint(b), nil
}

// binding ties a sign-in to the certificate under it, so that nobody can pass
// it on to another host. RFC 5929 says by which hash.
func binding(chain []*x509.Certificate) [16]byte {
	if len(chain) == 0 {
		return [16]byte{}
	}
	var h hash.Hash
	switch chain[0].SignatureAlgorithm {
	case x509.SHA384WithRSA, x509.ECDSAWithSHA384, x509.SHA384WithRSAPSS:
		h = sha512.New384()
	case x509.SHA512WithRSA, x509.ECDSAWithSHA512, x509.SHA512WithRSAPSS:
		h = sha512.New()
	case x509.PureEd25519, x509.UnknownSignatureAlgorithm:
		return [16]byte{} // undefined there
	default: // and for MD5 and SHA-1
		h = sha256.New()
	}
	h.Write(chain[0].Raw)
	return ntlm.Binding(h.Sum(nil))
}

func (c *conn) close() {
	c.broken = true
	c.nc.Close()
}

// alive looks whether an idle connection was closed by the host. It can only
// say no for sure.
func (c *conn) alive(now time.Time) bool {
	if c.broken || now.Sub(c.used) > idleLimit || c.in.Buffered() > 0 {
		return false
	}
	if now.Sub(c.used) < freshLimit {
		return true
	}
	c.left.N = 1
	c.nc.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := c.in.Peek(1)
	c.nc.SetReadDeadline(time.Time{})
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// A httpAnswer is one that was read whole.
type httpAnswer struct {
	status int
	header http.Header
	body   []byte
}

var errTooLarge = errors.New("the HTTP answer is too large")

// post sends one request and reads its answer, of at most limit bytes. The
// caller has set the deadline. sent says whether all of the request left us.
func (c *conn) post(r *core, contentType, authorization string, body []byte, limit int) (answer *httpAnswer, sent bool, err error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "POST %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: Backstay\r\n", r.path, r.host)
	if authorization != "" {
		fmt.Fprintf(&b, "Authorization: %s\r\n", authorization)
	}
	if contentType != "" {
		fmt.Fprintf(&b, "Content-Type: %s\r\n", contentType)
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n", len(body))
	b.Write(body)
	c.broken = true // until the answer is read whole
	c.left.N = int64(maxHeader + limit + 1)
	if _, err := c.nc.Write(b.Bytes()); err != nil {
		return nil, false, err
	}
	var resp *http.Response
	for interim := 0; ; interim++ {
		resp, err = http.ReadResponse(c.in, &http.Request{Method: http.MethodPost})
		if err == nil && resp.StatusCode < 200 && resp.StatusCode != http.StatusSwitchingProtocols && interim < 5 {
			continue // 100 Continue
		}
		break
	}
	if err == nil {
		answer = &httpAnswer{status: resp.StatusCode, header: resp.Header}
		answer.body, err = io.ReadAll(io.LimitReader(resp.Body, int64(limit)+1))
	}
	switch {
	case c.left.N == 0 || err == nil && len(answer.body) > limit:
		return nil, true, errTooLarge
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return nil, true, errors.New("the host closed the connection")
	case err != nil:
		return nil, true, err
	}
	c.broken = resp.Close
	c.used = time.Now()
	return answer, true, nil
}

// signIn makes the connection ours. Errors of the way there are as post gives
// them, a refusal is a SignInError.
func (c *conn) signIn(r *core) error {
	refused := func(a *httpAnswer, err error) error {
		return &SignInError{User: r.user, Wanted: "NTLM", Offers: offers(a.header), Err: err}
	}
	domain, user := splitUser(r.user)
	host, _, _ := net.SplitHostPort(r.host)
	client := &ntlm.Client{Domain: domain, User: user, Password: r.password.Reveal(), Target: "HTTP/" + host, ChannelBinding: c.binding}
	scheme := "Negotiate"
	var challenge []byte
	for challenge == nil {
		first, _, err := c.post(r, soapType, scheme+" "+base64.StdEncoding.EncodeToString(client.Negotiate()), nil, sealSlack)
		if err != nil {
			return err
		}
		if first.status != http.StatusUnauthorized {
			return first.err()
		}
		token, offered := tokenOf(first.header, scheme)
		switch {
		case token != "":
			if challenge, err = base64.StdEncoding.DecodeString(token); err != nil {
				return refused(first, fmt.Errorf("%w: the challenge is not base64", ErrProtocol))
			}
		case scheme == "Negotiate" && hasOffer(first.header, "NTLM"):
			scheme = "NTLM"
		case offered:
			return refused(first, fmt.Errorf("the host answers without a challenge: %w", fault.ErrUnsupported))
		default:
			return refused(first, fmt.Errorf("the host does not offer it: %w", fault.ErrUnsupported))
		}
		if c.broken {
			return refused(first, fmt.Errorf("%w: the host closes the connection in the middle", ErrProtocol))
		}
	}
	msg, session, err := client.Authenticate(challenge)
	if err != nil {
		return &SignInError{User: r.user, Wanted: "NTLM", Err: err}
	}
	last, _, err := c.post(r, soapType, scheme+" "+base64.StdEncoding.EncodeToString(msg), nil, sealSlack)
	if err != nil {
		return err
	}
	switch {
	case last.status == http.StatusUnauthorized:
		return refused(last, nil)
	case last.status/100 != 2:
		return last.err()
	}
	if r.tls == nil {
		c.session = session
	}
	return nil
}

// splitUser takes apart DOMAIN\name. A name@domain stays whole, with an empty
// domain: that is how Windows resolves it.
func splitUser(s string) (domain, user string) {
	if d, u, ok := strings.Cut(s, `\`); ok {
		if d == "." {
			d = ""
		}
		return d, u
	}
	return "", s
}

// offers gives the names of the schemes in a 401.
func offers(h http.Header) []string {
	var all []string
	for _, v := range h.Values("WWW-Authenticate") {
		scheme, _, _ := strings.Cut(strings.TrimSpace(v), " ")
		if scheme != "" && len(all) < 10 {
			all = append(all, oneLine(scheme))
		}
	}
	return all
}

func hasOffer(h http.Header, scheme string) bool {
	_, ok := tokenOf(h, scheme)
	return ok
}

// tokenOf gives what follows a scheme in a 401, and whether it is offered.
func tokenOf(h http.Header, scheme string) (token string, offered bool) {
	for _, v := range h.Values("WWW-Authenticate") {
		s, t, _ := strings.Cut(strings.TrimSpace(v), " ")
		if strings.EqualFold(s, scheme) {
			return strings.TrimSpace(t), true
		}
	}
	return "", false
}

// err is the error of an answer that holds no envelope.
func (a *httpAnswer) err() error {
	start := a.body
	if len(start) > 200 {
		start = start[:200]
	}
	return &AnswerError{Status: a.status, ContentType: oneLine(a.header.Get("Content-Type")), Location: a.header.Get("Location"),
		Start: oneLine(strings.ToValidUTF8(string(start), "?"))}
}
