package qcow2

import (
	"context"
	"encoding/binary"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// Bits of L1 and L2 entries.
const (
	offsetMask     = 0x00fffffffffffe00
	flagCopied     = 1 << 63 // the refcount of what the entry names is exactly 1
	flagCompressed = 1 << 62
	flagZero       = 1 << 0
)

// pageBytes is how much of the tables a walk reads at a time.
const pageBytes = 64 << 10

// A view gives the file's bytes from off on: at most n, and at least 16 if
// off and n are multiples of 16. They must not be changed, and may be
// overwritten by the next call.
type view func(off, n int64) ([]byte, error)

// view is the view through the cache.
func (img *Image) view(off, n int64) ([]byte, error) {
	return img.pages.Peek(off, 8, n)
}

// A zeroEnd is a file whose last cluster is whole.
type zeroEnd struct{ image.File }

// ReadAt fills all of p, which lies before the last cluster's end.
func (f zeroEnd) ReadAt(p []byte, off int64) (int, error) {
	if err := readZeroEnd(f.File, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ownView makes a view with a buffer of its own. It is for walks, which look
// at each table once and would push all others out of the cache.
func (img *Image) ownView() view {
	var buf, p []byte
	at := int64(-1)
	return func(off, n int64) ([]byte, error) {
		if want := off &^ (pageBytes - 1); want != at {
			if buf == nil {
				buf = make([]byte, pageBytes)
			}
			var err error
			if p, err = img.readPage(buf, want); err != nil {
				at = -1
				return nil, err
			}
			at = want
		}
		return img.slice(p, at, off, n)
	}
}

func (img *Image) readPage(buf []byte, at int64) ([]byte, error) {
	limit := img.fileLimit()
	if at < 0 || at >= limit {
		return nil, img.corrupt(at, "a table lies behind the end of a file of %d bytes", img.file.Bytes())
	}
	p := buf[:min(pageBytes, limit-at)]
	return p, readZeroEnd(img.file, p, at)
}

func (img *Image) slice(p []byte, at, off, n int64) ([]byte, error) {
	if off-at >= int64(len(p)) {
		return nil, img.corrupt(off, "a table lies behind the end of a file of %d bytes", img.file.Bytes())
	}
	p = p[off-at:]
	return p[:min(n, int64(len(p)))], nil
}

// A run is a range of the virtual disk that lies in one piece.
type run struct {
	extent.Extent
	kind       image.Kind
	compressed bool
	host       int64  // of Data that is not compressed: its offset in the data file
	entry      uint64 // of compressed clusters
}

// A walker follows the tables; l1 and l2 show them.
type walker struct {
	img    *Image
	l1, l2 view
}

// runs walks a range of the state in ascending order. Neighbours that lie in
// one piece and in one L2 table are one run; a compressed cluster is a run of
// its own.
func (w walker) runs(ctx context.Context, l state, within extent.Extent) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		m := merger{yield: yield}
		err := w.walkL1(ctx, l, within, &m)
		if m.stopped {
			return
		}
		if !m.flush() {
			return
		}
		if err != nil {
			yield(run{}, err)
		}
	}
}

// A merger joins runs before it yields them.
type merger struct {
	yield   func(run, error) bool
	pending run
	stopped bool
}

// add says whether the caller still wants to hear more.
func (m *merger) add(r run) bool {
	p := &m.pending
	if p.Len > 0 && p.kind == r.kind && !p.compressed && !r.compressed && (r.kind != image.Data || p.host+p.Len == r.host) {
		p.Len += r.Len
		return true
	}
	if !m.flush() {
		return false
	}
	m.pending = r
	return true
}

func (m *merger) flush() bool {
	if m.stopped {
		return false
	}
	if m.pending.Len > 0 && !m.yield(m.pending, nil) {
		m.stopped = true
		return false
	}
	m.pending = run{}
	return true
}

// walkL1 returns nil early if m wants no more.
func (w walker) walkL1(ctx context.Context, l state, within extent.Extent, m *merger) error {
	h := &w.img.header
	perTable := h.clustersPerL2() << h.clusterBits
	var entries []byte // of the L1 table, those from the current one on
	for off := within.Off; off < within.End(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		i := off / perTable
		if len(entries) < 8 {
			var err error
			if entries, err = w.l1(l.l1+i*8, (l.l1Entries-i)*8); err != nil {
				return err
			}
			if len(entries) < 8 {
				return w.img.corrupt(l.l1+i*8, "the L1 table ends early")
			}
		}
		entry := binary.BigEndian.Uint64(entries)
		entries = entries[8:]
		left := perTable - off%perTable
		part := extent.Extent{Off: off, Len: min(left, within.End()-off)}
		table := int64(entry & offsetMask)
		switch {
		case table == 0:
			if !m.add(run{Extent: part, kind: image.Absent}) {
				return nil
			}
		case table%h.clusterBytes() != 0:
			return w.img.corrupt(l.l1+i*8, "L2 table at %d, which is not a cluster", table)
		default:
			if err := w.walkL2(table, part, m); err != nil {
				return err
			}
			// Thousands of L1 entries may name one table of zeros: whoever
			// waits for the next run must not wait for all of them.
			if !m.flush() {
				return nil
			}
		}
		off = part.End()
	}
	return nil
}

// walkL2 walks part, all of which the L2 table maps.
func (w walker) walkL2(table int64, part extent.Extent, m *merger) error {
	h := &w.img.header
	cluster, size := h.clusterBytes(), h.entryBytes()
	var entries []byte
	for off := part.Off; off < part.End(); {
		i := off >> h.clusterBits % h.clustersPerL2()
		at := table + i*size
		if int64(len(entries)) < size {
			last := (part.End() - 1) >> h.clusterBits % h.clustersPerL2()
			var err error
			if entries, err = w.l2(at, (last-i+1)*size); err != nil {
				return err
			}
			if int64(len(entries)) < size {
				return w.img.corrupt(at, "an L2 table ends early")
			}
		}
		entry, bitmap := binary.BigEndian.Uint64(entries), uint64(0)
		if size == 16 {
			bitmap = binary.BigEndian.Uint64(entries[8:])
		}
		entries = entries[size:]
		c := extent.Extent{Off: off, Len: min(cluster-off%cluster, part.End()-off)}
		if err := w.cluster(at, entry, bitmap, c, m); err != nil {
			return err
		}
		if m.stopped {
			return nil
		}
		off = c.End()
	}
	return nil
}

// cluster adds the runs of part, which lies in the cluster that entry maps.
// The entry itself is at offset at of the file.
func (w walker) cluster(at int64, entry, bitmap uint64, part extent.Extent, m *merger) error {
	img, h := w.img, &w.img.header
	external := h.incompatible&incompatDataFile != 0
	if entry&flagCompressed != 0 {
		if external || bitmap != 0 {
			return img.corrupt(at, "a compressed cluster where there can be none")
		}
		m.add(run{Extent: part, kind: image.Data, compressed: true, entry: entry})
		return nil
	}
	host := int64(entry & offsetMask)
	if host%h.clusterBytes() != 0 {
		return img.corrupt(at, "a cluster at %d, which is not a multiple of %d", host, h.clusterBytes())
	}
	// A data file's first cluster is a good one; only the flag tells it from
	// none at all.
	allocated := host != 0 || external && entry&flagCopied != 0
	inner := part.Off % h.clusterBytes()
	switch {
	case h.extendedL2():
		return w.subclusters(at, allocated, host, bitmap, part, m)
	case h.version >= 3 && entry&flagZero != 0:
		m.add(run{Extent: part, kind: image.Zero})
	case !allocated:
		m.add(run{Extent: part, kind: image.Absent})
	default:
		m.add(run{Extent: part, kind: image.Data, host: host + inner})
	}
	return nil
}

// subclusters is cluster for extended L2 entries, whose bitmap has a bit
// "allocated" (low half) and a bit "zero" (high half) for each of 32 parts.
func (w walker) subclusters(at int64, allocated bool, host int64, bitmap uint64, part extent.Extent, m *merger) error {
	data, zero := uint32(bitmap), uint32(bitmap>>32)
	if data&zero != 0 || data != 0 && !allocated {
		return w.img.corrupt(at+8, "an impossible subcluster bitmap %#016x", bitmap)
	}
	cluster := w.img.header.clusterBytes()
	sub := cluster / 32
	for off := part.Off; off < part.End(); {
		inner := off % cluster
		i := inner / sub
		s := extent.Extent{Off: off, Len: min(sub-inner%sub, part.End()-off)}
		r := run{Extent: s, kind: image.Absent}
		switch {
		case zero>>i&1 != 0:
			r.kind = image.Zero
		case data>>i&1 != 0:
			r.kind, r.host = image.Data, host+inner
		}
		if !m.add(r) {
			return nil
		}
		off = s.End()
	}
	return nil
}
