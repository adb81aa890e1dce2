package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// A ref is how a manifest refers to a chunk: by its own record, or by an
// overlay on the record of another chunk.
type ref struct {
	id   chunk.ID // of the chunk
	base chunk.ID // of the one that it is an overlay on; zero if it is none
}

func (c ref) overlay() bool { return c.base != chunk.ID{} }

// recordID is the id of the record that c names.
func (r *Repository) recordID(c ref) chunk.ID {
	if !c.overlay() {
		return c.id
	}
	return r.overlays.ID(c.id, c.base)
}

// pack gives the n-th pack.
func (h *holdings) pack(n uint32) heldPack {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.packs[n]
}

// An opener opens records one after the other with memory of its own. It is not
// safe for concurrent use.
type opener struct {
	r *Repository
	w *pack.Worker

	plain  []byte // of the record that was opened last
	of     chunk.ID
	proven bool
	over   []byte // of the overlay that was applied last
}

// forget drops what was opened: its memory is about to be used again.
func (o *opener) forget() { o.of, o.proven = chunk.ID{}, false }

// open gives the chunk that is wanted out of the record at its place, and that
// of its overlay if it is layered; nil stands for one that its pack is too
// short for. What it gives is valid until the next call.
func (o *opener) open(ctx context.Context, h *holdings, t *want, record, over []byte) ([]byte, error) {
	switch {
	case !t.overlay():
		return o.record(h, t.id, t.place, record, true)
	case !t.layered:
		// Its base is not to be relied on. Perhaps nobody needs it.
		p, err := o.patch(h, t.ref, t.place, slices.Clone(record))
		if err != nil {
			return nil, err
		}
		if !p.Whole() {
			return o.r.readChunk(ctx, o.w, t.ref, int64(p.Bytes))
		}
		return o.apply(h, p, t.ref, t.place, nil)
	}
	p, err := o.patch(h, t.ref, t.over, over)
	if err != nil {
		return nil, err
	}
	if p.Whole() {
		return o.apply(h, p, t.ref, t.over, nil)
	}
	base, err := o.record(h, t.base, t.place, record, false)
	if err != nil {
		return nil, err
	}
	plain, err := o.apply(h, p, t.ref, t.over, base)
	if err == nil {
		return plain, nil
	}
	if wrong := o.w.Prove(base, t.base); wrong != nil {
		return nil, o.r.damaged(h, t.base, t.place, wrong)
	}
	return nil, err
}

// record opens a record that is no overlay, unless it was the last.
func (o *opener) record(h *holdings, id chunk.ID, at index.Place, record []byte, prove bool) (_ []byte, err error) {
	if o.of != id {
		if record == nil {
			return nil, o.r.damaged(h, id, at, io.ErrUnexpectedEOF)
		}
		o.forget()
		plain, err := o.w.Expand(o.plain, record, id)
		if err != nil {
			return nil, o.r.damaged(h, id, at, err)
		}
		o.plain, o.of = plain, id
	}
	if prove && !o.proven {
		if err := o.w.Prove(o.plain, id); err != nil {
			return nil, o.r.damaged(h, id, at, err)
		}
		o.proven = true
	}
	return o.plain, nil
}

// patch opens the overlay that c names.
func (o *opener) patch(h *holdings, c ref, at index.Place, record []byte) (p pack.Patch, err error) {
	id := o.r.recordID(c)
	if record == nil {
		return p, o.r.damaged(h, id, at, io.ErrUnexpectedEOF)
	}
	if p, err = o.w.OpenOverlay(record, id); err == nil && p.Base != c.base {
		err = errors.New("the overlay is on another chunk than the manifest says")
	}
	if err != nil {
		return p, o.r.damaged(h, id, at, err)
	}
	return p, nil
}

// apply gives what p makes of base, which it leaves alone.
func (o *opener) apply(h *holdings, p pack.Patch, c ref, at index.Place, base []byte) ([]byte, error) {
	if cap(o.over) < p.Bytes {
		o.over = make([]byte, p.Bytes)
	}
	o.over = o.over[:p.Bytes]
	if base != nil && len(base) != p.Bytes {
		return nil, o.r.damaged(h, p.Record, at, fmt.Errorf("its base has %d bytes, it has %d", len(base), p.Bytes))
	}
	copy(o.over, base)
	if err := o.w.Apply(&p, o.over); err != nil {
		return nil, o.r.damaged(h, p.Record, at, err)
	}
	return o.over, nil
}

// damaged makes an error of evidence against the record id at a place. It is
// stored again by the next writer that meets its chunk.
func (r *Repository) damaged(h *holdings, id chunk.ID, at index.Place, evidence error) error {
	if errors.Is(evidence, fault.ErrUnsupported) {
		return evidence
	}
	r.distrust(id)
	r.remember(wrongRecord{h.pack(at.Pack).id, id, at})
	return &fault.CorruptError{Object: packLabel(h.pack(at.Pack).id), Offset: int64(at.Off), Err: evidence}
}

func (r *Repository) distrust(id chunk.ID) {
	if h := r.current(); h != nil {
		h.distrust(id)
	}
}

// planOverlays cuts into reads the overlays of those wants that are layered, and
// says how many bytes these take. A want's index is its position in wants.
func planOverlays(wants []want, shape blob.ReadShape) (layers []run, bytes int64) {
	var over []want
	for i := range wants {
		if wants[i].layered {
			over = append(over, want{index: int64(i), ref: wants[i].ref, place: wants[i].over})
		}
	}
	slices.SortFunc(over, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.place.Pack, b.place.Pack), cmp.Compare(a.place.Off, b.place.Off))
	})
	layers = runs(over, shape)
	for i := range layers {
		bytes += layers[i].len()
	}
	return layers, bytes
}

// readOverlays reads into buf what planOverlays planned for n wants, and gives
// the record for each of them; nil where a pack is too short for it.
func (r *Repository) readOverlays(ctx context.Context, h *holdings, layers []run, n int, buf []byte) ([][]byte, error) {
	out := make([][]byte, n)
	for _, u := range layers {
		got, err := r.readRun(ctx, h, u, buf[:u.len()])
		if err != nil {
			return nil, err
		}
		for i := range u.wants {
			t := &u.wants[i]
			out[t.index] = t.within(u, buf[:got])
			if i > 0 && t.place == u.wants[i-1].place {
				out[t.index] = slices.Clone(out[t.index]) // opening it overwrites it
			}
		}
		buf = buf[u.len():]
	}
	return out, nil
}

// readRecord reads the record id and calls open with it, and with where it lies;
// nil stands for one that its pack is too short for. Its memory is valid until
// open returns. Open is called again where what it found damaged turns out to
// lie elsewhere.
func (r *Repository) readRecord(ctx context.Context, id chunk.ID, open func(h *holdings, at index.Place, record []byte) error) error {
	for try := 0; ; try++ {
		wants := []want{{ref: ref{id: id}}}
		h, err := r.locate(ctx, wants)
		if err != nil {
			return err
		}
		at := wants[0].place
		p := h.pack(at.Pack)
		buf := r.sealed.get(pack.RecordOverhead + int(at.CLen))
		n, err := r.st.ReadAt(ctx, p.name(), buf, int64(at.Off))
		switch {
		case errors.Is(err, fault.ErrNotFound) && try == 0:
			// A vacuum moved it since we loaded the index.
			r.sealed.put(buf)
			if _, err := r.reload(ctx, h); err != nil {
				return err
			}
			continue
		case err != nil && !errors.Is(err, io.EOF):
			return fmt.Errorf("%s: %w", packLabel(p.id), err)
		}
		record := buf
		if n < len(buf) {
			record = nil
		}
		err = open(h, at, record)
		r.sealed.put(buf)
		if errors.Is(err, fault.ErrCorrupt) && try == 0 {
			elsewhere, cerr := r.correct(ctx, h, id, at)
			if cerr != nil {
				return errors.Join(err, cerr)
			}
			if elsewhere {
				continue
			}
		}
		return err
	}
}

// readChunk reads one chunk of that many bytes, in new memory.
func (r *Repository) readChunk(ctx context.Context, w *pack.Worker, c ref, bytes int64) ([]byte, error) {
	o := &opener{r: r, w: w}
	plain, _, err := o.read(ctx, c, bytes)
	return plain, err
}

// read reads one chunk of that many bytes, proven by its id. It gives also the
// chunk that an overlay on this one's record would have as its base: its own
// base, or itself. That is nil where it was not read, and lies in o.plain
// otherwise.
func (o *opener) read(ctx context.Context, c ref, bytes int64) (plain, base []byte, err error) {
	if c.overlay() {
		plain, base, err = o.readLayers(ctx, c)
	} else {
		plain, err = o.readWhole(ctx, c.id)
		base = plain
	}
	if err == nil && int64(len(plain)) != bytes {
		err = fmt.Errorf("chunk %s is %d bytes long, want %d: %w", c.id.Short(), len(plain), bytes, fault.ErrCorrupt)
	}
	if err != nil {
		return nil, nil, err
	}
	return plain, base, nil
}

// readWhole reads a chunk that has a record of its own.
func (o *opener) readWhole(ctx context.Context, id chunk.ID) (plain []byte, err error) {
	err = o.r.readRecord(ctx, id, func(h *holdings, at index.Place, record []byte) (err error) {
		plain, err = o.record(h, id, at, record, true)
		return err
	})
	return plain, err
}

// readLayers reads an overlay, and its base if it needs that.
func (o *opener) readLayers(ctx context.Context, c ref) (plain, base []byte, err error) {
	err = o.r.readRecord(ctx, o.r.recordID(c), func(h *holdings, at index.Place, record []byte) error {
		p, err := o.patch(h, c, at, record)
		if err != nil {
			return err
		}
		if !p.Whole() {
			if base, err = o.readWhole(ctx, c.base); err != nil {
				return &baseError{c.id, err}
			}
		}
		plain, err = o.apply(h, p, c, at, base)
		return err
	})
	if lost := (*baseError)(nil); errors.As(err, &lost) {
		// Somebody may have stored the chunk with a record of its own.
		if h, herr := o.r.held(ctx); herr == nil {
			if _, stored, serr := o.r.stores(ctx, h, c.id); serr == nil && stored {
				plain, err = o.readWhole(ctx, c.id)
				return plain, nil, err
			}
		}
		err = fmt.Errorf("base of chunk %s: %w", lost.of.Short(), lost.err)
	}
	return plain, base, err
}

// A baseError says that the base of an overlay cannot be read. It is in no class,
// so that nobody looks for the overlay elsewhere.
type baseError struct {
	of  chunk.ID
	err error
}

func (e *baseError) Error() string { return e.err.Error() }

// whole says whether the overlay c can be read without its base.
func (r *Repository) whole(ctx context.Context, w *pack.Worker, c ref) (yes bool, err error) {
	o := &opener{r: r, w: w}
	err = r.readRecord(ctx, r.recordID(c), func(h *holdings, at index.Place, record []byte) error {
		p, err := o.patch(h, c, at, record)
		yes = err == nil && p.Whole()
		return err
	})
	return yes, err
}
