package nbd

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/url"
	"strings"
)

const defaultPort = "10809"

// ParseURI reads nbd://host[:port]/EXPORT and nbd+unix:///EXPORT?socket=PATH,
// and both with nbds for TLS against the system's certificate authorities.
func ParseURI(uri string) (Target, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Target{}, err
	}
	scheme, secure := strings.CutPrefix(u.Scheme, "nbds")
	if !secure {
		var ok bool
		if scheme, ok = strings.CutPrefix(u.Scheme, "nbd"); !ok {
			return Target{}, fmt.Errorf("%q is no nbd URI", uri)
		}
	}
	t := Target{Export: strings.TrimPrefix(u.Path, "/")}
	host := "localhost"
	switch scheme {
	case "":
		if u.Hostname() == "" {
			return Target{}, fmt.Errorf("%q names no host", uri)
		}
		host = u.Hostname()
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		t.Network, t.Address = "tcp", net.JoinHostPort(host, port)
	case "+unix":
		t.Network, t.Address = "unix", u.Query().Get("socket")
		if t.Address == "" || u.Host != "" {
			return Target{}, fmt.Errorf("%q: want nbd+unix:///EXPORT?socket=PATH", uri)
		}
	default:
		return Target{}, fmt.Errorf("%q is no nbd URI", uri)
	}
	if secure {
		t.TLS = &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	}
	return t, nil
}
