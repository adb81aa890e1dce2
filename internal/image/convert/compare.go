package convert

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"sync"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// A Comparison is what Compare found.
type Comparison struct {
	Identical bool `json:"identical"`
	// Offset is the first byte that differs; -1 for none. Behind the end of
	// the shorter image zeros are expected.
	Offset int64 `json:"offset"`
	// SameSize is false for images of different sizes, which are identical all
	// the same if the longer one ends in zeros: several formats round sizes up.
	SameSize bool `json:"same_size"`
}

// Compare reads all that a or b hold and finds the first byte that differs.
func Compare(ctx context.Context, a, b image.Image, o Options) (Comparison, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := &comparer{a: a, b: b, first: -1, progress: newProgress(o, max(a.Size(), b.Size()))}
	todo := make(chan extent.Extent, o.workers())
	var wg sync.WaitGroup
	for range o.workers() {
		wg.Go(func() {
			p, q := make([]byte, pieceBytes), make([]byte, pieceBytes)
			for e := range todo {
				if err := c.compare(e, p[:e.Len], q[:e.Len]); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	err := cut(either(dataOf(ctx, a), dataOf(ctx, b)), pieceBytes, func(e extent.Extent) error {
		if c.found() {
			return errFound // what comes before was handed out already
		}
		select {
		case todo <- e:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(todo)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return Comparison{}, cause
	}
	if err != nil && err != errFound {
		return Comparison{}, err
	}
	c.progress.reach(c.progress.total)
	return Comparison{Identical: c.first < 0, Offset: c.first, SameSize: a.Size() == b.Size()}, nil
}

var errFound = fmt.Errorf("a difference was found")

type comparer struct {
	a, b     image.Image
	progress *progress

	mu    sync.Mutex
	first int64 // -1 for none yet
}

func (c *comparer) found() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first >= 0
}

func (c *comparer) compare(e extent.Extent, p, q []byte) error {
	if err := readPadded(c.a, p, e.Off); err != nil {
		return fmt.Errorf("first image: %w", err)
	}
	if err := readPadded(c.b, q, e.Off); err != nil {
		return fmt.Errorf("second image: %w", err)
	}
	if !bytes.Equal(p, q) {
		i := 0
		for p[i] == q[i] {
			i++
		}
		c.mu.Lock()
		if at := e.Off + int64(i); c.first < 0 || at < c.first {
			c.first = at
		}
		c.mu.Unlock()
	}
	c.progress.reach(e.End())
	return nil
}

// readPadded reads zeros behind the end of img.
func readPadded(img image.Image, p []byte, off int64) error {
	n := min(max(img.Size()-off, 0), int64(len(p)))
	clear(p[n:])
	return readAt(img, p[:n], off)
}

// dataOf gives the ranges that img holds data for.
func dataOf(ctx context.Context, img image.Image) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		for e, err := range img.Extents(ctx, extent.Extent{Len: img.Size()}) {
			if err == nil && e.Kind != image.Data {
				continue
			}
			if !yield(e.Extent, err) {
				return
			}
		}
	}
}

// either merges two ascending walks into one by where the ranges begin.
func either(a, b iter.Seq2[extent.Extent, error]) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		nextA, stopA := iter.Pull2(a)
		defer stopA()
		nextB, stopB := iter.Pull2(b)
		defer stopB()
		x, errX, okX := nextA()
		y, errY, okY := nextB()
		for okX || okY {
			if okX && (errX != nil || !okY || errY == nil && x.Off <= y.Off) {
				if !yield(x, errX) {
					return
				}
				x, errX, okX = nextA()
				continue
			}
			if !yield(y, errY) {
				return
			}
			y, errY, okY = nextB()
		}
	}
}

// Map walks within like img.Extents, with neighbours of one kind merged.
func Map(ctx context.Context, img image.Image, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		var pending image.Extent
		for e, err := range img.Extents(ctx, within) {
			if err != nil {
				if pending.Len == 0 || yield(pending, nil) {
					yield(image.Extent{}, err)
				}
				return
			}
			if continues(pending, e) {
				pending.Len += e.Len
				continue
			}
			if pending.Len > 0 && !yield(pending, nil) {
				return
			}
			pending = e
		}
		if pending.Len > 0 {
			yield(pending, nil)
		}
	}
}

// continues says whether b goes on where and as a ends.
func continues(a, b image.Extent) bool {
	if a.Len == 0 || a.End() != b.Off || a.Kind != b.Kind || a.Compressed != b.Compressed || a.Depth != b.Depth {
		return false
	}
	if a.FileOffset < 0 || b.FileOffset < 0 {
		return a.FileOffset == b.FileOffset
	}
	return a.FileOffset+a.Len == b.FileOffset
}
