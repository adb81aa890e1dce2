package layer

import (
	"fmt"
	"os"

	"github.com/backstay/backstay/internal/image"
)

// An Output is the one file that a Writer makes.
type Output struct {
	image.Output
	path   string // empty where the caller opened it
	closed bool
}

// Create makes the file path, which must not exist, for the image that start
// begins to write into it. If that fails there is no file.
func Create[W any](path string, o image.CreateOptions, start func(*Output, image.CreateOptions) (W, error)) (w W, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return w, err
	}
	out := &Output{Output: f, path: path}
	if w, err = start(out, o); err != nil {
		out.Discard()
	}
	return w, err
}

// Writeback is that of a local file, and nil for others.
func (o *Output) Writeback() *image.Writeback {
	if f, ok := o.Output.(*os.File); ok {
		return image.NewWriteback(f)
	}
	return nil
}

// Discard closes the file and removes it if Create made it.
func (o *Output) Discard() {
	o.Close()
	if o.path != "" {
		os.Remove(o.path)
	}
}

// Finish makes the file durable and closes it. Of a file that Create made, it
// also syncs the directory, so that the name survives a power cut with the
// content.
func (o *Output) Finish() error {
	if err := o.Sync(); err != nil {
		return err
	}
	o.closed = true
	if err := o.Output.Close(); err != nil {
		return err
	}
	if o.path == "" {
		return nil
	}
	return image.SyncDir(o.path)
}

// Close closes the file and leaves it where it is; after Finish it does
// nothing.
func (o *Output) Close() error {
	if o.closed {
		return nil
	}
	o.closed = true
	return o.Output.Close()
}

// InDisk says what is wrong with a range of n bytes at off for a Writer that
// takes ranges of whole units up to limit.
func InDisk(off, n, limit, unit int64) error {
	if off < 0 || off > limit || n > limit-off {
		return fmt.Errorf("write of %d bytes at %d to a disk of %d", n, off, limit)
	}
	if off%unit != 0 || n%unit != 0 && off+n != limit {
		return fmt.Errorf("write of %d bytes at %d to sectors of %d", n, off, unit)
	}
	return nil
}
