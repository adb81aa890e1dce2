package pack

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/zstd"
)

// An overlay says how a chunk differs from another, in blocks of this many
// bytes: what file systems and databases write at least.
const (
	blockShift = 12
	blockBytes = 1 << blockShift
)

// overlayHead is the length of an overlay up to its first bitmap.
const overlayHead = 40

// How the blocks of an overlay are stored. These numbers are on disk in other
// people's backups: add to them, never renumber, never reuse.
const (
	blocksRaw  = 0
	blocksZstd = 1
)

// ErrOverlay says that a record is an overlay, and so not to be opened without
// its base.
var ErrOverlay = errors.New("the record is an overlay")

// A Patch is what the record of an overlay holds: how its chunk differs from its
// base. It is valid as long as the memory of the record.
type Patch struct {
	Base   chunk.ID // whose record is no overlay itself
	Bytes  int      // of the chunk, and of its base
	Record chunk.ID // the id of the record

	how     byte
	differs bitmap // blocks that the overlay has
	xored   bitmap // those of them that are the difference to the base's
	blocks  []byte
}

// Whole says whether the patch has all of the chunk, so that nobody needs the
// base to read it.
func (p *Patch) Whole() bool {
	n := blocks(p.Bytes)
	return p.differs.count() == n && p.xored.count() == 0
}

func blocks(n int) int { return (n + blockBytes - 1) / blockBytes }

// block is the i-th block of p, whose last may be short.
func block(p []byte, i int) []byte {
	return p[i*blockBytes : min(len(p), (i+1)*blockBytes)]
}

// A bitmap has a bit for each block, the least significant of a byte first.
type bitmap []byte

func bitmapBytes(blocks int) int { return (blocks + 7) / 8 }

func (b bitmap) set(i int)      { b[i/8] |= 1 << (i % 8) }
func (b bitmap) has(i int) bool { return b[i/8]>>(i%8)&1 != 0 }

func (b bitmap) count() (n int) {
	for _, x := range b {
		n += bits.OnesCount8(x)
	}
	return n
}

// SealOverlay makes the record of chunk id as an overlay on base, which holds
// on; it is valid until the worker's next call. Where more than half of the
// blocks differ, or none, ok is false and there is no record.
func (w *Worker) SealOverlay(id, base chunk.ID, plain, on []byte, compress bool) (e Entry, record []byte, ok bool, err error) {
	n := blocks(len(plain))
	if len(on) != len(plain) || n == 0 {
		return e, nil, false, nil
	}
	body := w.overlayBody(base, n)
	differs := bitmap(body[overlayHead:][:bitmapBytes(n)])
	xored := bitmap(body[overlayHead+bitmapBytes(n):])
	w.blocks = slices.Grow(w.blocks[:0], len(plain)/2+blockBytes)
	count := 0
	for i := range n {
		is, was := block(plain, i), block(on, i)
		if bytes.Equal(is, was) {
			continue
		}
		if count++; 2*count > n {
			return e, nil, false, nil
		}
		differs.set(i)
		at := len(w.blocks)
		w.blocks = w.blocks[:at+len(is)]
		diff := w.blocks[at:]
		// Where little of a block changed, its difference is mostly zeros.
		subtle.XORBytes(diff, is, was)
		if 2*nonzero(diff) <= nonzero(is) {
			xored.set(i)
		} else {
			copy(diff, is)
		}
	}
	if count == 0 {
		return e, nil, false, nil
	}
	e, record, err = w.sealOverlay(id, base, body, w.blocks, len(plain), compress)
	return e, record, err == nil, err
}

// SealWhole makes the record of chunk id as an overlay on base that has all of
// the chunk: it is read without the base. The record is valid until the
// worker's next call.
func (w *Worker) SealWhole(id, base chunk.ID, plain []byte, compress bool) (Entry, []byte, error) {
	n := blocks(len(plain))
	body := w.overlayBody(base, n)
	for i := range n {
		bitmap(body[overlayHead:]).set(i)
	}
	return w.sealOverlay(id, base, body, plain, len(plain), compress)
}

// overlayBody gives what stands before the blocks, with empty bitmaps for n of
// them.
func (w *Worker) overlayBody(base chunk.ID, n int) []byte {
	b := bitmapBytes(n)
	w.body = append(w.body[:0], base[:]...)
	w.body = append(w.body, blockShift, blocksRaw, 0, 0)
	w.body = le.AppendUint32(w.body, uint32(b))
	w.body = append(w.body, make([]byte, 2*b)...)
	return w.body
}

func (w *Worker) sealOverlay(id, base chunk.ID, body, blocks []byte, plen int, compress bool) (Entry, []byte, error) {
	e := Entry{ID: w.overlays.ID(id, base), PLen: uint32(plen), Encoding: Overlay}
	if compress {
		if n := zstd.Bound(len(blocks)); cap(w.frame) < n {
			w.frame = make([]byte, n)
		}
		frame, err := w.codec.Compress(w.frame, blocks)
		if err != nil {
			return e, nil, fmt.Errorf("compress: %w", err)
		}
		if len(frame) <= len(blocks)-len(blocks)/20 && len(frame) < len(blocks) {
			blocks, body[33] = frame, blocksZstd
		}
	}
	w.body = append(body, blocks...)
	var nonce [seal.NonceBytes]byte
	rand.Read(nonce[:])
	rec := w.seal(&e, w.body, nonce)
	return e, rec, nil
}

// OpenOverlay opens the record id, which it overwrites. Errors are evidence
// without a place.
func (w *Worker) OpenOverlay(record []byte, id chunk.ID) (p Patch, err error) {
	e, body, err := w.unseal(record, id)
	if err != nil {
		return p, err
	}
	if e.Encoding != Overlay {
		return p, errors.New("the record is no overlay")
	}
	return parseOverlay(e, body)
}

func parseOverlay(e Entry, body []byte) (p Patch, err error) {
	n := blocks(int(e.PLen))
	b := bitmapBytes(n)
	if len(body) < overlayHead+2*b || body[32] != blockShift || body[34]|body[35] != 0 || le.Uint32(body[36:]) != uint32(b) {
		return p, errors.New("the overlay does not begin like one")
	}
	p = Patch{
		Base: chunk.ID(body), Bytes: int(e.PLen), Record: e.ID, how: body[33],
		differs: body[overlayHead:][:b], xored: body[overlayHead+b:][:b], blocks: body[overlayHead+2*b:],
	}
	for i := range 8 * b {
		if p.differs.has(i) && i >= n || p.xored.has(i) && !p.differs.has(i) {
			return p, fmt.Errorf("the overlay's bitmaps are impossible at block %d", i)
		}
	}
	if p.differs.count() == 0 || p.how > blocksZstd {
		return p, errors.New("the overlay is of nothing, or of an unknown kind")
	}
	return p, nil
}

// Apply makes of plain, which holds the base, the chunk that the patch is of,
// and proves it by the record's id. An error may be the base's fault.
func (w *Worker) Apply(p *Patch, plain []byte) error {
	if len(plain) != p.Bytes {
		return fmt.Errorf("the overlay is of %d bytes, its base of %d", p.Bytes, len(plain))
	}
	want := 0
	for i := range blocks(len(plain)) {
		if p.differs.has(i) {
			want += len(block(plain, i))
		}
	}
	fresh := p.blocks
	if p.how == blocksZstd {
		w.blocks = slices.Grow(w.blocks[:0], want)[:want]
		if err := w.codec.Expand(w.blocks, fresh); err != nil {
			return fmt.Errorf("expand: %w", err)
		}
		fresh = w.blocks
	}
	if len(fresh) != want {
		return fmt.Errorf("the overlay has %d bytes of blocks, want %d", len(fresh), want)
	}
	for i := range blocks(len(plain)) {
		if !p.differs.has(i) {
			continue
		}
		dst := block(plain, i)
		if p.xored.has(i) {
			subtle.XORBytes(dst, dst, fresh[:len(dst)])
		} else {
			copy(dst, fresh)
		}
		fresh = fresh[len(dst):]
	}
	if w.overlays.ID(w.ID(plain), p.Base) != p.Record {
		return errors.New("chunk does not match the overlay's id")
	}
	return nil
}

// nonzero counts the bytes of p that are not zero.
func nonzero(p []byte) int {
	zeros, tail := 0, len(p)%8
	for i := 0; i+8 <= len(p); i += 8 {
		x := le.Uint64(p[i:])
		const low = 0x7f7f7f7f7f7f7f7f
		zeros += bits.OnesCount64(^((x&low + low) | x | low))
	}
	for _, x := range p[len(p)-tail:] {
		if x == 0 {
			zeros++
		}
	}
	return len(p) - zeros
}
