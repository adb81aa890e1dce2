package restore

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// grain is the length in bytes of a run of zeros within a chunk that is not
// worth writing.
const grain = 64 << 10

// write makes the new image path of src, the disk id, and makes it durable. need
// is how many bytes of src are data. made, if not nil, is called once the image's files
// exist.
func (o Options) write(ctx context.Context, id vm.DiskID, src Source, path string, f image.Format, need int64, p *progress, made func() error) (Result, error) {
	create := o.create
	if create == nil {
		create = open.Create
	}
	how := image.CreateOptions{VirtualBytes: src.Size(), Variant: o.Variant, Compression: o.Compression}
	if f == image.VHDX && o.Sectors[id] > 512 {
		how.SectorBytes = o.Sectors[id]
	}
	w, err := create(path, f, how)
	if err != nil {
		return Result{}, classify(err)
	}
	if f == image.Raw {
		w = direct(path, w)
	}
	defer w.Close()
	if made != nil {
		if err := made(); err != nil {
			return Result{}, err
		}
	}
	res, err := o.fill(ctx, src, w, path, need, p)
	res.Disk, res.Format, res.SectorBytes = id, f, how.SectorBytes
	return res, err
}

// fill writes src to the image w, which is called path, and finishes it.
func (o Options) fill(ctx context.Context, src Source, w image.Writer, path string, need int64, p *progress) (Result, error) {
	res := Result{Target: path, SizeBytes: src.Size()}
	base := path[strings.LastIndexAny(path, `/\`)+1:]
	c := newCutter(w, src)
	var read atomic.Int64
	err := src.Fetch(ctx, extent.Extent{Len: src.Size()}, repo.FetchOptions{Ordered: c.ordered, Workers: o.workers()},
		func(off int64, data []byte) error {
			if err := c.put(off, data); err != nil {
				return fmt.Errorf("write %s: %w", base, classify(err))
			}
			read.Add(int64(len(data)))
			p.add(int64(len(data)))
			return nil
		})
	if err != nil {
		return Result{}, err
	}
	if err := ctx.Err(); err != nil {
		return Result{}, err
	}
	if err := c.flush(); err != nil {
		return Result{}, fmt.Errorf("write %s: %w", base, classify(err))
	}
	res.ReadBytes, res.WrittenBytes = read.Load(), c.written.Load()
	if res.ReadBytes != need {
		// A disk that lacks a chunk must never pass for a good one.
		return Result{}, fmt.Errorf("the repository gave %d bytes of a disk that has %d", res.ReadBytes, need)
	}
	if err := w.Finish(); err != nil {
		return Result{}, fmt.Errorf("finish %s: %w", base, classify(err))
	}
	return res, nil
}

// A cutter writes chunks in units that the image takes, without their longer
// runs of zeros.
type cutter struct {
	w       image.Writer
	size    int64 // of the disk in bytes
	unit    int64
	grain   int64 // a multiple of unit
	ordered bool
	written atomic.Int64

	// Where a unit may hold parts of several chunks, it is put together here.
	// Chunks then come in order, so there is one such unit at a time.
	gather bool
	buf    []byte
	at     int64 // of buf, -1 for none
}

func newCutter(w image.Writer, src Source) *cutter {
	c := &cutter{w: w, size: src.Size(), unit: max(w.Unit(), 1), ordered: w.Ordered(), at: -1}
	c.grain = (grain + c.unit - 1) / c.unit * c.unit
	if src.ChunkBytes()%c.unit != 0 {
		c.gather, c.ordered = true, true
		c.buf = make([]byte, c.unit)
	}
	return c
}

func (c *cutter) put(off int64, data []byte) error {
	if !c.gather {
		return c.write(off, data)
	}
	for len(data) > 0 {
		at := off / c.unit * c.unit
		if at != c.at {
			if err := c.flush(); err != nil {
				return err
			}
			clear(c.buf)
			c.at = at
		}
		n := copy(c.buf[off-at:], data)
		off, data = off+int64(n), data[n:]
	}
	return nil
}

// flush writes the unit that is being put together.
func (c *cutter) flush() error {
	if c.at < 0 {
		return nil
	}
	at := c.at
	c.at = -1
	return c.write(at, c.buf[:min(c.unit, c.size-at)])
}

// write leaves out grains of zeros; off is a multiple of unit.
func (c *cutter) write(off int64, p []byte) error {
	start := 0
	for at := 0; at < len(p); {
		end := min(at+int(c.grain-(off+int64(at))%c.grain), len(p))
		if allZero(p[at:end]) {
			if err := c.out(off+int64(start), p[start:at]); err != nil {
				return err
			}
			start = end
		}
		at = end
	}
	return c.out(off+int64(start), p[start:])
}

func (c *cutter) out(off int64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	n, err := c.w.WriteAt(p, off)
	c.written.Add(int64(n))
	return err
}

// allZero is chunk.IsZero for any length.
func allZero(p []byte) bool {
	for len(p) > chunk.MaxBytes {
		if !chunk.IsZero(p[:chunk.MaxBytes]) {
			return false
		}
		p = p[chunk.MaxBytes:]
	}
	return chunk.IsZero(p)
}
