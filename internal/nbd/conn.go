package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/extent"
)

// A call is one request on its way. The connection's reader owns it until done
// is closed.
type call struct {
	cmd, flags uint16
	off        int64
	length     uint32
	payload    []byte // of a write; not touched after start
	buf        []byte // of a read
	meta       string // the context of a block status
	done       chan struct{}
	release    func() // gives back the slot of this request

	// For the reader alone.
	filled   extent.Set // which bytes of a read were answered
	chunks   int64
	status   []byte // the block status descriptors of context
	answered bool   // status was answered
	failure  error  // first error chunk
	context  uint32 // the id of meta on this connection

	err error // valid once done is closed

	// Guarded by conn.mu.
	abandoned bool          // nobody waits: buf must not be written any more
	busy      chan struct{} // while the reader writes to buf; closed when it stops
}

func (c *call) op() string {
	switch c.cmd {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdWriteZeroes:
		return "write zeroes"
	case cmdBlockStatus:
		return "block status"
	}
	return fmt.Sprintf("command %d", c.cmd)
}

// A conn is one connection in its transmission phase. Any number of requests
// may be on their way; one goroutine reads all the replies.
type conn struct {
	net       net.Conn
	r         *bufio.Reader
	export    export
	writing   chan struct{} // held while a request is written; a mutex that heeds a context
	closeOnce sync.Once

	mu      sync.Mutex
	waiting map[uint64]*call
	cookie  uint64
	err     error // why the connection is dead
}

func newConn(n *negotiation, e export) *conn {
	return &conn{net: n.conn, r: n.r, export: e, writing: make(chan struct{}, 1), waiting: map[uint64]*call{}}
}

// load is how many requests wait for an answer.
func (c *conn) load() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}

// start sends call k. After an error nothing is under way and the slot is
// given back.
func (c *conn) start(ctx context.Context, k *call) error {
	k.done = make(chan struct{})
	k.context = c.export.contexts[k.meta]
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		k.release()
		return ctx.Err()
	}
	defer func() { <-c.writing }()

	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		k.release()
		return c.err
	}
	c.cookie++
	cookie := c.cookie
	c.waiting[cookie] = k
	c.mu.Unlock()

	head := be.AppendUint32(make([]byte, 0, 28), magicRequest)
	head = be.AppendUint16(head, k.flags)
	head = be.AppendUint16(head, k.cmd)
	head = be.AppendUint64(head, cookie)
	head = be.AppendUint64(head, uint64(k.off))
	head = be.AppendUint32(head, k.length)

	stop := context.AfterFunc(ctx, func() { c.net.SetWriteDeadline(time.Unix(1, 0)) })
	bufs := net.Buffers{head}
	if len(k.payload) > 0 {
		bufs = append(bufs, k.payload)
	}
	_, err := bufs.WriteTo(c.net)
	if err == nil {
		if !stop() {
			c.net.SetWriteDeadline(time.Time{})
		}
		return nil
	}
	stop()
	// Half a request can't be taken back, so the connection is lost with it.
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	c.fail(err)
	<-k.done // so that nobody holds its buffer
	return err
}

// wait waits for the answer to k, which was started.
func (c *conn) wait(ctx context.Context, k *call) error {
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	k.abandoned = true
	busy := k.busy
	c.mu.Unlock()
	if busy != nil {
		// The reader is filling the caller's buffer at this moment. It will be
		// done soon, or the server hangs in the middle of a reply.
		t := time.NewTimer(time.Second)
		defer t.Stop()
		select {
		case <-busy:
		case <-t.C:
			c.fail(ctx.Err())
			<-busy
		}
	}
	return ctx.Err()
}

// fail ends the connection: everybody who waits gets err.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	lost := c.waiting
	c.waiting = map[uint64]*call{}
	err = c.err
	busy := make([]chan struct{}, 0, 1)
	for _, k := range lost {
		k.abandoned = true
		if k.busy != nil {
			busy = append(busy, k.busy)
		}
	}
	c.mu.Unlock()
	c.closeOnce.Do(func() { c.net.Close() })
	// Where the reader is filling a buffer at this moment, the closed
	// connection stops it; only then the buffer is its caller's again.
	for _, b := range busy {
		<-b
	}
	for _, k := range lost {
		k.end(err)
	}
}

func (k *call) end(err error) {
	k.err = err
	close(k.done)
	k.release()
}

// receive reads replies until the connection ends.
func (c *conn) receive() {
	for {
		if err := c.receiveOne(); err != nil {
			c.fail(err)
			return
		}
	}
}

func (c *conn) receiveOne() error {
	var h [20]byte
	if _, err := io.ReadFull(c.r, h[:4]); err != nil {
		return short(err)
	}
	switch magic := be.Uint32(h[:]); {
	case magic == magicSimple:
		if _, err := io.ReadFull(c.r, h[4:16]); err != nil {
			return short(err)
		}
		return c.simple(be.Uint64(h[8:]), be.Uint32(h[4:]))
	case magic == magicChunk && c.export.structure:
		if _, err := io.ReadFull(c.r, h[4:20]); err != nil {
			return short(err)
		}
		return c.chunk(be.Uint64(h[8:]), be.Uint16(h[4:]), be.Uint16(h[6:]), be.Uint32(h[16:]))
	default:
		return protocolError("reply starts with %x", h[:4])
	}
}

func (c *conn) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	k := c.waiting[cookie]
	if k == nil {
		return nil, protocolError("reply to request %d, which does not wait for one", cookie)
	}
	return k, nil
}

// finish ends the call with its last reply.
func (c *conn) finish(cookie uint64, err error) {
	c.mu.Lock()
	k := c.waiting[cookie]
	delete(c.waiting, cookie)
	c.mu.Unlock()
	if k != nil {
		k.end(err)
	}
}

func (c *conn) simple(cookie uint64, errno uint32) error {
	k, err := c.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case errno != 0:
		c.finish(cookie, &Error{Op: k.op(), Errno: errno})
		return nil
	case k.cmd == cmdBlockStatus, k.cmd == cmdRead && c.export.structure:
		return protocolError("simple reply to %s", k.op())
	case k.cmd == cmdRead:
		if err := c.fill(k, k.buf); err != nil {
			return err
		}
	}
	c.finish(cookie, nil)
	return nil
}

// chunk takes one chunk of a structured reply; size is its payload in bytes.
func (c *conn) chunk(cookie uint64, flags, typ uint16, size uint32) error {
	k, err := c.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case typ == chunkNone:
		if size != 0 || flags&chunkFlagDone == 0 {
			return protocolError("empty chunk of %d bytes, flags %#x", size, flags)
		}
	case typ == chunkData && k.cmd == cmdRead:
		err = c.dataChunk(k, size)
	case typ == chunkHole && k.cmd == cmdRead:
		err = c.holeChunk(k, size)
	case typ == chunkBlockStatus && k.cmd == cmdBlockStatus:
		err = c.statusChunk(k, size)
	case typ&chunkIsError != 0:
		err = c.errorChunk(k, typ, size)
	default:
		err = protocolError("chunk of type %d in reply to %s", typ, k.op())
	}
	if err != nil || flags&chunkFlagDone == 0 {
		return err
	}
	switch {
	case k.failure != nil:
		c.finish(cookie, k.failure)
	case k.cmd == cmdRead && k.filled.Bytes() != int64(k.length):
		return protocolError("read of %d bytes was answered with %d", k.length, k.filled.Bytes())
	case k.cmd == cmdBlockStatus && !k.answered:
		return protocolError("block status without the context that was asked for")
	default:
		c.finish(cookie, nil)
	}
	return nil
}

// claim notes that [off, off+n) of the export is answered for read k and gives
// where in its buffer that is. Bytes that were not asked for, or answered
// before, are refused: they could only hide others that never came.
func (k *call) claim(off uint64, n int64) (int64, error) {
	at := int64(off) - k.off
	if off > 1<<63-1 || n <= 0 || at < 0 || at > int64(k.length) || n > int64(k.length)-at {
		return 0, protocolError("read of %d bytes at %d answered with %d at %d", k.length, k.off, n, off)
	}
	if k.chunks++; k.chunks > int64(k.length)/512+2 {
		return 0, protocolError("read of %d bytes cut into more than %d chunks", k.length, k.chunks-1)
	}
	before := k.filled.Bytes()
	k.filled.Add(extent.Extent{Off: at, Len: n})
	if k.filled.Bytes() != before+n {
		return 0, protocolError("bytes %d+%d of a read answered twice", off, n)
	}
	return at, nil
}

func (c *conn) dataChunk(k *call, size uint32) error {
	var off [8]byte
	if size < 9 {
		return protocolError("data chunk of %d bytes", size)
	}
	if _, err := io.ReadFull(c.r, off[:]); err != nil {
		return short(err)
	}
	at, err := k.claim(be.Uint64(off[:]), int64(size)-8)
	if err != nil {
		return err
	}
	return c.fill(k, k.buf[at:at+int64(size)-8])
}

func (c *conn) holeChunk(k *call, size uint32) error {
	var b [12]byte
	if size != 12 {
		return protocolError("hole chunk of %d bytes", size)
	}
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return short(err)
	}
	n := int64(be.Uint32(b[8:]))
	at, err := k.claim(be.Uint64(b[:]), n)
	if err != nil {
		return err
	}
	if c.occupy(k) {
		clear(k.buf[at : at+n])
		c.vacate(k)
	}
	return nil
}

// statusChunk keeps the descriptors if they are of the context that was asked
// for; a connection's other contexts are answered too, unasked.
func (c *conn) statusChunk(k *call, size uint32) error {
	if size < 12 || (size-4)%8 != 0 || size > maxStatus {
		return protocolError("block status chunk of %d bytes", size)
	}
	if k.chunks++; k.chunks > int64(len(c.export.contexts)) {
		return protocolError("more block status chunks than contexts")
	}
	var id [4]byte
	if _, err := io.ReadFull(c.r, id[:]); err != nil {
		return short(err)
	}
	if be.Uint32(id[:]) != k.context {
		return c.discard(int64(size) - 4)
	}
	if k.answered {
		return protocolError("two block status chunks of one context")
	}
	k.answered = true
	body, err := c.body(size - 4)
	k.status = body
	return err
}

func (c *conn) errorChunk(k *call, typ uint16, size uint32) error {
	if size < 6 || size > maxString+16 {
		return protocolError("error chunk of %d bytes", size)
	}
	body, err := c.body(size)
	if err != nil {
		return err
	}
	errno, text := be.Uint32(body), int(be.Uint16(body[4:]))
	if text > len(body)-6 || typ == chunkErrorOffset && len(body) != 6+text+8 {
		return protocolError("error chunk of %d bytes with a message of %d", size, text)
	}
	if errno == 0 {
		return protocolError("error chunk without an error")
	}
	if k.failure == nil {
		k.failure = &Error{Op: k.op(), Errno: errno, Message: string(body[6 : 6+text])}
	}
	return nil
}

// body reads n bytes, taking memory only as they come.
func (c *conn) body(n uint32) ([]byte, error) {
	const step = 64 << 10
	p := make([]byte, 0, min(n, step))
	for len(p) < int(n) {
		have := len(p)
		p = append(p, make([]byte, min(int(n)-have, max(step, have)))...)
		if _, err := io.ReadFull(c.r, p[have:]); err != nil {
			return nil, short(err)
		}
	}
	return p, nil
}

func (c *conn) discard(n int64) error {
	if _, err := io.CopyN(io.Discard, c.r, n); err != nil {
		return short(err)
	}
	return nil
}

// occupy asks for the right to write into the buffer of k, which ends when its
// caller stops waiting.
func (c *conn) occupy(k *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k.abandoned {
		return false
	}
	k.busy = make(chan struct{})
	return true
}

func (c *conn) vacate(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(k.busy)
	k.busy = nil
}

// fill reads len(p) bytes of payload for k into p, a part of its buffer.
func (c *conn) fill(k *call, p []byte) error {
	if !c.occupy(k) {
		return c.discard(int64(len(p)))
	}
	_, err := io.ReadFull(c.r, p)
	c.vacate(k)
	if err != nil {
		return short(err)
	}
	return nil
}

// close says goodbye and ends the connection.
func (c *conn) close() {
	select {
	case c.writing <- struct{}{}:
		head := be.AppendUint32(make([]byte, 0, 28), magicRequest)
		head = be.AppendUint16(head, 0)
		head = be.AppendUint16(head, cmdDisconnect)
		c.net.SetWriteDeadline(time.Now().Add(time.Second))
		c.net.Write(append(head, make([]byte, 20)...)) // courtesy only: the answer is that it hangs up
		<-c.writing
	default:
		// A request is stuck in the middle; no goodbye fits there.
	}
	c.fail(errClosed)
}

var errClosed = errors.New("nbd connection was closed")
