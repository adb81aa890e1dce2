package hyperv

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/wsman"
)

// An address is what a source's URL says of its host.
type address struct {
	user   string
	host   string // without a port
	port   string // of WS-Management
	plain  bool   // HTTP, with sealed messages
	basic  bool
	pins   []wsman.Fingerprint // of the certificates of the host, or of its cluster's nodes
	ca     string              // file
	smb    string              // HOST:PORT
	shares *smb.Shares
}

// ParseSource takes apart "hyperv://USER@HOST:PORT/NAME?…": the URL of a host,
// without the VM, and the name or GUID of a VM there, empty where none is
// named. A "/" in a name is written %2F. docs/design/hyperv.md lists the keys.
func ParseSource(source string) (host *url.URL, name string, err error) {
	u, err := url.Parse(source)
	if err != nil {
		// A password that does not belong there may be what makes it unreadable,
		// and err repeats all of it.
		return nil, "", errors.New("a source begins with hyperv and is no URL: want hyperv://USER@HOST/NAME, with % and other signs of its parts as %XX")
	}
	if name, err = url.PathUnescape(strings.TrimPrefix(u.EscapedPath(), "/")); err != nil {
		return nil, "", fmt.Errorf("source %s: %w", u.Redacted(), err)
	}
	if strings.Contains(strings.TrimPrefix(u.EscapedPath(), "/"), "/") {
		return nil, "", fmt.Errorf("source %s: want hyperv://USER@HOST/NAME, with any / in NAME written %%2F", u.Redacted())
	}
	u.Path, u.RawPath, u.Fragment = "", "", ""
	if _, err := parseAddress(u); err != nil {
		return nil, "", err
	}
	return u, name, nil
}

// isPort says whether at is HOST:PORT.
func isPort(at string) bool {
	_, _, err := net.SplitHostPort(at)
	return err == nil
}

// nodeSource is the source of another node of the cluster that u is a source
// of: at its name, with the domain of u's host if it has none, unless node=
// says where. Other keys are the same for all nodes; smb= of u's own host is
// not.
func nodeSource(u *url.URL, node string) *url.URL {
	out := *u
	host, port := node, u.Port()
	if _, domain, ok := strings.Cut(u.Hostname(), "."); ok && !strings.Contains(node, ".") && net.ParseIP(u.Hostname()) == nil {
		host += "." + domain
	}
	query := u.Query()
	for _, v := range query["node"] {
		name, at, _ := strings.Cut(v, "=")
		if !strings.EqualFold(name, node) {
			continue
		}
		if host = strings.Trim(at, "[]"); isPort(at) {
			host, port, _ = net.SplitHostPort(at)
		}
	}
	if out.Host = host; port != "" {
		out.Host = net.JoinHostPort(host, port)
	} else if strings.Contains(host, ":") {
		out.Host = "[" + host + "]"
	}
	query["smb"] = slices.DeleteFunc(slices.Clone(query["smb"]), func(v string) bool { return !strings.Contains(v, "=") })
	if len(query["smb"]) == 0 {
		delete(query, "smb")
	}
	out.RawQuery = query.Encode()
	return &out
}

// parseAddress reads what ParseSource gave. The names are further ones of the
// host, by which it may call its own shares.
func parseAddress(u *url.URL, names ...string) (address, error) {
	a := address{host: u.Hostname(), port: u.Port(), user: u.User.Username(), shares: smb.NewShares(append(names, u.Hostname())...)}
	bad := func(format string, args ...any) (address, error) {
		return address{}, fmt.Errorf("source %s: "+format, append([]any{u.Redacted()}, args...)...)
	}
	switch u.Scheme {
	case "hyperv":
	case "hyperv+http":
		a.plain = true
	default:
		return bad("it is no hyperv: URL")
	}
	if _, has := u.User.Password(); has {
		return bad("a password does not belong in a source; say --host-password-file")
	}
	if a.host == "" {
		return bad("it names no host")
	}
	if a.user == "" {
		return bad(`it names no user: want hyperv://USER@HOST/NAME, and DOMAIN\USER written DOMAIN%%5CUSER`)
	}
	if a.port == "" {
		a.port = "5986"
		if a.plain {
			a.port = "5985"
		}
	}
	a.smb = net.JoinHostPort(a.host, "445")
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return bad("%w", err)
	}
	for key, values := range query {
		if len(values) > 1 && !slices.Contains([]string{"share", "fingerprint", "node", "smb"}, key) {
			return bad("%s= stands there more than once", key)
		}
		value := values[0]
		switch key {
		case "fingerprint":
			for _, v := range values {
				digest, ok := strings.CutPrefix(v, "sha256:")
				pin, err := wsman.ParseFingerprint(digest)
				if !ok || err != nil {
					return bad("fingerprint=%s: want sha256: and 64 hexadecimal digits", v)
				}
				a.pins = append(a.pins, pin)
			}
			if a.plain {
				return bad("fingerprint= is of a certificate, and over HTTP there is none")
			}
		case "ca":
			if a.ca = value; value == "" || a.plain {
				return bad("ca=%s: want a file, and HTTPS", value)
			}
		case "auth":
			if a.basic = value == "basic"; !a.basic && value != "ntlm" {
				return bad("auth=%s: want ntlm or basic", value)
			}
			if a.basic && a.plain {
				return bad("auth=basic shows the password to whoever listens, and is for HTTPS only")
			}
		case "smb":
			plain := 0
			for _, v := range values {
				node, at, isNode := strings.Cut(v, "=")
				if at == "" && isNode || v == "" {
					return bad("smb=%s: want HOST or HOST:PORT, or NODE=HOST:PORT of a cluster's node", v)
				}
				if !isNode {
					at = v
					plain++
				}
				if plain > 1 {
					return bad("smb= stands there more than once")
				}
				if isNode && !slices.ContainsFunc(names, func(name string) bool { return strings.EqualFold(name, node) }) {
					continue
				}
				if a.smb = at; !isPort(at) {
					a.smb = net.JoinHostPort(strings.Trim(at, "[]"), "445")
				}
			}
		case "node":
			for _, v := range values {
				if name, at, ok := strings.Cut(v, "="); !ok || name == "" || at == "" {
					return bad("node=%s: want NODE=HOST or NODE=HOST:PORT of a cluster's node", v)
				}
			}
		case "share":
			for _, v := range values {
				if err := a.shares.Add(v); err != nil {
					return bad(`share=%s: want share=C:\FOLDER=SHARE: %w`, v, err)
				}
			}
		default:
			return bad("unknown key %s=", key)
		}
	}
	return a, nil
}
