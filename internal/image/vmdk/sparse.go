package vmdk

import (
	"cmp"
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

const (
	grainCacheBytes = 2 << 20  // of grains that were unpacked for a part of them
	directoryPage   = 64 << 10 // a directory is read in pieces of this many bytes
	directoryKept   = 16 * directoryPage
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

	directory *directory // nil for a stream without: see index
	redundant *directory // its copy, nil for none
	tables    tableCache // by number

	// tableAt gives the offset of the table that a directory entry means, 0
	// for none.
	tableAt func(entry uint64) (int64, error)
	// grainAt says what a table entry means; the offset is for Data.
	grainAt func(entry uint64) (image.Kind, int64, error)
	// zeroTable is the directory entry of a table that has only zeros, 0 where
	// there is no such entry. In that table all entries are the same number.
	zeroTable uint64

	packed *packed   // how to unpack grains; nil where they are plain
	index  []scanned // the grains of a stream without a directory, sorted
}

// A directory is where the tables are listed.
type directory struct {
	base  int64 // bytes into the file
	pages tableCache
}

// tableCount is how many tables the capacity needs.
func (s *sparse) tableCount() int64 { return ceilDiv(ceilDiv(s.capacity, s.grain), s.perTable) }

// ready makes the caches. The extent is one of so many in its disk.
func (s *sparse) ready(extents int) {
	s.tables = newTableCache(tableCacheBytes/int64(max(extents, 1)), s.perTable*s.entry, s.tableCount())
	for _, d := range []*directory{s.directory, s.redundant} {
		if d != nil {
			d.pages = newTableCache(directoryKept/int64(max(extents, 1)), directoryPage, ceilDiv(s.tableCount()*s.entry, directoryPage))
		}
	}
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
		if kind, where, err = s.spareEntry(n, index, err); err != nil {
			return run{}, err
		}
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
			return run{}, s.behindEnd(r.fileOffset, off)
		}
		r.bytes = min(r.bytes, there)
	}
	return r, nil
}

func (s *sparse) behindEnd(where, off int64) error {
	return fault.Corrupt(s.object, where, "the file is truncated: byte %d of the disk would lie there, and it ends at %d", off, s.file.Bytes())
}

func (s *sparse) read(p []byte, off int64, r run) error {
	if r.compressed {
		return s.packed.read(s, p, off, r.fileOffset-off%s.grain)
	}
	return readFull(s.file, p, r.fileOffset)
}

// table gives grain table n, nil where there is none.
func (s *sparse) table(n int64) ([]byte, error) {
	if table, ok := s.tables.get(n); ok {
		return table, nil
	}
	table, err := s.findTable(n)
	if err == nil {
		s.tables.put(n, table)
	}
	return table, err
}

// findTable goes the way through the directory, and through its copy if the
// first is damaged.
func (s *sparse) findTable(n int64) ([]byte, error) {
	if s.directory == nil {
		return s.indexedTable(n), nil
	}
	entry, err := s.directoryEntry(s.directory, n)
	if err == nil && entry != 0 {
		var table []byte
		if table, err = s.load(entry); err == nil {
			return table, nil
		}
	}
	if s.redundant == nil {
		return nil, err
	}
	// Writers keep both directories alike. An entry that only the copy has was
	// lost in the first, and what it leads to must not read as zeros.
	spare, spareErr := s.directoryEntry(s.redundant, n)
	if spareErr != nil || spare == 0 {
		return nil, err
	}
	table, spareErr := s.load(spare)
	if spareErr != nil {
		return nil, cmp.Or(err, spareErr)
	}
	return table, nil
}

// empty says whether there is no table n.
func (s *sparse) empty(n int64) (bool, error) {
	if s.directory == nil {
		return s.indexedTable(n) == nil, nil
	}
	entry, err := s.directoryEntry(s.directory, n)
	if entry != 0 || err != nil || s.redundant == nil {
		return entry == 0, err
	}
	entry, err = s.directoryEntry(s.redundant, n)
	return entry == 0 || err != nil, nil
}

// load reads the table that a directory entry means.
func (s *sparse) load(entry uint64) ([]byte, error) {
	table := make([]byte, s.perTable*s.entry)
	if s.zeroTable != 0 && entry == s.zeroTable {
		for i := int64(0); i < int64(len(table)); i += s.entry {
			table[i] = byte(s.zeroTable)
		}
		return table, nil
	}
	off, err := s.tableAt(entry)
	if err != nil || off == 0 {
		return nil, err
	}
	// The last table of a file may be cut behind the entries that count.
	n := min(int64(len(table)), max(s.file.Bytes()-off, 0))
	if n < int64(len(table)) && n < ceilDiv(s.capacity, s.grain)*s.entry {
		return nil, fault.Corrupt(s.object, off, "the file is truncated: a grain table would lie there, and it ends at %d", s.file.Bytes())
	}
	return table, readFull(s.file, table[:n], off)
}

// directoryEntry reads entry n of a directory.
func (s *sparse) directoryEntry(d *directory, n int64) (uint64, error) {
	at := n * s.entry
	page := at / directoryPage
	p, ok := d.pages.get(page)
	if !ok {
		start := page * directoryPage
		p = make([]byte, min(directoryPage, s.tableCount()*s.entry-start))
		if err := readFull(s.file, p, d.base+start); err != nil {
			return 0, err
		}
		d.pages.put(page, p)
	}
	return s.value(p, at%directoryPage), nil
}

// grainEntry says what the table holds for the grain of that number.
func (s *sparse) grainEntry(table []byte, index int64) (image.Kind, int64, error) {
	kind, where, err := s.grainAt(s.value(table, index%s.perTable*s.entry))
	if err == nil && kind == image.Data && where >= s.file.Bytes() {
		err = s.behindEnd(where, index*s.grain)
	}
	return kind, where, err
}

// spareEntry asks the redundant table n for what the first one cannot say
// because of cause.
func (s *sparse) spareEntry(n, index int64, cause error) (image.Kind, int64, error) {
	if s.redundant == nil {
		return 0, 0, cause
	}
	entry, err := s.directoryEntry(s.redundant, n)
	if err != nil || entry == 0 {
		return 0, 0, cause
	}
	table, err := s.load(entry)
	if err != nil || table == nil {
		return 0, 0, cause
	}
	kind, where, err := s.grainEntry(table, index)
	if err != nil || kind != image.Data {
		return 0, 0, cause
	}
	return kind, where, nil
}

func (s *sparse) value(p []byte, at int64) uint64 {
	if s.entry == 4 {
		return uint64(binary.LittleEndian.Uint32(p[at:]))
	}
	return binary.LittleEndian.Uint64(p[at:])
}

// openHosted makes a layer of a hosted sparse extent (KDMV) whose header h is.
func openHosted(f image.File, h header) (*sparse, error) {
	if h.gdOffset <= 0 && h.rgdOffset <= 0 {
		return nil, fault.Corrupt(f.Name(), -1, "its header names no grain directory")
	}
	s := &sparse{
		file: f, object: f.Name(), capacity: h.capacity, grain: h.grain,
		perTable: h.tableSize, entry: 4,
		directory: &directory{base: h.gdOffset},
	}
	if h.rgdOffset > 0 {
		s.redundant = &directory{base: h.rgdOffset}
	}
	if err := s.checkDirectory(); err != nil {
		return nil, err
	}
	s.tableAt = func(entry uint64) (int64, error) { return int64(entry) * sector, nil }
	zeros := h.flags&flagZeroGrains != 0
	if zeros {
		s.zeroTable = zeroGrain
	}
	descEnd := h.descOffset + h.descBytes
	s.grainAt = func(entry uint64) (image.Kind, int64, error) {
		switch {
		case entry == 0:
			return image.Absent, 0, nil
		case entry == zeroGrain && zeros:
			return image.Zero, 0, nil
		}
		off := int64(entry) * sector
		if off >= h.descOffset && off < descEnd {
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
func (s *sparse) checkDirectory() error {
	bytes := s.tableCount() * s.entry
	fits := func(d *directory) bool { return d != nil && d.base > 0 && d.base <= s.file.Bytes()-bytes }
	switch {
	case fits(s.directory):
		if !fits(s.redundant) {
			s.redundant = nil
		}
		return nil
	case fits(s.redundant):
		s.directory, s.redundant = s.redundant, nil
		return nil
	}
	return fault.Corrupt(s.object, s.directory.base, "the file is truncated: its grain directory needs %d bytes, and it ends at %d", bytes, s.file.Bytes())
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
		directory: &directory{base: int64(le.Uint32(b[20:])) * sector},
	}
	if have, need := int64(le.Uint32(b[24:])), s.tableCount(); have < need {
		return nil, fault.Corrupt(f.Name(), 24, "%d grain directory entries for a disk that needs %d", have, need)
	}
	if err := s.checkDirectory(); err != nil {
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
