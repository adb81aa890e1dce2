package hyperv

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"os"

	"github.com/backstay/backstay/internal/wsman"
)

// Open makes a Driver of the host that o names, and asks the host for its VMs
// to see that it answers.
func Open(ctx context.Context, o Options) (*Driver, error) {
	a, err := parseAddress(o.Host)
	if err != nil {
		return nil, err
	}
	cfg := wsman.Config{URL: "https://" + net.JoinHostPort(a.host, a.port), User: a.user, Password: o.Password, Pin: a.pin, Record: o.Record}
	if a.plain {
		cfg.URL = "http://" + net.JoinHostPort(a.host, a.port)
	}
	if a.basic {
		cfg.Auth = wsman.Basic
	}
	if a.ca != "" {
		pem, err := os.ReadFile(a.ca)
		if err != nil {
			return nil, fmt.Errorf("ca=: %w", err)
		}
		cfg.Roots = x509.NewCertPool()
		if !cfg.Roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ca=%s: no certificate in it", a.ca)
		}
	}
	c, err := wsman.New(cfg)
	if err != nil {
		return nil, err
	}
	f, err := newShareFiles(a, o.Password)
	if err != nil {
		c.Close()
		return nil, err
	}
	d := newDriver(c, f, o)
	host, _, err := d.look(ctx)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("host %s: %w", a.host, err)
	}
	if a, err = parseAddress(o.Host, host); err != nil {
		return nil, err
	}
	f.shares = a.shares
	return d, nil
}
