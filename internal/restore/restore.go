// Package restore turns disks of restore points into image files, new virtual
// machines, or the old content of an existing image.
//
// What it makes appears whole, under its own name, once it is durable; until
// then it lies beside, in a directory that the next restore of the same target
// takes away if we were killed. Restoring in place is the exception, and
// leaves a file beside the image for as long as the image is half-done.
package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// A Source is a disk of a restore point, as *repo.Disk has it: what Fetch
// hands out was verified by its chunk.ID.
type Source interface {
	Size() int64
	ChunkBytes() int64
	Data(ctx context.Context, within extent.Extent) (extent.Set, error)
	Chunk(ctx context.Context, index int64) (id chunk.ID, hole bool, err error)
	Fetch(ctx context.Context, within extent.Extent, o repo.FetchOptions, fn func(off int64, data []byte) error) error
	Close() error
}

// A Repository is what a restore needs of one; Of makes it.
type Repository interface {
	OpenDisk(ctx context.Context, id point.ManifestID) (Source, error)
	ReadBlob(ctx context.Context, b point.Blob) ([]byte, error)
	// ChunkID names the chunk that holds plain.
	ChunkID(plain []byte) chunk.ID
}

// Of makes a Repository of r.
func Of(r *repo.Repository) Repository { return of{r} }

type of struct{ *repo.Repository }

func (r of) OpenDisk(ctx context.Context, id point.ManifestID) (Source, error) {
	d, err := r.Repository.OpenDisk(ctx, id)
	if err != nil {
		return nil, err // not d: a nil *repo.Disk is no nil Source
	}
	return d, nil
}

// Options say how to restore.
type Options struct {
	Format  image.Format // "" to go by the target's extension, or by the disk's own format
	Variant string       // of the format, "" for its usual one
	// Compression of the image, where its format has it: "", "zlib", "zstd".
	Compression string
	Force       bool // replace an existing target
	// Sectors is how many bytes a sector of a disk has, 512 where it says
	// nothing. A guest finds nothing on a disk whose sectors have another size.
	// Of image formats only VHDX holds it.
	Sectors map[vm.DiskID]int
	Workers int // reading, decrypting and writing; 0 for two more than there are processors
	// Progress, if not nil, is told of bytes of the disks, from several
	// goroutines. The total may grow.
	Progress func(doneBytes, totalBytes int64)

	create func(path string, f image.Format, o image.CreateOptions) (image.Writer, error)
	free   func(dir string) (int64, bool)
}

// workers: while one waits for the disk that it reads and one for the disk that
// it writes, the others keep all processors busy.
func (o Options) workers() int {
	if o.Workers > 0 {
		return o.Workers
	}
	return runtime.GOMAXPROCS(0) + 2
}

// A Result says what a restore of one disk did. All sizes are bytes of the
// disk, not of the repository.
type Result struct {
	Disk   vm.DiskID    `json:"disk,omitempty"`
	Target string       `json:"target"`
	Format image.Format `json:"format"`
	// SectorBytes is what the image says of the guest's sectors, 0 for nothing.
	SectorBytes int `json:"sector_bytes,omitempty"`

	SizeBytes int64 `json:"size_bytes"`
	// ReadBytes were read from the repository, and WrittenBytes of them went
	// to the target; zeros and holes are in neither.
	ReadBytes    int64 `json:"read_bytes"`
	WrittenBytes int64 `json:"written_bytes"`
	// Of a restore in place: ComparedBytes were read from the target,
	// SkippedBytes were right already, ZeroedBytes were not but are zero now.
	ComparedBytes int64         `json:"compared_bytes,omitempty"`
	SkippedBytes  int64         `json:"skipped_bytes,omitempty"`
	ZeroedBytes   int64         `json:"zeroed_bytes,omitempty"`
	Duration      time.Duration `json:"duration_ns"`
}

// FormatOf goes by the extension of path; it is "" for one that says nothing.
func FormatOf(path string) image.Format {
	f, _ := open.FormatByName(path)
	return f
}

// Extension is the usual one of files of format f, with its dot. The formats
// are named after it.
func Extension(f image.Format) string { return "." + string(f) }

// Disk restores src, which is the disk id, to a new image at target.
//
// Errors: fault.ErrExists for a target that is there, unless o.Force;
// fault.ErrLocked for one that is in use or being restored to;
// fault.ErrCorrupt, fault.ErrNoSpace. After an error the target is as it was.
func Disk(ctx context.Context, id vm.DiskID, src Source, target string, o Options) (Result, error) {
	start := time.Now()
	f := o.Format
	if f == "" {
		if f = FormatOf(target); f == "" {
			return Result{}, fmt.Errorf("%s: which format? its extension does not tell", target)
		}
	}
	st, err := stageFile(target, o.Force)
	if err != nil {
		return Result{}, err
	}
	defer st.discard()
	need, err := dataBytes(ctx, src)
	if err != nil {
		return Result{}, err
	}
	if err := o.checkSpace(st.dir, f, need); err != nil {
		return Result{}, err
	}
	p := newProgress(o.Progress, need)
	res, err := o.write(ctx, id, src, filepath.Join(st.dir, filepath.Base(target)), f, need, p, st.collides)
	if err == nil {
		err = st.publish(filepath.Base(target))
	}
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", target, sized(err, need))
	}
	os.Remove(Marker(target)) // what was half restored in place is replaced
	res.Target, res.Duration = target, time.Since(start)
	return res, nil
}

func dataBytes(ctx context.Context, src Source) (int64, error) {
	set, err := src.Data(ctx, extent.Extent{Len: src.Size()})
	if err != nil {
		return 0, err
	}
	return set.Bytes(), nil
}

// checkSpace refuses what can't fit. Chunks that are partly zero take less
// room than they count here, so an eighth is allowed for them; if that was too
// much, the file system says so later and nothing is lost but time.
func (o Options) checkSpace(dir string, f image.Format, needBytes int64) error {
	if o.Compression != "" || f == image.VMDK && o.Variant == "streamOptimized" {
		return nil // who knows
	}
	ask := o.free
	if ask == nil {
		ask = freeBytes
	}
	free, known := ask(dir)
	if !known || free >= needBytes-needBytes/8 {
		return nil
	}
	return fmt.Errorf("%w: the restore needs %d bytes and %s has %d free", fault.ErrNoSpace, needBytes, filepath.Dir(dir), free)
}

// sized adds to the error that a disk is full how much was to be written.
func sized(err error, needBytes int64) error {
	if errors.Is(err, fault.ErrNoSpace) {
		return fmt.Errorf("%w; the restore needs up to %d bytes", err, needBytes)
	}
	return err
}

// A progress adds up what all the disks of a restore have done.
type progress struct {
	tell        func(done, total int64)
	done, total atomic.Int64
}

func newProgress(tell func(done, total int64), total int64) *progress {
	p := &progress{tell: tell}
	p.more(total)
	return p
}

func (p *progress) more(n int64) {
	p.total.Add(n)
	p.add(0)
}

func (p *progress) add(n int64) {
	done := p.done.Add(n)
	if p.tell != nil {
		p.tell(done, p.total.Load())
	}
}

// classify puts what the system says of full and unwritable disks into the
// classes that every layer knows.
func classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fault.ErrNoSpace), errors.Is(err, fault.ErrReadOnly):
		return err
	case errors.Is(err, syscall.ENOSPC), isQuota(err):
		return fmt.Errorf("%w: %w", fault.ErrNoSpace, err)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: %w", fault.ErrReadOnly, err)
	}
	return err
}
