package vmdk

import (
	"errors"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/raw"
)

// A flatWriter writes a monolithicFlat disk: a raw image, and the descriptor
// that makes a VMDK of it.
type flatWriter struct {
	*raw.Writer
	files    Files
	capacity int64
	finished bool
	closed   bool
}

func newFlatWriter(fs Files, o image.CreateOptions) (*flatWriter, error) {
	if err := plainOnly(o); err != nil {
		return nil, err
	}
	if fs.Flat == nil {
		return nil, errors.New("a monolithicFlat disk without a file for its bytes")
	}
	capacity := ceilDiv(o.VirtualBytes, sector) * sector
	r, err := raw.NewWriter(fs.Flat, image.CreateOptions{VirtualBytes: capacity})
	if err != nil {
		return nil, err
	}
	return &flatWriter{Writer: r, files: fs, capacity: capacity}, nil
}

// Finish makes the bytes durable and then writes the descriptor.
func (w *flatWriter) Finish() error {
	if w.finished {
		return nil
	}
	if err := w.Writer.Finish(); err != nil {
		return err
	}
	text := newDescriptor(MonolithicFlat, w.capacity, "RW", `FLAT "`+w.files.FlatName+`" 0`)
	if _, err := w.files.Disk.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	if err := w.files.Disk.Sync(); err != nil {
		return err
	}
	w.finished, w.closed = true, true
	if err := w.files.Disk.Close(); err != nil {
		return err
	}
	return image.SyncDir(w.files.Disk.Name())
}

// Close closes both files.
func (w *flatWriter) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	return errors.Join(w.Writer.Close(), w.files.Disk.Close())
}
