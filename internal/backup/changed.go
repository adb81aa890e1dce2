package backup

import (
	"context"
	"fmt"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
)

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
			lost, err := r.lostChunks(ctx, win)
			if err != nil {
				return err
			}
			r.refill.Add(lost.Subtract(set).Bytes())
			set = set.Union(lost)
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

// lostChunks are the chunks of win that the repository knows it can't give
// back. The guest still has them, if they are unchanged, and to store them
// again makes every point whole that lost them.
func (r *reader) lostChunks(ctx context.Context, win extent.Extent) (extent.Set, error) {
	lost, err := r.out.Doubtful(ctx, win)
	if err == nil && lost.Bytes() > 0 {
		r.history.note(fmt.Errorf("disk %s: %d bytes that the repository had of it are damaged there and were read anew: %w", r.info.ID, lost.Bytes(), fault.ErrCorrupt))
		r.Log.Warn("chunks of the previous restore point are damaged, reading them from the source", "vm", r.history.name, "disk", r.info.ID, "bytes", lost.Bytes())
	}
	return lost, err
}

// whole is all of a chunk.
func (r *reader) whole(index int64) extent.Extent {
	unit := r.Repo.ChunkBytes()
	return extent.Extent{Off: index * unit, Len: chunk.Len(index, r.info.SizeBytes, unit)}
}

// untouchedData are the chunks of win, which begins with a chunk, that tracking
// calls unchanged and that the previous point has as data.
func (r *reader) untouchedData(ctx context.Context, win extent.Extent) (list []int64, err error) {
	err = r.out.PreviousData(ctx, win, func(i int64) {
		if !r.touched.has(i) {
			list = append(list, i)
		}
	})
	return list, err
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
