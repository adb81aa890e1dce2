// Package layer reads one layer of a virtual disk, over a parent or over
// nothing, for formats that store what they hold as it is. A format says where
// each byte lies; layer reads it, asks the parent for the rest and walks the
// extents.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// A Disk is one layer. Its methods are safe for concurrent use if Map and File
// are.
type Disk struct {
	Name  string      // for messages
	File  io.ReaderAt // what an extent's FileOffset points into
	Bytes int64       // virtual size

	// Parent answers for what is absent here; nil stands for zeros. It may be
	// shorter than the layer: what is behind its end is zeros.
	Parent image.Image

	// Map says what the layer holds at off: an extent that starts there, is at
	// least one and at most n bytes long, and has Depth 0. All of a Data extent
	// lies inside File at FileOffset.
	Map func(off, n int64) (image.Extent, error)
}

// ReadAt is the ReadAt of image.Image.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%s: read at negative offset %d", d.Name, off)
	}
	if off >= d.Bytes {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > d.Bytes-off {
		p, end = p[:d.Bytes-off], io.EOF
	}
	done := 0
	for done < len(p) {
		e, err := d.Map(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, err
		}
		part := p[done : done+int(e.Len)]
		switch {
		case e.Kind == image.Data:
			n, err := d.File.ReadAt(part, e.FileOffset)
			if n < len(part) {
				if err == nil || errors.Is(err, io.EOF) {
					err = fault.Corrupt(d.Name, e.FileOffset+int64(n), "the file became shorter")
				}
				return done + n, err
			}
		case e.Kind == image.Absent && d.Parent != nil:
			n, err := d.Parent.ReadAt(part, e.Off)
			if n < len(part) && err != nil && err != io.EOF {
				return done + n, err
			}
			clear(part[n:])
		default:
			clear(part)
		}
		done += len(part)
	}
	return done, end
}

// Extents is the Extents of image.Image. Neighbours that continue each other
// are merged.
func (d *Disk) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	within = within.Intersect(extent.Extent{Len: d.Bytes})
	return func(yield func(image.Extent, error) bool) {
		var held image.Extent // not yielded yet: its neighbour may continue it
		put := func(e image.Extent) bool {
			if continues(held, e) {
				held.Len += e.Len
				return true
			}
			out := held
			held = e
			return out.Len == 0 || yield(out, nil)
		}
		for off := within.Off; off < within.End(); {
			if err := ctx.Err(); err != nil {
				yield(image.Extent{}, err)
				return
			}
			e, err := d.Map(off, within.End()-off)
			if err != nil {
				if held.Len == 0 || yield(held, nil) {
					yield(image.Extent{}, err)
				}
				return
			}
			off = e.End()
			if e.Kind != image.Absent || d.Parent == nil {
				if !put(e) {
					return
				}
				continue
			}
			for below, err := range d.Parent.Extents(ctx, e.Extent) {
				if err != nil {
					if held.Len == 0 || yield(held, nil) {
						yield(image.Extent{}, err)
					}
					return
				}
				below.Depth++
				if !put(below) {
					return
				}
				e.Len, e.Off = e.End()-below.End(), below.End()
			}
			if e.Len > 0 { // behind the parent's end
				if !put(image.Extent{Extent: e.Extent, Kind: image.Absent, Depth: 1, FileOffset: -1}) {
					return
				}
			}
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}

func continues(a, b image.Extent) bool {
	if a.Len == 0 || a.End() != b.Off || a.Kind != b.Kind || a.Depth != b.Depth || a.Compressed || b.Compressed {
		return false
	}
	if a.FileOffset < 0 || b.FileOffset < 0 {
		return a.FileOffset < 0 && b.FileOffset < 0
	}
	return a.FileOffset+a.Len == b.FileOffset
}
