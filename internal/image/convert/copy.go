// Package convert copies and compares virtual disk images of any formats, in
// parallel and in time proportional to what they hold.
package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

const (
	pieceBytes = 1 << 20  // that one worker reads at a time
	holeBytes  = 64 << 10 // a run of zeros of this length becomes a hole
)

// Options say how to copy or compare. Zero values choose what is usual.
type Options struct {
	Workers int // that read and write at a time
	// Progress is told how many bytes of the disk are done, holes included, by
	// one goroutine at a time.
	Progress func(done, total int64)
}

func (o Options) workers() int {
	if o.Workers > 0 {
		return o.Workers
	}
	// While some wait for the disk, the others keep the processors busy.
	return runtime.GOMAXPROCS(0) + 2
}

// A Result says what Copy did, in bytes of the virtual disk.
type Result struct {
	ReadBytes    int64 `json:"read_bytes"`
	WrittenBytes int64 `json:"written_bytes"` // what was read and not zero
}

// Copy writes what src holds to dst, which must be as large, and leaves holes
// where src has holes or zeros. It neither finishes nor closes dst. After an
// error dst is useless.
func Copy(ctx context.Context, dst image.Writer, src image.Image, o Options) (Result, error) {
	return newCopier(dst, src, o).run(ctx, o)
}

func newCopier(dst image.Writer, src image.Image, o Options) *copier {
	c := &copier{dst: dst, src: src, unit: max(dst.Unit(), 1)}
	c.hole = roundUp(holeBytes, c.unit)
	c.piece = roundUp(pieceBytes, c.hole)
	c.progress = newProgress(o, src.Size())
	c.ranges = func(ctx context.Context) iter.Seq2[extent.Extent, error] { return dataOf(ctx, src) }
	return c
}

func (c *copier) run(ctx context.Context, o Options) (Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dst, src := c.dst, c.src
	var err error
	if dst.Ordered() {
		err = c.inOrder(ctx, cancel, o.workers())
	} else {
		err = c.anyOrder(ctx, cancel, o.workers())
	}
	if cause := context.Cause(ctx); cause != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = cause
	}
	if err == nil {
		c.progress.reach(src.Size())
	}
	return Result{c.read.Load(), c.written.Load()}, err
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

type copier struct {
	dst               image.Writer
	src               image.Image // to read from
	unit, hole, piece int64
	// ranges are what is to be copied, ascending and without overlaps.
	ranges func(ctx context.Context) iter.Seq2[extent.Extent, error]
	// zeros are written, not left out: they hide a parent.
	zeros         bool
	read, written atomic.Int64
	progress      *progress
}

// pieces gives what is to be copied in ascending pieces that dst takes.
func (c *copier) pieces(ctx context.Context, give func(extent.Extent) error) error {
	size := c.src.Size()
	return cut(func(yield func(extent.Extent, error) bool) {
		for e, err := range c.ranges(ctx) {
			if !yield(e.Align(c.unit, size), err) {
				return
			}
		}
	}, c.piece, give)
}

// cut joins ascending ranges that touch or overlap and cuts them at multiples
// of piece.
func cut(ranges func(func(extent.Extent, error) bool), piece int64, give func(extent.Extent) error) error {
	var pending extent.Extent
	// emit gives the pieces of pending that no later range can add to.
	emit := func(all bool) error {
		for pending.Len > 0 {
			n := piece - pending.Off%piece
			if n > pending.Len {
				if !all {
					return nil
				}
				n = pending.Len
			}
			if err := give(extent.Extent{Off: pending.Off, Len: n}); err != nil {
				return err
			}
			pending = extent.Extent{Off: pending.Off + n, Len: pending.Len - n}
		}
		return nil
	}
	for e, err := range ranges {
		if err != nil {
			return err
		}
		if e.Off <= pending.End() && pending.Len > 0 {
			pending.Len = max(pending.End(), e.End()) - pending.Off
		} else {
			if err := emit(true); err != nil {
				return err
			}
			// What was given already may reach into e where both share a unit.
			off := max(e.Off, pending.Off)
			pending = extent.Extent{Off: off, Len: max(e.End()-off, 0)}
		}
		if err := emit(false); err != nil {
			return err
		}
	}
	return emit(true)
}

// anyOrder lets every worker read a piece and write it.
func (c *copier) anyOrder(ctx context.Context, cancel context.CancelCauseFunc, workers int) error {
	todo := make(chan extent.Extent, workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			buf := make([]byte, c.piece)
			for e := range todo {
				p := buf[:e.Len]
				err := c.load(p, e.Off)
				if err == nil {
					err = c.store(p, e.Off)
				}
				if err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	err := c.pieces(ctx, func(e extent.Extent) error {
		select {
		case todo <- e:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(todo)
	wg.Wait()
	return err
}

// A loading is a piece that some worker reads.
type loading struct {
	extent.Extent
	buf  []byte
	done chan error
}

// inOrder lets workers read ahead and writes the pieces as they come.
func (c *copier) inOrder(ctx context.Context, cancel context.CancelCauseFunc, workers int) error {
	todo, queue := make(chan *loading, workers), make(chan *loading, 2*workers)
	free := make(chan []byte, 4*workers)
	for range cap(free) {
		free <- nil // made when first needed
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for l := range todo {
				if l.buf == nil {
					l.buf = make([]byte, c.piece)
				}
				l.done <- c.load(l.buf[:l.Len], l.Off)
			}
		})
	}
	wg.Go(func() {
		for l := range queue {
			err := <-l.done
			if err == nil && ctx.Err() == nil {
				err = c.store(l.buf[:l.Len], l.Off)
			}
			if err != nil {
				cancel(err)
			}
			free <- l.buf
		}
	})
	err := c.pieces(ctx, func(e extent.Extent) error {
		select {
		case buf := <-free:
			l := &loading{e, buf, make(chan error, 1)}
			todo <- l
			queue <- l
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(todo)
	close(queue)
	wg.Wait()
	return err
}

func (c *copier) load(p []byte, off int64) error {
	if err := readAt(c.src, p, off); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	c.read.Add(int64(len(p)))
	return nil
}

// readAt fills p, which lies in the image.
func readAt(img image.Image, p []byte, off int64) error {
	n, err := img.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// store writes p, without its longer runs of zeros unless they matter.
func (c *copier) store(p []byte, off int64) error {
	start := 0
	for at := 0; at < len(p) && !c.zeros; {
		end := min(at+int(c.hole-(off+int64(at))%c.hole), len(p))
		if isZero(p[at:end]) {
			if err := c.write(p[start:at], off+int64(start)); err != nil {
				return err
			}
			start = end
		}
		at = end
	}
	if err := c.write(p[start:], off+int64(start)); err != nil {
		return err
	}
	c.progress.reach(off + int64(len(p)))
	return nil
}

func (c *copier) write(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if _, err := c.dst.WriteAt(p, off); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	c.written.Add(int64(len(p)))
	return nil
}

// isZero is chunk.IsZero for any length.
func isZero(p []byte) bool {
	for len(p) > chunk.MaxBytes {
		if !chunk.IsZero(p[:chunk.MaxBytes]) {
			return false
		}
		p = p[chunk.MaxBytes:]
	}
	return chunk.IsZero(p)
}

// A progress tells how far the work has come: the highest byte that was
// reached, since pieces come about in order.
type progress struct {
	mu    sync.Mutex
	tell  func(done, total int64)
	done  int64
	total int64
}

func newProgress(o Options, total int64) *progress {
	return &progress{tell: o.Progress, total: total}
}

func (p *progress) reach(off int64) {
	if p.tell == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if off > p.done {
		p.done = off
		p.tell(off, p.total)
	}
}
