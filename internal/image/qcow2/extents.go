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
		var g gap
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
			if r.kind == image.Data && !r.compressed {
				if !img.dataExtents(ctx, r, &g, yield) {
					return
				}
				continue
			}
			if !yield(image.Extent{Extent: r.Extent, Kind: r.kind, Compressed: r.compressed, FileOffset: -1}, nil) {
				return
			}
		}
	}
}

// sparse says whether more than half of the file are holes.
// Where less does, reading costs little, and asking for the holes of every
// cluster may cost more.
func (img *Image) sparse() bool {
	img.sparseOnce.Do(func() {
		var holes int64
		for off, asked := int64(0), 0; off < img.file.Bytes() && asked < 1000; asked++ {
			data, hole, ok := image.NextData(img.file, off, img.file.Bytes())
			if !ok {
				return
			}
			if holes += data - off; holes > img.file.Bytes()/2 {
				img.isSparse = true
				return
			}
			off = max(hole, data)
		}
	})
	return img.isSparse
}

// A gap is what the file said last of its holes: none from data on, up to hole,
// and one from off to data.
type gap struct{ off, data, hole int64 }

// dataExtents yields r, which is plain data, and says whether to go on. An
// image whose clusters were all allocated when it was made is mostly holes of
// its file, which its tables do not tell. What the file says goes into g, for
// the runs that follow.
func (img *Image) dataExtents(ctx context.Context, r run, g *gap, yield func(image.Extent, error) bool) bool {
	give := func(n int64, kind image.Kind) bool {
		e := image.Extent{Extent: extent.Extent{Off: r.Off, Len: n}, Kind: kind, FileOffset: -1}
		if kind == image.Data && img.data == img.file {
			e.FileOffset = r.host
		}
		r.Off, r.host, r.Len = r.Off+n, r.host+n, r.Len-n
		return n == 0 || yield(e, nil)
	}
	// What lies behind the file's end is no hole but damage, which reading tells.
	for img.data == img.file && r.Len > 0 && r.host < img.file.Bytes() && img.sparse() {
		if err := ctx.Err(); err != nil {
			yield(image.Extent{}, err)
			return false
		}
		if r.host < g.off || r.host >= g.hole {
			data, hole, ok := image.NextData(img.file, r.host, img.file.Bytes())
			if !ok {
				break
			}
			*g = gap{r.host, data, max(hole, data)}
		}
		if r.host < g.data && !give(min(r.Len, g.data-r.host), image.Zero) {
			return false
		}
		if r.host < g.hole && !give(min(r.Len, g.hole-r.host), image.Data) {
			return false
		}
	}
	return give(r.Len, image.Data)
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
