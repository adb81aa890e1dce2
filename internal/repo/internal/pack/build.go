package pack

import (
	"encoding/hex"
	"errors"
	"hash/crc32"
	"io"
	"sync"

	"github.com/zeebo/blake3"
)

const segBytes = 1 << 20

// A Memory lends what packs are built in, up to a limit.
type Memory struct {
	mu    sync.Mutex
	free  [][]byte
	lent  int
	limit int
	back  chan struct{} // closed when something was given back
}

// NewMemory makes a Memory of at most limit bytes.
func NewMemory(limit int64) *Memory {
	return &Memory{limit: int(limit / segBytes), back: make(chan struct{})}
}

// take gives n segments or none; force ignores the limit.
func (m *Memory) take(n int, force bool) [][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lent+n > m.limit && !force {
		return nil
	}
	m.lent += n
	out := make([][]byte, 0, n)
	for range n {
		if k := len(m.free); k > 0 {
			out, m.free = append(out, m.free[k-1]), m.free[:k-1]
		} else {
			out = append(out, make([]byte, segBytes))
		}
	}
	return out
}

func (m *Memory) give(segs [][]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lent -= len(segs)
	m.free = append(m.free, segs...)
	close(m.back)
	m.back = make(chan struct{})
}

// Returned gives a channel that is closed when memory next comes back. Get it
// before trying Append, wait on it after.
func (m *Memory) Returned() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.back
}

// ErrMemory says that all memory for packs is lent: some pack must be stored
// first.
var ErrMemory = errors.New("all pack memory is in use")

// A Builder builds one pack in memory. It is not safe for concurrent use.
type Builder struct {
	mem     *Memory
	segs    [][]byte
	n       int64
	entries []Entry
	repo    [16]byte
	session [16]byte
}

// NewBuilder starts a pack of the session; it takes no memory yet.
func NewBuilder(mem *Memory, repo, session [16]byte) *Builder {
	return &Builder{mem: mem, repo: repo, session: session}
}

// Bytes is how long the records and the header are so far.
func (b *Builder) Bytes() int64 { return b.n }

// Len is how many records there are.
func (b *Builder) Len() int { return len(b.entries) }

// Entries are the records so far.
func (b *Builder) Entries() []Entry { return b.entries }

// Full says whether there is no room for another record of n bytes.
func (b *Builder) Full(n int) bool { return len(b.entries) > 0 && b.n+int64(n) > TargetBytes }

// Append adds a record and says where. It gives ErrMemory, having done
// nothing, if there is no memory for it.
func (b *Builder) Append(e Entry, record []byte) (Entry, error) {
	n := len(record)
	if b.n == 0 {
		n += HeaderBytes
	}
	if !b.room(n, false) {
		return e, ErrMemory
	}
	if b.n == 0 {
		var h [HeaderBytes]byte
		putHeader(h[:], b.repo, b.session)
		b.write(h[:])
	}
	e.Off = uint32(b.n)
	b.write(record)
	b.entries = append(b.entries, e)
	return e, nil
}

func (b *Builder) room(n int, force bool) bool {
	need := int((b.n+int64(n)+segBytes-1)/segBytes) - len(b.segs)
	if need <= 0 {
		return true
	}
	segs := b.mem.take(need, force)
	b.segs = append(b.segs, segs...)
	return segs != nil
}

func (b *Builder) write(p []byte) {
	for len(p) > 0 {
		k := copy(b.segs[b.n/segBytes][b.n%segBytes:], p)
		b.n += int64(k)
		p = p[k:]
	}
}

// Merge appends the records of c and frees it. It gives ErrMemory, having
// done nothing, if there is no memory for all of them.
func (b *Builder) Merge(c *Builder) error {
	if !b.room(int(c.n)+HeaderBytes, false) {
		return ErrMemory
	}
	for _, e := range c.entries {
		rec := make([]byte, e.Bytes())
		c.ReadAt(rec, int64(e.Off))
		if _, err := b.Append(e, rec); err != nil {
			return err
		}
	}
	c.Free()
	return nil
}

// Keep drops the records that keep refuses, and gives back the memory that is
// then free. The order stays.
func (b *Builder) Keep(keep func(Entry) bool) {
	end := int64(HeaderBytes)
	kept := b.entries[:0]
	for _, e := range b.entries {
		if !keep(e) {
			continue
		}
		if off := int64(e.Off); off != end {
			b.move(end, off, e.Bytes())
			e.Off = uint32(end)
		}
		end += e.Bytes()
		kept = append(kept, e)
	}
	if b.entries = kept; len(kept) == 0 {
		b.Free()
		return
	}
	b.n = end
	if need := int((b.n + segBytes - 1) / segBytes); need < len(b.segs) {
		b.mem.give(b.segs[need:])
		b.segs = b.segs[:need:need]
	}
}

// move copies n bytes to an earlier place.
func (b *Builder) move(to, from, n int64) {
	for n > 0 {
		src := b.segs[from/segBytes][from%segBytes:]
		k := int64(copy(b.segs[to/segBytes][to%segBytes:], src[:min(n, int64(len(src)))]))
		to, from, n = to+k, from+k, n-k
	}
}

// Finish writes entries and footer and gives the pack's id in hexadecimal. The
// pack is then read with ReadAt and Bytes.
func (b *Builder) Finish() (id string, sum [32]byte) {
	t := make([]byte, len(b.entries)*EntryBytes+footerBytes)
	for i, e := range b.entries {
		putEntry(t[i*EntryBytes:], e)
	}
	at := len(b.entries) * EntryBytes
	putFooter(t[at:], len(b.entries), crc32.Checksum(t[:at], castagnoli))
	b.room(len(t), true)
	b.write(t)
	h := blake3.New()
	for i, s := range b.segs {
		h.Write(s[:min(segBytes, b.n-int64(i)*segBytes)])
	}
	h.Sum(sum[:0])
	return hex.EncodeToString(sum[:]), sum
}

// ReadAt reads what was written.
func (b *Builder) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && off < b.n {
		seg := b.segs[off/segBytes]
		k := copy(p[n:], seg[off%segBytes:min(segBytes, b.n-off/segBytes*segBytes)])
		n, off = n+k, off+int64(k)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// View gives n bytes from off on to read, or nil where they do not lie together
// in memory. They are valid until Free.
func (b *Builder) View(off, n int64) []byte {
	if off < 0 || n < 0 || off+n > b.n || off/segBytes != (off+n-1)/segBytes {
		return nil
	}
	return b.segs[off/segBytes][off%segBytes:][:n:n]
}

// Free gives the memory back; it may be called twice.
func (b *Builder) Free() {
	if len(b.segs) > 0 {
		b.mem.give(b.segs)
	}
	b.segs, b.n, b.entries = nil, 0, nil
}
