package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// windowBytes is how much of a disk is planned at a time, so that the extents
// of the largest disk fit in memory. It is a multiple of every chunk size.
const windowBytes = 1 << 30

// mergeBytes: where everything is read, extents that are no further apart are
// read as one. What lies between is zeros, so it costs a copy and no data.
const mergeBytes = 64 << 10

// A reader takes one disk from its source into the repository.
type reader struct {
	*engine
	src     hypervisor.Disk
	info    vm.Disk
	session *repo.Session
	history *history
	seed    uint64

	out      *repo.DiskWriter
	previous bool // out has a previous point underneath
	bufs     sync.Pool

	read, refill, fresh, stored atomic.Int64
	changedBytes, auditBytes    int64
	touched                     bits // chunks that an incremental has seen changed
	lied                        bool
	lost                        int64 // chunks that turned to zeros without tracking
}

// ErrSource is the class of what the source, and not the repository, did wrong
// while it was read.
var ErrSource = errors.New("the source")

// A sourceError adds the class ErrSource to an error, and no words.
type sourceError struct{ error }

func (e sourceError) Unwrap() error        { return e.error }
func (e sourceError) Is(target error) bool { return target == ErrSource }

// run reads the disk in whatever mode the source and the previous point allow.
func (r *reader) run(ctx context.Context) (point.Disk, error) {
	start := r.Now()
	d := point.Disk{Disk: r.info, ChangeID: r.src.ChangeID()}
	d.Mode, d.Reason = r.src.Mode()
	prev, has := r.history.base(r.info.ID)
	if err := r.open(ctx, &d, prev, has); err != nil {
		return d, err
	}
	r.Progress.Total(r.info.SizeBytes)
	r.Log.Info("disk begins", "vm", r.history.name, "disk", r.info.ID, "size_bytes", r.info.SizeBytes, "mode", d.Mode, "reason", d.Reason)
	if err := r.readAs(ctx, &d, prev.SizeBytes); err != nil {
		return d, err
	}
	if d.ChangeID == prev.ChangeID && (r.lied || !r.previous) {
		d.ChangeID = "" // it was handed on, and leads to what can't be built on
	}
	var err error
	if d.Manifest, err = r.out.Finish(ctx); err != nil {
		return d, err
	}
	d.Stats = point.Stats{
		ReadBytes: r.read.Load(), ChangedBytes: r.changedBytes, AuditBytes: r.auditBytes, RefillBytes: r.refill.Load(),
		NewBytes: r.fresh.Load(), StoredBytes: r.stored.Load(), Duration: r.Now().Sub(start),
	}
	r.Log.Info("disk is read", "vm", r.history.name, "disk", r.info.ID, "mode", d.Mode, "reason", d.Reason, "read_bytes", d.Stats.ReadBytes,
		"new_bytes", d.Stats.NewBytes, "stored_bytes", d.Stats.StoredBytes, "took", d.Stats.Duration)
	return d, nil
}

// open starts the disk in the repository, upon the previous point if there is
// one that can be read, and settles what the disk's mode is to be called.
func (r *reader) open(ctx context.Context, d *point.Disk, prev base, has bool) (err error) {
	useless := r.history.useless
	if has && useless == nil {
		if r.out, err = r.session.Disk(ctx, r.info.SizeBytes, prev.Manifest); err == nil {
			r.previous = true
			r.distrust(d, prev)
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		r.history.note(fmt.Errorf("disk %s of the previous restore point: %w", r.info.ID, err))
		r.Log.Warn("the previous restore point can't be built on, reading everything", "vm", r.history.name, "disk", r.info.ID, "err", err)
		useless = err
	}
	switch {
	case useless != nil:
		d.Reason = fmt.Sprintf("the previous restore point can't be read: %v", useless)
	case d.Mode != point.Full:
		d.Reason = "first backup of this disk"
	}
	d.Mode = point.Full
	r.out, err = r.session.Disk(ctx, r.info.SizeBytes, "")
	return err
}

// distrust makes of an incremental a comparison where the previous point gives
// cause, whatever the driver says. Everything that is read whole upon a
// previous point is compared with it.
func (r *reader) distrust(d *point.Disk, prev base) {
	why := prev.why
	if why == "" && r.info.SizeBytes < prev.SizeBytes && d.Mode == point.Incremental {
		why = fmt.Sprintf("the disk shrank from %d to %d bytes", prev.SizeBytes, r.info.SizeBytes)
	}
	if why != "" {
		d.Mode, d.Reason = point.Compared, why
	}
	if d.Mode == point.Full {
		d.Mode = point.Compared
	}
}

// readAs reads the disk in mode d.Mode. Tracking that is lost on the way, or
// found lying, makes it a comparison of everything.
func (r *reader) readAs(ctx context.Context, d *point.Disk, prevBytes int64) error {
	if d.Mode != point.Incremental {
		return r.everything(ctx)
	}
	err := r.changed(ctx, prevBytes)
	if errors.Is(err, hypervisor.ErrTrackingLost) {
		d.Mode, d.Reason = point.Compared, err.Error()
		return r.everything(ctx)
	}
	if err != nil {
		return err
	}
	bad, sampled, err := r.audit(ctx)
	if err != nil || bad == 0 {
		return err
	}
	r.lied = true
	why := fmt.Sprintf("change tracking of disk %s lied: %d of %d sampled chunks that it called unchanged differ", r.info.ID, bad, sampled)
	r.Log.Error("change tracking lied", "vm", r.history.name, "disk", r.info.ID, "differ", bad, "sampled", sampled, "seed", r.seed)
	// Marked first: if this run dies now, the marks make the next one read all.
	if err := r.history.mark(ctx, r.info.ID, why); err != nil {
		return err
	}
	d.Mode, d.Reason = point.Compared, why
	return r.everything(ctx)
}

// everything reads all that the source calls data. What it doesn't is zeros.
func (r *reader) everything(ctx context.Context) error {
	size, unit := r.info.SizeBytes, r.Repo.ChunkBytes()
	return r.pipeline(ctx, func(ctx context.Context, emit func(task) error) error {
		next := int64(0) // the first chunk that nothing was said about
		for off := int64(0); off < size; off += windowBytes {
			win := extent.Extent{Off: off, Len: min(windowBytes, size-off)}
			data, err := r.src.Data(ctx, win)
			if err != nil {
				return sourceError{err}
			}
			for _, t := range cut(merge(data.Within(win), mergeBytes), unit) {
				if err := r.holes(ctx, next, t.index); err != nil {
					return err
				}
				next = t.index + 1
				if err := emit(t); err != nil {
					return err
				}
			}
			end := chunk.Count(win.End(), unit)
			if err := r.holes(ctx, next, end); err != nil {
				return err
			}
			next = end
		}
		return nil
	}, r.put)
}

// holes says of the chunks from first up to and without end that they are
// zeros. Where there is no previous point, silence says so.
func (r *reader) holes(ctx context.Context, first, end int64) error {
	for i := first; i < end; i++ {
		if r.previous {
			if err := r.out.Hole(i); err != nil {
				return err
			}
			if i%4096 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	if end > first {
		unit := r.Repo.ChunkBytes()
		r.Progress.Add(min(end*unit, r.info.SizeBytes) - first*unit)
	}
	return nil
}

// put reads one task's chunk and gives it to the repository.
func (r *reader) put(ctx context.Context, t task, buf []byte) error {
	if t.fill {
		if err := r.out.ReadPrevious(ctx, t.index, buf); err != nil {
			if ctx.Err() != nil {
				return err
			}
			// The guest has the whole chunk, so nothing is lost; but it is
			// counted apart, since it says that the repository is damaged.
			r.history.note(fmt.Errorf("disk %s of the previous restore point: %w", r.info.ID, err))
			r.Log.Warn("chunk of the previous restore point can't be read, reading it from the source", "vm", r.history.name, "disk", r.info.ID, "chunk", t.index, "err", err)
			whole := extent.Extent{Off: t.index * r.Repo.ChunkBytes(), Len: int64(len(buf))}
			t.parts, t.zeros = []extent.Extent{whole}, nil
			r.refill.Add(whole.Len)
		}
	} else if len(t.parts) != 1 || t.parts[0].Len != int64(len(buf)) {
		clear(buf)
	}
	base := t.index * r.Repo.ChunkBytes()
	for _, e := range t.zeros {
		clear(buf[e.Off-base : e.End()-base])
	}
	if err := r.readParts(t, buf); err != nil {
		return err
	}
	p, err := r.out.Put(ctx, t.index, buf)
	if err != nil {
		return err
	}
	if p.Kind == repo.New {
		r.fresh.Add(int64(len(buf)))
		r.stored.Add(p.StoredBytes)
	}
	if !t.counted {
		r.Progress.Add(int64(len(buf)))
	}
	return nil
}

func (r *reader) readParts(t task, buf []byte) error {
	base := t.index * r.Repo.ChunkBytes()
	for _, e := range t.parts {
		p := buf[e.Off-base : e.End()-base]
		n, err := r.src.ReadAt(p, e.Off)
		if n < len(p) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return sourceError{fmt.Errorf("read %d bytes at %d of the source: %w", e.Len, e.Off, err)}
		}
		r.read.Add(e.Len)
	}
	return nil
}
