// Package qcow2 reads and writes qcow2 images, versions 2 and 3.
//
// The virtual disk is cut into clusters. A two-level table maps each to a
// place in the file: the L1 table holds the offsets of L2 tables, those hold
// the offsets of clusters, all big-endian. What no table names is the backing
// file's, or zero where there is none. Refcounts, of which reading needs none,
// count how often each cluster of the file is used.
//
// Files come from strangers. Nothing is read into memory whole: tables are
// paged in as reads need them, and every size is compared with the file's
// before it is believed.
package qcow2

import (
	"context"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// Image is a qcow2 image, opened read-only.
type Image struct {
	file   image.File // metadata, and clusters unless there is a data file
	data   image.File // clusters; the same as file if none is external
	noData error      // why there is no data, where only the metadata were asked for

	sparseOnce sync.Once
	isSparse   bool // see sparse
	parent     image.Image

	header    header
	snapshots []Snapshot
	bitmaps   []Bitmap
	warnings  []string

	present state // the state of the disk when the image was last written
	active  state // what ReadAt and Extents show: the present state or a snapshot
	pages   *layer.Pages
	decoded *cache[uint64, []byte]
	inflate inflater
}

var _ image.Recorder = (*Image)(nil)

// A state is one that the disk has or had: the present one, or an internal snapshot.
type state struct {
	size      int64 // of the virtual disk in bytes
	l1        int64 // offset in the file
	l1Entries int64
}

// Open reads the header of f and opens what it names through o. The Image
// owns f once Open has returned no error.
func Open(f image.File, o image.OpenOptions) (*Image, error) {
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	img := &Image{file: f, data: f, header: *h}
	img.pages = layer.NewPages(f.Name(), zeroEnd{f}, img.fileLimit())
	img.decoded = newCache[uint64, []byte](max(4, int(decodedBytes>>h.clusterBits)))
	img.inflate = newInflater(h)
	if img.present, err = img.checkState(state{h.size, h.l1Offset, int64(h.l1Entries)}, "L1 table"); err != nil {
		return nil, err
	}
	img.active = img.present
	if err := img.readSnapshots(); err != nil {
		if o.Snapshot != "" {
			return nil, err
		}
		// Damage there does not touch the present state.
		img.warnings = append(img.warnings, fmt.Sprintf("internal snapshots cannot be listed: %v", err))
	}
	if o.Snapshot != "" {
		if img.active, err = img.findSnapshot(o.Snapshot); err != nil {
			return nil, err
		}
	}
	if err := img.readBitmaps(); err != nil {
		img.warnings = append(img.warnings, fmt.Sprintf("persistent bitmaps cannot be listed: %v", err))
	}
	if h.incompatible&incompatDirty != 0 {
		img.warnings = append(img.warnings, "the image was not closed properly; its refcounts may be wrong, which reading does not need")
	}
	if h.incompatible&incompatCorrupt != 0 {
		img.warnings = append(img.warnings, "the image is marked corrupt: QEMU found its tables wrong, and what is read may be too")
	}
	if err := img.openOthers(o); err != nil {
		return nil, err
	}
	return img, nil
}

// openOthers opens the data file and the parent.
func (img *Image) openOthers(o image.OpenOptions) error {
	h := &img.header
	if h.incompatible&incompatDataFile != 0 {
		f, err := img.resolveData(o.Resolver)
		switch {
		case err == nil:
			img.data = f
		case o.OnlyTop:
			// The tables and names are still good to look at.
			img.data, img.noData = nil, err
			img.warnings = append(img.warnings, fmt.Sprintf("the data file %q was not opened", h.dataFile))
		default:
			return err
		}
	}
	if h.backing == "" || o.OnlyTop {
		return nil
	}
	err := img.openParent(o)
	if err != nil && img.data != img.file {
		img.data.Close()
	}
	return err
}

// resolveData opens the external data file.
func (img *Image) resolveData(r image.Resolver) (image.File, error) {
	if r == nil {
		r = image.None
	}
	name := img.header.dataFile
	if err := plainName(name); err != nil {
		return nil, fmt.Errorf("%s: data file %w", img.file.Name(), err)
	}
	f, err := r.Resolve(name)
	if err != nil {
		return nil, fmt.Errorf("%s: data file: %w", img.file.Name(), err)
	}
	return f, nil
}

func (img *Image) openParent(o image.OpenOptions) error {
	h := &img.header
	name := img.file.Name()
	if err := plainName(h.backing); err != nil {
		return fmt.Errorf("%s: backing file %w", name, err)
	}
	format, err := parentFormat(h.backingFormat)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if o.Parent == nil {
		return fmt.Errorf("%s: backing file %q: %w", name, h.backing, image.ErrNotAllowed)
	}
	if img.parent, err = o.Parent(h.backing, format); err != nil {
		return fmt.Errorf("%s: backing file: %w", name, err)
	}
	return nil
}

// checkState says whether a state's L1 table covers its disk and lies in the
// file.
func (img *Image) checkState(l state, what string) (state, error) {
	h := &img.header
	perTable := h.clustersPerL2() << h.clusterBits // bytes of the disk that an L2 table maps
	need := l.size / perTable
	if l.size%perTable != 0 {
		need++
	}
	switch {
	case l.size < 0:
		return l, img.corrupt(24, "virtual size %d", uint64(l.size))
	case l.l1Entries < need:
		return l, img.corrupt(l.l1, "%s has %d entries, a disk of %d bytes needs %d", what, l.l1Entries, l.size, need)
	case l.l1Entries > maxL1Bytes/8:
		return l, img.corrupt(l.l1, "%s has %d entries", what, l.l1Entries)
	case l.l1Entries > 0 && (l.l1 <= 0 || l.l1%h.clusterBytes() != 0):
		return l, img.corrupt(l.l1, "%s is not at a cluster", what)
	case l.l1Entries > 0 && l.l1 > img.fileLimit()-need*8:
		return l, img.corrupt(l.l1, "%s of %d entries does not fit into a file of %d bytes", what, l.l1Entries, img.file.Bytes())
	}
	return l, nil
}

// Size is the virtual size in bytes.
func (img *Image) Size() int64 { return img.active.size }

// Close closes the file, the data file and the parent.
func (img *Image) Close() error {
	err := img.file.Close()
	if img.data != img.file && img.data != nil {
		if e := img.data.Close(); err == nil {
			err = e
		}
	}
	if img.parent != nil {
		if e := img.parent.Close(); err == nil {
			err = e
		}
	}
	return err
}

// ReadAt reads the virtual disk.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	size := img.active.size
	if off < 0 {
		return 0, fmt.Errorf("%s: read at negative offset %d", img.file.Name(), off)
	}
	if off >= size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > size-off {
		p, end = p[:size-off], io.EOF
	}
	n := 0
	w := walker{img: img, l1: img.view, l2: img.view}
	for r, err := range w.runs(context.Background(), img.active, extent.Extent{Off: off, Len: int64(len(p))}) {
		if err != nil {
			return n, err
		}
		if err := img.readRun(p[r.Off-off:][:r.Len], r); err != nil {
			return n, err
		}
		n += int(r.Len)
	}
	return n, end
}

// readRun fills p, which is as long as r.
func (img *Image) readRun(p []byte, r run) error {
	switch {
	case r.kind == image.Zero:
		clear(p)
		return nil
	case r.kind == image.Absent:
		return img.readParent(p, r.Off)
	case r.compressed:
		return img.readCompressed(p, r)
	}
	switch {
	case img.noData != nil:
		return img.noData
	case img.data != img.file:
		return img.readData(p, r.host)
	}
	return img.readFile(p, r.host)
}

func (img *Image) readParent(p []byte, off int64) error {
	if img.parent == nil || off >= img.parent.Size() {
		clear(p)
		return nil
	}
	if n := img.parent.Size() - off; n < int64(len(p)) {
		clear(p[n:])
		p = p[:n]
	}
	if n, err := img.parent.ReadAt(p, off); n < len(p) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}

// fileLimit is where the file's last cluster ends. A file may stop inside it;
// what is missing there reads as zeros, and what lies behind is damage.
func (img *Image) fileLimit() int64 {
	c := img.header.clusterBytes()
	n := img.file.Bytes()
	if n > math.MaxInt64-c {
		return math.MaxInt64
	}
	return (n + c - 1) / c * c
}

// readFile fills p from the image's own file.
func (img *Image) readFile(p []byte, off int64) error {
	if off < 0 || off > img.fileLimit()-int64(len(p)) {
		return img.corrupt(off, "%d bytes lie behind the end of a file of %d", len(p), img.file.Bytes())
	}
	return readZeroEnd(img.file, p, off)
}

// readData fills p from the external data file. One that is a raw disk may
// stop early, as raw disks with a hole at the end do.
func (img *Image) readData(p []byte, off int64) error {
	c := img.header.clusterBytes()
	limit := (img.data.Bytes() + c - 1) / c * c
	if img.header.autoclear&autoclearRawData == 0 && (off < 0 || off > limit-int64(len(p))) {
		return fault.Corrupt(img.data.Name(), off, "%d bytes lie behind the end of a file of %d", len(p), img.data.Bytes())
	}
	return readZeroEnd(img.data, p, off)
}

// readZeroEnd fills p from f and clears what lies behind f's end.
func readZeroEnd(f image.File, p []byte, off int64) error {
	have := min(max(f.Bytes()-off, 0), int64(len(p)))
	clear(p[have:])
	if have == 0 {
		return nil
	}
	n, err := f.ReadAt(p[:have], off)
	switch {
	case int64(n) == have:
		return nil
	case err == io.EOF || err == nil:
		return fault.Corrupt(f.Name(), off+int64(n), "the file shrank from %d bytes while it was read", f.Bytes())
	}
	return fmt.Errorf("%s: %w", f.Name(), err)
}

func (img *Image) corrupt(off int64, format string, args ...any) error {
	return fault.Corrupt(img.file.Name(), off, format, args...)
}
