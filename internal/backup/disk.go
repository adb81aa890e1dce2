package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// windowBytes is how much of a disk is planned at a time, so that the extents
// of the largest disk fit in memory. It is a multiple of every chunk size.
const windowBytes = 1 << 30

// mergeBytes: where everything is read, extents that are no further apart are
// read as one. What lies between is zeros, so it costs a copy and no data.
const mergeBytes = 64 << 10

// A reader takes one disk from its source into the repository.
type reader struct {
	*engine
	src     hypervisor.Disk
	info    vm.Disk
	session *repo.Session
	history *history
	seed    uint64

	out      *repo.DiskWriter
	previous bool // out has a previous point underneath
	bufs     sync.Pool

	read, refill, fresh, stored atomic.Int64
	changedBytes, auditBytes    int64
	touched                     bits // chunks that an incremental has seen changed
	lied                        bool
	lost                        int64 // chunks that turned to zeros without tracking
}

// errSource is the class of what the source, and not the repository, did wrong.
var errSource = errors.New("the source")

// A sourceError adds the class errSource to an error, and no words.
type sourceError struct{ error }

func (e sourceError) Unwrap() error        { return e.error }
func (e sourceError) Is(target error) bool { return target == errSource }

// run reads the disk in whatever mode the source and the previous point allow.
func (r *reader) run(ctx context.Context) (point.Disk, error) {
	start := r.Now()
	d := point.Disk{Disk: r.info, ChangeID: r.src.ChangeID()}
	d.Mode, d.Reason = r.src.Mode()
	prev, has := r.history.base(r.info.ID)
	if err := r.open(ctx, &d, prev, has); err != nil {
		return d, err
	}
	r.Progress.Total(r.info.SizeBytes)
	if err := r.readAs(ctx, &d, prev.SizeBytes); err != nil {
		return d, err
	}
	if d.ChangeID == prev.ChangeID && (r.lied || !r.previous) {
		d.ChangeID = "" // it was handed on, and leads to what can't be built on
	}
	var err error
	if d.Manifest, err = r.out.Finish(ctx); err != nil {
		return d, err
	}
	d.Stats = point.Stats{
		ReadBytes: r.read.Load(), ChangedBytes: r.changedBytes, AuditBytes: r.auditBytes, RefillBytes: r.refill.Load(),
		NewBytes: r.fresh.Load(), StoredBytes: r.stored.Load(), Duration: r.Now().Sub(start),
	}
	return d, nil
}

// open starts the disk in the repository, upon the previous point if there is
// one that can be read, and settles what the disk's mode is to be called.
func (r *reader) open(ctx context.Context, d *point.Disk, prev base, has bool) (err error) {
	useless := r.history.useless
	if has && useless == nil {
		if r.out, err = r.session.Disk(ctx, r.info.SizeBytes, prev.Manifest); err == nil {
			r.previous = true
			r.distrust(d, prev)
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		r.history.note(fmt.Errorf("disk %s of the previous restore point: %w", r.info.ID, err))
		r.Log.Warn("the previous restore point can't be built on, reading everything", "vm", r.history.name, "disk", r.info.ID, "err", err)
		useless = err
	}
	switch {
	case useless != nil:
		d.Reason = fmt.Sprintf("the previous restore point can't be read: %v", useless)
	case d.Mode != point.Full:
		d.Reason = "first backup of this disk"
	}
	d.Mode = point.Full
	r.out, err = r.session.Disk(ctx, r.info.SizeBytes, "")
	return err
}

// distrust makes of an incremental a comparison where the previous point gives
// cause, whatever the driver says. Everything that is read whole upon a
// previous point is compared with it.
func (r *reader) distrust(d *point.Disk, prev base) {
	why := prev.why
	if why == "" && r.info.SizeBytes < prev.SizeBytes && d.Mode == point.Incremental {
		why = fmt.Sprintf("the disk shrank from %d to %d bytes", prev.SizeBytes, r.info.SizeBytes)
	}
	if why != "" {
		d.Mode, d.Reason = point.Compared, why
	}
	if d.Mode == point.Full {
		d.Mode = point.Compared
	}
}

// readAs reads the disk in mode d.Mode. Tracking that is lost on the way, or
// found lying, makes it a comparison of everything.
func (r *reader) readAs(ctx context.Context, d *point.Disk, prevBytes int64) error {
	if d.Mode != point.Incremental {
		return r.everything(ctx)
	}
	err := r.changed(ctx, prevBytes)
	if errors.Is(err, hypervisor.ErrTrackingLost) {
		d.Mode, d.Reason = point.Compared, err.Error()
		return r.everything(ctx)
	}
	if err != nil {
		return err
	}
	bad, sampled, err := r.audit(ctx)
	if err != nil || bad == 0 {
		return err
	}
	r.lied = true
	why := fmt.Sprintf("change tracking of disk %s lied: %d of %d sampled chunks that it called unchanged differ", r.info.ID, bad, sampled)
	r.Log.Error("change tracking lied", "vm", r.history.name, "disk", r.info.ID, "differ", bad, "sampled", sampled, "seed", r.seed)
	// Marked first: if this run dies now, the marks make the next one read all.
	if err := r.history.mark(ctx, r.info.ID, why); err != nil {
		return err
	}
	d.Mode, d.Reason = point.Compared, why
	return r.everything(ctx)
}

// A task is one chunk and which of its bytes the source is to be asked for.
type task struct {
	index int64
	parts []extent.Extent // ascending, within the chunk
	fill  bool            // what parts leave out is the previous point's, not zeros
	zeros []extent.Extent // that replace the previous point's, before parts are read

	counted bool // the progress counts it already
}

// everything reads all that the source calls data. What it doesn't is zeros.
func (r *reader) everything(ctx context.Context) error {
	size, unit := r.info.SizeBytes, r.Repo.ChunkBytes()
	return r.pipeline(ctx, func(ctx context.Context, emit func(task) error) error {
		next := int64(0) // the first chunk that nothing was said about
		for off := int64(0); off < size; off += windowBytes {
			win := extent.Extent{Off: off, Len: min(windowBytes, size-off)}
			data, err := r.src.Data(ctx, win)
			if err != nil {
				return sourceError{err}
			}
			for _, t := range cut(merge(data.Within(win), mergeBytes), unit) {
				if err := r.holes(ctx, next, t.index); err != nil {
					return err
				}
				next = t.index + 1
				if err := emit(t); err != nil {
					return err
				}
			}
			end := chunk.Count(win.End(), unit)
			if err := r.holes(ctx, next, end); err != nil {
				return err
			}
			next = end
		}
		return nil
	}, r.put)
}

// holes says of the chunks from first up to and without end that they are
// zeros. Where there is no previous point, silence says so.
func (r *reader) holes(ctx context.Context, first, end int64) error {
	for i := first; i < end; i++ {
		if r.previous {
			if err := r.out.Hole(i); err != nil {
				return err
			}
			if i%4096 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	if end > first {
		unit := r.Repo.ChunkBytes()
		r.Progress.Add(min(end*unit, r.info.SizeBytes) - first*unit)
	}
	return nil
}

// changed reads what change tracking names, and the tail of a disk that grew.
//
// QEMU tracks neither that a disk shrinks nor that it grows again, and what
// was cut off and came back is zeros. So chunks that tracking does not name
// become holes where the source has none of the data that the previous point
// has. Once one was found, the chunk in which the disk ended for a while may
// be any of those of which the source has a part; then they are read too.
func (r *reader) changed(ctx context.Context, prevBytes int64) error {
	size, unit := r.info.SizeBytes, r.Repo.ChunkBytes()
	total := chunk.Count(size, unit)
	r.touched = newBits(total)
	partly := newBits(total)
	return r.pipeline(ctx, func(ctx context.Context, emit func(task) error) error {
		for off := int64(0); off < size; off += windowBytes {
			win := extent.Extent{Off: off, Len: min(windowBytes, size-off)}
			set, err := r.src.Changed(ctx, win)
			if err != nil {
				return sourceError{err}
			}
			set = set.Within(win)
			set.Add(extent.Extent{Off: max(off, prevBytes), Len: win.End() - max(off, prevBytes)})
			r.changedBytes += set.Bytes()
			tasks := cut(set, unit)
			for _, t := range tasks {
				r.touched.set(t.index)
			}
			kept, err := r.untouchedData(ctx, win)
			if err != nil {
				return err
			}
			// Of what changed, only data needs reading: a trimmed or a grown
			// range is zeros.
			var data extent.Set
			if set.Bytes() > 0 || len(kept) > 0 {
				if data, err = r.src.Data(ctx, win); err != nil {
					return sourceError{err}
				}
			}
			if err := r.lostZeros(kept, data, partly); err != nil {
				return err
			}
			done := int64(0)
			for _, t := range tasks {
				whole := r.whole(t.index)
				t.fill = len(t.parts) != 1 || t.parts[0] != whole
				done += whole.Len
				if err := emit(r.dataOf(t, data)); err != nil {
					return err
				}
			}
			r.Progress.Add(win.Len - done)
		}
		if r.lost == 0 {
			return nil
		}
		r.Log.Warn("chunks that tracking called unchanged are zeros now", "vm", r.history.name, "disk", r.info.ID, "chunks", r.lost)
		for i := range total {
			if partly.has(i) {
				r.touched.set(i)
				if err := emit(task{index: i, parts: []extent.Extent{r.whole(i)}, counted: true}); err != nil {
					return err
				}
			}
		}
		return nil
	}, r.put)
}

// whole is all of a chunk.
func (r *reader) whole(index int64) extent.Extent {
	unit := r.Repo.ChunkBytes()
	return extent.Extent{Off: index * unit, Len: chunk.Len(index, r.info.SizeBytes, unit)}
}

// untouchedData are the chunks of win, which begins with a chunk, that tracking
// calls unchanged and that the previous point has as data.
func (r *reader) untouchedData(ctx context.Context, win extent.Extent) (list []int64, err error) {
	unit := r.Repo.ChunkBytes()
	for i := win.Off / unit; i < chunk.Count(win.End(), unit); i++ {
		if r.touched.has(i) {
			continue
		}
		_, hole, err := r.out.Previous(ctx, i)
		if err != nil {
			return nil, err
		}
		if !hole {
			list = append(list, i)
		}
	}
	return list, nil
}

// lostZeros makes holes of those chunks of which the source has no data, and
// notes in partly those of which it has some and not all.
func (r *reader) lostZeros(chunks []int64, data extent.Set, partly bits) error {
	list := data.List()
	for _, i := range chunks {
		whole := r.whole(i)
		for len(list) > 0 && list[0].End() <= whole.Off {
			list = list[1:]
		}
		switch {
		case len(list) == 0 || list[0].Off >= whole.End():
			if err := r.out.Hole(i); err != nil {
				return err
			}
			r.touched.set(i)
			r.lost++
		case list[0].Intersect(whole) != whole:
			partly.set(i)
		}
	}
	return nil
}

// dataOf leaves out of a task what is known to be zeros. In a chunk that is
// filled from the previous point they replace something, whatever tracking
// says of them.
func (r *reader) dataOf(t task, data extent.Set) task {
	whole := r.whole(t.index)
	parts := t.parts
	t.parts = nil
	for _, e := range parts {
		t.parts = append(t.parts, merge(data.Within(e), mergeBytes).List()...)
	}
	if t.fill {
		t.zeros = extent.NewSet(whole).Subtract(data.Within(whole)).List()
	}
	return t
}

// put reads one task's chunk and gives it to the repository.
func (r *reader) put(ctx context.Context, t task, buf []byte) error {
	if t.fill {
		if err := r.out.ReadPrevious(ctx, t.index, buf); err != nil {
			if ctx.Err() != nil {
				return err
			}
			// The guest has the whole chunk, so nothing is lost; but it is
			// counted apart, since it says that the repository is damaged.
			r.history.note(fmt.Errorf("disk %s of the previous restore point: %w", r.info.ID, err))
			r.Log.Warn("chunk of the previous restore point can't be read, reading it from the source", "vm", r.history.name, "disk", r.info.ID, "chunk", t.index, "err", err)
			whole := extent.Extent{Off: t.index * r.Repo.ChunkBytes(), Len: int64(len(buf))}
			t.parts, t.zeros = []extent.Extent{whole}, nil
			r.refill.Add(whole.Len)
		}
	} else if len(t.parts) != 1 || t.parts[0].Len != int64(len(buf)) {
		clear(buf)
	}
	base := t.index * r.Repo.ChunkBytes()
	for _, e := range t.zeros {
		clear(buf[e.Off-base : e.End()-base])
	}
	if err := r.readParts(t, buf); err != nil {
		return err
	}
	p, err := r.out.Put(ctx, t.index, buf)
	if err != nil {
		return err
	}
	if p.Kind == repo.New {
		r.fresh.Add(int64(len(buf)))
		r.stored.Add(p.StoredBytes)
	}
	if !t.counted {
		r.Progress.Add(int64(len(buf)))
	}
	return nil
}

func (r *reader) readParts(t task, buf []byte) error {
	base := t.index * r.Repo.ChunkBytes()
	for _, e := range t.parts {
		p := buf[e.Off-base : e.End()-base]
		n, err := r.src.ReadAt(p, e.Off)
		if n < len(p) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return sourceError{fmt.Errorf("read %d bytes at %d of the source: %w", e.Len, e.Off, err)}
		}
		r.read.Add(e.Len)
	}
	return nil
}

// pipeline runs plan, which emits tasks in disk order, beside workers that do
// them. Memory is one chunk a worker.
func (r *reader) pipeline(ctx context.Context, plan func(context.Context, func(task) error) error, do func(context.Context, task, []byte) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	tasks := make(chan task, r.Workers)
	var wg sync.WaitGroup
	for range r.Workers {
		wg.Go(func() {
			buf := r.buffer()
			defer r.bufs.Put(buf)
			for t := range tasks {
				if ctx.Err() != nil {
					continue
				}
				n := chunk.Len(t.index, r.info.SizeBytes, r.Repo.ChunkBytes())
				if err := do(ctx, t, (*buf)[:n]); err != nil {
					cancel(err)
				}
			}
		})
	}
	err := plan(ctx, func(t task) error {
		select {
		case tasks <- t:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(tasks)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func (r *reader) buffer() *[]byte {
	if b, ok := r.bufs.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, r.Repo.ChunkBytes())
	return &b
}

// cut turns a set into one task for each chunk that it touches.
func cut(set extent.Set, unit int64) []task {
	var out []task
	for _, e := range set.List() {
		for e.Len > 0 {
			i := e.Off / unit
			part := extent.Extent{Off: e.Off, Len: min(e.End(), (i+1)*unit) - e.Off}
			if n := len(out); n > 0 && out[n-1].index == i {
				out[n-1].parts = append(out[n-1].parts, part)
			} else {
				out = append(out, task{index: i, parts: []extent.Extent{part}})
			}
			e.Off, e.Len = part.End(), e.Len-part.Len
		}
	}
	return out
}

// merge joins extents with gaps of at most gap bytes.
func merge(set extent.Set, gap int64) extent.Set {
	var out extent.Set
	var cur extent.Extent
	for _, e := range set.List() {
		if cur.Len > 0 && e.Off-cur.End() <= gap {
			cur.Len = e.End() - cur.Off
			continue
		}
		out.Add(cur)
		cur = e
	}
	out.Add(cur)
	return out
}
