package kvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os/user"
	"sync"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket"
	"github.com/digitalocean/go-libvirt/socket/dialers"

	"github.com/backstay/backstay/internal/fault"
)

// How long libvirt may take for a call. The first after its start may need
// some 15 s, while it asks QEMU what it can do; beginning a backup waits up to
// 30 s for other work on the VM.
const (
	callTimeout  = 30 * time.Second
	beginTimeout = 60 * time.Second
	// patience is how long a session waits for libvirt to come back.
	patience = 90 * time.Second
)

// errLost says that libvirt went away in the middle of a call, which may or
// may not have been carried out.
var errLost = errors.New("the connection to libvirt was lost")

var errNotRunning = errors.New("libvirt is not running")

// A conn is one connection to libvirt, made anew when it was lost. The library
// knows no deadlines: at ours, the connection is closed under it, which ends
// all calls on it. So each session has a conn of its own.
type conn struct {
	uri *url.URL // kvm form

	// patient makes again wait for a libvirt that is not there: a session does
	// not end because of a restart.
	patient bool

	mu  sync.Mutex
	l   *libvirt.Libvirt
	raw net.Conn
}

// remember keeps hold of what a dialer made.
type remember struct {
	socket.Dialer
	mu     sync.Mutex
	raw    net.Conn
	closed bool
}

func (r *remember) Dial() (net.Conn, error) {
	raw, err := r.Dialer.Dial()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		raw.Close()
		return nil, net.ErrClosed
	}
	r.raw = raw
	return raw, nil
}

func (r *remember) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.raw != nil {
		r.raw.Close()
	}
}

// transport is how uri reaches libvirt: "unix", "tcp", "tls" or "ssh".
func transport(uri *url.URL) string {
	if len(uri.Scheme) > len("kvm+") {
		return uri.Scheme[len("kvm+"):]
	}
	if uri.Host != "" {
		return "tls"
	}
	return "unix"
}

func dialer(uri *url.URL) (socket.Dialer, error) {
	q := uri.Query()
	switch t := transport(uri); t {
	case "unix":
		path := q.Get("socket")
		if path == "" {
			path = "/var/run/libvirt/libvirt-sock"
			if uri.Path == "/session" {
				return nil, fmt.Errorf("kvm:///session needs ?socket=PATH: %w", fault.ErrUnsupported)
			}
		}
		return dialers.NewLocal(dialers.WithSocket(path), dialers.WithLocalTimeout(5*time.Second)), nil
	case "tcp":
		ip := net.ParseIP(uri.Hostname())
		if uri.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, fmt.Errorf("kvm+tcp to %s would be neither encrypted nor authenticated, use kvm+tls or kvm+ssh: %w", uri.Hostname(), fault.ErrUnsupported)
		}
		var o []dialers.RemoteOption
		if p := uri.Port(); p != "" {
			o = append(o, dialers.UsePort(p))
		}
		return dialers.NewRemote(uri.Hostname(), o...), nil
	case "tls":
		var o []dialers.TLSOption
		if p := uri.Port(); p != "" {
			o = append(o, dialers.UseTLSPort(p))
		}
		if p := q.Get("pkipath"); p != "" {
			o = append(o, dialers.UsePKIPath(p))
		}
		return dialers.NewTLS(uri.Hostname(), o...), nil
	case "ssh":
		me, err := user.Current()
		if err != nil {
			return nil, err
		}
		o := []dialers.SSHOption{dialers.WithSystemSSHDefaults(me), dialers.UseSSHUsername(uri.User.Username())}
		if p := uri.Port(); p != "" {
			o = append(o, dialers.UseSSHPort(p))
		}
		if p := q.Get("socket"); p != "" {
			o = append(o, dialers.WithRemoteSocket(p))
		}
		if p := q.Get("keyfile"); p != "" {
			o = append(o, dialers.UseKeyFile(p))
		}
		return dialers.NewSSH(uri.Hostname(), o...), nil
	default:
		return nil, fmt.Errorf("transport %q of %s: %w", t, uri.Redacted(), fault.ErrUnsupported)
	}
}

func newConn(uri *url.URL) *conn { return &conn{uri: uri} }

// get gives the connection, made now if there is none.
func (c *conn) get(ctx context.Context) (*libvirt.Libvirt, net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.l != nil && c.l.IsConnected() {
		return c.l, c.raw, nil
	}
	d, err := dialer(c.uri)
	if err != nil {
		return nil, nil, err
	}
	r := &remember{Dialer: d}
	l := libvirt.NewWithDialer(r)
	done := make(chan error, 1)
	go func() { done <- l.ConnectToURI(libvirt.RemoteURI(libvirtURI(c.uri))) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		r.Close()
		err = ctx.Err()
	}
	if err != nil {
		r.Close()
		return nil, nil, c.notRunning(err)
	}
	c.l, c.raw = l, r.raw
	return c.l, c.raw, nil
}

// notRunning makes words of the ways in which libvirt can be away.
func (c *conn) notRunning(err error) error {
	where := c.uri.Redacted()
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s: %w: %w", errNotRunning, where, fault.ErrNotFound, err)
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return fmt.Errorf("libvirt at %s lets only root and the group libvirt in: %w", where, err)
	case wasLost(err):
		return fmt.Errorf("libvirt at %s: %w", where, errLost)
	}
	return fmt.Errorf("libvirt at %s: %w", where, err)
}

// wasLost recognizes the library's ways to say that the socket is gone.
func wasLost(err error) bool {
	return errors.Is(err, errLost) || errors.Is(err, libvirt.ErrInterrupted) || errors.Is(err, syscall.EINVAL) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}

// code is libvirt's number for err, 0 if it is not libvirt's.
func code(err error) libvirt.ErrorNumber {
	var e libvirt.Error
	if errors.As(err, &e) {
		return libvirt.ErrorNumber(e.Code)
	}
	return 0
}

// do runs f, which makes one call or a few, within limit. What f writes may be
// read when do has returned, whatever it returned.
func (c *conn) do(ctx context.Context, limit time.Duration, f func(l *libvirt.Libvirt) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	l, raw, err := c.get(ctx)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- f(l) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		raw.Close()
		<-done
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("libvirt did not answer within %v: %w", limit, ctx.Err())
		}
		return ctx.Err()
	}
	if err != nil && code(err) == 0 && wasLost(err) {
		raw.Close()
		return errLost
	}
	return err
}

// again is do for calls that may be repeated: when libvirt goes away in the
// middle, it waits for its return, until limit.
func (c *conn) again(ctx context.Context, limit time.Duration, f func(l *libvirt.Libvirt) error) error {
	if c.patient {
		limit = max(limit, patience)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for was := c.patient; ; {
		err := c.do(ctx, limit, f)
		if errors.Is(err, errLost) {
			was = true
		} else if err == nil || !was || !errors.Is(err, errNotRunning) {
			return err // "not running" is an answer, unless it was running just now
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c *conn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.raw != nil {
		c.raw.Close() // libvirt notices; its polite way may hang
	}
	c.l, c.raw = nil, nil
}
