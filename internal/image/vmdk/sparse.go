package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// A run is what a layer holds from some offset on.
type run struct {
	bytes      int64
	kind       image.Kind
	compressed bool
	fileOffset int64 // of Data that is not compressed
}

// A layer is one extent of a disk: what a line of the descriptor names. Its
// methods are safe for concurrent use.
type layer interface {
	// at says what is there from off on, for at least one byte and for at most
	// limit. A compressed run is never longer than one grain.
	at(off, limit int64) (run, error)
	// read fills p with the Data at off, which lie within one run r.
	read(p []byte, off int64, r run) error
}

// What a sparse extent may keep in memory of its tables and of grains that
// were unpacked for a part of them.
const (
	tableCacheBytes = 4 << 20
	grainCacheBytes = 2 << 20
	directoryPage   = 64 << 10 // the directory is read in pieces of this many bytes
)

// A sparse is an extent whose grains are found through a directory of grain
// tables. VMware has three of the kind, which differ in the width and meaning
// of the entries.
type sparse struct {
	file     image.File
	object   string // the file's name, for messages
	capacity int64  // bytes
	grain    int64  // bytes
	perTable int64  // entries of a table
	entry    int64  // bytes of an entry of either level: 4 or 8

	directory int64 // offset of the directory, 0 for none: see index
	redundant int64 // offset of its copy, -1 for none
	tables    *cache

	// tableAt gives the offset of the table that a directory entry means, 0
	// for none.
	tableAt func(entry uint64) (int64, error)
	// grainAt says what a table entry means; the offset is for Data.
	grainAt func(entry uint64) (image.Kind, int64, error)

	packed *packed   // how to unpack grains; nil where they are plain
	index  []scanned // the grains of a stream without a directory, sorted
}

func (s *sparse) at(off, limit int64) (run, error) {
	limit = min(limit, s.capacity-off)
	index := off / s.grain
	n := index / s.perTable // the table's number
	table, err := s.table(n)
	if err != nil {
		return run{}, err
	}
	span := s.grain * s.perTable
	if table == nil {
		end := (n + 1) * span
		for end < off+limit {
			n++
			if empty, err := s.empty(n); err != nil {
				return run{}, err
			} else if !empty {
				break
			}
			end += span
		}
		return run{bytes: min(limit, end-off), kind: image.Absent}, nil
	}
	kind, where, err := s.grainEntry(table, index)
	if err != nil {
		return run{}, err
	}
	r := run{kind: kind, fileOffset: where + off%s.grain, compressed: kind == image.Data && s.packed != nil}
	end := (index + 1) * s.grain
	if !r.compressed {
		for stop := min((n+1)*span, off+limit); end < stop; end += s.grain {
			index++
			k, w, err := s.grainEntry(table, index)
			if err != nil || k != kind || k == image.Data && w != where+s.grain {
				break // what is wrong with the next grain is told when it is asked for
			}
			where = w
		}
	}
	r.bytes = min(limit, end-off)
	if kind == image.Data && !r.compressed {
		// The last grain of a file may be cut where the disk ends, never before.
		there := s.file.Bytes() - r.fileOffset
		if there <= 0 {
			return run{}, fault.Corrupt(s.object, r.fileOffset, "byte %d of the disk would lie there, and the file ends at %d", off, s.file.Bytes())
		}
		r.bytes = min(r.bytes, there)
	}
	return r, nil
}

func (s *sparse) read(p []byte, off int64, r run) error {
	if r.compressed {
		return s.packed.read(s, p, off, r.fileOffset-off%s.grain)
	}
	return readFull(s.file, p, r.fileOffset)
}

// table gives grain table n, nil where there is none.
func (s *sparse) table(n int64) ([]byte, error) {
	if s.directory == 0 {
		return s.tables.get(n, func() ([]byte, error) { return s.indexedTable(n), nil })
	}
	entry, err := s.directoryEntry(s.directory, n)
	if err != nil {
		if s.redundant < 0 {
			return nil, err
		}
		return s.spareTable(n, err)
	}
	table, err := s.load(entry)
	if err != nil && s.redundant >= 0 {
		return s.spareTable(n, err)
	}
	return table, err
}

// empty says whether there is no table n.
func (s *sparse) empty(n int64) (bool, error) {
	if s.directory == 0 {
		return s.indexedTable(n) == nil, nil
	}
	entry, err := s.directoryEntry(s.directory, n)
	return entry == 0, err
}

// spareTable finds table n through the redundant directory when the way
// through the first one ended with cause.
func (s *sparse) spareTable(n int64, cause error) ([]byte, error) {
	entry, err := s.directoryEntry(s.redundant, n)
	if err != nil || entry == 0 {
		return nil, cause
	}
	table, err := s.load(entry)
	if err != nil {
		return nil, cause
	}
	return table, nil
}

// load reads the table that a directory entry means.
func (s *sparse) load(entry uint64) ([]byte, error) {
	off, err := s.tableAt(entry)
	if err != nil || off == 0 {
		return nil, err
	}
	return s.tables.get(off, func() ([]byte, error) {
		// The last table of a file may be cut behind the entries that count.
		n := min(s.perTable*s.entry, max(s.file.Bytes()-off, 0))
		if n < s.perTable*s.entry && n < ceilDiv(s.capacity, s.grain)*s.entry {
			return nil, fault.Corrupt(s.object, off, "a grain table lies behind the end of the file")
		}
		table := make([]byte, s.perTable*s.entry)
		return table, readFull(s.file, table[:n], off)
	})
}

// directoryEntry reads entry n of the directory at base.
func (s *sparse) directoryEntry(base, n int64) (uint64, error) {
	at := n * s.entry
	page := at / directoryPage * directoryPage
	all := ceilDiv(ceilDiv(s.capacity, s.grain), s.perTable) * s.entry
	// Tables and pages share the cache; a page's key is negative.
	p, err := s.tables.get(-1-(base+page), func() ([]byte, error) {
		p := make([]byte, min(directoryPage, all-page))
		return p, readFull(s.file, p, base+page)
	})
	if err != nil {
		return 0, err
	}
	return s.value(p, at-page), nil
}

// grainEntry says what the table holds for the grain of that number.
func (s *sparse) grainEntry(table []byte, index int64) (image.Kind, int64, error) {
	return s.grainAt(s.value(table, index%s.perTable*s.entry))
}

func (s *sparse) value(p []byte, at int64) uint64 {
	if s.entry == 4 {
		return uint64(binary.LittleEndian.Uint32(p[at:]))
	}
	return binary.LittleEndian.Uint64(p[at:])
}

// openHosted makes a layer of a hosted sparse extent (KDMV) whose header h is.
func openHosted(f image.File, h header) (*sparse, error) {
	if h.gdOffset <= 0 {
		return nil, fault.Corrupt(f.Name(), -1, "its header names no grain directory")
	}
	s := &sparse{
		file: f, object: f.Name(), capacity: h.capacity, grain: h.grain,
		perTable: h.tableSize, entry: 4,
		directory: h.gdOffset, redundant: h.rgdOffset,
		tables: newCache(tableCacheBytes),
	}
	if err := s.checkDirectory(h.directoryEntries() * 4); err != nil {
		return nil, err
	}
	s.tableAt = func(entry uint64) (int64, error) { return int64(entry) * sector, nil }
	s.grainAt = func(entry uint64) (image.Kind, int64, error) {
		switch {
		case entry == 0:
			return image.Absent, 0, nil
		case entry == 1 && h.flags&flagZeroGrains != 0:
			return image.Zero, 0, nil
		}
		off := int64(entry) * sector
		if off < h.descOffset+h.descBytes {
			return 0, 0, fault.Corrupt(s.object, -1, "a grain table entry points at the descriptor (sector %d)", entry)
		}
		return image.Data, off, nil
	}
	if h.compressed() {
		s.packed = newPacked(h.markers(), h.grain)
	}
	return s, nil
}

// checkDirectory looks whether the directory fits into the file. If it does
// not and its copy does, the copy is what counts.
func (s *sparse) checkDirectory(bytes int64) error {
	fits := func(off int64) bool { return off > 0 && off <= s.file.Bytes()-bytes }
	switch {
	case fits(s.directory):
		return nil
	case fits(s.redundant):
		s.directory, s.redundant = s.redundant, -1
		return nil
	}
	return fault.Corrupt(s.object, s.directory, "the grain directory needs %d bytes, and the file ends at %d", bytes, s.file.Bytes())
}

// openCOWD makes a layer of a COWD extent, the sparse kind of old ESX hosts
// ("-delta.vmdk").
func openCOWD(f image.File) (*sparse, error) {
	b := make([]byte, 32)
	if err := readFull(f, b, 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[4:]); v != 1 {
		return nil, fmt.Errorf("%s: COWD extent version %d: %w", f.Name(), v, fault.ErrUnsupported)
	}
	capacity, grain := int64(le.Uint32(b[12:]))*sector, int64(le.Uint32(b[16:]))*sector
	if grain == 0 || grain > maxGrain {
		return nil, fault.Corrupt(f.Name(), 16, "a grain of %d bytes", grain)
	}
	s := &sparse{
		file: f, object: f.Name(), capacity: capacity, grain: grain,
		perTable: 4096, entry: 4,
		directory: int64(le.Uint32(b[20:])) * sector, redundant: -1,
		tables: newCache(tableCacheBytes),
	}
	need := ceilDiv(ceilDiv(capacity, grain), s.perTable)
	if have := int64(le.Uint32(b[24:])); have < need {
		return nil, fault.Corrupt(f.Name(), 24, "%d grain directory entries for a disk that needs %d", have, need)
	}
	if err := s.checkDirectory(need * 4); err != nil {
		return nil, err
	}
	s.tableAt = func(entry uint64) (int64, error) { return int64(entry) * sector, nil }
	s.grainAt = func(entry uint64) (image.Kind, int64, error) {
		if entry == 0 {
			return image.Absent, 0, nil
		}
		return image.Data, int64(entry) * sector, nil
	}
	return s, nil
}
