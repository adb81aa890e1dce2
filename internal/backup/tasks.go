package backup

import (
	"context"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/hypervisor"
)

// A task is one chunk and which of its bytes the source is to be asked for.
type task struct {
	index int64
	parts []extent.Extent // ascending, within the chunk
	fill  bool            // what parts leave out is the previous point's, not zeros
	zeros []extent.Extent // that replace the previous point's, before parts are read

	counted bool // the progress counts it already
}

// pipeline runs plan, which emits tasks in disk order, beside workers that do
// them. Memory is one chunk a worker.
func (r *reader) pipeline(ctx context.Context, plan func(context.Context, func(task) error) error, do func(context.Context, task, []byte) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	workers := r.Workers
	if deep, ok := r.src.(hypervisor.DeepDisk); ok {
		workers = max(workers, deep.Reads())
	}
	tasks := make(chan task, workers)
	var wg sync.WaitGroup
	for range workers {
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
