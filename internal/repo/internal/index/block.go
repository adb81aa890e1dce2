package index

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"sort"

	"github.com/zeebo/blake3"
)

const (
	blockBytes   = 4096
	blockEntries = 151 // entries in a block
	recordBytes  = 27  // of an entry in a block
	blockSum     = 16  // bytes of the hash at a block's end
)

var partMagic = []byte("BSTYSEG1")

// Compare orders keys as their bytes.
func (k *Key) Compare(o *Key) int {
	return cmp.Or(cmp.Compare(be.Uint64(k[:8]), be.Uint64(o[:8])), cmp.Compare(be.Uint64(k[8:]), be.Uint64(o[8:])))
}

// A record is an entry as a block holds it.
type record struct {
	key  Key
	ref  uint32 // into the pack table of the run
	off  uint32
	clen uint32
}

func putRecord(b []byte, r *record) {
	copy(b, r.key[:])
	le.PutUint32(b[16:], r.ref)
	le.PutUint32(b[20:], r.off)
	b[24], b[25], b[26] = byte(r.clen), byte(r.clen>>8), byte(r.clen>>16)
}

func getRecord(b []byte) record {
	return record{Key(b[:16]), le.Uint32(b[16:]), le.Uint32(b[20:]), uint32(b[24]) | uint32(b[25])<<8 | uint32(b[26])<<16}
}

// blocks is how many blocks n entries take, the header not counted.
func blocks(n uint32) int64 { return (int64(n) + blockEntries - 1) / blockEntries }

// inBlock is how many of n entries are in block i, counted from 0.
func inBlock(n uint32, i int64) int { return int(min(blockEntries, int64(n)-i*blockEntries)) }

// partBytes is the length of a part of n entries.
func partBytes(n uint32) int64 { return (1 + blocks(n)) * blockBytes }

// A summer hashes blocks; it is not safe for concurrent use.
type summer struct {
	h *blake3.Hasher
	b [24]byte
}

func newSummer() *summer { return &summer{h: blake3.New()} }

// sum is the hash of block no of a part, its header being block 0.
func (s *summer) sum(run [16]byte, part, no uint32, block []byte) (out [blockSum]byte) {
	copy(s.b[:], run[:])
	le.PutUint32(s.b[16:], part)
	le.PutUint32(s.b[20:], no)
	s.h.Reset()
	s.h.Write(s.b[:])
	s.h.Write(block[:blockBytes-blockSum])
	var full [32]byte
	s.h.Sum(full[:0])
	copy(out[:], full[:])
	return out
}

func (s *summer) seal(run [16]byte, part, no uint32, block []byte) {
	sum := s.sum(run, part, no, block)
	copy(block[blockBytes-blockSum:], sum[:])
}

func (s *summer) check(run [16]byte, part, no uint32, block []byte) error {
	if sum := s.sum(run, part, no, block); !bytes.Equal(sum[:], block[blockBytes-blockSum:]) {
		return fmt.Errorf("checksum of block %d does not match", no)
	}
	return nil
}

// searchBlock finds k among the n entries of a block.
func searchBlock(block []byte, n int, k *Key) (at int, ok bool) {
	return sort.Find(n, func(i int) int { return bytes.Compare(k[:], block[i*recordBytes:i*recordBytes+16]) })
}

// partHeader is block 0 of a part.
func partHeader(b []byte, repo, run [16]byte, part, entries uint32) {
	clear(b)
	copy(b, partMagic)
	copy(b[8:], repo[:])
	copy(b[24:], run[:])
	le.PutUint32(b[40:], part)
	le.PutUint32(b[44:], entries)
}

func checkPartHeader(b []byte, repo, run [16]byte, part, entries uint32) error {
	switch {
	case !bytes.Equal(b[:8], partMagic):
		return errors.New("it does not begin like a part of a run")
	case !bytes.Equal(b[8:24], repo[:]):
		return fmt.Errorf("it belongs to repository %x", b[8:24])
	case !bytes.Equal(b[24:40], run[:]) || le.Uint32(b[40:]) != part || le.Uint32(b[44:]) != entries:
		return errors.New("it is not the part that its name says")
	case len(bytes.Trim(b[48:blockBytes-blockSum], "\x00")) > 0:
		return errors.New("its header has bytes that must be zero")
	}
	return nil
}
