// Package hyperv is a simulated Hyper-V host that speaks its real protocol:
// WMI over WS-Management, with disks that are real VHDX files. What it does
// rests on documents and on what others have seen, not on a host that we have
// met: docs/design/hyperv-evidence.md says which.
package hyperv

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/backstay/backstay/sim/hyperv/host"
	"github.com/backstay/backstay/sim/hyperv/ntlm"
	"github.com/backstay/backstay/sim/hyperv/wsman"
)

// Options say how a host is reached. Zero values choose the usual.
type Options struct {
	Listen   string // "127.0.0.1:0"
	User     string
	Password string
	HTTP     bool // without TLS; messages are sealed then
	NoBasic  bool
	// RequireBinding refuses NTLM without channel binding over TLS.
	RequireBinding bool
	EnvelopeBytes  int
	Expired        bool // the certificate is not valid any more
	Log            func(format string, args ...any)
	// Fault is asked before each request, with its action, for what goes wrong
	// with it.
	Fault func(action string) wsman.Trouble
}

// An Endpoint is a running service.
type Endpoint struct {
	URL         string `json:"url"`                   // of WS-Management
	Fingerprint string `json:"fingerprint,omitempty"` // SHA-256 of the certificate, in hex
	Certificate []byte `json:"-"`                     // in PEM

	close func() error
}

// Serve begins to answer for h. Close ends it.
func Serve(h *host.Host, name string, o Options) (*Endpoint, error) {
	if o.User == "" || o.Password == "" {
		return nil, errors.New("a host needs a user and a password")
	}
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	if name == "" {
		name = "HV01"
	}
	s := &wsman.Server{Provider: h, Account: ntlm.Account{User: o.User, Password: o.Password}, Machine: name, Basic: !o.NoBasic, RequireBinding: o.RequireBinding, EnvelopeBytes: o.EnvelopeBytes, Now: time.Now, Log: o.Log, Fault: o.Fault}
	e := &Endpoint{}
	scheme := "http"
	if !o.HTTP {
		until := time.Now().AddDate(1, 0, 0)
		if o.Expired {
			until = time.Now().Add(-time.Minute)
		}
		cert, hash, err := wsman.SelfSigned(name, time.Now(), until)
		if err != nil {
			return nil, err
		}
		s.TLS, s.Certificate = &tls.Config{Certificates: []tls.Certificate{cert}}, hash
		e.Fingerprint = hex.EncodeToString(hash)
		e.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
		scheme = "https"
	}
	l, err := net.Listen("tcp", o.Listen)
	if err != nil {
		return nil, err
	}
	e.URL = fmt.Sprintf("%s://%s/wsman", scheme, l.Addr())
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	e.close = sync.OnceValue(func() error {
		stop()
		return <-done
	})
	return e, nil
}

// Close ends the service and its connections. It may be called twice.
func (e *Endpoint) Close() error { return e.close() }
