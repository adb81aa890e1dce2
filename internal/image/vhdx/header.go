package vhdx

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"unicode/utf16"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

const (
	mib         = 1 << 20
	signature   = "vhdxfile"
	headerBytes = 4 << 10
	regionBytes = 64 << 10 // of a region table
	maxRegions  = 2047

	header1, header2   = 64 << 10, 128 << 10
	regions1, regions2 = 192 << 10, 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum is the CRC-32C of p with zeros in place of the four bytes at 4.
func checksum(p []byte) uint32 {
	sum := crc32.Update(0, castagnoli, p[:4])
	sum = crc32.Update(sum, castagnoli, []byte{0, 0, 0, 0})
	return crc32.Update(sum, castagnoli, p[8:])
}

// A guid is kept as it lies in the file: three little-endian numbers and eight
// bytes.
type guid [16]byte

func (g guid) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(g[:]),
		binary.LittleEndian.Uint16(g[4:]), binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:])
}

// parseGUID reads what String wrote.
func parseGUID(s string) (g guid, ok bool) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return g, false
	}
	p, err := hex.DecodeString(s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:])
	if err != nil {
		return g, false
	}
	binary.LittleEndian.PutUint32(g[:], binary.BigEndian.Uint32(p))
	binary.LittleEndian.PutUint16(g[4:], binary.BigEndian.Uint16(p[4:]))
	binary.LittleEndian.PutUint16(g[6:], binary.BigEndian.Uint16(p[6:]))
	copy(g[8:], p[8:])
	return g, true
}

func mustGUID(s string) guid {
	g, ok := parseGUID(s)
	if !ok {
		panic("not a GUID: " + s)
	}
	return g
}

// A header says where the log is and whether it must be replayed. There are
// two, so that one is whole while the other is rewritten.
type header struct {
	sequence  uint64
	fileWrite guid // changes with every session that writes the file
	dataWrite guid // changes with the disk's content; children name it
	log       guid // zero if there is nothing to replay
	logBytes  int64
	logOffset int64
}

func (h header) encode() []byte {
	p := make([]byte, headerBytes)
	copy(p, "head")
	binary.LittleEndian.PutUint64(p[8:], h.sequence)
	copy(p[16:], h.fileWrite[:])
	copy(p[32:], h.dataWrite[:])
	copy(p[48:], h.log[:])
	binary.LittleEndian.PutUint16(p[66:], 1) // version; the log's before it is 0
	binary.LittleEndian.PutUint32(p[68:], uint32(h.logBytes))
	binary.LittleEndian.PutUint64(p[72:], uint64(h.logOffset))
	binary.LittleEndian.PutUint32(p[4:], checksum(p))
	return p
}

// readHeaders finds the header that counts, of good ones. twins says that both
// are the same to the last byte, as in a file that its maker wrote in one go
// and that nobody opened for writing since.
func readHeaders(file image.File) (h header, good int, twins bool, err error) {
	var p [2][headerBytes]byte
	best := -1
	for i, off := range []int64{header1, header2} {
		if err := layer.ReadFull(file, file.Name(), p[i][:], off); err != nil {
			return h, good, false, err
		}
		if string(p[i][:4]) != "head" || binary.LittleEndian.Uint32(p[i][4:]) != checksum(p[i][:]) {
			continue
		}
		good++
		if best < 0 || sequence(p[i][:]) > sequence(p[best][:]) {
			best = i
		}
	}
	if best < 0 {
		return h, good, false, fault.Corrupt(file.Name(), header1, "neither header has a right checksum")
	}
	if good == 2 && sequence(p[0][:]) == sequence(p[1][:]) {
		if twins = bytes.Equal(p[0][:], p[1][:]); !twins {
			return h, good, false, fault.Corrupt(file.Name(), header1, "two different headers with the same sequence number")
		}
	}
	q := p[best][:]
	if v, log := binary.LittleEndian.Uint16(q[66:]), binary.LittleEndian.Uint16(q[64:]); v != 1 {
		return h, good, false, fmt.Errorf("%s: VHDX version %d: %w", file.Name(), v, fault.ErrUnsupported)
	} else if log != 0 {
		return h, good, false, fmt.Errorf("%s: VHDX log version %d: %w", file.Name(), log, fault.ErrUnsupported)
	}
	h = header{
		sequence:  sequence(q),
		fileWrite: guid(q[16:32]),
		dataWrite: guid(q[32:48]),
		log:       guid(q[48:64]),
		logBytes:  int64(binary.LittleEndian.Uint32(q[68:])),
		logOffset: int64(binary.LittleEndian.Uint64(q[72:])),
	}
	if h.logBytes%mib != 0 || h.logOffset%mib != 0 || h.logOffset < 0 || h.logBytes > 0 && h.logOffset < mib {
		return h, good, false, fault.Corrupt(file.Name(), header1, "a log of %d bytes at %d", h.logBytes, h.logOffset)
	}
	return h, good, twins, nil
}

func sequence(p []byte) uint64 { return binary.LittleEndian.Uint64(p[8:]) }

// A region is a MiB-aligned part of the file with one purpose.
type region struct{ off, bytes int64 }

func (r region) end() int64 { return r.off + r.bytes }

var (
	regionTable    = mustGUID("2dc27766-f623-4200-9d64-115e9bfd4a08") // block allocation table
	regionMetadata = mustGUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
)

// regions is what the region table says.
type regions struct {
	table, metadata region
	taken           []region // every region, and the log: nothing else lies there
	second          bool     // the first table is damaged, and its copy was used
}

// readRegions reads the first region table that is good.
func readRegions(r io.ReaderAt, name string, end int64, h header) (regions, error) {
	var s regions
	p := make([]byte, regionBytes)
	found := false
	for i, off := range []int64{regions1, regions2} {
		if err := layer.ReadFull(r, name, p, off); err != nil {
			return s, err
		}
		if found = string(p[:4]) == "regi" && binary.LittleEndian.Uint32(p[4:]) == checksum(p); found {
			s.second = i == 1
			break
		}
	}
	bad := func(format string, args ...any) (regions, error) {
		return s, fault.Corrupt(name, regions1, format, args...)
	}
	if !found {
		return bad("neither region table has a right checksum")
	}
	n := int(binary.LittleEndian.Uint32(p[8:]))
	if n > maxRegions {
		return bad("%d regions", n)
	}
	s.taken = append(s.taken, region{0, mib})
	if h.logBytes > 0 {
		s.taken = append(s.taken, region{h.logOffset, h.logBytes})
	}
	for i := range n {
		e := p[16+32*i:][:32]
		id := guid(e[:16])
		off, bytes := binary.LittleEndian.Uint64(e[16:]), int64(binary.LittleEndian.Uint32(e[24:]))
		if off%mib != 0 || bytes == 0 || off > uint64(end) || int64(off) > end-bytes {
			return bad("region %s of %d bytes at %d in a file of %d", id, bytes, off, end)
		}
		reg := region{int64(off), bytes}
		for _, t := range s.taken {
			if reg.off < t.end() && t.off < reg.end() {
				return bad("region %s at %d overlaps what lies at %d", id, reg.off, t.off)
			}
		}
		s.taken = append(s.taken, reg)
		switch {
		case id == regionTable && s.table.bytes == 0:
			s.table = reg
		case id == regionMetadata && s.metadata.bytes == 0:
			s.metadata = reg
		case id == regionTable || id == regionMetadata:
			return bad("region %s is there twice", id)
		case binary.LittleEndian.Uint32(e[28:])&1 != 0:
			return s, fmt.Errorf("%s: required region %s: %w", name, id, fault.ErrUnsupported)
		}
	}
	if s.table.bytes == 0 || s.metadata.bytes == 0 {
		return bad("no block allocation table or no metadata")
	}
	slices.SortFunc(s.taken, func(a, b region) int { return cmp.Compare(a.off, b.off) })
	return s, nil
}

func encodeRegions(table, metadata region) []byte {
	p := make([]byte, regionBytes)
	copy(p, "regi")
	binary.LittleEndian.PutUint32(p[8:], 2)
	for i, e := range []struct {
		id guid
		region
	}{{regionTable, table}, {regionMetadata, metadata}} {
		q := p[16+32*i:]
		copy(q, e.id[:])
		binary.LittleEndian.PutUint64(q[16:], uint64(e.off))
		binary.LittleEndian.PutUint32(q[24:], uint32(e.bytes))
		q[28] = 1 // required
	}
	binary.LittleEndian.PutUint32(p[4:], checksum(p))
	return p
}

// utf16Text decodes p, which is all of a text or ends in zeros.
func utf16Text(p []byte) string {
	var units []uint16
	for ; len(p) >= 2; p = p[2:] {
		u := binary.LittleEndian.Uint16(p)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

func utf16Bytes(s string) []byte {
	var p []byte
	for _, u := range utf16.Encode([]rune(s)) {
		p = binary.LittleEndian.AppendUint16(p, u)
	}
	return p
}
