package vmdk

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// Kinds of metadata markers in a stream. A marker is one sector:
//
//	sectors that follow (u64) | 0 (u32) | kind (u32)
//
// A grain's marker differs in that its u32 at 8, the length, is not 0.
const (
	markerEnd       = 0
	markerTable     = 1
	markerDirectory = 2
	markerFooter    = 3
)

// A stream that lost its footer is indexed grain by grain up to this many,
// which take 32 MiB of memory and are 256 GiB of disk.
const maxScanned = 4 << 20

const scanWindow = 4 << 10 // bytes of a stream that scan reads at a time

// openStream makes a layer of an extent whose header leaves the directory's
// place to a footer. Where the end of the file has no footer, because
// something was appended, or the writer wrote none, the stream is read marker
// by marker. A stream that breaks off is damage: what it does not hold would
// read as zeros.
func openStream(f image.File, h header) (*sparse, error) {
	if foot, ok := footer(f, h); ok {
		return openHosted(f, foot)
	}
	if !h.compressed() || !h.markers() {
		return nil, fault.Corrupt(f.Name(), -1, "its header refers to a footer, and there is none")
	}
	found, grains, err := scan(f, h)
	if err != nil {
		return nil, err
	}
	if found.gdOffset > 0 {
		return openHosted(f, found)
	}
	return indexed(f, h, grains), nil
}

// footer reads the copy of the header that lies before the end-of-stream
// marker, and says whether it is one that fits h.
func footer(f image.File, h header) (header, bool) {
	at := f.Bytes() - 2*sector
	b := make([]byte, 2*sector)
	if readFull(f, b, at) != nil || !allZero(b[sector:sector+16]) {
		return h, false
	}
	foot, err := parseHeader(f.Name(), at, b[:sector])
	if err != nil || foot.gdOffset <= 0 || foot.capacity != h.capacity || foot.grain != h.grain || foot.tableSize != h.tableSize {
		return h, false
	}
	// The footer is a copy with the directory's place put in; where the rest
	// differs, the head of the file is what everybody goes by.
	h.gdOffset = foot.gdOffset
	return h, true
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// A scanned grain is one that scan met: its number, and where it lies.
type scanned struct {
	index, sector uint32
}

// scan follows the markers from the first grain to the end of the stream. It
// gives the header with the directory's place if a marker told it, and the
// grains otherwise.
func scan(f image.File, h header) (header, []scanned, error) {
	var grains []scanned
	var buf [scanWindow]byte
	var window []byte // of the file at windowOff: markers may follow each other closely
	var windowOff int64
	off := h.overhead
	for {
		if off > f.Bytes()-sector {
			return h, nil, fault.Corrupt(f.Name(), off, "the stream is truncated: it breaks off before its end marker")
		}
		if off < windowOff || off+sector > windowOff+int64(len(window)) {
			window, windowOff = buf[:min(scanWindow, f.Bytes()-off)], off
			if err := readFull(f, window, off); err != nil {
				return h, nil, err
			}
		}
		m := window[off-windowOff:]
		value, size := binary.LittleEndian.Uint64(m), int64(binary.LittleEndian.Uint32(m[8:]))
		if size != 0 {
			if size > 2*h.grain+4096 || value%uint64(h.grain/sector) != 0 || value >= uint64(h.capacity/sector) {
				return h, nil, fault.Corrupt(f.Name(), off, "no marker of the stream: sector %d, %d bytes", value, size)
			}
			index := int64(value) * sector / h.grain
			if len(grains) == maxScanned || index > math.MaxUint32 || off/sector > math.MaxUint32 {
				return h, nil, fmt.Errorf("%s: a stream without a directory, of more than %d grains: %w", f.Name(), maxScanned, fault.ErrUnsupported)
			}
			grains = append(grains, scanned{uint32(index), uint32(off / sector)})
			off += ceilDiv(markerBytes+size, sector) * sector
			continue
		}
		kind := binary.LittleEndian.Uint32(m[12:])
		off += sector
		switch kind {
		case markerEnd:
			return h, grains, nil
		case markerDirectory:
			h.gdOffset = off
			return h, nil, nil
		case markerTable, markerFooter:
			if value > uint64(f.Bytes()/sector) {
				return h, nil, fault.Corrupt(f.Name(), off-sector, "a marker with %d sectors behind it", value)
			}
			off += int64(value) * sector
		default:
			return h, nil, fault.Corrupt(f.Name(), off-sector, "a marker of kind %d", kind)
		}
	}
}

// indexed makes a layer of the grains of a stream that has no directory.
func indexed(f image.File, h header, grains []scanned) *sparse {
	// Of two for one place the later counts, as for one who reads from a pipe.
	slices.SortStableFunc(grains, func(a, b scanned) int { return cmp.Compare(a.index, b.index) })
	s := &sparse{
		file: f, object: f.Name(), capacity: h.capacity, grain: h.grain,
		perTable: h.tableSize, entry: 4,
		packed: newPacked(true, h.grain),
		index:  grains,
	}
	s.grainAt = func(entry uint64) (image.Kind, int64, error) {
		if entry == 0 {
			return image.Absent, 0, nil
		}
		return image.Data, int64(entry) * sector, nil
	}
	return s
}

// indexedTable makes table n out of the index, nil where it has nothing.
func (s *sparse) indexedTable(n int64) []byte {
	first := n * s.perTable
	i, _ := slices.BinarySearchFunc(s.index, first, func(g scanned, v int64) int { return cmp.Compare(int64(g.index), v) })
	var table []byte
	for ; i < len(s.index) && int64(s.index[i].index) < first+s.perTable; i++ {
		if table == nil {
			table = make([]byte, s.perTable*s.entry)
		}
		binary.LittleEndian.PutUint32(table[(int64(s.index[i].index)-first)*s.entry:], s.index[i].sector)
	}
	return table
}
