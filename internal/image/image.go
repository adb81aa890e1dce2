// Package image says what a virtual disk image is: random access to the bytes
// that a guest would see, plus which of them are there. Its children know one
// format each; image/open knows them all.
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/backstay/backstay/internal/extent"
)

// Format names a virtual disk format as the command line does.
type Format string

// The formats.
const (
	Raw   Format = "raw"
	Qcow2 Format = "qcow2"
	VHD   Format = "vhd"
	VHDX  Format = "vhdx"
	VMDK  Format = "vmdk"
	VDI   Format = "vdi" // only read
	OVA   Format = "ova" // an appliance, of which one disk is the image
)

// An Image is a virtual disk, opened read-only. All methods are safe for
// concurrent use, and reads run in parallel.
//
// ReadAt follows io.ReaderAt within [0, Size): holes read as zeros, a read
// that passes Size gives what is there and io.EOF. Damage is reported as
// fault.ErrCorrupt and never as zeros.
//
// An implementation opens no file that it was not handed: parents, extents and
// data files come from the Resolver that the caller gave, or Open fails.
type Image interface {
	io.ReaderAt
	io.Closer

	// Size is the virtual size in bytes.
	Size() int64

	// Extents walks within in ascending order, without gaps or overlaps, and
	// costs time in proportion to the metadata that it crosses, never to
	// within.Len. Neighbours of one kind may or may not be merged. Iteration
	// ends at the first error.
	Extents(ctx context.Context, within extent.Extent) iter.Seq2[Extent, error]

	Info() Info
}

// Kind is what an image holds for a range.
type Kind uint8

// The kinds.
const (
	Absent Kind = iota // nothing here: the parent's bytes, or zeros where there is none
	Zero               // zeros, whatever a parent says
	Data               // bytes in this layer
)

func (k Kind) String() string {
	switch k {
	case Absent:
		return "absent"
	case Zero:
		return "zero"
	case Data:
		return "data"
	}
	return fmt.Sprintf("kind %d", k)
}

// An Extent is a range of the virtual disk with what the image holds for it.
type Extent struct {
	extent.Extent
	Kind       Kind
	Compressed bool
	// Depth is the layer that answers: 0 the image itself, 1 its parent, …
	Depth int
	// FileOffset is where the bytes lie in the layer's file, or -1 where they
	// are compressed, spread over several files or not in a file.
	FileOffset int64
}

// Info is what people ask of an image.
type Info struct {
	Format       Format   `json:"format"`
	Variant      string   `json:"variant,omitempty"` // "dynamic", "streamOptimized", …
	Version      int      `json:"version,omitempty"`
	VirtualBytes int64    `json:"virtual_bytes"`
	FileBytes    int64    `json:"file_bytes"`            // length of the file, or of all files of a split image
	BlockBytes   int64    `json:"block_bytes,omitempty"` // cluster, block or grain
	SectorBytes  int      `json:"sector_bytes,omitempty"`
	Compression  string   `json:"compression,omitempty"`
	Creator      string   `json:"creator,omitempty"`
	Parent       string   `json:"parent,omitempty"` // as the header names it; empty for none
	ParentFormat Format   `json:"parent_format,omitempty"`
	Identity     string   `json:"identity,omitempty"` // UUID, DataWriteGuid or CID
	Snapshots    []string `json:"snapshots,omitempty"`
	Bitmaps      []string `json:"bitmaps,omitempty"`
	// What is known of each of the snapshots and bitmaps, in their order.
	SnapshotInfo []SnapshotInfo `json:"snapshot_details,omitempty"`
	BitmapInfo   []BitmapInfo   `json:"bitmap_details,omitempty"`

	Warnings []string `json:"warnings,omitempty"`
	// Files are those that the image is read from besides its own: extents,
	// data files, parents. Names are relative to the image's directory, or
	// absolute where that can't be. Only image/open knows them.
	Files         []string          `json:"files,omitempty"`
	FormatDetails map[string]string `json:"details,omitempty"` // what only one format has
}

// SnapshotInfo is what an image says of one of its internal snapshots.
type SnapshotInfo struct {
	ID           string    `json:"id"`
	Name         string    `json:"name"`
	Made         time.Time `json:"made"`
	VirtualBytes int64     `json:"virtual_bytes"`         // size of the disk then
	StateBytes   int64     `json:"state_bytes,omitempty"` // the VM's saved memory, which no disk holds
}

// BitmapInfo is what an image says of one of its persistent bitmaps.
type BitmapInfo struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity_bytes"` // of the disk, that a bit stands for
	Recording   bool   `json:"recording"`         // writes are recorded whenever the image is in use
	// Trusted says that the bitmap has every write since it was begun. One
	// that was not stored properly, or is of an unknown kind, has not.
	Trusted bool `json:"trusted"`
}

// A File is what an Image reads from: an *os.File, or a fake. Reads at or
// behind its end give io.EOF.
type File interface {
	io.ReaderAt
	io.Closer
	// Bytes is the file's length when it was opened.
	Bytes() int64
	// Name is for messages; it is never opened again.
	Name() string
}

// A Resolver finds the further files that an image's header names: extents of
// a VMDK, parents, data files. It decides which names it allows; the name
// comes from the image and must be taken for hostile. It returns
// ErrNotAllowed, wrapped, for a name that it does not open.
type Resolver interface {
	Resolve(name string) (File, error)
}

// ErrNotAllowed says that an image names another file and that its caller
// allowed no such file to be opened.
var ErrNotAllowed = errors.New("the image names a file that may not be opened")

// None is the Resolver that allows nothing.
var None Resolver = none{}

type none struct{}

func (none) Resolve(name string) (File, error) {
	return nil, fmt.Errorf("%q: %w", name, ErrNotAllowed)
}

// An Output is what a Writer that makes one file can write it to: a file on
// another machine, or an *os.File. It is new or its content of no use. WriteAt
// comes from several goroutines at once; what is never written is zeros.
type Output interface {
	io.WriterAt
	io.Closer
	// Truncate makes the file size bytes long, after or before all writes.
	Truncate(size int64) error
	// Sync returns once what was written is durable.
	Sync() error
}

// CreateOptions say what image to write. Zero values choose each format's
// usual setting.
type CreateOptions struct {
	VirtualBytes int64
	Variant      string // "dynamic", "fixed"; "monolithicSparse", "monolithicFlat", "streamOptimized"
	BlockBytes   int64
	Compression  string // "", "zlib" or "zstd", where the format has it
	Level        int    // of Compression; 0 for its default
	SectorBytes  int    // the guest's sector, 512 or 4096, where the format knows it; 0 for 512

	// Parent makes a layer over the image of that name, which is written into
	// the header and not opened. Ranges that are never written are then the
	// parent's, and zeros that are written hide it.
	Parent       string
	ParentFormat Format
	// ParentInfo is what the parent says of itself, for formats whose layers
	// know it by more than a name.
	ParentInfo *Info
}

// A Writer makes one new image. Bytes that are never written read as zeros and
// take no room.
//
// WriteAt takes ranges in any order and from several goroutines at once, each
// byte at most once, with off and len(p) multiples of Unit (the last range may
// end at the virtual size). A Writer whose Ordered is true takes ascending
// offsets from one goroutine only.
//
// Nothing that WriteAt did is an image until Finish returned nil: Finish
// writes the metadata, with whatever makes the file valid last, and syncs.
// Close releases the files without finishing; after Finish it does nothing.
type Writer interface {
	io.WriterAt
	Unit() int64
	Ordered() bool
	Finish() error
	Close() error
}
