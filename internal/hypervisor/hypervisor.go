// Package hypervisor says what a driver must do: find VMs, and hold one still
// long enough to be read. hypervisor/drivertest holds the conformance suite.
package hypervisor

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A Driver speaks to one host. Its methods are safe for concurrent use, on
// different VMs; two sessions on one VM are refused with fault.ErrLocked. It can
// be a map's key.
type Driver interface {
	// Machines lists all VMs of the host, with their disks.
	Machines(ctx context.Context) ([]vm.Machine, error)

	// Begin takes a snapshot of the named VM. Whatever it makes on the host is
	// journaled before it is made. After an error nothing is left on the host.
	// Once ctx is over the Session may refuse to be read; it can be ended still.
	// Errors: fault.ErrNotFound, fault.ErrLocked, fault.ErrConsistency.
	Begin(ctx context.Context, name string, o Options) (Session, error)

	Close() error
}

// Options are what a backup asks of a driver.
type Options struct {
	RepoID      string // names on the host carry it: two repositories may back up one VM
	Consistency vm.Consistency
	FreezeLimit time.Duration // the guest is thawed after this, whatever happens; 0 for 2 s
	// Previous are the disks of the newest restore point, by ID; empty for a
	// first backup.
	Previous map[vm.DiskID]PreviousDisk
	Exclude  []vm.DiskID
	// ScratchLimit bounds in bytes what the guest's writes may take in scratch
	// space while the session lasts; 0 for no bound but the free space.
	ScratchLimit int64
	Log          *slog.Logger
}

// A PreviousDisk is a disk as the newest restore point recorded it.
type PreviousDisk struct {
	SizeBytes int64
	ChangeID  string // "" where that point has none
}

// A Session is one VM held still. It ends with exactly one Commit or Abort,
// after which its disks must not be read.
type Session interface {
	// Machine describes the VM as it was when the snapshot was taken; all its
	// disks are in it, those that are not protected with Excluded set.
	Machine() vm.Machine
	Config() []vm.ConfigFile

	// Disks are those that are protected, in the machine's order.
	Disks() []Disk

	// Taken is the moment of the snapshot, Grade what was reached, and
	// FrozenFor how long the guest stood still.
	Taken() time.Time
	Grade() vm.Grade
	FrozenFor() time.Duration

	// Warnings are for the summary: a lower grade than preferred, leftovers
	// that were reaped, a freeze that is not ours. Reading and Check may add some.
	Warnings() []string

	// Commit says that the restore point is durable: the session's checkpoint
	// stays, our older one is dropped, the snapshot goes. An error leaves a
	// restore point that is good and perhaps something to reap.
	Commit(ctx context.Context) error

	// Abort removes the snapshot and the session's checkpoint and keeps the
	// older one. It works with a ctx of its own, since the caller's may be over.
	Abort(ctx context.Context) error
}

// A Checker is a Session that can tell whether its snapshot still holds. Check
// is called when everything was read and before the restore point is
// committed; an error means that what was read is not one moment of the VM.
type Checker interface {
	Check(ctx context.Context) error
}

// A Disk is one disk of a Session. Its methods are safe for concurrent use.
type Disk interface {
	io.ReaderAt

	Info() vm.Disk

	// Mode is point.Incremental where Changed can be believed, point.Full or
	// point.Compared otherwise, and reason says why it is not incremental:
	// "first backup", "the bitmap is inconsistent".
	Mode() (mode point.Mode, reason string)

	// Data reports which bytes of within may be other than zero. It may report
	// too much, never too little.
	Data(ctx context.Context, within extent.Extent) (extent.Set, error)

	// Changed reports which bytes of within may differ from the previous
	// restore point. It may report too much but never too little: an extra
	// range costs one read, a missing one is a restore point that is silently
	// wrong. Only for point.Incremental; ErrTrackingLost sends the caller back
	// to reading everything.
	Changed(ctx context.Context, within extent.Extent) (extent.Set, error)

	// ChangeID is what a later session needs to know what changed since this
	// one; "" where the hypervisor can't track.
	ChangeID() string
}

// A DeepDisk is a Disk that lies far enough away for several reads to be under
// way at once, however few processors there are.
type DeepDisk interface {
	// Reads is how many at a time are of use.
	Reads() int
}

// ErrNoDisk says that a VM has no disk that is to be backed up and can be. A
// restore point without one would restore nothing, and look like protection.
var ErrNoDisk = errors.New("no disk is left to back up")

// ErrLeft says that what failed left something on the host that could not be
// taken away yet. The journal has it, for the next run.
var ErrLeft = errors.New("left for the next run to clean up")

// ErrTrackingLost says that the hypervisor can't tell what changed.
var ErrTrackingLost = errors.New("change tracking was lost")

// A RetryError ends a session for a reason that a new one may not meet: the
// host went down under it, and another one has the VM. What was read is worth
// nothing.
type RetryError struct{ Err error }

func (e *RetryError) Error() string { return e.Err.Error() }

// Unwrap gives the reason.
func (e *RetryError) Unwrap() error { return e.Err }

// A TrackingResetter is a Driver that can forget all its change tracking of a
// VM, so that the next backup reads everything.
type TrackingResetter interface {
	ResetTracking(ctx context.Context, name, repoID string) error
}

// A Lister is a Driver that names its VMs for less than Machines costs, which
// asks the host for each one's disks.
type Lister interface {
	// List is Machines without the disks. With a *PartialError it gives the VMs
	// that it could see.
	List(ctx context.Context) ([]vm.Machine, error)
}

// A PartialError says that there may be more VMs than those that are listed.
type PartialError struct{ Err error } // why those could not be seen

func (e *PartialError) Error() string { return "VMs may be missing from the list: " + e.Err.Error() }

// Unwrap gives the reason.
func (e *PartialError) Unwrap() error { return e.Err }

// An OffTracker is a Driver whose sessions each begin to count what changes,
// those of a VM that is off, too. The others' points of such a VM hand on the
// change ID of the point before.
type OffTracker interface{ TracksOff() }
