package vmdk

import (
	"errors"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/raw"
)

// A flatWriter writes a disk of plain bytes: one raw image or, of a split
// disk, several, and the descriptor that makes a VMDK of them.
type flatWriter struct {
	pieces   []*raw.Writer
	piece    int64 // bytes of each but the last
	files    Files
	text     string
	size     int64
	capacity int64
	finished bool
	closed   bool
}

func newFlatWriter(fs Files, o image.CreateOptions) (*flatWriter, error) {
	capacity := ceilDiv(o.VirtualBytes, sector) * sector
	w := &flatWriter{files: fs, size: o.VirtualBytes, capacity: capacity, piece: max(capacity, 1)}
	kind := "FLAT"
	name := func(int) string { return FlatName(fs.Name) }
	switch o.Variant {
	case VMFS:
		kind = "VMFS"
	case SplitFlat:
		if capacity > splitTooBig {
			return nil, tooManyPieces(capacity)
		}
		w.piece = splitBytes
		name = func(i int) string { return SplitName(fs.Name, i, true) }
	}
	d := description{variant: o.Variant, capacity: capacity, parent: parentLink{cid: noParent}, thin: o.Variant == VMFS}
	for i, off := 0, int64(0); off < capacity || i == 0; i, off = i+1, off+w.piece {
		f, err := fs.Extra(name(i))
		if err != nil {
			return nil, err
		}
		bytes := min(w.piece, capacity-off)
		r, err := raw.NewWriter(f, image.CreateOptions{VirtualBytes: bytes})
		if err != nil {
			return nil, err
		}
		w.pieces = append(w.pieces, r)
		d.extents = append(d.extents, extentDescription("RW", bytes, kind, name(i)))
	}
	w.text = d.text()
	return w, nil
}

func tooManyPieces(capacity int64) error {
	return fmt.Errorf("a VMDK of %d bytes in pieces of 2 GiB, more than %d files: %w; %s holds it", capacity, maxSplit, fault.ErrUnsupported, MonolithicFlat)
}

func (w *flatWriter) Unit() int64   { return 1 }
func (w *flatWriter) Ordered() bool { return false }

// Warnings says what the disk has that was not asked for.
func (w *flatWriter) Warnings() []string { return grown(w.size, w.capacity, wholeSectors) }

func (w *flatWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), w.size, 1); err != nil {
		return 0, err
	}
	return inPieces(p, off, w.piece, func(i int64, p []byte, off int64) (int, error) { return w.pieces[i].WriteAt(p, off) })
}

// inPieces cuts a range of a split disk where its extents meet.
func inPieces(p []byte, off, piece int64, write func(i int64, p []byte, off int64) (int, error)) (int, error) {
	for done := 0; ; {
		at := off + int64(done)
		n := int(min(int64(len(p)-done), piece-at%piece))
		if n == 0 {
			return done, nil
		}
		m, err := write(at/piece, p[done:done+n], at%piece)
		if done += m; err != nil {
			return done, err
		}
	}
}

// Finish makes the bytes durable and then writes the descriptor.
func (w *flatWriter) Finish() error {
	if w.finished {
		return nil
	}
	for _, r := range w.pieces {
		if err := r.Finish(); err != nil {
			return err
		}
	}
	if err := writeDescriptor(w.files, w.text); err != nil {
		return err
	}
	w.finished, w.closed = true, true
	return nil
}

// writeDescriptor writes a descriptor file, which is the last of a disk to
// become durable, and closes it.
func writeDescriptor(fs Files, text string) error {
	if _, err := fs.Disk.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	if err := fs.Disk.Sync(); err != nil {
		return err
	}
	if err := fs.Disk.Close(); err != nil {
		return err
	}
	return image.SyncDir(fs.Disk.Name())
}

// Close closes all files.
func (w *flatWriter) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	errs := []error{w.files.Disk.Close()}
	for _, r := range w.pieces {
		errs = append(errs, r.Close())
	}
	return errors.Join(errs...)
}
