package vhdx

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sort"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

const (
	logSector     = 4096
	entryHeader   = 64
	logDescriptor = 32

	// Windows and qemu make logs of 1 MiB, in which no more descriptors find
	// room. A longer log costs time to search, and more descriptors cost time
	// and memory to sort.
	maxLog         = 64 * mib
	maxDescriptors = 1 << 15
)

// The log holds changes of 4 KiB pages, which its writer may not have made at
// their place yet: until they are, no other structure can be trusted. It is a
// ring of entries, and an entry is a header with descriptors, then a sector
// of data for each descriptor that needs one. The entries that count are the
// sequence that ends in the highest number and holds its own tail.

// An entry of the log whose checksum is right.
type entry struct {
	at          int64 // in the ring
	bytes       int64
	tail        int64 // where in the ring the oldest change is that may be missing
	sequence    uint64
	descriptors int
	flushed     int64 // the file is at least this long
	fileBytes   int64 // and after the replay this long
}

// A logReader finds what is to be replayed.
type logReader struct {
	file   image.File
	header header

	known   map[int64]*entry // by place; nil for none
	checked int64            // bytes of entries whose checksum was computed
	sawOwn  bool             // some sector bears the log's GUID
	buf     []byte

	window   []byte // of the ring, for what is read in small pieces
	windowAt int64
}

// logWindow is how much of the ring is read at once in search of entries, which
// lie at any of its sectors: a log on a share is 256 round trips otherwise.
const logWindow = 256 << 10

// A replayed file is the file as it will be after the replay, of which
// nothing is written: changes are read from the log.
type replayed struct {
	file    image.File
	bytes   int64
	pieces  []piece // sorted, without overlaps
	entries int
}

// A piece is a range that the log changes: to zeros, or to a page of a data
// sector with its first eight and last four bytes from the descriptor.
type piece struct {
	off, bytes int64
	zero       bool
	sector     int64 // in the file
	lead       [8]byte
	trail      [4]byte
}

// replay reads the log of a file whose header says that it has one to replay.
func replay(file image.File, h header) (*replayed, error) {
	r := &replayed{file: file, bytes: file.Bytes()}
	if h.logBytes == 0 || h.logOffset > file.Bytes()-h.logBytes {
		return nil, fault.Corrupt(file.Name(), h.logOffset, "dirty log of %d bytes in a file of %d", h.logBytes, file.Bytes())
	}
	if h.logBytes > maxLog {
		return nil, fmt.Errorf("%s: dirty log of %d bytes: %w", file.Name(), h.logBytes, fault.ErrUnsupported)
	}
	l := &logReader{file: file, header: h, known: map[int64]*entry{}, buf: make([]byte, 64<<10)}
	active, err := l.active()
	if err != nil {
		return nil, err
	}
	if len(active) == 0 {
		if l.sawOwn {
			return nil, fault.Corrupt(file.Name(), h.logOffset, "dirty log without a whole sequence of entries")
		}
		return r, nil // opened for writing, but nothing was written
	}
	head := active[len(active)-1]
	if file.Bytes() < head.flushed {
		return nil, fault.Corrupt(file.Name(), file.Bytes(), "the dirty log says that the file has at least %d bytes, it has %d", head.flushed, file.Bytes())
	}
	if head.fileBytes > r.bytes {
		r.bytes = roundMiB(head.fileBytes)
	}
	r.entries = len(active)
	var changes []piece
	for _, e := range active {
		if changes, err = l.changes(e, changes); err != nil {
			return nil, err
		}
	}
	r.pieces = flatten(changes)
	return r, nil
}

// active is the sequence to replay, oldest first, from the tail on.
func (l *logReader) active() ([]*entry, error) {
	var best []*entry
	for at := int64(0); at < l.header.logBytes; {
		var run []*entry
		has := map[int64]bool{}
		place, used := at, int64(0)
		for {
			e, err := l.entry(place)
			if err != nil {
				return nil, err
			}
			if e == nil || len(run) > 0 && e.sequence != run[len(run)-1].sequence+1 || used+e.bytes > l.header.logBytes {
				break
			}
			run = append(run, e)
			has[place] = true
			used += e.bytes
			place = (place + e.bytes) % l.header.logBytes
		}
		if len(run) == 0 {
			at += logSector
			continue
		}
		// A run that begins later in this one ends in the same entry and has no
		// tail either if this one has none.
		last := run[len(run)-1]
		at += used
		if !has[last.tail] {
			continue
		}
		if len(best) == 0 || last.sequence > best[len(best)-1].sequence {
			i := slices.IndexFunc(run, func(e *entry) bool { return e.at == last.tail })
			best = run[i:]
		}
	}
	return best, nil
}

// entry reads the entry at a place of the ring; nil says that there is no
// whole one.
func (l *logReader) entry(at int64) (*entry, error) {
	if e, ok := l.known[at]; ok {
		return e, nil
	}
	var p [entryHeader]byte
	if err := l.peek(p[:], at); err != nil {
		return nil, err
	}
	if string(p[:4]) != "loge" || guid(p[32:48]) != l.header.log {
		l.known[at] = nil
		return nil, nil
	}
	l.sawOwn = true
	e := &entry{
		at:          at,
		bytes:       int64(binary.LittleEndian.Uint32(p[8:])),
		tail:        int64(binary.LittleEndian.Uint32(p[12:])),
		sequence:    binary.LittleEndian.Uint64(p[16:]),
		descriptors: int(binary.LittleEndian.Uint32(p[24:])),
		flushed:     int64(binary.LittleEndian.Uint64(p[48:])),
		fileBytes:   int64(binary.LittleEndian.Uint64(p[56:])),
	}
	ok := e.bytes >= logSector && e.bytes%logSector == 0 && e.bytes <= l.header.logBytes &&
		e.tail%logSector == 0 && e.tail < l.header.logBytes && e.sequence > 0 &&
		entryHeader+logDescriptor*int64(e.descriptors) <= e.bytes && e.flushed >= 0 && e.fileBytes >= 0 && e.fileBytes < 1<<62
	if ok {
		// Entries never overlap, and few stale ones do with newer ones.
		if l.checked += e.bytes; l.checked > 2*l.header.logBytes+16*mib {
			return nil, fault.Corrupt(l.file.Name(), l.header.logOffset+at, "dirty log: its entries overlap too much")
		}
		sum, err := l.checksum(at, e.bytes)
		if err != nil {
			return nil, err
		}
		ok = sum == binary.LittleEndian.Uint32(p[4:])
	}
	if !ok {
		e = nil
	}
	l.known[at] = e
	return e, nil
}

// peek is read by way of the window.
func (l *logReader) peek(p []byte, at int64) error {
	if l.header.logBytes-at < int64(len(p)) {
		return l.read(p, at)
	}
	if at < l.windowAt || at+int64(len(p)) > l.windowAt+int64(len(l.window)) {
		if l.window == nil {
			l.window = make([]byte, logWindow)
		}
		w := l.window[:min(logWindow, l.header.logBytes-at)]
		l.window = w[:0]
		if err := l.read(w, at); err != nil {
			return err
		}
		l.window, l.windowAt = w, at
	}
	copy(p, l.window[at-l.windowAt:])
	return nil
}

// read reads p from a place of the ring.
func (l *logReader) read(p []byte, at int64) error {
	for len(p) > 0 {
		at %= l.header.logBytes
		n := min(int64(len(p)), l.header.logBytes-at)
		if err := layer.ReadFull(l.file, l.file.Name(), p[:n], l.header.logOffset+at); err != nil {
			return err
		}
		p, at = p[n:], at+n
	}
	return nil
}

// checksum is that of n bytes from at, with zeros in place of bytes 4 to 7.
func (l *logReader) checksum(at, n int64) (uint32, error) {
	var sum uint32
	for done := int64(0); done < n; {
		p := l.buf[:min(int64(len(l.buf)), n-done)]
		if err := l.read(p, at+done); err != nil {
			return 0, err
		}
		if done == 0 {
			clear(p[4:8])
		}
		sum = crc32.Update(sum, castagnoli, p)
		done += int64(len(p))
	}
	return sum, nil
}

// changes appends what e changes to list, in e's order.
func (l *logReader) changes(e *entry, list []piece) ([]piece, error) {
	bad := func(format string, args ...any) ([]piece, error) {
		return nil, fault.Corrupt(l.file.Name(), l.header.logOffset+e.at, "dirty log: "+format, args...)
	}
	if len(list)+e.descriptors > maxDescriptors {
		return bad("more than %d changes", maxDescriptors)
	}
	// Data sectors follow the sectors that hold the header and descriptors.
	data := (entryHeader + logDescriptor*int64(e.descriptors) + logSector - 1) / logSector * logSector
	const atOnce = 2048
	for i := range e.descriptors {
		if i%atOnce == 0 {
			if err := l.read(l.buf[:logDescriptor*min(atOnce, e.descriptors-i)], e.at+entryHeader+logDescriptor*int64(i)); err != nil {
				return nil, err
			}
		}
		d := l.buf[i%atOnce*logDescriptor:][:logDescriptor]
		off := int64(binary.LittleEndian.Uint64(d[16:]))
		if binary.LittleEndian.Uint64(d[24:]) != e.sequence || off < 0 || off%logSector != 0 {
			return bad("descriptor %d of entry %d", i, e.sequence)
		}
		switch string(d[:4]) {
		case "zero":
			n := int64(binary.LittleEndian.Uint64(d[8:]))
			if n < 0 || n%logSector != 0 || off > 1<<62-n {
				return bad("zeros of %d bytes at %d", n, off)
			}
			if n > 0 {
				list = append(list, piece{off: off, bytes: n, zero: true})
			}
		case "desc":
			if data+logSector > e.bytes || off > 1<<62 {
				return bad("descriptor %d of entry %d has no data", i, e.sequence)
			}
			at := (e.at + data) % l.header.logBytes
			var s [logSector]byte
			if err := l.read(s[:], at); err != nil {
				return nil, err
			}
			number := uint64(binary.LittleEndian.Uint32(s[4:]))<<32 | uint64(binary.LittleEndian.Uint32(s[logSector-4:]))
			if string(s[:4]) != "data" || number != e.sequence {
				return bad("data sector %d of entry %d", i, e.sequence)
			}
			list = append(list, piece{
				off: off, bytes: logSector, sector: l.header.logOffset + at,
				trail: [4]byte(d[4:8]), lead: [8]byte(d[8:16]),
			})
			data += logSector
		default:
			return bad("descriptor %d of entry %d has the signature %q", i, e.sequence, d[:4])
		}
	}
	return list, nil
}

// flatten cuts changes, of which later ones hide earlier ones, into sorted
// pieces without overlaps. Zeros may cover any range at all, so the cost must
// depend on the number of changes alone.
func flatten(changes []piece) []piece {
	var borders []int64
	for _, c := range changes {
		borders = append(borders, c.off, c.off+c.bytes)
	}
	slices.Sort(borders)
	borders = slices.Compact(borders)
	// Paint the slots between borders, latest change first; free[i] leads to
	// the first slot at or behind i that is not painted.
	free := make([]int32, len(borders)+1)
	for i := range free {
		free[i] = int32(i)
	}
	find := func(i int32) int32 {
		for free[i] != i {
			free[i] = free[free[i]]
			i = free[i]
		}
		return i
	}
	owner := make([]int32, len(borders))
	for i := range owner {
		owner[i] = -1
	}
	for n := len(changes) - 1; n >= 0; n-- {
		from, _ := slices.BinarySearch(borders, changes[n].off)
		to, _ := slices.BinarySearch(borders, changes[n].off+changes[n].bytes)
		for i := find(int32(from)); i < int32(to); i = find(i) {
			owner[i] = int32(n)
			free[i] = i + 1
		}
	}
	var out []piece
	for i, n := range owner {
		if n < 0 {
			continue
		}
		// All borders are multiples of a page, so a data change is one slot.
		p := changes[n]
		p.off, p.bytes = borders[i], borders[i+1]-borders[i]
		out = append(out, p)
	}
	return out
}

// ReadAt reads the file with the log's changes made.
func (r *replayed) ReadAt(p []byte, off int64) (int, error) {
	if off >= r.bytes {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > r.bytes-off {
		p, end = p[:r.bytes-off], io.EOF
	}
	i := sort.Search(len(r.pieces), func(i int) bool { return r.pieces[i].off+r.pieces[i].bytes > off })
	for done := 0; done < len(p); {
		at, rest := off+int64(done), p[done:]
		if i < len(r.pieces) && r.pieces[i].off <= at {
			c := r.pieces[i]
			rest = rest[:min(int64(len(rest)), c.off+c.bytes-at)]
			if err := r.change(rest, c, at-c.off); err != nil {
				return done, err
			}
			i++
		} else {
			if i < len(r.pieces) {
				rest = rest[:min(int64(len(rest)), r.pieces[i].off-at)]
			}
			n, err := r.file.ReadAt(rest, at)
			if n < len(rest) {
				if err != io.EOF {
					return done + n, err
				}
				clear(rest[n:]) // the replay would have made the file longer
			}
		}
		done += len(rest)
	}
	return len(p), end
}

// change fills p with what c says of its bytes from at on.
func (r *replayed) change(p []byte, c piece, at int64) error {
	if c.zero {
		clear(p)
		return nil
	}
	var s [logSector]byte
	if err := layer.ReadFull(r.file, r.file.Name(), s[:], c.sector); err != nil {
		return err
	}
	copy(s[:8], c.lead[:])
	copy(s[logSector-4:], c.trail[:])
	copy(p, s[at:])
	return nil
}
