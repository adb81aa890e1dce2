package pack

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// ReadEntries reads the entries at the end of a pack of size bytes.
func ReadEntries(r io.ReaderAt, size int64) ([]Entry, error) {
	if size < HeaderBytes+footerBytes || size > MaxBytes {
		return nil, fmt.Errorf("a pack cannot have %d bytes", size)
	}
	var f [footerBytes]byte
	if err := readFull(r, f[:], size-footerBytes); err != nil {
		return nil, err
	}
	n, crc, err := parseFooter(f[:])
	if err != nil {
		return nil, err
	}
	if n > (size-HeaderBytes-footerBytes)/(EntryBytes+RecordOverhead) {
		return nil, fmt.Errorf("footer speaks of %d records in %d bytes", n, size)
	}
	b := make([]byte, n*EntryBytes)
	end := size - footerBytes - int64(len(b))
	if err := readFull(r, b, end); err != nil {
		return nil, err
	}
	return parseEntries(b, crc, end)
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func parseFooter(f []byte) (n int64, entriesCRC uint32, err error) {
	if !bytes.Equal(f[:8], footerMagic) || crc32.Checksum(f[:28], castagnoli) != le.Uint32(f[28:]) {
		return 0, 0, errors.New("footer is damaged")
	}
	if le.Uint32(f[12:]) != 0 || le.Uint64(f[20:]) != 0 {
		return 0, 0, errors.New("footer has bytes that must be zero")
	}
	return int64(le.Uint32(f[8:])), le.Uint32(f[16:]), nil
}

// parseEntries takes entries only if they cover the records without a gap up
// to end.
func parseEntries(b []byte, crc uint32, end int64) ([]Entry, error) {
	if crc32.Checksum(b, castagnoli) != crc {
		return nil, errors.New("entries' checksum does not match")
	}
	entries := make([]Entry, len(b)/EntryBytes)
	next := int64(HeaderBytes)
	for i := range entries {
		p, e := b[i*EntryBytes:], &entries[i]
		copy(e.ID[:], p)
		e.Off, e.CLen, e.PLen, e.Encoding = le.Uint32(p[32:]), le.Uint32(p[36:]), le.Uint32(p[40:]), p[44]
		if err := e.check(); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if int64(e.Off) != next || p[45]|p[46]|p[47] != 0 {
			return nil, fmt.Errorf("entry %d is not where its record must be", i)
		}
		next = e.End()
	}
	if next != end {
		return nil, fmt.Errorf("entries end at %d, records at %d", next, end)
	}
	return entries, nil
}

// CheckRecord reads the record at the start of b, whose checksums must be right;
// that needs no keys. Off stays 0.
func CheckRecord(b []byte) (Entry, error) {
	e, crc, err := ParseRecordHeader(b)
	switch {
	case err != nil:
		return e, err
	case e.Bytes() > int64(len(b)):
		return e, io.ErrUnexpectedEOF
	case crc32.Checksum(b[RecordHeader:e.Bytes()], castagnoli) != crc:
		return e, errors.New("record checksum does not match")
	}
	return e, nil
}

// A Damage is a place in a pack that is not as it was written.
type Damage struct {
	Off   int64
	Err   error
	Entry *Entry // whose record it is, where that is still known
}

// Scan walks a whole pack record by record, whatever is left of it. Records in
// good have their checksums right, which needs no keys; damage is the rest.
func Scan(data []byte, repo [16]byte) (good []Entry, damage []Damage) {
	if err := checkHeader(data, repo); err != nil {
		damage = append(damage, Damage{Off: 0, Err: err})
	}
	end, known := int64(len(data)), map[uint32]Entry{}
	if entries, err := ReadEntries(bytes.NewReader(data), int64(len(data))); err != nil {
		damage = append(damage, Damage{Off: max(0, end-footerBytes), Err: err})
	} else {
		end = HeaderBytes
		for _, e := range entries {
			known[e.Off] = e
			end = e.End()
		}
	}
	lost := false // between records, searching for the next
	for off := int64(HeaderBytes); off+RecordOverhead <= end; {
		e, crc, err := ParseRecordHeader(data[off:end])
		e.Off = uint32(off)
		if err == nil && e.End() > end {
			err = io.ErrUnexpectedEOF
		}
		if err == nil {
			lost = false
			if crc32.Checksum(data[off+RecordHeader:e.End()], castagnoli) == crc {
				good = append(good, e)
			} else {
				damage = append(damage, Damage{Off: off, Err: errors.New("record checksum does not match"), Entry: &e})
			}
			off = e.End()
			continue
		}
		if k, ok := known[uint32(off)]; ok {
			damage = append(damage, Damage{Off: off, Err: err, Entry: &k})
			off = k.End()
			continue
		}
		if !lost && len(known) == 0 {
			damage = append(damage, Damage{Off: off, Err: err})
		}
		lost = true
		i := bytes.Index(data[off+1:end], recordMagic)
		if i < 0 {
			break
		}
		off += 1 + int64(i)
	}
	return good, damage
}
