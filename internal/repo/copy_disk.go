package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/vm"
)

type diskID = vm.DiskID

// copyWorkers is how many chunks are worked on at once.
func copyWorkers() int { return runtime.GOMAXPROCS(0) + 1 }

// A copier copies points from one repository to another.
type copier struct {
	from, to *Repository
	o        CopyOptions
	same     bool
	there    map[string]*point.RestorePoint // in to, by ref
	both     []*point.RestorePoint          // of from, that are in to as well

	total            int64
	done, read, sent atomic.Int64
}

func (c *copier) advance(n int64) {
	if done := c.done.Add(n); c.o.Progress != nil {
		c.o.Progress(min(done, c.total), c.total)
	}
}

// disk copies one disk on top of what there has, which has the content of
// before; before may be nil.
func (c *copier) disk(ctx context.Context, s *Session, d point.Disk, before *point.Disk, there point.ManifestID) (point.ManifestID, error) {
	src, err := c.from.OpenDisk(ctx, d.Manifest)
	if err != nil {
		return "", err
	}
	defer src.Close()
	var prev *Disk
	if before != nil && (c.from.conf.ChunkBytes == c.to.conf.ChunkBytes || before.SizeBytes == d.SizeBytes) {
		// What cannot be read here is copied as if it were not there.
		if prev, err = c.from.OpenDisk(ctx, before.Manifest); err == nil {
			defer prev.Close()
		}
	}
	if prev == nil {
		there = ""
	}
	w, err := s.Disk(ctx, src.Size(), there)
	if err != nil {
		return "", atDestination(err)
	}
	w.slot.counts = nil // the point says what its own backup stored
	k := &diskCopy{c: c, s: s, w: w, src: src, prev: prev}
	// A multiple of every chunk size.
	step := windowChunks * c.from.conf.ChunkBytes
	for off := int64(0); off < src.Size(); off += step {
		within := extent.Extent{Off: off, Len: min(step, src.Size()-off)}
		if err := k.window(ctx, within); err != nil {
			return "", err
		}
	}
	id, err := w.Finish(ctx)
	return id, atDestination(err)
}

type diskCopy struct {
	c    *copier
	s    *Session
	w    *DiskWriter
	src  *Disk
	prev *Disk // nil if there is none
}

// window copies what changed in a part of the disk.
func (k *diskCopy) window(ctx context.Context, within extent.Extent) error {
	data, err := k.src.Data(ctx, within)
	if err != nil {
		return err
	}
	changed := data
	if k.prev != nil {
		if changed, err = k.changed(ctx, within); err != nil {
			return err
		}
		doubt, err := k.w.Doubtful(ctx, within)
		if err != nil {
			return atDestination(err)
		}
		changed = changed.Union(doubt.Align(k.src.ChunkBytes(), k.src.Size()))
	}
	// What need not be read is done with.
	k.c.advance(within.Len - changed.Bytes())
	if k.src.ChunkBytes() != k.c.to.conf.ChunkBytes {
		return k.recut(ctx, changed.Align(k.c.to.conf.ChunkBytes, k.src.Size()))
	}
	for _, e := range changed.Subtract(data).List() {
		for off := e.Off; off < e.End(); off += k.src.ChunkBytes() {
			if err := k.w.Hole(off / k.src.ChunkBytes()); err != nil {
				return atDestination(err)
			}
		}
		k.c.advance(e.Len)
	}
	if k.c.same {
		return k.verbatim(ctx, within, changed)
	}
	return k.reseal(ctx, within, changed)
}

// changed are the chunks that the point before did not have.
func (k *diskCopy) changed(ctx context.Context, within extent.Extent) (set extent.Set, err error) {
	first, end, err := k.src.within(within)
	if err != nil {
		return set, err
	}
	for i := first; i < end; i++ {
		id, hole, err := k.src.Chunk(ctx, i)
		if err != nil {
			return set, err
		}
		same := false
		if i < k.prev.Chunks() {
			was, wasHole, err := k.prev.Chunk(ctx, i)
			if err != nil && !errors.Is(err, fault.ErrCorrupt) {
				return set, err
			}
			// A chunk that is a hole here and there may yet have another length.
			same = err == nil && hole == wasHole && (hole || id == was)
		} else if hole {
			same = true // behind the end of the point before there are holes
		}
		if !same {
			set.Add(k.src.extent(i))
		}
	}
	return set, nil
}

// reseal reads chunks of the source, which verifies them, and seals what the
// other side does not have.
func (k *diskCopy) reseal(ctx context.Context, within extent.Extent, changed extent.Set) error {
	skip := func(i int64, _ chunk.ID) bool { return !changed.Contains(k.src.extent(i)) }
	return k.src.Fetch(ctx, within, FetchOptions{Skip: skip}, func(off int64, data []byte) error {
		return k.put(ctx, off/k.src.ChunkBytes(), data)
	})
}

func (k *diskCopy) put(ctx context.Context, index int64, data []byte) error {
	p, err := k.w.Put(ctx, index, data)
	if err != nil {
		return atDestination(err)
	}
	k.c.read.Add(int64(len(data)))
	k.c.sent.Add(p.StoredBytes)
	k.c.advance(int64(len(data)))
	return nil
}

// recut is reseal where the other side cuts disks otherwise: it reads what
// belongs to each of its chunks.
func (k *diskCopy) recut(ctx context.Context, changed extent.Set) error {
	size := k.c.to.conf.ChunkBytes
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(copyWorkers())
	for _, e := range changed.List() {
		for off := e.Off; off < e.End() && gctx.Err() == nil; off += size {
			g.Go(func() error {
				buf := make([]byte, min(size, k.src.Size()-off))
				if _, err := k.src.ReadAt(buf, off); err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				return k.put(gctx, off/size, buf)
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// verbatim moves records as they are sealed. What the other side has is not
// read at all.
func (k *diskCopy) verbatim(ctx context.Context, within extent.Extent, changed extent.Set) error {
	first, end, err := k.src.within(within)
	if err != nil {
		return err
	}
	m := &moves{overlays: map[chunk.ID]ref{}}
	err = k.src.walk(ctx, first, end, func(i int64, c ref) error {
		e := k.src.extent(i)
		if !changed.Contains(e) {
			return nil
		}
		moves := len(m.wants)
		for _, id := range []chunk.ID{k.c.from.recordID(c), c.base} {
			if id == (chunk.ID{}) {
				continue // it has no base
			}
			h, err := k.c.to.held(ctx)
			if err != nil {
				return atDestination(err)
			}
			known, err := k.s.claim(ctx, h, id, nil)
			if err != nil {
				return atDestination(err)
			}
			if !known {
				m.wants = append(m.wants, want{index: i, ref: ref{id: id}})
			}
		}
		if c.overlay() {
			m.overlays[k.c.from.recordID(c)] = c
		}
		if len(m.wants) == moves {
			k.c.advance(e.Len)
		}
		return atDestination(k.w.draft.Set(i, c.id, c.base))
	})
	if err == nil {
		err = k.move(ctx, m)
	}
	if err != nil {
		// Somebody may rely on what was claimed and will not come.
		k.s.fail(err)
	}
	return err
}

// moves are the records to move: each is claimed, and wanted by its own id.
type moves struct {
	wants    []want
	overlays map[chunk.ID]ref // by record: what the overlays among them stand for
}

// move moves records in the order of packs.
func (k *diskCopy) move(ctx context.Context, m *moves) error {
	if len(m.wants) == 0 {
		return nil
	}
	h, err := k.c.from.locate(ctx, m.wants)
	if err != nil {
		return err
	}
	slices.SortFunc(m.wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.place.Pack, b.place.Pack), cmp.Compare(a.place.Off, b.place.Off))
	})
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(copyWorkers())
	for _, u := range runs(m.wants, blob.ShapeOf(k.c.from.st)) {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error { return k.run(gctx, h, m, u) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

func (k *diskCopy) run(ctx context.Context, h *holdings, m *moves, u run) error {
	p := h.pack(u.pack)
	buf := make([]byte, u.len())
	n, err := k.c.from.st.ReadAt(ctx, p.name(), buf, u.off())
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, fault.ErrNotFound) {
		return fmt.Errorf("%s: %w", packLabel(p.id), err)
	}
	buf = buf[:n] // nothing, if a vacuum moved it since it was located
	pw := k.c.from.worker(readLevel)
	defer k.c.from.idle(readLevel, pw)
	r := &mover{k: k, w: pw}
	for i := range u.wants {
		t := &u.wants[i]
		rec := buf[min(int64(t.place.Off)-u.off(), int64(n)):min(t.end()-u.off(), int64(n))]
		c, overlay := m.overlays[t.id]
		if !overlay {
			c = t.ref
		}
		if err := r.move(ctx, t, c, rec); err != nil {
			return err
		}
	}
	return nil
}

// A mover moves records one after the other with memory of its own.
type mover struct {
	k          *diskCopy
	w          *pack.Worker
	rec, plain []byte
}

// move sends the record of c if it is what it should be: opened, and the chunk
// verified by its id. One that is not is read the long way, which knows where
// else the chunk may lie, and sealed again.
func (r *mover) move(ctx context.Context, t *want, c ref, rec []byte) error {
	k := r.k
	bytes := k.src.extent(t.index).Len
	e, _, err := pack.ParseRecordHeader(rec)
	if err == nil && (e.ID != t.id || e.Bytes() != int64(len(rec)) || int64(e.PLen) != bytes) {
		err = errors.New("another record")
	}
	if err == nil {
		r.rec = append(r.rec[:0], rec...) // opening overwrites it
		if c.overlay() {
			// An overlay says nothing without its base: only both can be verified.
			if _, err = r.w.OpenOverlay(r.rec, t.id); err == nil {
				_, err = k.c.from.readChunk(ctx, r.w, c, bytes)
			}
		} else {
			r.plain, err = r.w.Open(r.plain, r.rec, t.id)
		}
	}
	if err != nil {
		plain, err := k.c.from.readChunk(ctx, r.w, c, bytes)
		if err != nil {
			return err
		}
		if c.overlay() {
			e, rec, err = r.w.SealWhole(c.id, c.base, plain, k.s.level > 0)
		} else {
			e, rec, err = r.w.Seal(c.id, plain, k.s.level > 0)
		}
		if err != nil {
			return err
		}
	}
	if err := k.s.append(ctx, k.w.slot, e, rec); err != nil {
		return atDestination(err)
	}
	k.c.sent.Add(e.Bytes())
	k.c.read.Add(bytes)
	k.c.advance(bytes)
	return nil
}
