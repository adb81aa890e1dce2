package repo

import (
	"context"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// A Disk is one disk of a restore point, open for reading. All methods are
// safe for concurrent use.
type Disk struct{}

// OpenDisk opens the disk whose manifest is id.
func (r *Repository) OpenDisk(ctx context.Context, id point.ManifestID) (*Disk, error) {
	return nil, errSoon
}

// Size is the disk's size in bytes.
func (d *Disk) Size() int64 { return 0 }

// ChunkBytes is the size of all chunks but the last.
func (d *Disk) ChunkBytes() int64 { return 0 }

// Chunks is how many chunks the disk has.
func (d *Disk) Chunks() int64 { return 0 }

// ReadAt reads like an io.ReaderAt, through a small cache of chunks.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) { return 0, errSoon }

// Data is the part of within that is no hole.
func (d *Disk) Data(ctx context.Context, within extent.Extent) (extent.Set, error) {
	return extent.Set{}, errSoon
}

// Chunk names chunk index.
func (d *Disk) Chunk(ctx context.Context, index int64) (id chunk.ID, hole bool, err error) {
	return chunk.ID{}, false, errSoon
}

// FetchOptions say how Fetch goes about it.
type FetchOptions struct {
	// Ordered asks for chunks in ascending order, one at a time. Otherwise
	// they come in the order that reads packs best, from several goroutines.
	Ordered bool
	Workers int // 0 means one more than there are processors
	// Skip, if not nil, is asked before a chunk is read.
	Skip func(index int64, id chunk.ID) bool
}

// Fetch reads every chunk in within that is no hole, verifies it by its id and
// calls fn with it. Chunks are whole even where within cuts them; data is only
// valid during fn.
func (d *Disk) Fetch(ctx context.Context, within extent.Extent, o FetchOptions, fn func(off int64, data []byte) error) error {
	return errSoon
}

// Close lets go of the disk's memory.
func (d *Disk) Close() error { return nil }
