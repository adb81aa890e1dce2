// Package pack reads and writes packs, the only objects that hold chunks.
//
// A pack is header ‖ record* ‖ entry* ‖ footer and is written once. Records
// describe themselves, so a lost index is rebuilt from packs alone, and a pack
// that lost its end gives up every record that is left.
//
// docs/format/pack.md is the specification. Where the two disagree, this
// package has the bug.
package pack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// Sizes in bytes.
const (
	TargetBytes    = 64 << 20  // of a full pack
	MaxBytes       = 128 << 20 // longer ones are refused
	HeaderBytes    = 64
	RecordHeader   = 64
	RecordOverhead = RecordHeader + seal.Overhead
	EntryBytes     = 48
	footerBytes    = 32
	FrameBytes     = HeaderBytes + footerBytes // of a pack without records
	// MaxRecord is the longest record that a pack may hold.
	MaxRecord = RecordOverhead + chunk.MaxBytes + slackBytes
	// slackBytes is how much longer than its chunk a ciphertext may be.
	slackBytes = 4096
)

// Encodings of a chunk in a record. These numbers are on disk in other
// people's backups: add to them, never renumber, never reuse.
const (
	Raw     = 0
	Zstd    = 1
	Overlay = 2
)

var (
	packMagic   = []byte("BSTYPAK1")
	recordMagic = []byte("BSTYREC1")
	footerMagic = []byte("BSTYPKF1")
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	le          = binary.LittleEndian
)

// An Entry says where a record lies in its pack and what is in it.
type Entry struct {
	ID       chunk.ID
	Off      uint32 // of the record, bytes from the start of the pack
	CLen     uint32 // bytes of ciphertext, without nonce and tag
	PLen     uint32 // bytes of the chunk
	Encoding uint8
}

// Bytes is the length of the whole record.
func (e Entry) Bytes() int64 { return RecordOverhead + int64(e.CLen) }

// End is the offset of the first byte behind the record.
func (e Entry) End() int64 { return int64(e.Off) + e.Bytes() }

func putHeader(b []byte, repo, session [16]byte) {
	clear(b[:HeaderBytes])
	copy(b, packMagic)
	copy(b[8:], repo[:])
	copy(b[24:], session[:])
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

func checkHeader(b []byte, repo [16]byte) error {
	switch {
	case len(b) < HeaderBytes || !bytes.Equal(b[:8], packMagic):
		return errors.New("it does not begin like a pack")
	case crc32.Checksum(b[:60], castagnoli) != le.Uint32(b[60:]):
		return errors.New("header checksum does not match")
	case !bytes.Equal(b[8:24], repo[:]):
		return fmt.Errorf("it belongs to repository %x", b[8:24])
	}
	return nil
}

// putRecordHeader describes e; crc is over what follows the header.
func putRecordHeader(b []byte, e Entry, crc uint32) {
	clear(b[:RecordHeader])
	copy(b, recordMagic)
	b[8] = e.Encoding
	le.PutUint32(b[12:], e.CLen)
	le.PutUint32(b[16:], e.PLen)
	le.PutUint32(b[20:], crc)
	copy(b[24:], e.ID[:])
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

// ParseRecordHeader reads the header at the start of b; Off stays 0.
func ParseRecordHeader(b []byte) (e Entry, crc uint32, err error) {
	if len(b) < RecordHeader || !bytes.Equal(b[:8], recordMagic) {
		return e, 0, errors.New("no record begins here")
	}
	if crc32.Checksum(b[:60], castagnoli) != le.Uint32(b[60:]) {
		return e, 0, errors.New("record header checksum does not match")
	}
	e.Encoding = b[8]
	e.CLen, e.PLen, crc = le.Uint32(b[12:]), le.Uint32(b[16:]), le.Uint32(b[20:])
	copy(e.ID[:], b[24:56])
	if le.Uint32(b[8:])>>8 != 0 || le.Uint32(b[56:]) != 0 {
		return e, 0, errors.New("record header has bytes that must be zero")
	}
	return e, crc, e.check()
}

// check refuses lengths that no writer can have written.
func (e Entry) check() error {
	if e.PLen < 1 || e.PLen > chunk.MaxBytes || e.CLen < 1 || e.CLen > e.PLen+slackBytes {
		return fmt.Errorf("record of %d bytes in %d is impossible", e.PLen, e.CLen)
	}
	return nil
}

func putEntry(b []byte, e Entry) {
	clear(b[:EntryBytes])
	copy(b, e.ID[:])
	le.PutUint32(b[32:], e.Off)
	le.PutUint32(b[36:], e.CLen)
	le.PutUint32(b[40:], e.PLen)
	b[44] = e.Encoding
}

func putFooter(b []byte, n int, entriesCRC uint32) {
	clear(b[:footerBytes])
	copy(b, footerMagic)
	le.PutUint32(b[8:], uint32(n))
	le.PutUint32(b[16:], entriesCRC)
	le.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
}

// HeaderSession gives the session or vacuum that a pack's header names.
func HeaderSession(b []byte, repo [16]byte) (session [16]byte, err error) {
	if err := checkHeader(b, repo); err != nil {
		return session, err
	}
	return [16]byte(b[24:40]), nil
}
