package hypervisor

import (
	"context"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/vm"
)

// A Builder makes a VM on another machine of disks that are written to it, or
// gives a VM that is there its restored disks. Whatever it makes on the host is
// journaled before it is made. It ends with exactly one Commit or Abort.
type Builder interface {
	// Room fails with fault.ErrNoSpace where the host has less room than so
	// many bytes for each of the disks.
	Room(ctx context.Context, need map[vm.DiskID]int64) error

	// Create makes the file of a disk, which did not exist, and gives its name
	// on the host. Errors: fault.ErrNotFound for a disk that the VM has not.
	Create(ctx context.Context, disk vm.DiskID) (out image.Output, name string, err error)

	// Open opens what was written to the file of that disk, which is closed by
	// now, to be read back.
	Open(ctx context.Context, disk vm.DiskID) (image.Image, error)

	// Commit makes the VM of the disks, or swaps them for its own. After an
	// error everything is still to be aborted.
	Commit(ctx context.Context) (Built, error)

	// Abort takes away everything that was made, the newest first, also when
	// ctx is over. What it can't take away a later run does; the error says
	// what that is.
	Abort(ctx context.Context) error
}

// Built is what came of a Builder.
type Built struct {
	Name    string `json:"name"`
	UUID    string `json:"uuid"`
	Folder  string `json:"folder,omitempty"` // on the host, where the new VM lies
	Running bool   `json:"running"`
	// How says what the VM was made of: "definition" for our neutral one,
	// "import" for the host's own; empty where no VM was made.
	How string `json:"how,omitempty"`
	// Kept are the disks that were swapped for others.
	Kept []KeptDisk `json:"kept,omitempty"`
	// Notes are for the summary. Warnings say what is not as it was, or as it
	// was asked for.
	Notes    []string `json:"notes,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

// A KeptDisk is a disk that a restored one took the place of.
type KeptDisk struct {
	Disk vm.DiskID `json:"disk"`
	Path string    `json:"path,omitempty"` // where it lies now; empty if it was removed
}
