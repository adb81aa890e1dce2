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
// to see that it answers. If that is a node of a cluster, or a cluster's name,
// the Driver speaks to the other nodes where VMs are there, as the same user.
func Open(ctx context.Context, o Options) (*Driver, error) {
	d, err := connect(o)
	if err != nil {
		return nil, err
	}
	host, _, err := d.look(ctx)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("host %s: %w", o.Host.Hostname(), err)
	}
	// It may call its own shares by its own name.
	if err := d.files.(*shareFiles).named(o, host); err != nil {
		d.Close()
		return nil, err
	}
	c := d.cluster
	c.dial = func(node string) (*Driver, error) {
		there := o
		there.Host = nodeSource(o.Host, node)
		n, err := connect(there, node)
		if err == nil {
			n.cluster = c
		}
		return n, err
	}
	return d, nil
}

// connect makes a Driver of a host without asking it anything. The names are
// further ones of the host.
func connect(o Options, names ...string) (*Driver, error) {
	a, err := parseAddress(o.Host, names...)
	if err != nil {
		return nil, err
	}
	cfg := wsman.Config{URL: "https://" + net.JoinHostPort(a.host, a.port), User: a.user, Password: o.Password, Pins: a.pins, Record: o.Record}
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
	members, err := c.In(clusterNamespace)
	if err != nil {
		c.Close()
		return nil, err
	}
	f, err := newShareFiles(a, o.Password)
	if err != nil {
		c.Close()
		return nil, err
	}
	d := newDriver(c, f, o)
	d.members = &client{members, d.poll, d.patience}
	return d, nil
}
