package repo

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// Where the previous point's chunk is not at hand, an overlay costs a read. A
// disk of which everything is rewritten would only waste them: after missesInARow
// chunks that became none, one in tryEvery is tried.
const (
	missesInARow = 16
	tryEvery     = 8
)

// place makes sure that the repository has the chunk id, which is plain, and
// says how the manifest is to refer to it: as an overlay where that takes less.
func (w *DiskWriter) place(ctx context.Context, pw *pack.Worker, index int64, id chunk.ID, plain []byte) (ref, Put, error) {
	s := w.s
	on := w.bases.take(index) // what an overlay would be on, if that was read already
	if on != nil {
		defer s.r.plains.put(on)
	}
	h, err := s.r.held(ctx)
	if err != nil {
		return ref{}, Put{}, err
	}
	prev, hole, err := w.previous(ctx, index)
	had := err == nil && !hole // a previous point that cannot be read is of no use
	if had && prev.id == id && prev.overlay() {
		return w.keep(ctx, pw, h, prev, plain, on)
	}
	known := true
	if had && prev.id != id && s.overlays && chunk.Len(index, w.prev.Size(), s.r.conf.ChunkBytes) == int64(len(plain)) {
		if known, err = s.knows(ctx, h, id); err != nil {
			return ref{}, Put{}, err
		}
	}
	if !known {
		c := ref{id: id, base: prev.id}
		if prev.overlay() {
			c.base = prev.base // an overlay is never on another
		}
		if put, ok, err := w.overlay(ctx, pw, h, c, plain, on); ok || err != nil {
			return c, put, err
		}
	}
	put, err := w.storeWhole(ctx, pw, id, plain)
	if put.Kind == Known && had && prev.id == id {
		put.Kind = Same
	}
	return ref{id: id}, put, err
}

func (w *DiskWriter) storeWhole(ctx context.Context, pw *pack.Worker, id chunk.ID, plain []byte) (Put, error) {
	fresh, bytes, err := w.s.store(ctx, w.slot, pw, id, plain)
	if err != nil || !fresh {
		return Put{Kind: Known}, err
	}
	return Put{Kind: New, StoredBytes: bytes}, nil
}

// overlay stores c as an overlay on on, which it reads if it is nil. If that is
// not worth its while, or there is no sound base, ok is false and nothing
// happened.
func (w *DiskWriter) overlay(ctx context.Context, pw *pack.Worker, h *holdings, c ref, plain, on []byte) (put Put, ok bool, err error) {
	s := w.s
	if _, sound, err := s.r.stores(ctx, h, c.base); err != nil || !sound {
		return put, false, err
	}
	id := s.r.recordID(c)
	if known, err := s.knows(ctx, h, id); err != nil || known {
		return Put{Kind: Known}, known, err
	}
	if on == nil {
		o := &opener{r: s.r, w: pw, plain: s.r.plains.get(int(s.r.conf.ChunkBytes))}
		defer func() { s.r.plains.put(o.plain) }()
		if on, err = w.base(ctx, o, c.base, int64(len(plain))); err != nil || on == nil {
			return put, false, err
		}
	}
	e, record, ok, err := pw.SealOverlay(c.id, c.base, plain, on, s.level > 0)
	if err != nil || !ok {
		w.bases.missed.Add(1)
		return put, false, err
	}
	w.bases.missed.Store(0)
	// What changed may be nearly all that does not compress away: then the
	// whole is hardly larger, and is read at once. Most are clearly smaller
	// than their base, and so than the whole.
	if at, _, found, err := h.find(ctx, c.base); err != nil || !found || e.CLen > at.CLen/8*5 {
		record = slices.Clone(record)
		whole, _, err := pw.Seal(c.id, plain, s.level > 0)
		if err != nil {
			return put, false, err
		}
		if e.CLen > whole.CLen-whole.CLen/4 {
			return put, false, nil
		}
	}
	if known, err := s.claim(ctx, h, id, w.slot.counts); err != nil || known {
		return Put{Kind: Known}, known, err
	}
	if err := s.append(ctx, w.slot, e, record); err != nil {
		return put, false, s.fail(err)
	}
	return Put{Kind: New, StoredBytes: e.Bytes()}, true, nil
}

// base reads the chunk id that an overlay is to be on. It is nil where it
// cannot be had, or probably not be used.
func (w *DiskWriter) base(ctx context.Context, o *opener, id chunk.ID, bytes int64) ([]byte, error) {
	if n := w.bases.missed.Load(); n >= missesInARow && n%tryEvery != 0 {
		w.bases.missed.Add(1)
		return nil, nil
	}
	plain, _, err := o.read(ctx, ref{id: id}, bytes)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, nil // who reads it for its own sake will say
	}
	return plain, nil
}

// keep makes sure that the chunk c, which the previous point has as an overlay
// and which is plain, is still all there. If its base is lost, it is stored
// twice: with a record of its own for this point and later ones, and as an
// overlay that needs no base for those before.
func (w *DiskWriter) keep(ctx context.Context, pw *pack.Worker, h *holdings, c ref, plain, on []byte) (ref, Put, error) {
	s := w.s
	id := s.r.recordID(c)
	there, err := s.knows(ctx, h, id)
	if err != nil {
		return c, Put{}, err
	}
	_, based, err := s.r.stores(ctx, h, c.base)
	if err != nil {
		return c, Put{}, err
	}
	if there && based {
		return c, Put{Kind: Same}, nil
	}
	if based {
		put, ok, err := w.overlay(ctx, pw, h, c, plain, on)
		if err != nil {
			return c, put, err
		}
		if ok {
			return c, put, nil
		}
	}
	if there {
		if yes, err := s.r.whole(ctx, pw, c); ctx.Err() != nil {
			return c, Put{}, context.Cause(ctx)
		} else if err != nil || !yes {
			there = false
		}
	}
	put, err := w.storeWhole(ctx, pw, c.id, plain)
	if err != nil || there || !s.claimAgain(id) {
		return ref{id: c.id}, put, err
	}
	e, record, err := pw.SealWhole(c.id, c.base, plain, s.level > 0)
	if err == nil {
		err = s.append(ctx, w.slot, e, record)
	}
	if err != nil {
		return c, Put{}, s.fail(err)
	}
	put.Kind, put.StoredBytes = New, put.StoredBytes+e.Bytes()
	return ref{id: c.id}, put, nil
}

// bases are chunks that were read to fill others, until those are put: one for
// each worker. Whoever takes one has it alone. It is safe for concurrent use.
type bases struct {
	missed atomic.Int64 // chunks in a row that became no overlay

	mu sync.Mutex
	m  map[int64][]byte
}

// mostBases bounds what is kept for chunks that are never put.
const mostBases = 64

// keep says whether it keeps plain.
func (b *bases) keep(index int64, plain []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.m == nil {
		b.m = map[int64][]byte{}
	}
	if len(b.m) >= mostBases {
		return false
	}
	b.m[index] = plain
	return true
}

// take gives what is kept for index, or nil, and keeps it no longer.
func (b *bases) take(index int64) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	plain := b.m[index]
	delete(b.m, index)
	return plain
}

func (b *bases) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.m = nil
}
