package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

const (
	headerBytes = 32
	packBytes   = 40
	entryBytes  = 24
	sumBytes    = 32

	// MaxBytes is the longest index object that a reader takes.
	MaxBytes = 256 << 20
	// CutBytes is where writers begin another object.
	CutBytes = 16 << 20
)

var (
	magic = []byte("BSTYIDX1")
	le    = binary.LittleEndian
	be    = binary.BigEndian
)

// An Entry is one record of a pack.
type Entry struct {
	Key  Key
	Off  uint32
	CLen uint32
}

// A Pack is one pack with its records.
type Pack struct {
	ID      [32]byte
	Bytes   uint32
	Entries []Entry
}

// EncodedBytes is what p takes in an index object.
func (p *Pack) EncodedBytes() int64 { return packBytes + entryBytes*int64(len(p.Entries)) }

// Encode makes an index object.
func Encode(repo [16]byte, packs []Pack) []byte {
	n := int64(headerBytes + sumBytes)
	for i := range packs {
		n += packs[i].EncodedBytes()
	}
	b := make([]byte, 0, n)
	b = append(b, magic...)
	b = append(b, repo[:]...)
	b = le.AppendUint32(b, uint32(len(packs)))
	b = le.AppendUint32(b, 0)
	for _, p := range packs {
		b = append(b, p.ID[:]...)
		b = le.AppendUint32(b, p.Bytes)
		b = le.AppendUint32(b, uint32(len(p.Entries)))
		for _, e := range p.Entries {
			b = append(b, e.Key[:]...)
			b = le.AppendUint32(b, e.Off)
			b = le.AppendUint32(b, e.CLen)
		}
	}
	sum := seal.Hash(b)
	return append(b, sum[:]...)
}

// Decode reads an index object and calls yield for each pack; the pack's
// entries are only valid during the call.
func Decode(repo [16]byte, b []byte, yield func(Pack) error) error {
	if len(b) < headerBytes+sumBytes || !bytes.Equal(b[:8], magic) {
		return errors.New("it does not begin like an index object")
	}
	if sum := seal.Hash(b[:len(b)-sumBytes]); !bytes.Equal(sum[:], b[len(b)-sumBytes:]) {
		return errors.New("checksum does not match")
	}
	if !bytes.Equal(b[8:24], repo[:]) {
		return fmt.Errorf("it belongs to repository %x", b[8:24])
	}
	packs := le.Uint32(b[24:])
	if le.Uint32(b[28:]) != 0 {
		return errors.New("header has bytes that must be zero")
	}
	b = b[headerBytes : len(b)-sumBytes]
	var entries []Entry
	for range packs {
		if len(b) < packBytes {
			return errors.New("it ends inside a pack")
		}
		p := Pack{Bytes: le.Uint32(b[32:])}
		copy(p.ID[:], b)
		n := int64(le.Uint32(b[36:]))
		b = b[packBytes:]
		if n > int64(len(b))/entryBytes {
			return errors.New("it ends inside a pack's entries")
		}
		entries = entries[:0]
		for range n {
			e := Entry{Key(b[:16]), le.Uint32(b[16:]), le.Uint32(b[20:])}
			if int64(e.Off)+int64(e.CLen) > int64(p.Bytes) {
				return errors.New("an entry lies behind the end of its pack")
			}
			entries = append(entries, e)
			b = b[entryBytes:]
		}
		p.Entries = entries
		if err := yield(p); err != nil {
			return err
		}
	}
	if len(b) != 0 {
		return errors.New("bytes behind the last pack")
	}
	return nil
}
