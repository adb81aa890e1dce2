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

	// Holes says that Extents shall tell holes of the file in what Map calls
	// data, for disks whose own tables never do.
	Holes bool
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
	var ahead image.Extent // already mapped, because it might have continued what was read
	for done < len(p) {
		e := ahead
		if ahead = (image.Extent{}); e.Len == 0 {
			var err error
			if e, err = d.Map(off+int64(done), int64(len(p)-done)); err != nil {
				return done, err
			}
		}
		// Blocks that lie behind each other are one read.
		for e.Kind == image.Data && e.Len < int64(len(p)-done) {
			next, err := d.Map(e.End(), int64(len(p)-done)-e.Len)
			if err != nil {
				break // it comes again when what is before it was read
			}
			if !continues(e, next) {
				ahead = next
				break
			}
			e.Len += next.Len
		}
		n, err := d.readExtent(p[done:done+int(e.Len)], e)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, end
}

// Close closes the layer's file and its parents.
func (d *Disk) Close(file io.Closer) error {
	err := file.Close()
	if d.Parent != nil {
		err = errors.Join(err, d.Parent.Close())
	}
	return err
}

// readExtent fills p, all of e.
func (d *Disk) readExtent(p []byte, e image.Extent) (int, error) {
	switch {
	case e.Kind == image.Data:
		n, err := d.File.ReadAt(p, e.FileOffset)
		if n == len(p) {
			return n, nil
		}
		if err == nil || errors.Is(err, io.EOF) {
			err = fault.Corrupt(d.Name, e.FileOffset+int64(n), "the file became shorter")
		}
		return n, err
	case e.Kind == image.Absent && d.Parent != nil:
		n, err := d.Parent.ReadAt(p, e.Off)
		if n < len(p) && err != nil && err != io.EOF {
			return n, err
		}
		clear(p[n:])
	default:
		clear(p)
	}
	return len(p), nil
}

// Extents is the Extents of image.Image. Neighbours that continue each other
// are merged.
func (d *Disk) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	merged := d.merged(ctx, within.Intersect(extent.Extent{Len: d.Bytes}))
	file, ok := d.File.(image.File)
	if !d.Holes || !ok {
		return merged
	}
	return func(yield func(image.Extent, error) bool) {
		for e, err := range merged {
			if err != nil || e.Kind != image.Data || e.Depth > 0 {
				if !yield(e, err) {
					return
				}
				continue
			}
			for e.Len > 0 {
				if err := ctx.Err(); err != nil {
					yield(image.Extent{}, err)
					return
				}
				part := withoutHoles(file, e)
				if !yield(part, nil) {
					return
				}
				e.Off, e.Len, e.FileOffset = part.End(), e.Len-part.Len, e.FileOffset+part.Len
			}
		}
	}
}

// withoutHoles is e up to where a hole of the file begins or, as Zero, ends.
func withoutHoles(file image.File, e image.Extent) image.Extent {
	data, hole, ok := image.NextData(file, e.FileOffset, e.FileOffset+e.Len)
	switch {
	case !ok:
	case data > e.FileOffset:
		e.Kind, e.Len, e.FileOffset = image.Zero, data-e.FileOffset, -1
	default:
		e.Len = hole - e.FileOffset
	}
	return e
}

// merged walks within, which lies in the disk.
func (d *Disk) merged(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
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
