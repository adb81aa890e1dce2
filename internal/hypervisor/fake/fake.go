// Package fake is a hypervisor in memory: a driver that works, for tests. Its
// VMs are written to, grow, crash and lose their change tracking as a test
// tells them, and every byte that is read from them is counted.
package fake

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/vm"
)

// A Host is a hypervisor.Driver. It is safe for concurrent use.
type Host struct {
	name, id string

	mu  sync.Mutex
	vms []*VM
	now func() time.Time
}

var (
	_ hypervisor.Driver           = (*Host)(nil)
	_ hypervisor.TrackingResetter = (*Host)(nil)
)

// New makes a host without VMs; now tells when snapshots are taken.
func New(name string, now func() time.Time) *Host {
	return &Host{name: name, id: "host-" + name, now: now}
}

// A VM is one virtual machine of a Host. Its methods are what happens to it
// outside a backup; they are safe for concurrent use.
type VM struct {
	host *Host
	name string
	uuid string

	mu          sync.Mutex
	disks       []*disk
	grade       vm.Grade
	frozenFor   time.Duration
	warnings    []string
	config      []vm.ConfigFile
	checkpoints []*checkpoint
	made        int // checkpoints ever made
	current     *session
	off         bool
	failBegin   error
	failCommit  error
}

// A disk is one disk of a VM, with what a test wants of its next sessions.
type disk struct {
	id       vm.DiskID
	now      *content
	excluded string
	untrack  bool // the disk's format keeps no bitmaps

	hidden   extent.Set // writes here are not tracked: tracking that lies
	loseFrom int64      // Changed from this offset on loses tracking; -1 for never
	onRead   func(off int64, n int) error
	read     int64      // bytes, ever
	readSet  extent.Set // of what
}

// A checkpoint is a moment since which writes to the disks are tracked.
type checkpoint struct {
	id      string
	repo    string
	changed map[vm.DiskID]*extent.Set // nil Set once tracking is lost
	size    map[vm.DiskID]int64
}

// Add makes a VM that reaches the grade filesystem.
func (h *Host) Add(name string) *VM {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := &VM{host: h, name: name, uuid: fmt.Sprintf("%s-%s", h.name, name), grade: vm.GradeFilesystem, frozenFor: 5 * time.Millisecond,
		config: []vm.ConfigFile{{Name: "domain.xml", Data: []byte("<domain><name>" + name + "</name></domain>")}}}
	h.vms = append(h.vms, v)
	return v
}

// AddDisk gives the VM a disk of zeros.
func (v *VM) AddDisk(id vm.DiskID, sizeBytes int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.disks = append(v.disks, &disk{id: id, now: newContent(sizeBytes), loseFrom: -1})
}

// RemoveDisk takes a disk away.
func (v *VM) RemoveDisk(id vm.DiskID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.disks = slices.DeleteFunc(v.disks, func(d *disk) bool { return d.id == id })
}

func (v *VM) change(id vm.DiskID, do func(d *disk) extent.Extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := v.disk(id)
	if d == nil {
		panic(fmt.Sprintf("fake VM %s has no disk %s", v.name, id))
	}
	written := do(d)
	seen := extent.NewSet(written.Align(pageBytes, d.now.size)).Subtract(d.hidden)
	for _, c := range v.checkpoints {
		if set := c.changed[id]; set != nil {
			*set = set.Union(seen)
		}
	}
}

func (v *VM) disk(id vm.DiskID) *disk {
	for _, d := range v.disks {
		if d.id == id {
			return d
		}
	}
	return nil
}

// Write is the guest writing.
func (v *VM) Write(id vm.DiskID, off int64, data []byte) {
	v.change(id, func(d *disk) extent.Extent {
		if err := d.now.write(off, data); err != nil {
			panic(err)
		}
		return extent.Extent{Off: off, Len: int64(len(data))}
	})
}

// Discard is the guest trimming.
func (v *VM) Discard(id vm.DiskID, e extent.Extent) {
	v.change(id, func(d *disk) extent.Extent { d.now.discard(e); return e })
}

// Resize changes a disk's size. As with QEMU, growth does not count as a
// write, and tracking survives; a disk that shrinks loses it.
func (v *VM) Resize(id vm.DiskID, sizeBytes int64) {
	v.change(id, func(d *disk) extent.Extent {
		if sizeBytes < d.now.size {
			for _, c := range v.checkpoints {
				delete(c.changed, id)
			}
		}
		d.now.resize(sizeBytes)
		return extent.Extent{}
	})
}

// Lie makes change tracking miss all writes to e from now on, and growth into
// it; an empty extent makes it honest again.
func (v *VM) Lie(id vm.DiskID, e extent.Extent) {
	v.change(id, func(d *disk) extent.Extent { d.hidden = extent.NewSet(e); return extent.Extent{} })
}

// LoseTracking makes Changed give hypervisor.ErrTrackingLost in the middle of
// the next sessions: for ranges that reach off. -1 ends that.
func (v *VM) LoseTracking(id vm.DiskID, off int64) {
	v.change(id, func(d *disk) extent.Extent { d.loseFrom = off; return extent.Extent{} })
}

// Untracked makes the disk one of a format that can't be tracked.
func (v *VM) Untracked(id vm.DiskID) {
	v.change(id, func(d *disk) extent.Extent { d.untrack = true; return extent.Extent{} })
	v.Crash()
}

// Exclude makes the disk one that can't be protected.
func (v *VM) Exclude(id vm.DiskID, why string) {
	v.change(id, func(d *disk) extent.Extent { d.excluded = why; return extent.Extent{} })
}

// OnRead is called before every read of a snapshot of the disk; its error
// fails the read.
func (v *VM) OnRead(id vm.DiskID, hook func(off int64, n int) error) {
	v.change(id, func(d *disk) extent.Extent { d.onRead = hook; return extent.Extent{} })
}

// Crash is the host losing its power: the disks stay, all tracking is lost.
func (v *VM) Crash() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range v.checkpoints {
		clear(c.changed)
	}
}

// SetOff shuts the VM off, or starts it again. As on KVM, the backup of a VM
// that is off makes no checkpoint and hands on the change IDs that it was given.
func (v *VM) SetOff(off bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.off = off
}

// Save is a snapshot of the storage below the VM; calling what it gives rolls
// the disks back, and with them the bitmaps that lie in their images.
func (v *VM) Save() (rollBack func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	then := map[vm.DiskID]*content{}
	for _, d := range v.disks {
		then[d.id] = d.now.snapshot()
	}
	changed := map[*checkpoint]map[vm.DiskID]extent.Set{}
	for _, c := range v.checkpoints {
		changed[c] = cloneSets(c.changed)
	}
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		for _, d := range v.disks {
			d.now = then[d.id].snapshot()
		}
		for _, c := range v.checkpoints {
			clear(c.changed)
			for id, set := range changed[c] {
				c.changed[id] = &set
			}
		}
	}
}

// ForgetZeros makes zeros of e without tracking it, as when QEMU's disk is
// shrunk and grown again between two backups.
func (v *VM) ForgetZeros(id vm.DiskID, e extent.Extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.disk(id).now.discard(e)
}

// Reach sets which grade a snapshot of the VM can reach.
func (v *VM) Reach(g vm.Grade) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.grade = g
}

// Warn makes the next sessions carry warnings.
func (v *VM) Warn(warnings ...string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.warnings = warnings
}

// Fail makes Begin and a session's Commit fail with these errors, if not nil.
func (v *VM) Fail(begin, commit error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.failBegin, v.failCommit = begin, commit
}

// Contents are the bytes that the disk holds now; only for small disks.
func (v *VM) Contents(id vm.DiskID) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := v.disk(id)
	p := make([]byte, d.now.size)
	d.now.read(p, 0)
	return p
}

// TakeReads gives how many bytes were read from snapshots of the disk since
// the last call, and which.
func (v *VM) TakeReads(id vm.DiskID) (bytes int64, what extent.Set) {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := v.disk(id)
	bytes, what = d.read, d.readSet
	d.read, d.readSet = 0, extent.Set{}
	return bytes, what
}

// Left are what a backup left on the host: a snapshot if a session is open,
// and the checkpoints.
func (v *VM) Left() (snapshot bool, checkpoints []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range v.checkpoints {
		checkpoints = append(checkpoints, c.id)
	}
	return v.current != nil, checkpoints
}

// Machines implements hypervisor.Driver.
func (h *Host) Machines(ctx context.Context) ([]vm.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var list []vm.Machine
	for _, v := range h.vms {
		v.mu.Lock()
		list = append(list, v.machine())
		v.mu.Unlock()
	}
	return list, nil
}

func (v *VM) machine() vm.Machine {
	m := vm.Machine{Name: v.name, Host: v.host.name, HostID: v.host.id, UUID: v.uuid, Hypervisor: "fake", State: "running"}
	if v.off {
		m.State = "shut off"
	}
	for _, d := range v.disks {
		m.Disks = append(m.Disks, vm.Disk{ID: d.id, SizeBytes: d.now.size, Format: "fake", Excluded: d.excluded})
	}
	return m
}

// Close implements hypervisor.Driver.
func (h *Host) Close() error { return nil }

// ResetTracking implements hypervisor.TrackingResetter.
func (h *Host) ResetTracking(ctx context.Context, name, repoID string) error {
	v, err := h.find(name)
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.checkpoints = slices.DeleteFunc(v.checkpoints, func(c *checkpoint) bool { return c.repo == repoID })
	return nil
}

func (h *Host) find(name string) (*VM, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, v := range h.vms {
		if v.name == name {
			return v, nil
		}
	}
	return nil, fmt.Errorf("VM %s: %w", name, fault.ErrNotFound)
}

// changeID names a checkpoint and the disk, so that neither is mistaken.
func changeID(checkpoint string, d vm.DiskID) string { return checkpoint + "/" + string(d) }

// since finds the checkpoint that a change ID of the disk names.
func (v *VM) since(id string, d vm.DiskID, repoID string) (*checkpoint, error) {
	name, of, _ := strings.Cut(id, "/")
	for _, c := range v.checkpoints {
		if c.id == name && of == string(d) && c.repo == repoID {
			if c.changed[d] == nil {
				return nil, errors.New("the bitmap is inconsistent")
			}
			return c, nil
		}
	}
	return nil, errors.New("there is no such checkpoint")
}

func cloneSets(sets map[vm.DiskID]*extent.Set) map[vm.DiskID]extent.Set {
	out := map[vm.DiskID]extent.Set{}
	for id, s := range maps.All(sets) {
		out[id] = *s
	}
	return out
}
