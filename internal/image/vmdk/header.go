package vmdk

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// What the first bytes of a file can be.
const (
	magicSparse   = "KDMV"
	magicCOWD     = "COWD"
	magicSESparse = "\xbe\xba\xfe\xca\x00\x00\x00\x00"
)

// Flags of the sparse header.
const (
	flagNewlines   = 1 << 0 // the newline test bytes are there
	flagRedundant  = 1 << 1 // the redundant grain directory is kept up
	flagZeroGrains = 1 << 2 // zeroGrain means zeros
	flagCompressed = 1 << 16
	flagMarkers    = 1 << 17
)

// zeroGrain is a table's entry for a grain of zeros, and a directory's for a
// table of them, where flagZeroGrains is set.
const zeroGrain = 1

const (
	gdAtEnd         = ^uint64(0) // gdOffset of a header whose footer has the real one
	deflate         = 1          // compressAlgorithm
	newlineTest     = "\n \r\n"
	headerBytes     = 512
	maxGrain        = 16 << 20 // bytes
	maxPackedGrain  = 4 << 20  // bytes of a compressed grain's content: it is decoded in memory
	maxTableEntries = 512      // VMware writes 512, always
)

// A header is the first sector of a hosted sparse extent, or its copy in the
// footer. Positions are in bytes here and in sectors in the file.
type header struct {
	version    uint32
	flags      uint32
	capacity   int64 // bytes
	grain      int64 // bytes
	descOffset int64
	descBytes  int64
	tableSize  int64 // entries of a grain table
	rgdOffset  int64 // -1 for none
	gdOffset   int64 // -1 where the footer says it
	overhead   int64
	unclean    bool
}

// parseHeader reads the sector b that lies at off of object.
func parseHeader(object string, off int64, b []byte) (header, error) {
	le := binary.LittleEndian
	bad := func(format string, args ...any) (header, error) {
		return header{}, fault.Corrupt(object, off, "sparse header: "+format, args...)
	}
	if len(b) < headerBytes || string(b[:4]) != magicSparse {
		return bad("no %s there", magicSparse)
	}
	h := header{version: le.Uint32(b[4:]), flags: le.Uint32(b[8:]), unclean: b[72] != 0}
	if h.version < 1 || h.version > 3 {
		return header{}, fmt.Errorf("%s: sparse extent version %d: %w", object, h.version, fault.ErrUnsupported)
	}
	if h.flags&flagNewlines != 0 && string(b[73:77]) != newlineTest {
		return bad("its line ends were changed, as by a transfer in text mode")
	}
	capacity, grain := le.Uint64(b[12:]), le.Uint64(b[20:])
	if capacity > maxBytes/sector {
		return bad("a capacity of %d sectors", capacity)
	}
	h.capacity = int64(capacity) * sector
	limit := uint64(maxGrain / sector)
	if h.compressed() {
		limit = maxPackedGrain / sector
	}
	if bits.OnesCount64(grain) != 1 || grain > limit {
		return bad("a grain of %d sectors", grain)
	}
	h.grain = int64(grain) * sector
	h.tableSize = int64(le.Uint32(b[44:]))
	if bits.OnesCount64(uint64(h.tableSize)) != 1 || h.tableSize > maxTableEntries {
		return bad("%d entries in a grain table", h.tableSize)
	}
	for _, p := range []struct {
		name string
		at   int
		to   *int64
	}{
		{"descriptor", 28, &h.descOffset}, {"descriptor size", 36, &h.descBytes},
		{"redundant grain directory", 48, &h.rgdOffset}, {"grain directory", 56, &h.gdOffset},
		{"data", 64, &h.overhead},
	} {
		v := le.Uint64(b[p.at:])
		switch {
		case v == gdAtEnd && (p.to == &h.gdOffset || p.to == &h.rgdOffset):
			*p.to = -1
		case v > maxBytes/sector:
			return bad("%s at sector %d", p.name, v)
		default:
			*p.to = int64(v) * sector
		}
	}
	if h.flags&flagRedundant == 0 || h.rgdOffset == 0 {
		h.rgdOffset = -1
	}
	if algorithm := le.Uint16(b[77:]); h.compressed() && algorithm != deflate {
		return header{}, fmt.Errorf("%s: compression %d: %w", object, algorithm, fault.ErrUnsupported)
	}
	return h, nil
}

func (h header) compressed() bool { return h.flags&flagCompressed != 0 }
func (h header) markers() bool    { return h.flags&flagMarkers != 0 }

// encode is parseHeader's inverse.
func (h header) encode() []byte {
	b := make([]byte, headerBytes)
	le := binary.LittleEndian
	copy(b, magicSparse)
	le.PutUint32(b[4:], h.version)
	le.PutUint32(b[8:], h.flags)
	for at, v := range map[int]int64{
		12: h.capacity, 20: h.grain, 28: h.descOffset, 36: h.descBytes,
		48: h.rgdOffset, 56: h.gdOffset, 64: h.overhead,
	} {
		if v >= 0 {
			le.PutUint64(b[at:], uint64(v/sector))
		}
	}
	if h.gdOffset < 0 {
		le.PutUint64(b[56:], gdAtEnd)
	}
	le.PutUint32(b[44:], uint32(h.tableSize))
	copy(b[73:], newlineTest)
	if h.compressed() {
		le.PutUint16(b[77:], deflate)
	}
	return b
}

func ceilDiv(a, b int64) int64 {
	return a/b + min(a%b, 1)
}

// readFull reads len(p) bytes at off and takes a file that ends before for
// damage.
func readFull(f image.File, p []byte, off int64) error {
	if off < 0 || off > f.Bytes()-int64(len(p)) {
		return fault.Corrupt(f.Name(), off, "the file is truncated: %d bytes are needed there, and it ends at %d", len(p), f.Bytes())
	}
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("short read")
	}
	return fmt.Errorf("%s at %d: %w", f.Name(), off, err)
}
