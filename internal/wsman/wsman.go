// Package wsman calls a Windows host's WMI classes over WS-Management.
//
// It knows no class: their names are arguments. A Client has a pool of
// connections, each signed in on its own, because NTLM signs in a connection.
// Instances are read and written as properties with CIM types; what a method
// takes as an embedded instance is an *Instance, too.
//
//	c, err := wsman.New(wsman.Config{URL: "https://hv01", User: `LAB\backup`, Password: password})
//	for vm, err := range c.Query(ctx, "SELECT * FROM Msvm_ComputerSystem WHERE Name = "+wsman.Quote(guid)) { … }
//	out, err := c.Invoke(ctx, service, "CreateSnapshot",
//		wsman.Arg("AffectedSystem", wsman.Of(vmRef)),
//		wsman.Arg("SnapshotSettings", wsman.Of(settings)),
//		wsman.Arg("SnapshotType", wsman.Of(uint16(32768))))
//	code, err := wsman.Prop[uint32](out, "ReturnValue")
//
// Nothing here waits for a job. A request has a timeout; what it started on
// the host goes on for as long as it takes, and the caller asks for its state.
//
// docs/design/wsman.md says what was decided, and on what evidence.
package wsman

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/backstay/backstay/internal/secret"
)

// Auth is a way to sign in.
type Auth int

const (
	// NTLM is NTLMv2, in Negotiate. Over HTTPS it is tied to the certificate;
	// over HTTP every envelope is sealed.
	NTLM Auth = iota
	// Basic sends the password itself, over HTTPS only. Hosts accept it for
	// local accounts and only if they were told to.
	Basic
)

// Config says which host a Client calls, and as whom.
type Config struct {
	// URL is https://HOST[:5986][/wsman], or http:// for sealed NTLM.
	URL string
	// User is DOMAIN\name, name@domain, or the name of a local account.
	User     string
	Password secret.Bytes
	Auth     Auth

	// The host's certificate is verified by the system's roots, or by Roots
	// where set. A Pin instead is the one certificate to accept, whatever its
	// name, issuer and dates.
	Roots *x509.CertPool
	Pin   *Fingerprint
	Pins  []Fingerprint // further ones, where several hosts may answer

	// Namespace is that of all classes; empty means root/virtualization/v2.
	Namespace string
	// Connections bounds how many requests are under way at once; 0 means 4.
	Connections int
	// Timeout is what one request may take on the host; 0 means a minute. The
	// way there and back may take ten seconds more.
	Timeout time.Duration
	// MaxEnvelope is the largest answer to ask for and to read, in bytes; 0
	// means 512000, which is what hosts allow if not told otherwise.
	MaxEnvelope int

	// Record, where set, is called with each request and its answer, in clear,
	// by any goroutine. What must not be kept is the caller's to take out; no
	// password is in it.
	Record func(Exchange)
}

// An Exchange is one request and its answer, as Config.Record gets them.
type Exchange struct {
	Action   string
	Request  []byte // the envelope; not to be changed
	Response []byte // nil where none came; not to be changed
	Status   int    // of HTTP
	Started  time.Time
	Took     time.Duration
	Err      error // of the connection or of sealing; a fault is in Response
}

// A Client calls one host. It is safe for concurrent use.
type Client struct {
	*core
	namespace string
}

// core is what Clients of several namespaces share.
type core struct {
	url, host, path string
	tls             *tls.Config // nil over plain HTTP
	user            string
	password        secret.Bytes
	basic           secret.Bytes // the value of a header, for Basic
	timeout         time.Duration
	travel          time.Duration // how much longer a request may be under way
	maxEnvelope     int
	record          func(Exchange)
	wait            []time.Duration // before each further try
	pool
}

// New checks the settings. It does not connect: the first request does.
func New(cfg Config) (*Client, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		// The URL may hold a password, and so may the error.
		return nil, errors.New("wsman: the URL cannot be read")
	}
	bad := func(format string, args ...any) (*Client, error) {
		return nil, fmt.Errorf("wsman: %s: %w", u.Redacted(), fmt.Errorf(format, args...))
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return bad("the URL has to begin with https:// or http://")
	case u.Hostname() == "":
		return bad("the URL names no host")
	case u.User != nil:
		return bad("a URL is no place for a password or a user")
	case u.RawQuery != "" || u.Fragment != "":
		return bad("the URL has a query or a fragment")
	case cfg.User == "" || cfg.Password.Empty():
		return bad("a user and a password are needed")
	case !utf8.ValidString(cfg.User) || !utf8.Valid(cfg.Password.Reveal()):
		return bad("the user or the password is not UTF-8")
	case cfg.Connections < 0 || cfg.Timeout < 0 || cfg.MaxEnvelope < 0:
		return bad("a setting is negative")
	case cfg.Auth != NTLM && cfg.Auth != Basic:
		return bad("there is no sign-in number %d", cfg.Auth)
	}
	c := &core{user: cfg.User, password: cfg.Password, timeout: cfg.Timeout, maxEnvelope: cfg.MaxEnvelope, record: cfg.Record,
		travel: 10 * time.Second, wait: []time.Duration{500 * time.Millisecond, 2 * time.Second}}
	port := u.Port()
	if u.Scheme == "https" {
		pins := cfg.Pins
		if cfg.Pin != nil {
			pins = append([]Fingerprint{*cfg.Pin}, pins...)
		}
		c.tls = tlsConfig(u.Hostname(), cfg.Roots, pins)
	} else if cfg.Pin != nil || len(cfg.Pins) > 0 || cfg.Roots != nil {
		return bad("there is no certificate to verify over http://")
	}
	if port == "" {
		port = "5985"
		if c.tls != nil {
			port = "5986"
		}
	}
	c.host = net.JoinHostPort(u.Hostname(), port)
	if c.path = u.EscapedPath(); strings.Trim(c.path, "/") == "" {
		c.path = "/wsman"
	}
	c.url = u.Scheme + "://" + c.host + c.path
	if cfg.Auth == Basic {
		if c.tls == nil {
			return bad("Basic would send the password in clear over http://")
		}
		if strings.Contains(cfg.User, ":") {
			return bad("Basic cannot send a user's name with a colon")
		}
		c.basic = secret.New([]byte("Basic " + base64.StdEncoding.EncodeToString(append([]byte(cfg.User+":"), cfg.Password.Reveal()...))))
	}
	if c.timeout == 0 {
		c.timeout = time.Minute
	}
	if c.maxEnvelope == 0 {
		c.maxEnvelope = 512000
	}
	if c.maxEnvelope < 8192 {
		return bad("no host sends envelopes of %d bytes: 8192 is the least", c.maxEnvelope)
	}
	n := cfg.Connections
	if n == 0 {
		n = 4
	}
	c.places = make(chan struct{}, n)
	client := &Client{core: c}
	ns := cfg.Namespace
	if ns == "" {
		ns = "root/virtualization/v2"
	}
	if client, err = client.In(ns); err != nil {
		return bad("%w", err)
	}
	return client, nil
}

// In gives the same client for another namespace, "root/cimv2". Both share
// their connections; closing one closes both.
func (c *Client) In(namespace string) (*Client, error) {
	namespace = strings.Trim(strings.ReplaceAll(namespace, `\`, "/"), "/")
	if !isNamespace(namespace) {
		return nil, fmt.Errorf("wsman: %q is no namespace", namespace)
	}
	return &Client{c.core, namespace}, nil
}

// Host is the host and port that the client calls.
func (c *Client) Host() string { return c.host }

// String is the URL.
func (c *Client) String() string { return c.url }

// Close closes the connections. Requests under way end as they would, and
// later ones fail. It may be called twice.
func (c *Client) Close() error {
	c.pool.close()
	return nil
}

var errClosed = errors.New("wsman: the client is closed")
