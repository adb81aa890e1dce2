package fake

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// session is one VM held still: copies of its disks and of their bitmaps.
type session struct {
	v        *VM
	machine  vm.Machine
	config   []vm.ConfigFile
	disks    []hypervisor.Disk
	taken    time.Time
	grade    vm.Grade
	frozen   time.Duration
	warnings []string
	made     *checkpoint
}

// Begin implements hypervisor.Driver.
func (h *Host) Begin(ctx context.Context, name string, o hypervisor.Options) (hypervisor.Session, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	v, err := h.find(name)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failBegin != nil {
		return nil, v.failBegin
	}
	if v.current != nil {
		return nil, fmt.Errorf("VM %s is being backed up: %w", name, fault.ErrLocked)
	}
	s := &session{v: v, config: slices.Clone(v.config), taken: h.now(), frozen: v.frozenFor, warnings: slices.Clone(v.warnings)}
	if err := s.freeze(o.Consistency); err != nil {
		return nil, fmt.Errorf("VM %s: %w", name, err)
	}
	s.machine = v.machine()
	v.made++
	s.made = &checkpoint{id: fmt.Sprintf("cp%d", v.made), repo: o.RepoID, changed: map[vm.DiskID]*extent.Set{}, size: map[vm.DiskID]int64{}}
	for i, d := range v.disks {
		if slices.Contains(o.Exclude, d.id) {
			s.machine.Disks[i].Excluded = "excluded on request"
		}
		if s.machine.Disks[i].Excluded != "" {
			continue
		}
		s.disks = append(s.disks, s.hold(d, s.machine.Disks[i], o))
	}
	if !v.off {
		v.checkpoints = append(v.checkpoints, s.made)
	}
	v.current = s
	return s, nil
}

// freeze settles which grade the snapshot has.
func (s *session) freeze(want vm.Consistency) error {
	reach := s.v.grade
	least := map[vm.Consistency]vm.Grade{vm.RequireApplication: vm.GradeApplication, vm.Filesystem: vm.GradeFilesystem}[want]
	switch {
	case want == vm.Crash:
		reach = vm.GradeCrash
	case least != "" && !reach.AtLeast(least):
		return fmt.Errorf("%s was reached and %s asked for: %w", reach, want, fault.ErrConsistency)
	case want == vm.PreferApplication && reach != vm.GradeApplication:
		s.warnings = append(s.warnings, fmt.Sprintf("only %s was reached", reach))
	}
	s.grade = reach
	if reach == vm.GradeCrash {
		s.frozen = 0
	}
	return nil
}

// hold makes the snapshot of one disk and begins to track it.
func (s *session) hold(d *disk, info vm.Disk, o hypervisor.Options) *heldDisk {
	held := &heldDisk{s: s, d: d, info: info, then: d.now.snapshot(), mode: point.Full, loseFrom: d.loseFrom}
	if !d.untrack && !s.v.off {
		s.made.changed[d.id] = &extent.Set{}
		s.made.size[d.id] = d.now.size
		held.change = changeID(s.made.id, d.id)
	}
	prev, known := o.Previous[d.id]
	switch {
	case len(o.Previous) == 0:
		held.reason = "first backup"
	case !known:
		held.reason = "new disk"
	case d.untrack:
		held.mode, held.reason = point.Compared, "this disk can't be tracked"
	case prev.ChangeID == "":
		held.reason = "the previous restore point has no checkpoint"
	default:
		c, err := s.v.since(prev.ChangeID, d.id, o.RepoID)
		if err != nil {
			held.reason = fmt.Sprintf("%v: %v", hypervisor.ErrTrackingLost, err)
			break
		}
		held.mode = point.Incremental
		if s.v.off {
			held.change = prev.ChangeID
		}
		held.changed = cloneSets(c.changed)[d.id]
		if grown := d.now.size - c.size[d.id]; grown > 0 {
			tail := extent.NewSet(extent.Extent{Off: c.size[d.id], Len: grown})
			held.changed = held.changed.Union(tail.Subtract(d.hidden))
		}
	}
	return held
}

func (s *session) Machine() vm.Machine       { return s.machine }
func (s *session) Config() []vm.ConfigFile   { return s.config }
func (s *session) Disks() []hypervisor.Disk  { return s.disks }
func (s *session) Taken() time.Time          { return s.taken }
func (s *session) Grade() vm.Grade           { return s.grade }
func (s *session) FrozenFor() time.Duration  { return s.frozen }
func (s *session) Warnings() []string        { return s.warnings }
func (s *session) other(c *checkpoint) bool  { return c.repo == s.made.repo && c != s.made }
func (s *session) itself(c *checkpoint) bool { return c == s.made }

// Commit keeps the new checkpoint and drops this repository's older ones.
func (s *session) Commit(ctx context.Context) error {
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	if s.v.current != s {
		return fmt.Errorf("VM %s: the session is over", s.v.name)
	}
	s.v.current = nil
	if s.v.failCommit != nil {
		return s.v.failCommit
	}
	if slices.ContainsFunc(s.v.checkpoints, s.itself) {
		s.v.checkpoints = slices.DeleteFunc(s.v.checkpoints, s.other)
	}
	return ctx.Err()
}

// Abort drops the new checkpoint and keeps the older one. It needs no ctx.
func (s *session) Abort(context.Context) error {
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	if s.v.current != s {
		return fmt.Errorf("VM %s: the session is over", s.v.name)
	}
	s.v.current = nil
	s.v.checkpoints = slices.DeleteFunc(s.v.checkpoints, s.itself)
	return nil
}

// heldDisk is one disk of a session.
type heldDisk struct {
	s        *session
	d        *disk
	info     vm.Disk
	then     *content
	mode     point.Mode
	reason   string
	change   string
	changed  extent.Set
	loseFrom int64
}

func (h *heldDisk) Info() vm.Disk              { return h.info }
func (h *heldDisk) Mode() (point.Mode, string) { return h.mode, h.reason }
func (h *heldDisk) ChangeID() string           { return h.change }

func (h *heldDisk) ReadAt(p []byte, off int64) (int, error) {
	v := h.s.v
	v.mu.Lock()
	over, hook := v.current != h.s, h.d.onRead
	v.mu.Unlock()
	if over {
		return 0, fmt.Errorf("disk %s of VM %s is read after its session", h.d.id, v.name)
	}
	if hook != nil {
		if err := hook(off, len(p)); err != nil {
			return 0, err
		}
	}
	n := int(max(0, min(int64(len(p)), h.then.size-off)))
	h.then.read(p[:n], off)
	v.mu.Lock()
	h.d.read += int64(n)
	h.d.readSet.Add(extent.Extent{Off: off, Len: int64(n)})
	v.mu.Unlock()
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *heldDisk) Data(ctx context.Context, within extent.Extent) (extent.Set, error) {
	return h.then.data(within), ctx.Err()
}

func (h *heldDisk) Changed(ctx context.Context, within extent.Extent) (extent.Set, error) {
	if h.mode != point.Incremental || h.loseFrom >= 0 && within.End() > h.loseFrom {
		return extent.Set{}, fmt.Errorf("disk %s: %w", h.d.id, hypervisor.ErrTrackingLost)
	}
	return h.changed.Within(within), ctx.Err()
}
