package restore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// BuildOptions say how disks get to another machine.
type BuildOptions struct {
	Options // the format is VHDX; Variant "dynamic" or "fixed"
	// Disks are those to restore; all of the restore point if it is empty.
	Disks []vm.DiskID
	// Prove reads every disk back from the host before the Builder commits, and
	// compares it with the repository.
	Prove bool
}

// blockBytes is what a dynamic VHDX grows by: 2 MiB, for huge disks more.
func blockBytes(size int64) int64 {
	n := int64(2 << 20)
	for n < 32<<20 && size/n > 1<<20 {
		n *= 2
	}
	return n
}

// A build is one disk on its way to another machine.
type build struct {
	disk  point.Disk
	src   Source
	data  int64 // bytes to fetch
	takes int64 // bytes of the file
	res   Result
}

// farWorkers is how many chunks are on their way to a machine that may be far
// away: 8 MiB at once are 400 MB/s with round trips of 20 ms.
const farWorkers = 16

// Build writes disks of p to where b makes a VM of them, as VHDX. After an
// error b has taken away what was made, or the error says what is left.
func Build(ctx context.Context, r Repository, p *point.RestorePoint, b hypervisor.Builder, o BuildOptions) (PointResult, error) {
	start := time.Now()
	if o.Workers == 0 {
		o.Workers = max(o.workers(), farWorkers)
	}
	res, err := builds(ctx, r, p, b, o)
	if err != nil {
		if e := b.Abort(ctx); e != nil {
			err = fmt.Errorf("%w; %w: %w", err, hypervisor.ErrLeft, e)
		}
		return PointResult{}, fmt.Errorf("restore %s: %w", p.Ref(), err)
	}
	res.Duration = time.Since(start)
	return res, nil
}

func builds(ctx context.Context, r Repository, p *point.RestorePoint, b hypervisor.Builder, o BuildOptions) (PointResult, error) {
	res := PointResult{Point: p.Ref()}
	if o.Format != "" && o.Format != image.VHDX {
		return res, fmt.Errorf("disks of a VM there are VHDX, not %s: %w", o.Format, fault.ErrUnsupported)
	}
	work, err := o.sources(ctx, r, p)
	defer func() {
		for _, w := range work {
			w.src.Close()
		}
	}()
	if err != nil {
		return res, err
	}
	var fetch, room int64
	need := map[vm.DiskID]int64{}
	for _, w := range work {
		fetch += w.data
		room += w.takes
		need[w.disk.ID] = w.takes
	}
	if err := b.Room(ctx, need); err != nil {
		return res, err
	}
	prog := newProgress(o.Progress, fetch)
	for _, w := range work {
		if err := o.send(ctx, b, w, prog); err != nil {
			return res, fmt.Errorf("disk %s: %w", w.disk.ID, sized(err, room))
		}
	}
	if o.Prove {
		for _, w := range work {
			if err := o.prove(ctx, r, b, w, prog); err != nil {
				return res, fmt.Errorf("disk %s: read back from the host: %w", w.disk.ID, err)
			}
		}
	}
	built, err := b.Commit(ctx)
	if err != nil {
		return res, err
	}
	res.VM = &built
	for _, w := range work {
		res.Disks = append(res.Disks, w.res)
	}
	return res, nil
}

// sources opens the disks and counts what they take.
func (o BuildOptions) sources(ctx context.Context, r Repository, p *point.RestorePoint) (work []*build, err error) {
	list := p.Disks
	if len(o.Disks) > 0 {
		list = nil
		for _, id := range o.Disks {
			d, err := Select(p, string(id))
			if err != nil {
				return nil, err
			}
			list = append(list, d)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("restore point %s holds no disk: %w", p.Ref(), fault.ErrNotFound)
	}
	for _, d := range list {
		src, err := r.OpenDisk(ctx, d.Manifest)
		if err != nil {
			return work, fmt.Errorf("disk %s: %w", d.ID, err)
		}
		w := &build{disk: d, src: src}
		work = append(work, w)
		set, err := src.Data(ctx, extent.Extent{Len: src.Size()})
		if err != nil {
			return work, fmt.Errorf("disk %s: %w", d.ID, err)
		}
		const metadata = 8 << 20
		w.data = set.Bytes()
		if w.takes = set.Align(blockBytes(src.Size()), src.Size()).Bytes() + metadata; o.Variant == "fixed" {
			w.takes = src.Size() + metadata
		}
	}
	return work, nil
}

// send writes one disk.
func (o BuildOptions) send(ctx context.Context, b hypervisor.Builder, w *build, prog *progress) error {
	start := time.Now()
	out, name, err := b.Create(ctx, w.disk.ID)
	if err != nil {
		return err
	}
	img, err := vhdx.NewWriter(out, image.CreateOptions{VirtualBytes: w.src.Size(), Variant: o.Variant, BlockBytes: blockBytes(w.src.Size()), SectorBytes: o.Sectors[w.disk.ID]})
	if err != nil {
		return errors.Join(err, out.Close())
	}
	w.res, err = o.fill(ctx, w.src, img, name, w.data, prog)
	if e := img.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	w.res.Disk, w.res.Format, w.res.Duration = w.disk.ID, image.VHDX, time.Since(start)
	return nil
}

// prove reads a disk back and compares it with the chunks that it was made of.
func (o BuildOptions) prove(ctx context.Context, r Repository, b hypervisor.Builder, w *build, prog *progress) error {
	img, err := b.Open(ctx, w.disk.ID)
	if err != nil {
		return err
	}
	defer img.Close()
	// A VHDX has whole sectors.
	if n := img.Size(); n < w.src.Size() || n-w.src.Size() >= 4096 {
		return fmt.Errorf("it has %d bytes instead of %d: %w", n, w.src.Size(), fault.ErrCorrupt)
	}
	diff, err := compare(ctx, r, w.src, readable{img}, o.workers(), prog)
	if err != nil {
		return err
	}
	if n := diff.write.Bytes() + diff.zero.Bytes(); n > 0 {
		first := diff.write.Union(diff.zero).List()[0]
		return fault.Corrupt("the restored disk", first.Off, "%d bytes are not those of the restore point", n)
	}
	return nil
}

// readable is an image as compare reads it.
type readable struct{ image.Image }

// Data is what the image holds of within.
func (d readable) Data(ctx context.Context, within extent.Extent) (set extent.Set, err error) {
	for e, err := range d.Extents(ctx, within) {
		if err != nil {
			return extent.Set{}, err
		}
		if e.Kind == image.Data {
			set.Add(e.Extent)
		}
	}
	return set, nil
}
