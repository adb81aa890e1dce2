package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
)

// DefaultPort is where a server listens if nothing else is said.
const DefaultPort = "9443"

// A Location is where a repository's objects are.
type Location struct {
	Host string // host:port
	Repo string
	Pin  *Pin // of the server's key; nil to take the one in the token
}

// ParseURL reads "backstay://host:port/name", with "#sha256:…" behind it where
// the server has another key than the token says. A URL that holds a user or a
// password is refused: arguments can be seen by everybody on the machine.
func ParseURL(s string) (Location, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "backstay" || u.Opaque != "" {
		return Location{}, errors.New("the URL of a repository server cannot be parsed: want backstay://host:port/name")
	}
	if u.User != nil {
		return Location{}, errors.New("the URL of a repository server holds no user and no password: the token comes from --token-file, BACKSTAY_TOKEN_FILE or BACKSTAY_TOKEN")
	}
	if u.RawQuery != "" || u.ForceQuery {
		return Location{}, errors.New("the URL of a repository server has no settings: want backstay://host:port/name")
	}
	if u.Hostname() == "" {
		return Location{}, fmt.Errorf("%q names no server: want backstay://host:port/name", s)
	}
	port := u.Port()
	if port == "" {
		port = DefaultPort
	}
	l := Location{Host: net.JoinHostPort(u.Hostname(), port), Repo: strings.TrimSuffix(strings.TrimPrefix(u.EscapedPath(), "/"), "/")}
	if err := CheckRepo(l.Repo); err != nil {
		return Location{}, fmt.Errorf("%q: %w", s, err)
	}
	if u.Fragment != "" {
		pin, err := ParsePin(u.Fragment)
		if err != nil {
			return Location{}, err
		}
		l.Pin = &pin
	}
	return l, nil
}

// String is the URL of l, without the fingerprint.
func (l Location) String() string { return "backstay://" + l.Host + "/" + l.Repo }

// Open makes a Store of the repository at l and asks the server whether it
// takes the token. It gives fault.ErrNotFound if there is no such repository,
// and fault.ErrDenied if the token or the server is not the right one.
func Open(ctx context.Context, l Location, t Token) (*Store, error) {
	return connect(ctx, l, t, http.MethodGet)
}

// Create is Open, but makes the repository's directory if there is none.
func Create(ctx context.Context, l Location, t Token) (*Store, error) {
	return connect(ctx, l, t, http.MethodPut)
}

func connect(ctx context.Context, l Location, t Token, method string) (*Store, error) {
	pin := t.Pin
	if l.Pin != nil {
		pin = *l.Pin
	}
	dialer := &net.Dialer{Timeout: 20 * time.Second, KeepAlive: 30 * time.Second}
	s := &Store{at: l, bearer: "Bearer " + t.bearer(), host: (&url.URL{Scheme: "https", Host: l.Host}).String()}
	s.transport = &http.Transport{
		DialContext:            dialer.DialContext,
		TLSClientConfig:        pinned(pin),
		TLSHandshakeTimeout:    20 * time.Second,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        time.Minute,
		ResponseHeaderTimeout:  2 * time.Minute, // a PUT is answered when it is durable
		ExpectContinueTimeout:  10 * time.Second,
		MaxResponseHeaderBytes: 16 << 10,
		DisableCompression:     true,
		WriteBufferSize:        bufferBytes,
		ReadBufferSize:         bufferBytes,
	}
	s.client = http.Client{Transport: s.transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return errors.New("the server answered with a redirect, which no repository server does")
	}}
	res, err := s.do(ctx, method, Target{Repo: l.Repo}, nil)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("%s: %w", s, err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(res.Body, MaxReason)); err != nil {
		s.Close()
		return nil, fmt.Errorf("%s: %w", s, err)
	}
	return s, nil
}

// A PinError says that another server answered than the one that was meant.
type PinError struct{ Got, Want Pin }

func (e *PinError) Error() string {
	return fmt.Sprintf("the server has the key %s, expected was %s: %v", e.Got, e.Want, fault.ErrDenied)
}

// Is puts it in the class of a sign-in that was refused.
func (e *PinError) Is(target error) bool { return target == fault.ErrDenied }

// pinned trusts the server that has the key, whatever its certificate says
// about names and times: nobody has to run a certificate authority, and no
// clock decides.
func pinned(pin Pin) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"http/1.1"},
		InsecureSkipVerify: true, // VerifyConnection does it
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("the server showed no certificate")
			}
			if got := PinOf(cs.PeerCertificates[0]); !got.is(pin) {
				return &PinError{got, pin}
			}
			return nil
		},
	}
}
