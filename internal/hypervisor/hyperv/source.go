package hyperv

import (
	"errors"
	"fmt"
	"net"
	"net/url"
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
	pin    *wsman.Fingerprint // of the host's certificate; nil for none
	ca     string             // file
	smb    string             // HOST:PORT
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
		if len(values) > 1 && key != "share" {
			return bad("%s= stands there more than once", key)
		}
		value := values[0]
		switch key {
		case "fingerprint":
			digest, ok := strings.CutPrefix(value, "sha256:")
			pin, err := wsman.ParseFingerprint(digest)
			if !ok || err != nil {
				return bad("fingerprint=%s: want sha256: and 64 hexadecimal digits", value)
			}
			a.pin = &pin
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
			if a.smb = value; value == "" {
				return bad("smb=: want HOST or HOST:PORT")
			}
			if _, _, err := net.SplitHostPort(value); err != nil {
				a.smb = net.JoinHostPort(strings.Trim(value, "[]"), "445")
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
