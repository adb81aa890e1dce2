package kvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/nbd"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// endTimeout is how long ending a session may take, a restart of libvirt in
// the middle included.
const endTimeout = 2 * time.Minute

// connections is how many to open to read one disk.
const connections = 4

// A session is one VM held still.
type session struct {
	*beginning
	disks []hypervisor.Disk

	servers []*nbdServer // of a shut-off VM
	images  []*os.File   // its locked images

	watching context.CancelFunc
	watched  chan struct{}

	mu    sync.Mutex
	cause error // why reads fail, once it is known
	asked bool  // whether the cause was looked for
	ended bool
	end   error // what Commit or Abort said
}

var _ hypervisor.Session = (*session)(nil)

func (s *session) Machine() vm.Machine      { return s.machine }
func (s *session) Config() []vm.ConfigFile  { return s.config }
func (s *session) Disks() []hypervisor.Disk { return s.disks }
func (s *session) Taken() time.Time         { return s.taken }
func (s *session) Grade() vm.Grade          { return s.grade }
func (s *session) FrozenFor() time.Duration { return s.held }
func (s *session) Warnings() []string       { return s.warnings }

// A disk is read over several NBD connections. What is allocated and what
// changed are asked on connections of their own, because the server works out
// all contexts of a connection for every question.
type disk struct {
	s              *session
	info           vm.Disk
	plan           decision
	change         string
	bitmap         string // context of the changes
	data           *nbd.Client
	alloc, changed *nbd.Client
}

var _ hypervisor.Disk = (*disk)(nil)

// open dials the exports of the backup job.
func (b *beginning) open(ctx context.Context) (*session, error) {
	b.live = true
	s := &session{beginning: b}
	for i, e := range b.defs {
		d := &disk{s: s, info: e.Disk, plan: b.plans[i], bitmap: "qemu:dirty-bitmap:backup-" + string(e.ID)}
		if d.plan.track {
			d.change = changeID{1, b.dom.uuid(), string(e.ID), b.checkpoint, b.facts[i].files}.String()
		}
		err := d.dial(ctx, b.socket)
		s.disks = append(s.disks, d)
		if err != nil {
			s.hangUp()
			return nil, err
		}
	}
	s.watch()
	return s, nil
}

// dial connects to the export of d at socket.
func (d *disk) dial(ctx context.Context, socket string) (err error) {
	t := nbd.Target{Network: "unix", Address: socket, Export: string(d.info.ID), Connections: connections}
	if d.data, err = nbd.Dial(ctx, t); err != nil {
		return fmt.Errorf("disk %s: %w", d.info.ID, err)
	}
	t.Connections, t.MetaContexts = 1, []string{"base:allocation"}
	if d.alloc, err = nbd.Dial(ctx, t); err != nil {
		return fmt.Errorf("disk %s: %w", d.info.ID, err)
	}
	if d.plan.mode == point.Incremental {
		t.MetaContexts = []string{d.bitmap}
		if d.changed, err = nbd.Dial(ctx, t); err != nil {
			return fmt.Errorf("disk %s: %w", d.info.ID, err)
		}
		if len(d.changed.Contexts()) == 0 {
			return fmt.Errorf("disk %s: QEMU does not show the bitmap that it was asked for", d.info.ID)
		}
	}
	if n := d.data.Size(); n != d.info.SizeBytes { // resized since we looked
		d.info.SizeBytes = n
		if n < d.plan.grown {
			d.plan = decision{mode: point.Full, reason: lost + "the disk shrank", track: d.plan.track}
		}
		for i := range d.s.machine.Disks {
			if d.s.machine.Disks[i].ID == d.info.ID {
				d.s.machine.Disks[i].SizeBytes = n
			}
		}
	}
	return nil
}

func (d *disk) Info() vm.Disk              { return d.info }
func (d *disk) Mode() (point.Mode, string) { return d.plan.mode, d.plan.reason }
func (d *disk) ChangeID() string           { return d.change }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.data.ReadAt(p, off)
	return n, d.why(err)
}

// Data is what the server does not call zero.
func (d *disk) Data(ctx context.Context, within extent.Extent) (extent.Set, error) {
	var out extent.Set
	for st, err := range d.alloc.BlockStatus(ctx, "base:allocation", d.clip(within)) {
		if err != nil {
			return extent.Set{}, d.why(err)
		}
		if st.Flags&nbd.StateZero == 0 {
			out.Add(st.Extent)
		}
	}
	return out, nil
}

// Changed is what the bitmap names, and what the disk has grown by: QEMU does
// not count growth as a write.
func (d *disk) Changed(ctx context.Context, within extent.Extent) (extent.Set, error) {
	if d.plan.mode != point.Incremental {
		return extent.Set{}, fmt.Errorf("disk %s: %w", d.info.ID, hypervisor.ErrTrackingLost)
	}
	within = d.clip(within)
	var out extent.Set
	for st, err := range d.changed.BlockStatus(ctx, d.bitmap, within) {
		if err != nil {
			return extent.Set{}, d.why(err)
		}
		if st.Flags&nbd.StateDirty != 0 {
			out.Add(st.Extent)
		}
	}
	out.Add(within.Intersect(extent.Extent{Off: d.plan.grown, Len: max(0, d.info.SizeBytes-d.plan.grown)}))
	return out, nil
}

func (d *disk) clip(e extent.Extent) extent.Extent {
	return e.Intersect(extent.Extent{Len: d.info.SizeBytes})
}

// why names the disk in an error of reading it and, where the connection
// ended, the reason for that.
func (d *disk) why(err error) error {
	var answer *nbd.Error
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case errors.As(err, &answer):
	default:
		if cause := d.s.diagnose(); cause != nil {
			err = cause
		}
	}
	return fmt.Errorf("disk %s: %w", d.info.ID, err)
}

// diagnose finds out, once, why connections end.
func (s *session) diagnose() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil || s.asked || s.ended {
		return s.cause
	}
	s.asked = true
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	// A connection of its own: its deadline must not end calls of others.
	dom := &domain{newConn(s.dom.uri), s.dom.name, s.dom.id}
	defer dom.close()
	on, err := dom.active(ctx)
	switch {
	case errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning):
		s.cause = fmt.Errorf("the VM was removed while it was read: %w", fault.ErrNotFound)
	case err != nil:
	case !on:
		s.cause = errors.New("the VM went down while it was read")
	default:
		if now, err := dom.backupSocket(ctx); err == nil && now != s.socket {
			s.cause = errors.New("the backup job was ended by somebody else")
		}
	}
	return s.cause
}

// fail ends the reading: a guest is never made to pay for a backup.
func (s *session) fail(cause error) {
	s.mu.Lock()
	first := s.cause == nil && !s.ended
	if first {
		s.cause = cause
	}
	s.mu.Unlock()
	if !first {
		return
	}
	s.hangUp()
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	if _, err := s.dom.endJob(ctx, s.socket); err != nil && s.o.Log != nil {
		s.o.Log.Warn("end the backup job", "vm", s.dom.name, "error", err)
	}
}

// watch looks after the scratch space while the session lasts.
func (s *session) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	s.watching, s.watched = cancel, make(chan struct{})
	go func() {
		defer close(s.watched)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if err := s.checkScratch(); err != nil {
				s.fail(err)
				return
			}
		}
	}()
}

func (s *session) checkScratch() error {
	if s.o.ScratchLimit > 0 {
		var used int64
		files, _ := filepath.Glob(filepath.Join(s.dir, "*.scratch"))
		for _, name := range files {
			used += allocated(name)
		}
		if used > s.o.ScratchLimit {
			return fmt.Errorf("the guest wrote so much that scratch space took %d bytes, more than the limit of %d: %w", used, s.o.ScratchLimit, fault.ErrNoSpace)
		}
	}
	if free, err := freeBytes(s.d.scratchDir); err == nil && free < scratchReserve {
		return fmt.Errorf("scratch directory %s has only %d bytes left: %w", s.d.scratchDir, free, fault.ErrNoSpace)
	}
	return nil
}

// hangUp closes all NBD connections; reads under way fail.
func (s *session) hangUp() {
	for _, h := range s.disks {
		d := h.(*disk)
		for _, c := range []*nbd.Client{d.data, d.alloc, d.changed} {
			if c != nil {
				c.Close()
			}
		}
	}
}

// Commit keeps the session's checkpoint and drops our older ones.
func (s *session) Commit(ctx context.Context) error { return s.finish(ctx, true) }

// Abort deletes the session's checkpoint and keeps the older ones.
func (s *session) Abort(ctx context.Context) error { return s.finish(ctx, false) }

func (s *session) finish(ctx context.Context, commit bool) error {
	s.mu.Lock()
	if s.ended {
		defer s.mu.Unlock()
		return s.end
	}
	s.ended = true
	s.mu.Unlock()
	if s.watching != nil {
		s.watching()
		<-s.watched
	}
	s.hangUp()
	s.stopNBD()
	s.dom.patient = true
	ctx, cancel := withTimeout(ctx, endTimeout)
	defer cancel()
	var errs []error
	if commit && s.checkpoint != "" {
		// First of all: from here on a reaper must not take it for garbage.
		errs = append(errs, s.run.Done(kindCheckpoint, s.checkpoint))
	}
	_, err := s.dom.undo(ctx, s.run, func(e journal.Entry) bool {
		return commit && e.Kind == kindCheckpoint // one that could not be struck off is still good
	})
	errs = append(errs, err)
	// Without a new checkpoint the older ones are the base of nothing any more,
	// but for a VM that is off: there they still track.
	if commit && (s.checkpoint != "" || s.live) {
		errs = append(errs, s.dom.dropCheckpoints(ctx, s.prefix, s.checkpoint))
	}
	err = errors.Join(errs...)
	if err != nil {
		err = fmt.Errorf("VM %q: clean up: %w", s.dom.name, err)
	}
	s.run.Close()
	s.lock.Unlock()
	s.dom.close()
	s.mu.Lock()
	s.end = err
	s.mu.Unlock()
	return err
}

// allocated is how many bytes a file takes on its disk.
func allocated(name string) int64 {
	st, err := os.Stat(name)
	if err != nil {
		return 0
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Blocks * 512
	}
	return st.Size()
}

func fileOwner(name string) (uid, gid int, ok bool) {
	st, err := os.Stat(name)
	if err != nil {
		return -1, -1, false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return -1, -1, false
	}
	return int(sys.Uid), int(sys.Gid), true
}
