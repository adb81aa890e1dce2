package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

// A Target says which export of which server.
type Target struct {
	Network string // "unix" or "tcp"
	Address string // socket path, or host:port
	Export  string // "" is the server's default export
	// TLS is used if it is set; a server that has none is then refused.
	TLS *tls.Config
	// Connections is how many to open if the server allows several; 0 for one.
	Connections int
	// MetaContexts to select, "base:allocation", "qemu:dirty-bitmap:NAME".
	// A server works out all of them for every block status request, so a
	// context that is costly deserves a client of its own.
	MetaContexts []string
}

func (t Target) String() string { return fmt.Sprintf("nbd export %q at %s", t.Export, t.Address) }

// pipeline is how many requests one connection may have under way; servers
// such as QEMU stop reading at that many.
const pipeline = 16

// patience is how long dialling and negotiation may take. A server that has
// all the clients it allows lets the next one connect and says nothing.
const patience = 30 * time.Second

// A Client reads and writes one export over one or more connections. All
// methods are safe for concurrent use.
//
// An *Error is the server's answer and concerns one request. Every other error
// is the end of a connection; the Client does not reconnect.
type Client struct {
	target Target
	conns  []*conn
	slots  chan struct{}
	life   context.Context // ends with Close
	end    context.CancelFunc
}

// Dial opens the export. ctx limits the dialling and negotiation alone.
//
// Errors: fault.ErrNotFound for an export that does not exist,
// fault.ErrUnsupported for a server that is too old.
func Dial(ctx context.Context, t Target) (*Client, error) {
	first, err := dial(ctx, t)
	if err != nil {
		return nil, err
	}
	c := &Client{target: t, conns: []*conn{first}}
	for len(c.conns) < t.Connections && first.export.flags&flagCanMultiConn != 0 {
		// Further connections only make it faster: a server that is slow to
		// accept them has reached its limit, and what we have will do.
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		next, err := dial(short, t)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				c.closeAll()
				return nil, err
			}
			break
		}
		c.conns = append(c.conns, next)
		if !next.export.same(first.export) {
			c.closeAll()
			return nil, fmt.Errorf("%v: %w", t, protocolError("two connections see different exports"))
		}
	}
	c.slots = make(chan struct{}, pipeline*len(c.conns))
	c.life, c.end = context.WithCancel(context.Background())
	for _, k := range c.conns {
		go k.receive()
	}
	return c, nil
}

func dial(ctx context.Context, t Target) (*conn, error) {
	var c *conn
	err := converse(ctx, t, func(n *negotiation) error {
		e, err := n.open(t.Export, t.MetaContexts)
		c = newConn(n, e)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// converse connects and runs f within ctx. After an error of f the connection
// is closed.
func converse(ctx context.Context, t Target, f func(n *negotiation) error) error {
	if len(t.Export) > maxString {
		return fmt.Errorf("nbd export name of %d bytes", len(t.Export))
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var d net.Dialer
	nc, err := d.DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	n, err := greet(ctx, nc, t.TLS)
	if err == nil {
		err = f(n)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("no answer: %w", ctx.Err())
		}
		return fmt.Errorf("nbd server at %s: %w", t.Address, err)
	}
	return nil
}

// List asks the server at t for the names of its exports; t.Export is not
// used. Many servers refuse to tell.
func List(ctx context.Context, t Target) ([]string, error) {
	var names []string
	err := converse(ctx, t, func(n *negotiation) (err error) {
		if names, err = n.list(); err == nil {
			n.send(optAbort, nil) // courtesy
			n.conn.Close()
		}
		return err
	})
	return names, err
}

// ListContexts asks which metadata contexts the export t has that match the
// queries; "qemu:dirty-bitmap:" matches all of that kind, and no query at all
// asks for everything.
func ListContexts(ctx context.Context, t Target, queries ...string) ([]string, error) {
	var names []string
	err := converse(ctx, t, func(n *negotiation) error {
		if err := n.ask(optStructured, nil, nil); err != nil {
			return err
		}
		got, err := n.meta(optListMeta, t.Export, queries)
		if err != nil {
			return err
		}
		for name := range got {
			names = append(names, name)
		}
		n.send(optAbort, nil)
		n.conn.Close()
		return nil
	})
	slices.Sort(names)
	return names, err
}

// same says whether two connections see one and the same export.
func (e export) same(f export) bool {
	if e.size != f.size || e.flags != f.flags || e.min != f.min || e.max != f.max ||
		e.structure != f.structure || len(e.contexts) != len(f.contexts) {
		return false
	}
	for name := range e.contexts {
		if _, ok := f.contexts[name]; !ok {
			return false
		}
	}
	return true
}

func (c *Client) export() export { return c.conns[0].export }

// Size is the export's size in bytes.
func (c *Client) Size() int64 { return c.export().size }

// ReadOnly says whether the server takes no writes.
func (c *Client) ReadOnly() bool { return c.export().flags&flagReadOnly != 0 }

// Contexts are the metadata contexts that were asked for and that the server
// has, sorted.
func (c *Client) Contexts() []string {
	names := make([]string, 0, len(c.export().contexts))
	for name := range c.export().contexts {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// BlockSizes are the server's in bytes: writes must be aligned to the minimum,
// and one request moves at most the maximum.
func (c *Client) BlockSizes() (minimum, preferred, maximum int64) {
	e := c.export()
	return e.min, e.preferred, e.max
}

// Connections is how many connections are open.
func (c *Client) Connections() int { return len(c.conns) }

// Close ends all connections; requests under way fail. It may be called twice.
func (c *Client) Close() error {
	c.end()
	c.closeAll()
	return nil
}

func (c *Client) closeAll() {
	for _, k := range c.conns {
		k.close()
	}
}

// begin sends k on the connection with the least to do, once there is room.
func (c *Client) begin(ctx context.Context, k *call) (*conn, error) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	k.release = func() { <-c.slots }
	best, least := c.conns[0], 0
	for i, n := range c.conns {
		if l := n.load(); i == 0 || l < least {
			best, least = n, l
		}
	}
	return best, best.start(ctx, k)
}

// do runs calls side by side and waits for all that were started: their
// buffers belong to the caller again when it returns. next gives nil at the
// end.
func (c *Client) do(ctx context.Context, next func() *call) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)()
	type started struct {
		n *conn
		k *call
	}
	var all []started
	var first error
	for first == nil {
		k := next()
		if k == nil {
			break
		}
		n, err := c.begin(ctx, k)
		if err != nil {
			first = err
			break
		}
		all = append(all, started{n, k})
	}
	for _, s := range all {
		if err := s.n.wait(ctx, s.k); err != nil && first == nil {
			first = err
			cancel()
		}
	}
	if first != nil && c.life.Err() != nil && errors.Is(first, context.Canceled) {
		first = errClosed
	}
	if first != nil {
		return fmt.Errorf("%v: %w", c.target, first)
	}
	return nil
}

// one runs a single call.
func (c *Client) one(ctx context.Context, k *call) error {
	return c.do(ctx, func() *call { r := k; k = nil; return r })
}

// ReadAt is ReadAtContext without a limit but Close.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads as io.ReaderAt does, with any offset and length,
// whatever the server's block sizes. After an error p holds nothing of use.
// What a cancelled ctx leaves under way is dropped when it arrives.
func (c *Client) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	e := c.export()
	if off < 0 {
		return 0, fmt.Errorf("%v: read at %d", c.target, off)
	}
	if off >= e.size {
		return 0, io.EOF
	}
	n := int64(len(p))
	var eof error
	if n > e.size-off {
		n, eof = e.size-off, io.EOF
	}
	if n == 0 {
		return 0, nil
	}
	from := off / e.min * e.min
	end := off + n
	if r := end % e.min; r != 0 {
		end = min(end+e.min-r, e.size)
	}
	buf := p[:n]
	if from != off || end != off+n {
		buf = make([]byte, end-from)
	}
	if err := c.do(ctx, c.pieces(from, end-from, e.max, func(at, n int64) *call {
		return &call{cmd: cmdRead, off: from + at, length: uint32(n), buf: buf[at : at+n]}
	})); err != nil {
		return 0, err
	}
	if &buf[0] != &p[0] {
		copy(p[:n], buf[off-from:])
	}
	return int(n), eof
}

// pieces cuts [off, off+n) at step bytes.
func (c *Client) pieces(off, n, step int64, make func(at, n int64) *call) func() *call {
	var at int64
	return func() *call {
		if at >= n {
			return nil
		}
		k := make(at, min(step, n-at))
		at += step
		return k
	}
}
