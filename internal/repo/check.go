package repo

import (
	"context"
	"errors"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

var errSoon = errors.New("not yet")

// CheckOptions say how deep Check looks. Without any it takes the inventory:
// whether every object that is needed is there with its right length.
type CheckOptions struct {
	Scrub    bool // re-read every stored byte and compare checksums; needs no keys
	ReadData bool // decrypt, decompress and re-hash every chunk
	Progress func(doneBytes, totalBytes int64)
}

// A Hit is a part of a restore point that a finding damages. Without keys
// only Point is known, as the record's opaque name.
type Hit struct {
	VM    string        `json:"vm,omitempty"`
	Point point.ID      `json:"point"`
	Disk  vm.DiskID     `json:"disk,omitempty"`
	Range extent.Extent `json:"range"`
}

// A Finding is one thing that is wrong.
type Finding struct {
	Object string // its name in the store
	Offset int64  // bytes into the object, -1 where it has no place
	Err    error  // in class fault.ErrCorrupt or fault.ErrNotFound
	Hits   []Hit
}

// A CheckReport counts what was looked at and lists what is wrong.
type CheckReport struct {
	Packs, Points, Manifests, Chunks int64
	Bytes                            int64 // that were read
	Findings                         []Finding
}

// Check says whether the repository is sound. Findings are not an error.
func (r *Repository) Check(ctx context.Context, o CheckOptions) (CheckReport, error) {
	return CheckReport{}, errSoon
}
