package raw

import (
	"fmt"
	"io"
	"os"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// grain is the length in bytes of a run of zeros that is worth a hole.
const grain = 64 << 10

// Writer writes a raw image, from any number of goroutines in any order.
type Writer struct {
	file   *os.File
	size   int64
	sparse bool // what is not written reads as zeros
	early  *image.Writeback
	sync   func() error
	closed bool
}

var _ image.Writer = (*Writer)(nil)

// Create makes the file path, which must not exist, with o.VirtualBytes.
// Finish also syncs the directory, so that the file's name survives a power
// cut with its content.
func Create(path string, o image.CreateOptions) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	w, err := NewWriter(f, o)
	if err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	w.sync = func() error { return image.SyncDir(path) }
	return w, nil
}

// NewWriter writes the image to f, which belongs to the Writer once there is
// one. An empty regular file gets its length and keeps holes for what is zero;
// into anything else, a block device for example, zeros are written like all
// other bytes, but only where WriteAt is told to.
func NewWriter(f *os.File, o image.CreateOptions) (*Writer, error) {
	if o.VirtualBytes < 0 {
		return nil, fmt.Errorf("virtual size of %d bytes", o.VirtualBytes)
	}
	if o.Compression != "" {
		return nil, fmt.Errorf("raw images have no compression, so not %q either", o.Compression)
	}
	if o.Parent != "" {
		return nil, fmt.Errorf("raw images have no parent, so not %q either", o.Parent)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	w := &Writer{file: f, size: o.VirtualBytes, early: image.NewWriteback(f)}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		w.sparse = info.Size() == 0
		if err := f.Truncate(o.VirtualBytes); err != nil {
			return nil, err
		}
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		if end, err := f.Seek(0, io.SeekEnd); err == nil && end < o.VirtualBytes {
			return nil, fmt.Errorf("%s holds %d bytes, the disk needs %d: %w", f.Name(), end, o.VirtualBytes, fault.ErrNoSpace)
		}
	}
	return w, nil
}

// Unit is 1: any range will do.
func (w *Writer) Unit() int64 { return 1 }

// Ordered is false.
func (w *Writer) Ordered() bool { return false }

// WriteAt writes p, leaving out its longer runs of zeros where the file has
// holes for them.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > w.size || int64(len(p)) > w.size-off {
		return 0, fmt.Errorf("write of %d bytes at %d to a disk of %d", len(p), off, w.size)
	}
	if !w.sparse {
		return w.write(p, off)
	}
	// start is where the bytes begin that are not yet written; pieces end at
	// multiples of grain in the file, where it can have a hole.
	start := 0
	for at := 0; at < len(p); {
		end := min(at+int(grain-(off+int64(at))%grain), len(p))
		if chunk.IsZero(p[at:end]) {
			if n, err := w.write(p[start:at], off+int64(start)); err != nil {
				return start + n, err
			}
			start = end
		}
		at = end
	}
	n, err := w.write(p[start:], off+int64(start))
	return start + n, err
}

func (w *Writer) write(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := w.file.WriteAt(p, off)
	w.early.Grown(off + int64(n))
	return n, err
}

// Finish makes the bytes durable and closes the file.
func (w *Writer) Finish() error {
	if err := w.file.Sync(); err != nil {
		return err
	}
	w.closed = true
	if err := w.file.Close(); err != nil {
		return err
	}
	if w.sync != nil {
		return w.sync()
	}
	return nil
}

// Close closes the file and leaves it where it is.
func (w *Writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	return w.file.Close()
}
