package vmdk

import (
	"errors"
	"fmt"

	"github.com/backstay/backstay/internal/image"
)

const descriptorRoom = descriptorSectors * sector

// A sparseWriter writes a monolithicSparse disk, or a layer over a parent: one
// sparse extent with the descriptor in it.
type sparseWriter struct {
	extent *sparseExtent
	text   string
	size   int64 // bytes that may be written
	closed bool
}

func newSparseWriter(fs Files, o image.CreateOptions, parent parentLink) (*sparseWriter, error) {
	grain, err := grainSize(o.BlockBytes)
	if err != nil {
		return nil, err
	}
	capacity := ceilDiv(o.VirtualBytes, sector) * sector
	text := description{
		variant: MonolithicSparse, capacity: capacity, parent: parent,
		extents: []string{extentDescription("RW", capacity, "SPARSE", fs.Name)},
	}.text()
	if len(text) > descriptorRoom {
		return nil, fmt.Errorf("the names %q and %q are too long for a descriptor", fs.Name, parent.hint)
	}
	e, err := newSparseExtent(fs.Disk, capacity, grain, descriptorRoom)
	if err != nil {
		return nil, err
	}
	e.layer = parent.cid != noParent
	return &sparseWriter{extent: e, text: text, size: o.VirtualBytes}, nil
}

func (w *sparseWriter) Unit() int64   { return w.extent.grain }
func (w *sparseWriter) Ordered() bool { return false }

// Warnings says what the disk has that was not asked for.
func (w *sparseWriter) Warnings() []string { return grown(w.size, w.extent.capacity, wholeSectors) }

// WriteAt writes the grains of p. Those that are zero take no room.
func (w *sparseWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), w.size, w.extent.grain); err != nil {
		return 0, err
	}
	return w.extent.write(p, off)
}

// Finish makes the file a VMDK.
func (w *sparseWriter) Finish() error {
	if w.closed {
		return nil
	}
	if err := w.extent.finish(w.text); err != nil {
		return err
	}
	w.closed = true
	if err := w.extent.file.Close(); err != nil {
		return err
	}
	return image.SyncDir(w.extent.file.Name())
}

// Close closes the file, which is no VMDK unless Finish returned nil.
func (w *sparseWriter) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	return w.extent.file.Close()
}

// A splitWriter writes a twoGbMaxExtentSparse disk: sparse extents without
// descriptors, and the descriptor in a file of its own.
type splitWriter struct {
	extents  []*sparseExtent
	files    Files
	text     string
	size     int64
	capacity int64
	closed   bool
}

func newSplitWriter(fs Files, o image.CreateOptions) (*splitWriter, error) {
	grain, err := grainSize(o.BlockBytes)
	if err != nil {
		return nil, err
	}
	capacity := ceilDiv(o.VirtualBytes, sector) * sector
	if capacity > splitTooBig {
		return nil, tooManyPieces(capacity)
	}
	w := &splitWriter{files: fs, size: o.VirtualBytes, capacity: capacity}
	d := description{variant: SplitSparse, capacity: capacity, parent: parentLink{cid: noParent}}
	pieces := max(ceilDiv(capacity, splitBytes), 1)
	for i := range pieces {
		name := SplitName(fs.Name, int(i), false)
		f, err := fs.Extra(name)
		if err != nil {
			return nil, err
		}
		bytes := min(splitBytes, capacity-i*splitBytes)
		e, err := newSparseExtent(f, bytes, grain, 0)
		if err != nil {
			return nil, err
		}
		e.keep = int(max(maxTablesKept/pieces, 8))
		w.extents = append(w.extents, e)
		d.extents = append(d.extents, extentDescription("RW", bytes, "SPARSE", name))
	}
	w.text = d.text()
	return w, nil
}

func (w *splitWriter) Unit() int64   { return w.extents[0].grain }
func (w *splitWriter) Ordered() bool { return false }

// Warnings says what the disk has that was not asked for.
func (w *splitWriter) Warnings() []string { return grown(w.size, w.capacity, wholeSectors) }

// WriteAt writes the grains of p that are not zero.
func (w *splitWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), w.size, w.Unit()); err != nil {
		return 0, err
	}
	return inPieces(p, off, splitBytes, func(i int64, p []byte, off int64) (int, error) { return w.extents[i].write(p, off) })
}

// Finish makes the extents whole and durable and then writes the descriptor.
func (w *splitWriter) Finish() error {
	if w.closed {
		return nil
	}
	for _, e := range w.extents {
		if err := e.finish(""); err != nil {
			return err
		}
	}
	if err := writeDescriptor(w.files, w.text); err != nil {
		return err
	}
	w.closed = true
	var errs []error
	for _, e := range w.extents {
		errs = append(errs, e.file.Close())
	}
	return errors.Join(errs...)
}

// Close closes all files.
func (w *splitWriter) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	errs := []error{w.files.Disk.Close()}
	for _, e := range w.extents {
		errs = append(errs, e.file.Close())
	}
	return errors.Join(errs...)
}
