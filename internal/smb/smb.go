// Package smb reads and writes files on a Windows host's shares.
//
// A Client holds one or more connections to one host and makes them anew when
// they are lost. Whoever reads a File does not notice, unless the host stays
// away for longer than Target.Outage or the file is another one when it comes
// back. Whoever writes one gets the error: what a host that went away had
// taken but not yet stored is gone.
//
// The protocol is github.com/cloudsoda/go-smb2; how the connection is guarded
// stands in gate.go, and why in docs/design/smb.md.
package smb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/internal/secret"
)

// Protection is what keeps others on the network from reading along or
// putting bytes of theirs in between. There is no value for neither.
type Protection uint8

const (
	// Encrypted is what every client has that says nothing else. A host that
	// can't encrypt is refused.
	Encrypted Protection = iota
	// SignedOnly sends the bytes in the clear, signed. It is for hosts that
	// can't encrypt, and slower.
	SignedOnly
)

func (p Protection) String() string {
	if p == SignedOnly {
		return "signed only"
	}
	return "encrypted"
}

// A Target says which host, as whom and how.
type Target struct {
	Host string // name or address
	Port int    // 0 for 445
	// User is "user", "DOMAIN\user" or "user@domain".
	User       string
	Password   secret.Bytes
	Protection Protection
	// Connections is how many to use at most; 0 for DefaultConnections. The
	// second one is made when the first has more to do than it should.
	Connections int
	// Patience is how long the host may say nothing while we wait for an
	// answer until its connection is given up; 0 for a minute.
	Patience time.Duration
	// Outage is how long a reader tries to reach a host that went away; 0 for
	// two minutes.
	Outage time.Duration
}

// DefaultConnections is measured in docs/design/smb.md.
const DefaultConnections = 2

const (
	defaultPatience = time.Minute
	defaultOutage   = 2 * time.Minute
	// perConnection is how many reads of pieceBytes one connection may have
	// under way: what a line of 5 Gbit/s with round trips of 20 ms holds. Every
	// one of them takes 16 credits and up to 2 MiB of memory. Hosts lend out at
	// least 512 credits.
	perConnection = 14
	credits       = 512
	// pieceBytes is what one read or write moves at most: Windows takes no more
	// at once, whatever it says.
	pieceBytes = 1 << 20
)

func (t Target) address() string {
	port := t.Port
	if port == 0 {
		port = 445
	}
	return net.JoinHostPort(t.Host, strconv.Itoa(port))
}

// account is User apart: NTLM has the domain by itself, unless it is the part
// behind an @.
func (t Target) account() (domain, user string) {
	if domain, user, ok := strings.Cut(t.User, `\`); ok {
		return domain, user
	}
	return "", t.User
}

// A Client reaches the shares of one host. All methods are safe for concurrent
// use.
type Client struct {
	target Target
	lanes  []*lane
	slots  chan struct{} // requests that may be under way
	life   context.Context
	end    context.CancelFunc
	moved  atomic.Int64

	mu    sync.Mutex
	links []*link // that live, to be closed with the client
}

// A lane is the place of one connection, which is made anew when it is lost.
type lane struct {
	lock chan struct{} // held by whoever looks at link or makes a new one
	link *link
	busy atomic.Int64
}

// Dial connects and signs in. It tries once: fault.ErrDenied for a user that
// the host refuses, fault.ErrUnsupported for a host that can't protect the
// connection as the target asks.
func Dial(ctx context.Context, t Target) (*Client, error) {
	if t.Host == "" || strings.ContainsAny(t.Host, `\/ `) {
		return nil, fmt.Errorf("smb host %q", t.Host)
	}
	if t.Connections <= 0 {
		t.Connections = DefaultConnections
	}
	if t.Patience <= 0 {
		t.Patience = defaultPatience
	}
	if t.Outage <= 0 {
		t.Outage = defaultOutage
	}
	c := &Client{target: t, slots: make(chan struct{}, perConnection*t.Connections)}
	c.life, c.end = context.WithCancel(context.Background())
	for range t.Connections {
		c.lanes = append(c.lanes, &lane{lock: make(chan struct{}, 1)})
	}
	if _, err := c.connect(ctx, c.lanes[0]); err != nil {
		c.end()
		return nil, err
	}
	return c, nil
}

// Host is the target's, for messages and paths.
func (c *Client) Host() string { return c.target.Host }

// BytesRead is how many bytes of files came over the network since Dial,
// those included that were read ahead and not asked for.
func (c *Client) BytesRead() int64 { return c.moved.Load() }

// Close ends all connections, and with them what is under way. It may be
// called twice.
func (c *Client) Close() error {
	c.end()
	c.mu.Lock()
	links := c.links
	c.links = nil
	c.mu.Unlock()
	for _, l := range links {
		l.fail(errClosed)
	}
	return nil
}

var errClosed = errors.New("the connection was closed")

// connect gives the lane's connection, a new one if it was lost. An error is
// a *lostError where trying again may help.
func (c *Client) connect(ctx context.Context, n *lane) (*link, error) {
	select {
	case n.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-c.life.Done():
		return nil, errClosed
	}
	defer func() { <-n.lock }()
	if n.link != nil && n.link.gate.failed() == nil {
		return n.link, nil
	}
	n.link = nil
	ctx, cancel := context.WithTimeout(ctx, c.target.Patience)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)()
	l, err := dial(ctx, c.target)
	if err != nil {
		if c.life.Err() != nil {
			err = errClosed
		}
		return nil, fmt.Errorf("%s: %w", c.target.address(), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.Err() != nil {
		l.fail(errClosed)
		return nil, errClosed
	}
	live := c.links[:0]
	for _, k := range c.links {
		if k.gate.failed() == nil {
			live = append(live, k)
		}
	}
	c.links = append(live, l)
	n.link = l
	return l, nil
}

// lane is the one with the least to do, the first among equals: a connection
// that nobody needs is not made.
func (c *Client) lane() *lane {
	best := c.lanes[0]
	for _, n := range c.lanes[1:] {
		if b := best.busy.Load(); b > 0 && n.busy.Load() < b {
			best = n
		}
	}
	return best
}

// garbled is how many answers that make no sense are taken from a host in a
// row until it is left alone.
const garbled = 3

// again is againFor with the target's outage.
func (c *Client) again(ctx context.Context, f func(*lane, *link) error) error {
	return c.againFor(ctx, c.target.Outage, f)
}

// reconnect is connect within most.
func (c *Client) reconnect(ctx context.Context, n *lane, most time.Duration) (*link, error) {
	limited, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	l, err := c.connect(limited, n)
	if err != nil && ctx.Err() == nil && limited.Err() != nil && !errors.Is(err, ErrLost) {
		err = &lostError{fmt.Errorf("no connection: %w", err), false}
	}
	return l, err
}

// againFor runs f until it is done, the host refuses, or the outage has lasted
// too long. f may run several times, so it must be something that can be
// repeated.
func (c *Client) againFor(ctx context.Context, outage time.Duration, f func(*lane, *link) error) error {
	var since time.Time
	senseless := 0
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		n := c.lane()
		n.busy.Add(1)
		l, err := c.reconnect(ctx, n, outage)
		if err == nil {
			err = f(n, l)
		}
		n.busy.Add(-1)
		var lost *lostError
		if err == nil || !errors.As(err, &lost) {
			return err
		}
		if lost.senseless {
			if senseless++; senseless == garbled {
				return err
			}
		}
		if since.IsZero() {
			since = time.Now()
		} else if gone := time.Since(since); gone > outage {
			return fmt.Errorf("%w; tried again for %v", err, gone.Round(time.Second))
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		case <-c.life.Done():
			t.Stop()
			return errClosed
		}
	}
}

// once runs f on a connection, and only the making of that is repeated: f may
// have been done although its answer was lost.
func (c *Client) once(ctx context.Context, f func(*link) error) error {
	var l *link
	if err := c.again(ctx, func(_ *lane, got *link) error { l = got; return nil }); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return f(l)
}

// slot waits until one more request may be under way.
func (c *Client) slot(ctx context.Context) error {
	select {
	case c.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.life.Done():
		return errClosed
	}
}

// detached runs f and waits for it or for ctx, whichever ends first: what is
// under way on a connection can't be taken back without losing the connection
// for everybody. f must touch nothing that its caller has.
func detached[T any](ctx context.Context, f func() (T, error)) (T, error) {
	if ctx.Done() == nil {
		return f()
	}
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}
