package smb

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/internal/fault"
)

// A gate stands between the protocol's library and the network. The library
// encrypts when the server asks for it, takes answers in the clear even then,
// allocates what a frame's header says and waits without end; the gate sees
// to it that
//
//   - a session is encrypted because we say so: it sets the server's request
//     for encryption in the last answer of the session setup. That answer is
//     no part of what the keys come from, so a server that can encrypt
//     notices nothing but encrypted requests;
//   - once there is a session nothing goes out or comes in unencrypted, or
//     unsigned where that was chosen, and before it nothing but negotiation;
//   - a session as guest, which has no keys, is refused;
//   - no frame is larger than what was asked for could need;
//   - a write that the network does not take ends the connection.
type gate struct {
	conn       net.Conn
	r          *bufio.Reader
	protection Protection
	patience   time.Duration

	up   atomic.Bool  // the session is there
	last atomic.Int64 // when something last came in, Unix nanoseconds

	// For the library's one reader.
	held []byte // of a frame that was looked at whole
	left int    // of a frame that passes through
	// For its one writer.
	head []byte // of a frame whose rest follows

	once sync.Once
	done chan struct{}
	err  error // why it ended, once done is closed
}

const (
	// A frame has at most pieceBytes of data and some headers.
	maxFrame      = pieceBytes + 64<<10
	maxSetupFrame = 64 << 10

	headerBytes = 64 // of an SMB 2 message

	commandNegotiate = 0
	commandSetup     = 1

	flagSigned = 0x8

	dialect300 = 0x0300
	dialect302 = 0x0302
	dialect311 = 0x0311

	capabilityEncryption = 0x40
	contextEncryption    = 2

	sessionGuest   = 0x1
	sessionNull    = 0x2
	sessionEncrypt = 0x4
)

var le = binary.LittleEndian

func newGate(conn net.Conn, t Target) *gate {
	g := &gate{conn: conn, r: bufio.NewReaderSize(conn, 64<<10), protection: t.Protection, patience: t.Patience, done: make(chan struct{})}
	g.last.Store(time.Now().UnixNano())
	return g
}

// fail ends the connection for the reason err, the first of which counts.
func (g *gate) fail(err error) error {
	g.once.Do(func() {
		g.err = err
		close(g.done)
		g.conn.Close()
	})
	return g.failed()
}

// failed is why the connection ended, or nil while it lives.
func (g *gate) failed() error {
	select {
	case <-g.done:
		return g.err
	default:
		return nil
	}
}

// senseless is an answer that no server gives.
func senseless(format string, args ...any) error {
	return &lostError{fmt.Errorf(format, args...), true}
}

func (g *gate) Read(p []byte) (int, error) {
	if len(g.held) == 0 && g.left == 0 {
		if err := g.frame(); err != nil {
			return 0, g.fail(broken(err))
		}
	}
	if len(g.held) > 0 {
		n := copy(p, g.held)
		g.held = g.held[n:]
		return n, nil
	}
	n, err := g.r.Read(p[:min(len(p), g.left)])
	g.left -= n
	g.last.Store(time.Now().UnixNano())
	if err != nil {
		return n, g.fail(broken(err))
	}
	return n, nil
}

// broken is what the end of a connection is to whoever waits for an answer.
func broken(err error) error {
	var lost *lostError
	switch {
	case errors.As(err, &lost), errors.Is(err, fault.ErrDenied), errors.Is(err, fault.ErrUnsupported):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &lostError{errors.New("the host closed the connection"), false}
	}
	return &lostError{err, false}
}

// frame reads the head of the next frame, and during the setup all of it.
func (g *gate) frame() error {
	var head [4]byte
	if _, err := io.ReadFull(g.r, head[:]); err != nil {
		return err
	}
	g.last.Store(time.Now().UnixNano())
	n := int(binary.BigEndian.Uint32(head[:]))
	limit := maxFrame
	if !g.up.Load() {
		limit = maxSetupFrame
	}
	if n < headerBytes || n > limit {
		return senseless("a frame of %d bytes", n)
	}
	if !g.up.Load() {
		g.held = make([]byte, 4+n)
		copy(g.held, head[:])
		if _, err := io.ReadFull(g.r, g.held[4:]); err != nil {
			return err
		}
		return g.setup(g.held[4:])
	}
	magic, err := g.r.Peek(4)
	if err != nil {
		return err
	}
	switch string(magic) {
	case "\xfdSMB":
	case "\xfeSMB":
		if g.protection == Encrypted {
			return senseless("an answer that is not encrypted")
		}
	default:
		return senseless("a frame that begins with %x", magic)
	}
	g.held, g.left = append(g.held[:0], head[:]...), n
	return nil
}

// setup looks at an answer of the negotiation, and changes the last one.
func (g *gate) setup(p []byte) error {
	if string(p[:4]) != "\xfeSMB" {
		return senseless("a frame that begins with %x", p[:4])
	}
	status, command, body := le.Uint32(p[8:]), le.Uint16(p[12:]), p[headerBytes:]
	switch {
	case status != 0:
		return nil // the library says what it means
	case command == commandNegotiate:
		return g.negotiated(p)
	case command == commandSetup:
		if len(body) < 8 {
			return senseless("a session setup of %d bytes", len(p))
		}
		flags := le.Uint16(body[2:])
		if flags&(sessionGuest|sessionNull) != 0 {
			return fmt.Errorf("the host lets this user in as a guest only, which protects nothing: %w", fault.ErrDenied)
		}
		if g.protection == Encrypted {
			le.PutUint16(body[2:], flags|sessionEncrypt)
		}
		g.up.Store(true)
		return nil
	}
	return senseless("an answer to command %d before there is a session", command)
}

// negotiated says whether what the server settled for is enough.
func (g *gate) negotiated(p []byte) error {
	body := p[headerBytes:]
	if len(body) < 64 {
		return senseless("a negotiation of %d bytes", len(p))
	}
	dialect := le.Uint16(body[4:])
	switch dialect {
	case dialect300, dialect302:
		if g.protection == Encrypted && le.Uint32(body[24:])&capabilityEncryption == 0 {
			return errNoEncryption
		}
	case dialect311:
		if g.protection == Encrypted && !encrypts(p) {
			return errNoEncryption
		}
	default:
		return fmt.Errorf("the host speaks SMB %d.%d and no version 3: %w", dialect>>8, dialect>>4&0xf, fault.ErrUnsupported)
	}
	return nil
}

var errNoEncryption = fmt.Errorf("the host does not encrypt; signing alone must be asked for: %w", fault.ErrUnsupported)

// encrypts says whether the negotiation p of SMB 3.1.1 has a cipher.
func encrypts(p []byte) bool {
	body := p[headerBytes:]
	at := int64(le.Uint32(body[60:])) // from the start of the message
	for range le.Uint16(body[6:]) {
		if at < headerBytes || at+8 > int64(len(p)) {
			return false
		}
		kind, n := le.Uint16(p[at:]), int64(le.Uint16(p[at+2:]))
		data := p[at+8:]
		if n > int64(len(data)) {
			return false
		}
		if kind == contextEncryption {
			return n >= 4 && le.Uint16(data) == 1 && le.Uint16(data[2:]) != 0
		}
		at += (8 + n + 7) &^ 7
	}
	return false
}

// Write takes a frame's head and then its rest, and sends them as one.
func (g *gate) Write(p []byte) (int, error) {
	if err := g.failed(); err != nil {
		return 0, err
	}
	if g.head == nil {
		g.head = append([]byte(nil), p...)
		return len(p), nil
	}
	frame := net.Buffers{g.head, p}
	g.head = nil
	if err := g.outgoing(p); err != nil {
		return 0, g.fail(err)
	}
	if g.up.Load() {
		g.conn.SetWriteDeadline(time.Now().Add(g.patience))
	}
	if _, err := frame.WriteTo(g.conn); err != nil {
		return 0, g.fail(broken(err))
	}
	return len(p), nil
}

// outgoing is the last look at what leaves: nothing here is the server's doing.
func (g *gate) outgoing(p []byte) error {
	switch {
	case len(p) < headerBytes:
		return fmt.Errorf("a request of %d bytes", len(p))
	case string(p[:4]) == "\xfdSMB":
		return nil
	case !g.up.Load() && le.Uint16(p[12:]) <= commandSetup:
		return nil
	case g.up.Load() && g.protection == SignedOnly && le.Uint32(p[16:])&flagSigned != 0:
		return nil
	}
	return fmt.Errorf("request %d would have left unprotected", le.Uint16(p[12:]))
}

func (g *gate) Close() error {
	g.fail(errClosed)
	return nil
}

func (g *gate) LocalAddr() net.Addr                { return g.conn.LocalAddr() }
func (g *gate) RemoteAddr() net.Addr               { return g.conn.RemoteAddr() }
func (g *gate) SetDeadline(t time.Time) error      { return g.conn.SetDeadline(t) }
func (g *gate) SetReadDeadline(t time.Time) error  { return g.conn.SetReadDeadline(t) }
func (g *gate) SetWriteDeadline(t time.Time) error { return g.conn.SetWriteDeadline(t) }
