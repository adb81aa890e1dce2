// Package vmdk reads and writes VMware's virtual disks: a text that describes
// them, and one or more extents with the bytes, which may be plain (flat), laid
// out in grains behind grain tables (sparse), or compressed grains in a stream
// (streamOptimized). The text lies in a file of its own or in the one sparse
// extent.
//
// All numbers are little-endian, and positions are counted in sectors of 512
// bytes.
package vmdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sort"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/raw"
)

// A Disk is an open VMDK.
type Disk struct {
	parts  []part
	size   int64
	parent image.Image  // nil for none
	files  []image.File // to close
	info   image.Info
}

var _ image.Image = (*Disk)(nil)

// A part is where a layer lies in the disk.
type part struct {
	extent.Extent
	layer
}

// Size is the sum of the extents' sizes in bytes.
func (d *Disk) Size() int64 { return d.size }

// Info gives what the descriptor and the extents' headers say.
func (d *Disk) Info() image.Info { return d.info }

// Close closes the extents and the parent.
func (d *Disk) Close() error {
	var errs []error
	for _, f := range d.files {
		errs = append(errs, f.Close())
	}
	if d.parent != nil {
		errs = append(errs, d.parent.Close())
	}
	return errors.Join(errs...)
}

// find is the number of the part that holds off, which lies in the disk.
func (d *Disk) find(off int64) int {
	return sort.Search(len(d.parts), func(i int) bool { return d.parts[i].End() > off })
}

// ReadAt reads what the guest sees, the parents' bytes included.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%s: read at negative offset %d", d.info.Variant, off)
	}
	if off >= d.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > d.size-off {
		p, end = p[:d.size-off], io.EOF
	}
	done := 0
	for i := d.find(off); done < len(p); i++ {
		part := d.parts[i]
		for at := off + int64(done) - part.Off; at < part.Len && done < len(p); {
			r, err := part.at(at, min(int64(len(p)-done), part.Len-at))
			if err != nil {
				return done, err
			}
			if err := d.fill(p[done:done+int(r.bytes)], part, at, r); err != nil {
				return done, err
			}
			at += r.bytes
			done += int(r.bytes)
		}
	}
	return done, end
}

// fill reads one run, whose layer-relative offset is at.
func (d *Disk) fill(p []byte, part part, at int64, r run) error {
	switch {
	case r.kind == image.Data:
		return part.read(p, at, r)
	case r.kind == image.Absent && d.parent != nil:
		return readParent(d.parent, p, part.Off+at)
	}
	clear(p)
	return nil
}

// readParent reads the parent's bytes at off, and zeros where it is shorter.
func readParent(parent image.Image, p []byte, off int64) error {
	n := 0
	if off < parent.Size() {
		var err error
		n, err = parent.ReadAt(p, off)
		if err != nil && !(err == io.EOF && off+int64(n) == parent.Size()) {
			return err
		}
	}
	clear(p[n:])
	return nil
}

// Extents walks the grain tables, and those of the parents where this layer
// has nothing. Neighbours of one kind in this layer come as one.
func (d *Disk) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		within = within.Intersect(extent.Extent{Len: d.size})
		give := func(e image.Extent) bool {
			if e.Kind == image.Absent && d.parent != nil {
				return d.parentExtents(ctx, e, yield)
			}
			return e.Len == 0 || yield(e, nil)
		}
		var pending image.Extent
		for off := within.Off; off < within.End(); off = pending.End() {
			e, err := d.extentAt(ctx, extent.Extent{Off: off, Len: within.End() - off})
			if err != nil {
				if give(pending) {
					yield(image.Extent{}, err)
				}
				return
			}
			if continues(pending, e) {
				pending.Len += e.Len
				continue
			}
			if !give(pending) {
				return
			}
			pending = e
		}
		give(pending)
	}
}

// extentAt is what is at the beginning of within.
func (d *Disk) extentAt(ctx context.Context, within extent.Extent) (image.Extent, error) {
	if err := ctx.Err(); err != nil {
		return image.Extent{}, err
	}
	part := d.parts[d.find(within.Off)]
	at, limit := within.Off-part.Off, min(within.End(), part.End())-within.Off
	var r run
	var err error
	if f, ok := part.layer.(flat); ok {
		r, err = f.mapped(ctx, at, limit)
	} else {
		r, err = part.at(at, limit)
	}
	e := image.Extent{
		Extent: extent.Extent{Off: within.Off, Len: r.bytes},
		Kind:   r.kind, Compressed: r.compressed, FileOffset: -1,
	}
	if r.kind == image.Data && !r.compressed && len(d.parts) == 1 {
		e.FileOffset = r.fileOffset
	}
	return e, err
}

// continues says whether b goes on where and as a ends.
func continues(a, b image.Extent) bool {
	return a.Len > 0 && a.End() == b.Off && a.Kind == b.Kind && a.Compressed == b.Compressed &&
		(a.FileOffset == -1 && b.FileOffset == -1 || a.FileOffset >= 0 && a.FileOffset+a.Len == b.FileOffset)
}

// parentExtents gives what the parents have for e, which is absent here. It
// says whether to go on.
func (d *Disk) parentExtents(ctx context.Context, e image.Extent, yield func(image.Extent, error) bool) bool {
	if e.Len == 0 {
		return true
	}
	for up, err := range d.parent.Extents(ctx, e.Extent) {
		if err != nil {
			yield(image.Extent{}, err)
			return false
		}
		up.Depth++
		if !yield(up, nil) {
			return false
		}
		e.Len -= up.End() - e.Off
		e.Off = up.End()
	}
	return e.Len == 0 || yield(e, nil) // the parent is shorter
}

// A flat is an extent of plain bytes at an offset of a file: a piece of a raw
// image.
type flat struct {
	raw    *raw.Image
	file   image.File
	offset int64
}

func newFlat(f image.File, e extentLine) (flat, error) {
	if e.offset > f.Bytes() || e.bytes > f.Bytes()-e.offset {
		return flat{}, fault.Corrupt(f.Name(), -1, "the descriptor wants %d bytes at %d, and the file has %d", e.bytes, e.offset, f.Bytes())
	}
	return flat{raw.Open(f), f, e.offset}, nil
}

func (f flat) at(off, limit int64) (run, error) {
	return run{bytes: limit, kind: image.Data, fileOffset: f.offset + off}, nil
}

// mapped is at for those who want to know the holes of the file, which costs a
// question to the file system.
func (f flat) mapped(ctx context.Context, off, limit int64) (run, error) {
	for e, err := range f.raw.Extents(ctx, extent.Extent{Off: f.offset + off, Len: limit}) {
		return run{bytes: e.Len, kind: e.Kind, fileOffset: e.FileOffset}, err
	}
	return f.at(off, limit)
}

func (f flat) read(p []byte, _ int64, r run) error { return readFull(f.file, p, r.fileOffset) }

// A blank is an extent of zeros, which has no file.
type blank struct{}

func (blank) at(_, limit int64) (run, error) { return run{bytes: limit, kind: image.Zero}, nil }
func (blank) read(p []byte, _ int64, _ run) error {
	clear(p)
	return nil
}
