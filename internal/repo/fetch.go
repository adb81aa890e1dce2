package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// windowChunks is how many chunk positions Fetch plans at once: 32 GiB of disk
// at the default chunk size, in a few MB of memory.
const windowChunks = 64 << 10

// FetchOptions say how Fetch goes about it.
type FetchOptions struct {
	// Ordered asks for chunks in ascending order, one at a time. Otherwise
	// they come in the order that reads packs best, from several goroutines.
	Ordered bool
	Workers int // 0 means one more than there are processors
	// Skip, if not nil, is asked before a chunk is read.
	Skip func(index int64, id chunk.ID) bool
}

// A want is one chunk that somebody wants: where it lies and where it goes.
type want struct {
	index int64 // of the chunk in the disk
	ref
	place index.Place // of the chunk's record, or of that of its base
	// Over is, where place is the base's, where the overlay on it lies.
	over    index.Place
	layered bool
}

// end is the first byte behind the record in its pack.
func (w *want) end() int64 {
	return int64(w.place.Off) + pack.RecordOverhead + int64(w.place.CLen)
}

// Fetch reads every chunk in within that is no hole, verifies it by its id and
// calls fn with it. Chunks are whole even where within cuts them; data is only
// valid during fn. The first error ends it.
func (d *Disk) Fetch(ctx context.Context, within extent.Extent, o FetchOptions, fn func(off int64, data []byte) error) error {
	first, end, err := d.within(within)
	if err != nil {
		return err
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0) + 1
	}
	f := d.newFetch(o.Workers, fn)
	defer f.close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wants := make([]want, 0, min(windowChunks, end-first))
	flush := func() error {
		if len(wants) == 0 {
			return nil
		}
		err := f.window(ctx, wants, o.Ordered)
		wants = wants[:0]
		return err
	}
	limit := cap(wants)
	if o.Ordered {
		limit = f.batch() * windowBatches
	}
	err = d.walk(ctx, first, end, func(i int64, c ref) error {
		if o.Skip != nil && o.Skip(i, c.id) {
			return nil
		}
		wants = append(wants, want{index: i, ref: c})
		if len(wants) >= limit {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	return err
}

// windowBatches is how many batches an ordered Fetch plans at once.
const windowBatches = 64

type fetch struct {
	d        *Disk
	fn       func(off int64, data []byte) error
	shape    blob.ReadShape
	inFlight int          // runs that are being read or decoded
	buffers  *buffers     // that runs are read into
	openers  chan *opener // one for each worker
	h        *holdings    // that numbers the packs of this window
}

func (d *Disk) newFetch(workers int, fn func(off int64, data []byte) error) *fetch {
	f := &fetch{d: d, fn: fn, shape: blob.ShapeOf(d.r.st), openers: make(chan *opener, workers)}
	f.inFlight = max(workers, f.shape.InFlight)
	f.buffers = newBuffers(f.shape.Memory)
	for range workers {
		f.openers <- &opener{r: d.r, w: d.r.worker(readLevel)}
	}
	return f
}

// close waits for nothing: whoever had an opener has given it back.
func (f *fetch) close() {
	for range cap(f.openers) {
		f.d.r.idle(readLevel, (<-f.openers).w)
	}
}

// batch is how many chunks an ordered Fetch decodes together.
func (f *fetch) batch() int { return int(max(1, f.shape.Run/f.d.ChunkBytes())) }

// batches is how many of them are in memory at once, but for the one that is
// handed out. Half of what reads may take is theirs.
func (f *fetch) batches() int {
	if f.shape.Memory == 0 {
		return f.inFlight
	}
	fit := f.shape.Memory / 2 / (int64(f.batch()) * f.d.ChunkBytes())
	return int(max(1, min(int64(f.inFlight), fit)))
}

// window fetches chunks whose indexes ascend.
func (f *fetch) window(ctx context.Context, wants []want, ordered bool) error {
	h, err := f.d.r.locate(ctx, wants)
	if err != nil {
		return err
	}
	f.h = h
	if ordered {
		return f.ordered(ctx, wants)
	}
	return f.unordered(ctx, wants)
}

// locate finds the place of each chunk. The numbers of packs are those of the
// holdings that it gives.
func (r *Repository) locate(ctx context.Context, wants []want) (*holdings, error) {
	h, err := r.held(ctx)
	if err != nil {
		return nil, err
	}
	for reloaded := false; ; {
		lookup := h.locate(ctx, r, wants)
		if lookup == nil {
			return h, nil
		}
		if part := (*index.PartError)(nil); errors.As(lookup, &part) {
			if h, err = r.mend(ctx, h, lookup); err != nil {
				return nil, err
			}
			continue
		}
		if lie := (*beyondError)(nil); errors.As(lookup, &lie) {
			elsewhere, err := r.correct(ctx, h, lie.id, lie.at)
			if err != nil || !elsewhere {
				r.distrust(lie.id)
				return nil, errors.Join(lookup, err)
			}
			if h, err = r.held(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if reloaded {
			return h, lookup
		}
		// Another process may have stored it, or moved it, since we looked.
		if h, err = r.reload(ctx, h); err != nil {
			return nil, err
		}
		reloaded = true
	}
}

func (h *holdings) locate(ctx context.Context, r *Repository, wants []want) error {
	records := make([]chunk.ID, len(wants))
	keys := make([]index.Key, 0, len(wants))
	for i := range wants {
		records[i] = r.recordID(wants[i].ref)
		keys = append(keys, index.KeyOf(records[i]))
		if wants[i].overlay() {
			keys = append(keys, index.KeyOf(wants[i].base))
		}
	}
	keys = index.SortKeys(keys)
	found, err := h.table.Resolve(ctx, keys)
	if err != nil {
		return err
	}
	place := func(k index.Key) (index.Place, bool) {
		n, _ := slices.BinarySearchFunc(keys, k, func(a, b index.Key) int { return a.Compare(&b) })
		return found[n].Place, found[n].OK
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	for i := range wants {
		t := &wants[i]
		at, ok := place(index.KeyOf(records[i]))
		if !ok {
			return fmt.Errorf("chunk %s: in no pack: %w", t.id.Short(), fault.ErrCorrupt)
		}
		t.place, t.layered = at, false
		in := &h.packs[at.Pack]
		if in.state == packMissing {
			return fmt.Errorf("chunk %s: %w", t.id.Short(), fault.Corrupt(packLabel(in.id), -1, "it is not in the store"))
		}
		// No length is believed that the pack cannot hold.
		if t.end() > in.bytes {
			return &beyondError{records[i], at, &fault.CorruptError{Object: packLabel(in.id), Offset: int64(at.Off), Err: io.ErrUnexpectedEOF}}
		}
		if !t.overlay() {
			continue
		}
		k := index.KeyOf(t.base)
		if base, ok := place(k); ok && h.trust(base) == sound && !h.bad[k] {
			t.place, t.over, t.layered = base, at, true
			if t.end() > h.packs[base.Pack].bytes {
				t.place, t.layered = at, false // who reads the base alone will say
			}
		}
	}
	return nil
}

// A run is what one read of one pack gives.
type run struct {
	pack  uint32
	wants []want // by offset
}

func (u *run) off() int64 { return int64(u.wants[0].place.Off) }
func (u *run) len() int64 { return u.wants[len(u.wants)-1].end() - u.off() }

// runs cuts wants, sorted by pack and offset, into reads.
func runs(wants []want, shape blob.ReadShape) (out []run) {
	for len(wants) > 0 {
		n := 1
		for n < len(wants) && wants[n].place.Pack == wants[0].place.Pack &&
			int64(wants[n].place.Off)-wants[n-1].end() <= shape.Gap &&
			int64(wants[n].place.Off)-int64(wants[0].place.Off) < shape.Run {
			n++
		}
		// The same record, wanted again elsewhere in the disk.
		for n < len(wants) && wants[n].place == wants[n-1].place {
			n++
		}
		out = append(out, run{wants[0].place.Pack, wants[:n]})
		wants = wants[n:]
	}
	return out
}

// unordered takes packs in the order of their first chunk in the disk.
func (f *fetch) unordered(ctx context.Context, wants []want) error {
	rank := map[uint32]int{}
	for _, w := range wants {
		if _, ok := rank[w.place.Pack]; !ok {
			rank[w.place.Pack] = len(rank)
		}
	}
	slices.SortFunc(wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(rank[a.place.Pack], rank[b.place.Pack]), cmp.Compare(a.place.Off, b.place.Off), cmp.Compare(a.index, b.index))
	})
	jobs := make(chan run)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range f.inFlight {
		wg.Go(func() {
			for u := range jobs {
				err := f.run(ctx, u, func(index int64, data []byte) error {
					return f.fn(index*f.d.ChunkBytes(), data)
				})
				if err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	for _, u := range runs(wants, f.shape) {
		select {
		case jobs <- u:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(jobs)
	wg.Wait()
	return context.Cause(ctx)
}

// ordered decodes batches of neighbouring chunks ahead and hands them out in
// turn.
func (f *fetch) ordered(ctx context.Context, wants []want) error {
	type batch struct {
		wants []want
		data  [][]byte // by position in wants
		done  chan error
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	n, ahead := f.batch(), f.batches()
	jobs, turns := make(chan *batch), make(chan *batch, ahead)
	free := make(chan [][]byte, ahead+1)
	for range ahead + 1 {
		free <- make([][]byte, n)
	}
	var wg sync.WaitGroup
	for range ahead {
		wg.Go(func() {
			for b := range jobs {
				b.done <- f.decode(ctx, b.wants, b.data)
			}
		})
	}
	wg.Go(func() {
		defer close(turns)
		defer close(jobs)
		for len(wants) > 0 {
			k := cutBatch(wants, n)
			b := &batch{wants: wants[:k], done: make(chan error, 1)}
			wants = wants[k:]
			select {
			case b.data = <-free:
			case <-ctx.Done():
				return
			}
			select {
			case jobs <- b:
				turns <- b // has room for all that are out
			case <-ctx.Done():
				return
			}
		}
	})
	var err error
	for b := range turns {
		if e := <-b.done; err == nil {
			err = e
		}
		for i := range b.wants {
			if err == nil {
				err = f.fn(b.wants[i].index*f.d.ChunkBytes(), b.data[i])
			}
		}
		if err != nil {
			cancel(err)
		}
		free <- b.data
	}
	wg.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// cutBatch says how many of wants make up a batch of at most n: rather fewer
// than a few of another pack, which would cost a read of their own.
func cutBatch(wants []want, n int) int {
	n = min(n, len(wants))
	for k := n/2 + 1; k < n; k++ {
		if wants[k].place.Pack != wants[k-1].place.Pack {
			return k
		}
	}
	return n
}

// decode fills data[i] with the chunk wants[i].
func (f *fetch) decode(ctx context.Context, wants []want, data [][]byte) error {
	at := make(map[int64]int, len(wants))
	for i := range wants {
		at[wants[i].index] = i
	}
	sorted := slices.Clone(wants)
	slices.SortFunc(sorted, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.place.Pack, b.place.Pack), cmp.Compare(a.place.Off, b.place.Off))
	})
	for _, u := range runs(sorted, f.shape) {
		err := f.run(ctx, u, func(index int64, plain []byte) error {
			i := at[index]
			data[i] = append(data[i][:0], plain...)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// run reads the run, and the overlays on what it reads, and calls fn for each of
// its chunks. While it waits for the store it holds a buffer and no opener:
// there may be far more reads than processors.
func (f *fetch) run(ctx context.Context, u run, fn func(index int64, data []byte) error) error {
	layers, more := planOverlays(u.wants, f.shape)
	buf, err := f.buffers.get(ctx, u.len()+more)
	if err != nil {
		return err
	}
	defer f.buffers.put(buf)
	n, err := f.d.r.readRun(ctx, f.h, u, buf[:u.len()])
	var overlays [][]byte
	if err == nil {
		overlays, err = f.d.r.readOverlays(ctx, f.h, layers, len(u.wants), buf[u.len():])
	}
	var w *opener
	select {
	case w = <-f.openers:
		defer func() { f.openers <- w }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if errors.Is(err, fault.ErrNotFound) {
		return f.single(ctx, w, u, fn)
	}
	if err != nil {
		return err
	}
	w.forget()
	for i := range u.wants {
		t := &u.wants[i]
		plain, err := w.open(ctx, f.h, t, t.within(u, buf[:n]), overlays[i])
		if errors.Is(err, fault.ErrCorrupt) {
			// Perhaps it is only the index that is wrong.
			plain, err = f.d.r.readChunk(ctx, w.w, t.ref, f.d.extent(t.index).Len)
		}
		if err != nil {
			return err
		}
		if want := f.d.extent(t.index).Len; int64(len(plain)) != want {
			return fault.Corrupt("manifest "+string(f.d.id[:8]), -1, "chunk %d is %d bytes long, want %d", t.index, len(plain), want)
		}
		if err := fn(t.index, plain); err != nil {
			return err
		}
	}
	return nil
}

// readRun reads u into buf and says how much of it there is.
func (r *Repository) readRun(ctx context.Context, h *holdings, u run, buf []byte) (int, error) {
	p := h.pack(u.pack)
	n, err := r.st.ReadAt(ctx, p.name(), buf, u.off())
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("%s: %w", packLabel(p.id), err)
	}
	return n, nil
}

// within is t's record in data, which begins where u does; nil where that ends
// too early.
func (t *want) within(u run, data []byte) []byte {
	if t.end()-u.off() > int64(len(data)) {
		return nil
	}
	return data[int64(t.place.Off)-u.off() : t.end()-u.off()]
}

// single reads chunk by chunk what moved since it was located.
func (f *fetch) single(ctx context.Context, w *opener, u run, fn func(index int64, data []byte) error) error {
	for _, t := range u.wants {
		plain, err := f.d.r.readChunk(ctx, w.w, t.ref, f.d.extent(t.index).Len)
		if err != nil {
			return err
		}
		if err := fn(t.index, plain); err != nil {
			return err
		}
	}
	return nil
}
