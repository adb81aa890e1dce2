package qcow2

import (
	"context"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// Extents walks the chain. Where no layer holds anything the kind is Absent.
func (img *Image) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		within = within.Intersect(extent.Extent{Len: img.active.size})
		w := walker{img: img, l1: img.ownView(), l2: img.ownView()}
		for r, err := range w.runs(ctx, img.active, within) {
			if err != nil {
				yield(image.Extent{}, err)
				return
			}
			if r.kind == image.Absent && img.parent != nil {
				if !img.parentExtents(ctx, r.Extent, yield) {
					return
				}
				continue
			}
			e := image.Extent{Extent: r.Extent, Kind: r.kind, Compressed: r.compressed, FileOffset: -1}
			if r.kind == image.Data && !r.compressed && img.data == img.file {
				e.FileOffset = r.host
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// parentExtents yields what the parent holds for e, and says whether to go on.
func (img *Image) parentExtents(ctx context.Context, e extent.Extent, yield func(image.Extent, error) bool) bool {
	inside := e.Intersect(extent.Extent{Len: img.parent.Size()})
	if inside.Len > 0 {
		for x, err := range img.parent.Extents(ctx, inside) {
			x.Depth++
			if !yield(x, err) || err != nil {
				return false
			}
		}
	}
	if rest := e.Len - inside.Len; rest > 0 {
		// The parent is shorter: nobody holds anything there.
		return yield(image.Extent{Extent: extent.Extent{Off: e.End() - rest, Len: rest}, Kind: image.Absent, FileOffset: -1}, nil)
	}
	return true
}
