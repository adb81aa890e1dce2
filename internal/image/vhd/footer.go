package vhd

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

const (
	footerBytes = 512
	cookie      = "conectix"
	version1    = 0x00010000

	typeFixed        = 2
	typeDynamic      = 3
	typeDifferencing = 4

	sectorBytes = 512
)

// maxGeometry is the largest disk in bytes that cylinders, heads and sectors
// can name; a geometry that says it means "larger than I can say".
const maxGeometry = 65535 * 16 * 255 * sectorBytes

// A uuid is kept and compared as it lies in the file: Windows writes a GUID's
// own byte order there and others do not.
type uuid [16]byte

func (u uuid) String() string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// A footer says what the disk is. It lies behind everything else and, unless
// the disk is fixed, once more at the file's start.
type footer struct {
	features       uint32
	dataOffset     int64 // of the dynamic header; -1 in a fixed disk
	stamp          uint32
	creator        string // 4 bytes: the program
	creatorVersion uint32
	creatorOS      string // 4 bytes
	originalBytes  int64
	currentBytes   int64
	geometry       geometry
	kind           uint32
	id             uuid
	savedState     bool
}

// parseFooter reads a footer of 512 or, as some wrote before 2004, 511 bytes.
// ok is false where there is none or one whose checksum is wrong.
func parseFooter(p []byte) (f footer, ok bool) {
	if !bytes.HasPrefix(p, []byte(cookie)) || checksum(p, 64) != binary.BigEndian.Uint32(p[64:]) {
		return f, false
	}
	return footer{
		features:       binary.BigEndian.Uint32(p[8:]),
		dataOffset:     int64(binary.BigEndian.Uint64(p[16:])),
		stamp:          binary.BigEndian.Uint32(p[24:]),
		creator:        string(p[28:32]),
		creatorVersion: binary.BigEndian.Uint32(p[32:]),
		creatorOS:      string(p[36:40]),
		originalBytes:  int64(binary.BigEndian.Uint64(p[40:])),
		currentBytes:   int64(binary.BigEndian.Uint64(p[48:])),
		geometry: geometry{
			cylinders: int64(binary.BigEndian.Uint16(p[56:])),
			heads:     int64(p[58]),
			sectors:   int64(p[59]),
		},
		kind:       binary.BigEndian.Uint32(p[60:]),
		id:         uuid(p[68:84]),
		savedState: p[84] != 0,
	}, true
}

func (f footer) encode() []byte {
	p := make([]byte, footerBytes)
	copy(p, cookie)
	binary.BigEndian.PutUint32(p[8:], f.features)
	binary.BigEndian.PutUint32(p[12:], version1)
	binary.BigEndian.PutUint64(p[16:], uint64(f.dataOffset))
	binary.BigEndian.PutUint32(p[24:], f.stamp)
	copy(p[28:32], f.creator)
	binary.BigEndian.PutUint32(p[32:], f.creatorVersion)
	copy(p[36:40], f.creatorOS)
	binary.BigEndian.PutUint64(p[40:], uint64(f.originalBytes))
	binary.BigEndian.PutUint64(p[48:], uint64(f.currentBytes))
	binary.BigEndian.PutUint16(p[56:], uint16(f.geometry.cylinders))
	p[58], p[59] = byte(f.geometry.heads), byte(f.geometry.sectors)
	binary.BigEndian.PutUint32(p[60:], f.kind)
	copy(p[68:84], f.id[:])
	binary.BigEndian.PutUint32(p[64:], checksum(p, 64))
	return p
}

// checksum is the complement of the sum of p's bytes, without the four at at.
func checksum(p []byte, at int) uint32 {
	var sum uint32
	for i, b := range p {
		if i < at || i >= at+4 {
			sum += uint32(b)
		}
	}
	return ^sum
}

// findFooter finds the footer at the file's end, or its copy at the start.
// end is where the footer at the end begins: the bytes before it belong to the
// blocks. It is the file's length, and atEnd is false, if only the copy is
// good.
func findFooter(file image.File) (f footer, end int64, atEnd bool, err error) {
	var p [footerBytes]byte
	seen := false
	for _, n := range []int64{footerBytes, footerBytes - 1} {
		off := file.Bytes() - n
		if off < 0 {
			continue
		}
		if err := layer.ReadFull(file, file.Name(), p[:n], off); err != nil {
			return f, 0, false, err
		}
		if f, ok := parseFooter(p[:n]); ok {
			return f, off, true, nil
		}
		seen = seen || bytes.HasPrefix(p[:], []byte(cookie))
	}
	if file.Bytes() >= footerBytes {
		if err := layer.ReadFull(file, file.Name(), p[:], 0); err != nil {
			return f, 0, false, err
		}
		if f, ok := parseFooter(p[:]); ok && f.kind != typeFixed {
			return f, file.Bytes(), false, nil
		}
		seen = seen || bytes.HasPrefix(p[:], []byte(cookie))
	}
	if seen {
		return f, 0, false, fault.Corrupt(file.Name(), -1, "no footer with a right checksum")
	}
	return f, 0, false, fmt.Errorf("%s is no VHD: no footer at its end or start: %w", file.Name(), fault.ErrCorrupt)
}

// virtualBytes is the size that the guest saw. Virtual PC and old qemu made
// the disk as large as its geometry says, everybody else as CurrentSize says.
func (f footer) virtualBytes() int64 {
	if f.creator == "vpc " || f.creator == "qemu" {
		if n := f.geometry.bytes(); n > 0 && n < maxGeometry {
			return n
		}
	}
	return f.currentBytes
}

// A geometry is a disk in cylinders, heads and sectors per track.
type geometry struct{ cylinders, heads, sectors int64 }

func (g geometry) bytes() int64 { return g.cylinders * g.heads * g.sectors * sectorBytes }

// newGeometry is the geometry that the VHD specification's appendix gives a
// disk: the largest of its kind that is not larger than the disk.
func newGeometry(size int64) geometry {
	total := min(size, maxGeometry) / sectorBytes
	if total >= 65535*16*63 {
		return geometry{total / 255 / 16, 16, 255}
	}
	g := geometry{sectors: 17}
	tracks := total / g.sectors
	g.heads = max((tracks+1023)/1024, 4)
	if tracks >= g.heads*1024 || g.heads > 16 {
		g.sectors, g.heads = 31, 16
		tracks = total / g.sectors
	}
	if tracks >= g.heads*1024 {
		g.sectors, g.heads = 63, 16
		tracks = total / g.sectors
	}
	g.cylinders = tracks / g.heads
	return g
}

// epoch is where VHD counts its seconds from.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
