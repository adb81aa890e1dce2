// Package manifest writes and reads manifests: which chunks make up one disk.
//
// A manifest is cut into pages of 1,024 chunk positions, so that no disk is
// too large to be streamed. What a page needs is listed in the clear, for a
// vacuum without keys; where in the disk it belongs is sealed.
//
// docs/format/manifest.md is the specification.
package manifest

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"slices"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/zstd"
)

// Positions is how many chunks a page has room for.
const Positions = 1024

const (
	headerBytes = 128
	entryBytes  = 48
	footerBytes = 32
	pageHeader  = 24
	maxIDs      = 2 * Positions
	maxSealed   = 8 << 10
	maxPage     = pageHeader + 32*maxIDs + maxSealed
	maxDisk     = 1 << 62
)

var (
	magic       = []byte("BSTYMAN1")
	pageMagic   = []byte("BSTYPAG1")
	footerMagic = []byte("BSTYMNF1")
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	le          = binary.LittleEndian
)

// An ID names a manifest.
type ID [32]byte

// A Header says what disk the manifest is of.
type Header struct {
	Repo       [16]byte
	Salt       [16]byte
	ChunkBytes int64
	DiskBytes  int64
	Base       ID // zero: this is a base itself
}

// Differential says whether h replaces pages of a base.
func (h *Header) Differential() bool { return h.Base != ID{} }

// Chunks is how many chunks the disk has.
func (h *Header) Chunks() int64 { return chunk.Count(h.DiskBytes, h.ChunkBytes) }

// Pages is how many pages the disk has, written or not.
func (h *Header) Pages() int64 { return (h.Chunks() + Positions - 1) / Positions }

// PageLen is how many positions page no has.
func (h *Header) PageLen(no int64) int { return int(min(Positions, h.Chunks()-no*Positions)) }

func (h *Header) encode() []byte {
	b := make([]byte, headerBytes)
	copy(b, magic)
	copy(b[8:], h.Repo[:])
	copy(b[24:], h.Salt[:])
	if h.Differential() {
		b[40] = 1
	}
	b[41] = byte(bits.TrailingZeros64(uint64(h.ChunkBytes)))
	le.PutUint64(b[48:], uint64(h.DiskBytes))
	copy(b[56:], h.Base[:])
	le.PutUint32(b[124:], crc32.Checksum(b[:124], castagnoli))
	return b
}

func parseHeader(b []byte) (h Header, err error) {
	if len(b) < headerBytes || !bytes.Equal(b[:8], magic) {
		return h, errors.New("it does not begin like a manifest")
	}
	if crc32.Checksum(b[:124], castagnoli) != le.Uint32(b[124:]) {
		return h, errors.New("header checksum does not match")
	}
	copy(h.Repo[:], b[8:])
	copy(h.Salt[:], b[24:])
	copy(h.Base[:], b[56:])
	size := le.Uint64(b[48:])
	if b[40] > 1 || (b[40] == 1) != h.Differential() || b[41] > 62 || size >= maxDisk {
		return h, errors.New("header is impossible")
	}
	h.ChunkBytes, h.DiskBytes = 1<<b[41], int64(size)
	if err := chunk.CheckBytes(h.ChunkBytes); err != nil {
		return h, err
	}
	if !bytes.Equal(h.encode(), b[:headerBytes]) {
		return h, errors.New("header has bytes that must be zero")
	}
	return h, nil
}

// A Page is what one page says: for each position a chunk or a hole.
type Page struct {
	IDs  []chunk.ID // of chunks, whatever the records that hold them are called
	Data []bool     // false: a hole, whose id means nothing
	// Bases says for each position on which chunk its record is an overlay; the
	// zero ID where it is none. Bases is nil where no position has one.
	Bases []chunk.ID
}

// Base is on which chunk the record of position i is an overlay, or the zero
// ID.
func (p *Page) Base(i int) (base chunk.ID) {
	if p.Bases != nil && p.Data[i] {
		base = p.Bases[i]
	}
	return base
}

// Set says that position i is the chunk id, and on which base its record is an
// overlay, if it is one.
func (p *Page) Set(i int, id, base chunk.ID) {
	p.IDs[i], p.Data[i] = id, true
	if p.Bases == nil && base != (chunk.ID{}) {
		p.Bases = make([]chunk.ID, len(p.IDs))
	}
	if p.Bases != nil {
		p.Bases[i] = base
	}
}

// key is that of the manifest with this salt.
func key(meta *seal.Key, salt [16]byte) *seal.Key {
	k := seal.Key(meta.KeyedHash([]byte("backstay v1 manifest"), salt[:]))
	return &k
}

// A coder encodes and decodes pages. It is not safe for concurrent use.
type coder struct {
	header   []byte
	overlays *seal.Overlays
	key      *seal.Key // from meta, for this manifest alone
	codec    *zstd.Codec
	aad      []byte
	plain    []byte
	frame    []byte
}

func newCoder(header []byte, salt [16]byte, meta *seal.Key) *coder {
	return &coder{header: header, overlays: meta.Overlays(), key: key(meta, salt), codec: zstd.New(1)}
}

// encode gives page no.
func (c *coder) encode(no int64, p Page) ([]byte, error) {
	ids := make([]chunk.ID, 0, len(p.IDs))
	records := make([]chunk.ID, len(p.IDs))
	overlays := false
	for i, id := range p.IDs {
		if !p.Data[i] {
			continue
		}
		if base := p.Base(i); base != (chunk.ID{}) {
			id = c.overlays.ID(id, base)
			ids = append(ids, base)
			overlays = true
		}
		records[i] = id
		ids = append(ids, id)
	}
	slices.SortFunc(ids, compare)
	ids = slices.Compact(ids)

	c.plain = c.plain[:0]
	number := func(id chunk.ID, is bool) {
		at := 0
		if is {
			at, _ = slices.BinarySearchFunc(ids, id, compare)
			at++
		}
		c.plain = le.AppendUint16(c.plain, uint16(at))
	}
	for i, id := range records {
		number(id, p.Data[i])
	}
	if overlays {
		for i := range records {
			number(p.Base(i), p.Base(i) != chunk.ID{})
		}
	}
	if n := zstd.Bound(len(c.plain)); cap(c.frame) < n {
		c.frame = make([]byte, n)
	}
	frame, err := c.codec.Compress(c.frame, c.plain)
	if err != nil {
		return nil, err
	}
	var nonce [seal.NonceBytes]byte
	rand.Read(nonce[:])
	return c.seal(no, ids, frame, nonce), nil
}

// seal makes page no of its list and its compressed positions.
func (c *coder) seal(no int64, ids []chunk.ID, frame []byte, nonce [seal.NonceBytes]byte) []byte {
	b := make([]byte, pageHeader, pageHeader+32*len(ids)+len(frame)+seal.Overhead)
	copy(b, pageMagic)
	le.PutUint64(b[8:], uint64(no))
	le.PutUint32(b[16:], uint32(len(ids)))
	le.PutUint32(b[20:], uint32(len(frame)+seal.Overhead))
	for i := range ids {
		b = append(b, ids[i][:]...)
	}
	c.aad = append(append(c.aad[:0], c.header...), b...)
	return c.key.SealWith(b, nonce, frame, c.aad)
}

func compare(a, b chunk.ID) int { return bytes.Compare(a[:], b[:]) }

// parsePage gives the clear list and the sealed part of page no.
func parsePage(b []byte, no int64) (ids, sealed []byte, err error) {
	if len(b) < pageHeader || !bytes.Equal(b[:8], pageMagic) {
		return nil, nil, errors.New("no page begins here")
	}
	n, s := int64(le.Uint32(b[16:])), int64(le.Uint32(b[20:]))
	if le.Uint64(b[8:]) != uint64(no) || n > maxIDs || pageHeader+32*n+s != int64(len(b)) {
		return nil, nil, fmt.Errorf("it is not page %d or has another length", no)
	}
	ids, sealed = b[pageHeader:pageHeader+32*n], b[pageHeader+32*n:]
	for i := int64(1); i < n; i++ {
		if bytes.Compare(ids[32*(i-1):32*i], ids[32*i:32*i+32]) >= 0 {
			return nil, nil, fmt.Errorf("ids of page %d are not sorted", no)
		}
	}
	return ids, sealed, nil
}

// decode opens page no, which has n positions.
func (c *coder) decode(b []byte, no int64, n int) (p Page, err error) {
	ids, sealed, err := parsePage(b, no)
	if err != nil {
		return p, err
	}
	c.aad = append(append(c.aad[:0], c.header...), b[:len(b)-len(sealed)]...)
	frame, err := c.key.Open(nil, sealed, c.aad)
	if err != nil {
		return p, err
	}
	c.plain = slices.Grow(c.plain[:0], 4*n)[:4*n]
	got, err := c.codec.ExpandUpTo(c.plain, frame)
	if err != nil {
		return p, err
	}
	if got != 2*n && got != 4*n {
		return p, fmt.Errorf("page %d has %d bytes of positions", no, got)
	}
	p = Page{IDs: make([]chunk.ID, n), Data: make([]bool, n)}
	listed := func(i int) (id chunk.ID, is bool, err error) {
		at := int(le.Uint16(c.plain[2*i:]))
		if at == 0 {
			return id, false, nil
		}
		if at > len(ids)/32 {
			return id, false, fmt.Errorf("page %d points behind its list", no)
		}
		return chunk.ID(ids[32*(at-1) : 32*at]), true, nil
	}
	for i := range n {
		id, is, err := listed(i)
		if err != nil {
			return p, err
		}
		var base chunk.ID
		overlay := false
		if got == 4*n {
			if base, overlay, err = listed(n + i); err != nil {
				return p, err
			}
		}
		switch {
		case overlay && !is:
			return p, fmt.Errorf("page %d gives a hole a base", no)
		case overlay:
			p.Set(i, c.overlays.ID(id, base), base)
		case is:
			p.Set(i, id, chunk.ID{})
		}
	}
	return p, nil
}
