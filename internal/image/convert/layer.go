package convert

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// ErrPartial says that a layer holds only a part of a unit of the image that
// it is copied to, and that nothing can say what the rest is.
var ErrPartial = errors.New("the layer holds only a part of it")

// CopyLayer writes to dst, a layer over some parent, what layer, opened alone,
// holds itself: its data, and its zeros, which hide the parent. What it does
// not hold stays the parent's.
//
// Where layer holds only a part of a unit of dst, the rest is read from whole,
// the same image opened with its parents; if whole is nil, that is an
// ErrPartial. Like Copy it neither finishes nor closes dst.
func CopyLayer(ctx context.Context, dst image.Writer, layer, whole image.Image, o Options) (Result, error) {
	src := layer
	if whole != nil {
		src = whole
	}
	c := newCopier(dst, src, o)
	c.zeros = true
	c.ranges = func(ctx context.Context) iter.Seq2[extent.Extent, error] {
		return func(yield func(extent.Extent, error) bool) {
			for e, err := range heldBy(ctx, layer) {
				if err == nil && whole == nil {
					err = c.wholeUnits(e, layer.Size())
				}
				if !yield(e, err) {
					return
				}
			}
		}
	}
	return c.run(ctx, o)
}

func (c *copier) wholeUnits(e extent.Extent, size int64) error {
	if whole := e.Align(c.unit, size); whole != e {
		return fmt.Errorf("%v of the disk, in units of %d bytes: %w", whole, c.unit, ErrPartial)
	}
	return nil
}

// heldBy gives the ranges that are not absent, joined where they touch.
func heldBy(ctx context.Context, layer image.Image) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		var held extent.Extent
		for e, err := range layer.Extents(ctx, extent.Extent{Len: layer.Size()}) {
			switch {
			case err != nil:
				yield(extent.Extent{}, err)
				return
			case e.Kind == image.Absent:
			case held.Len > 0 && held.End() == e.Off:
				held.Len += e.Len
			default:
				if held.Len > 0 && !yield(held, nil) {
					return
				}
				held = e.Extent
			}
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}
