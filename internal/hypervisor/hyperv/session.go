package hyperv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// A session is one VM held still.
type session struct {
	*beginning
	watching context.CancelFunc
	watched  chan struct{}

	mu      sync.Mutex
	cause   error // why what is read is worth nothing any more
	ended   bool
	settled bool  // the checkpoint is
	last    error // what Commit or Abort said
}

var (
	_ hypervisor.Session = (*session)(nil)
	_ hypervisor.Checker = (*session)(nil)
)

func (s *session) Machine() vm.Machine      { return s.machine }
func (s *session) Config() []vm.ConfigFile  { return s.config }
func (s *session) Taken() time.Time         { return s.taken }
func (s *session) Grade() vm.Grade          { return s.grade }
func (s *session) FrozenFor() time.Duration { return 0 } // the host does not tell

func (s *session) Warnings() []string {
	s.where.Lock()
	defer s.where.Unlock()
	return slices.Clone(s.warnings)
}

func (s *session) Disks() []hypervisor.Disk {
	out := make([]hypervisor.Disk, 0, len(s.disks))
	for _, d := range s.disks {
		out = append(out, d)
	}
	return out
}

// Check fails if the checkpoint is not there any more: somebody destroyed it
// and the host merged it, or the VM is gone.
func (s *session) Check(ctx context.Context) error {
	if err := s.failed(); err != nil {
		return err
	}
	if err := s.roam.unchanged(ctx); err != nil {
		return fmt.Errorf("VM %q: %w", s.sys.name, err)
	}
	return s.held(ctx)
}

// held fails unless the VM has its checkpoint, wherever it is by now.
func (s *session) held(ctx context.Context) error {
	from := s.at()
	_, err := from.Get(ctx, s.frozen.ref)
	moved := err != nil && s.follow(ctx, from, err)
	if moved {
		_, err = s.at().Get(ctx, s.frozen.ref) // it went along
	}
	if !errors.Is(err, fault.ErrNotFound) {
		return err
	}
	switch e := s.target().onHost(ctx); {
	case errors.Is(e, errElsewhere):
		return fmt.Errorf("VM %q was deleted, or moved to another host, while it was read: %w", s.sys.name, fault.ErrNotFound)
	case e != nil:
		return e
	case moved || s.roam.went():
		return &hypervisor.RetryError{Err: fmt.Errorf("VM %q is on %s by now, and its checkpoint is not: %w", s.sys.name, s.at().called(), err)}
	}
	return fmt.Errorf("VM %q: somebody deleted its checkpoint while it was read: %w", s.sys.name, err)
}

func (s *session) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

func (s *session) fail(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		s.cause = cause
	}
}

// Commit makes the checkpoint a reference point and drops our older ones.
func (s *session) Commit(ctx context.Context) error { return s.finish(ctx, true) }

// Abort destroys the checkpoint and keeps the reference points.
func (s *session) Abort(ctx context.Context) error { return s.finish(ctx, false) }

func (s *session) finish(ctx context.Context, commit bool) error {
	s.mu.Lock()
	if s.ended {
		defer s.mu.Unlock()
		return s.last
	}
	s.ended = true
	s.mu.Unlock()
	s.watching()
	<-s.watched
	s.end() // reads end, so that the host can merge
	for _, d := range s.disks {
		d.img.Close()
	}
	limit := endTime
	if commit {
		limit += s.at().mergeWait // some hosts merge within the job
	}
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	from := s.at()
	err := s.conclude(ending, commit)
	for try := 1; err != nil && try < mostMoves && s.follow(ending, from, err); try++ {
		from = s.at()
		err = s.conclude(ending, commit)
	}
	if !commit && errors.Is(err, errElsewhere) {
		err = nil // it went with the VM; the journal has it, should the VM be anywhere
	}
	if err == nil {
		// A restore point is done, and whoever waits for it sees how the merge
		// goes; an interrupted backup isn't kept waiting.
		waiting := context.WithoutCancel(ctx)
		most := s.at().mergeWait
		if !commit {
			waiting, most = ctx, min(most, abortMergeWait)
		}
		if err = s.at().waitMerge(waiting, s.sys, s.now.ref, s.deltas, most); !commit {
			err = nil // the host goes on by itself
		}
	}
	if err != nil {
		err = fmt.Errorf("VM %q: clean up: %w", s.sys.name, err)
	}
	s.run.Close()
	s.release()
	s.lock.Unlock()
	s.mu.Lock()
	s.last = err
	s.mu.Unlock()
	return err
}

// conclude does with the checkpoint what the session ends with. It may be called
// again, on another node.
func (s *session) conclude(ctx context.Context, commit bool) (err error) {
	keep := ""
	if !s.settled {
		switch t := s.target(); {
		case commit && s.tracked && !s.saved:
			_, err = t.convert(ctx, s.entry)
		default:
			_, err = t.drop(ctx, s.entry)
		}
	}
	s.settled = s.settled || err == nil
	switch {
	case !commit:
		return err
	case s.tracked && !s.saved:
		if err != nil {
			return err // the older one is the base of the next backup still
		}
		keep = s.entry.Name
	}
	// Without a new reference point the older ones are the base of nothing any
	// more.
	return errors.Join(err, s.at().dropReferences(ctx, s.journal, s.sys, s.prefix, keep))
}

// A disk is a frozen file with its parents.
type disk struct {
	s      *session
	b      *beginning
	info   vm.Disk
	img    image.Image
	plan   decision
	node   *Driver // that had the VM when that was planned
	change string

	mu     sync.Mutex
	window window
	known  extent.Extent
	answer extent.Set // what changed of known
}

var (
	_ hypervisor.Disk     = (*disk)(nil)
	_ hypervisor.DeepDisk = (*disk)(nil)
)

// diskReads is how many reads of a disk are to be under way: what changed lies
// in pieces of 64 KiB, and 16 of those are 50 MB/s from a host 20 ms away.
const diskReads = 16

func (d *disk) Info() vm.Disk              { return d.info }
func (d *disk) Mode() (point.Mode, string) { return d.plan.mode, d.plan.reason }
func (d *disk) ChangeID() string           { return d.change }
func (d *disk) Reads() int                 { return diskReads }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.s.failed(); err != nil {
		return 0, err
	}
	n, err := d.img.ReadAt(p, off)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	if cause := d.s.failed(); cause != nil {
		return n, cause
	}
	return n, err
}

// Data is what the frozen files hold.
func (d *disk) Data(ctx context.Context, within extent.Extent) (out extent.Set, err error) {
	for e, err := range d.img.Extents(ctx, d.clip(within)) {
		if err != nil {
			return extent.Set{}, err
		}
		if e.Kind == image.Data {
			out.Add(e.Extent)
		}
	}
	return out, nil
}

// clip is the part of within that the disk has.
func (d *disk) clip(within extent.Extent) extent.Extent {
	return within.Intersect(extent.Extent{Len: d.info.SizeBytes})
}

// Changed is what the host says was written since the reference point.
func (d *disk) Changed(ctx context.Context, within extent.Extent) (out extent.Set, err error) {
	if d.plan.mode != point.Incremental {
		return out, hypervisor.ErrTrackingLost
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	within = d.clip(within)
	for off := within.Off; off < within.End(); off = d.known.End() {
		if off < d.known.Off || off >= d.known.End() {
			if err := d.ask(ctx, off); err != nil {
				if ctx.Err() != nil {
					return extent.Set{}, context.Cause(ctx)
				}
				return extent.Set{}, fmt.Errorf("%w: %w", hypervisor.ErrTrackingLost, err)
			}
		}
		out = out.Union(d.answer.Within(within))
	}
	return out, nil
}

// ask asks the host what changed from off on, and keeps the answer. It asks for
// less where the answer would be too long.
func (d *disk) ask(ctx context.Context, off int64) error {
	// What a node knows of the tracking of a VM that another one lost, nobody
	// says: it is not believed, here as little as in the next backup.
	if now := d.b.at(); now != d.node {
		return fmt.Errorf("the VM moved from %s to %s while it was read", d.node.called(), now.called())
	}
	for tries := 0; ; {
		n := min(d.window.bytes, d.info.SizeBytes-off)
		changed, ranges, done, err := d.node.changes(ctx, d.info.Source, d.plan.since, off, n)
		var cut *wsman.ConnectionError
		switch {
		case err == nil:
			if err := d.b.stillThere(ctx, d.node); err != nil {
				return err
			}
			d.known, d.answer = extent.Extent{Off: off, Len: done}, changed
			d.window.answered(done, ranges)
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case (errors.Is(err, wsman.ErrEnvelope) || errors.Is(err, wsman.ErrTimedOut)) && d.window.refused(n, errors.Is(err, wsman.ErrTimedOut)):
		case (errors.As(err, &cut) || errors.Is(err, wsman.ErrBusy)) && tries < 3:
			// It only reads, and may be asked again.
			tries++
			if err := sleep(ctx, d.node.poll); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// stillThere fails if the address of a cluster's node, which may be the cluster's
// own name, leads to another node than when the backup began: what that one said
// is not believed either.
func (b *beginning) stillThere(ctx context.Context, d *Driver) error {
	if len(d.cluster.known()) < 2 {
		return nil
	}
	host, _, err := d.systems(ctx)
	if err == nil && host != b.host {
		err = fmt.Errorf("%s leads to %s by now, and led to %s when the backup began", d.hostKey(), host, b.host)
	}
	return err
}

// changes asks which of n bytes of a file's disk from off on were written since
// the tracking id. It gives for how many of them the answer holds, and how many
// ranges it has.
func (c *client) changes(ctx context.Context, file, since string, off, n int64) (out extent.Set, ranges int, done int64, err error) {
	const method = "GetVirtualDiskChanges"
	o, job, err := c.start(ctx, familyImage, service(classImages), method,
		wsman.Arg("Path", wsman.Of(file)), wsman.Arg("LimitId", wsman.Of(since)), wsman.Arg("TargetSnapshotId", wsman.Of("")),
		wsman.Arg("ByteOffset", wsman.Of(uint64(off))), wsman.Arg("ByteLength", wsman.Of(uint64(n))))
	if err != nil {
		return out, 0, 0, err
	}
	if job.Class != "" { // whose results nobody gets to see: not even that there are some
		return out, 0, 0, fmt.Errorf("%s: the host answers with a job instead of ranges", method)
	}
	done, ok := o.number("ProcessedByteLength")
	offs, ok1 := o.numbers("ChangedByteOffsets")
	lens, ok2 := o.numbers("ChangedByteLengths")
	switch {
	case !ok || !ok1 || !ok2:
		return out, 0, 0, fmt.Errorf("%s: the host's answer is not complete", method)
	case done <= 0:
		return out, 0, 0, fmt.Errorf("%s: the host looked at %d of %d bytes at %d", method, done, n, off)
	case len(offs) != len(lens):
		return out, 0, 0, fmt.Errorf("%s: %d offsets and %d lengths", method, len(offs), len(lens))
	}
	done = min(done, n)
	window := extent.Extent{Off: off, Len: done}
	for i := range offs {
		if offs[i] < 0 || lens[i] <= 0 || offs[i] > math.MaxInt64-lens[i] {
			return out, 0, 0, fmt.Errorf("%s: a range of %d bytes at %d", method, lens[i], offs[i])
		}
		e := extent.Extent{Off: offs[i], Len: lens[i]}
		if e.Intersect(extent.Extent{Off: off, Len: n}).Len <= 0 {
			return out, 0, 0, fmt.Errorf("%s: asked for %d bytes at %d, the host names %d at %d", method, n, off, lens[i], offs[i])
		}
		out.Add(e.Intersect(window))
	}
	return out, len(offs), done, nil
}
