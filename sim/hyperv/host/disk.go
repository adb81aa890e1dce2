package host

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
)

// A disk is what a VM sees behind one slot: a chain of files of which the last
// is written to, and what is known of all that was ever written.
type disk struct {
	id     string // InstanceID of its allocation, without "Microsoft:" and the configuration's id
	bytes  int64
	layers []*layer
	log    []write
	tracks map[string]*track // by RCT id
	under  []string          // the paths of parents that layers[0] had already, nearest first
	// baseline is what the disk held when it was attached, nil for nothing;
	// unknown says that it was too much to keep.
	baseline *os.File
	unknown  bool
}

// A layer is one file of a chain.
type layer struct {
	path string // as the host names it
	file diskFile
}

// A diskFile is a virtual disk that a running VM writes to.
type diskFile interface {
	diskBytes() int64
	sectorSize() int64
	// WriteAt writes whole sectors.
	WriteAt(p []byte, off int64) error
	// seal gives the identity of the data as it is now, by which children know
	// their parent.
	seal() (data [16]byte, err error)
	// relink makes the file a child of the parent of that path and identity.
	relink(parent string, data [16]byte) error
	// resize makes the disk larger.
	resize(bytes int64) error
	close() error
}

// isVHD says whether a file is of the older format.
func isVHD(path string) bool {
	path = strings.ToLower(path)
	return strings.HasSuffix(path, ".vhd") || strings.HasSuffix(path, ".avhd")
}

func openDiskFile(path string) (diskFile, error) {
	if isVHD(path) {
		return openLiveVHD(path)
	}
	return openLive(path)
}

// A write is what a guest did. Its bytes follow from the seed, so that a log of
// all of them stays small; seed 0 stands for zeros. data holds bytes that were
// given instead.
type write struct {
	off, n int64
	seed   uint64
	data   []byte
	// back stands for no write: the disk is again what it was when the log had
	// back-1 entries.
	back int
}

func (w write) bytes() []byte {
	if w.data != nil {
		return w.data
	}
	p := make([]byte, w.n)
	fill(p, w.seed)
	return p
}

// A track is what was written since a moment, in granules.
type track struct {
	bits []uint64
}

func (t *track) mark(off, n, granule int64) {
	for g := off / granule; g <= (off+n-1)/granule; g++ {
		t.bits[g/64] |= 1 << (g % 64)
	}
}

func (t *track) clone() *track { return &track{bits: slices.Clone(t.bits)} }

// ranges are the marked granules within a range, merged, at most that many, and
// how far they reach.
func (t *track) ranges(within extent.Extent, granule, disk int64, most int) (list []extent.Extent, processed int64) {
	for off := within.Off; off < within.End(); {
		g := off / granule
		word := t.bits[g/64] >> (g % 64)
		if word == 0 {
			off = min((g/64+1)*64*granule, within.End())
			continue
		}
		if skip := int64(bits.TrailingZeros64(word)); skip > 0 {
			off = min((g+skip)*granule, within.End())
			continue
		}
		end := min((g+1)*granule, within.End())
		if n := len(list); n > 0 && list[n-1].End() == off {
			list[n-1].Len += end - off
		} else if n == most {
			return list, off - within.Off
		} else {
			list = append(list, extent.Extent{Off: off, Len: end - off})
		}
		off = end
	}
	return list, within.Len
}

// fill makes the bytes of a write.
func fill(p []byte, seed uint64) {
	if seed == 0 {
		clear(p)
		return
	}
	for i := 0; i+8 <= len(p); i += 8 {
		seed += 0x9e3779b97f4a7c15
		z := (seed ^ seed>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(p[i:], z^z>>31)
	}
}

// createDisk makes a new, empty VHDX or VHD.
func (h *Host) createDisk(path string, bytes int64, fixed bool, sector int) error {
	file := h.local(path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	o := image.CreateOptions{VirtualBytes: bytes, BlockBytes: 32 * mib, SectorBytes: sector}
	if fixed {
		o = image.CreateOptions{VirtualBytes: bytes, Variant: "fixed", SectorBytes: sector}
	}
	return createImage(file, o)
}

// createImage makes an image of the format that its name has.
func createImage(file string, o image.CreateOptions) error {
	var w image.Writer
	var err error
	if isVHD(file) {
		if o.Variant != "fixed" {
			o.BlockBytes = 2 * mib
		}
		w, err = vhd.Create(file, o)
	} else {
		w, err = vhdx.Create(file, o)
	}
	if err != nil {
		return err
	}
	if err := w.Finish(); err != nil {
		w.Close()
		return err
	}
	return w.Close()
}

func (h *Host) openDisk(id, path string) (*disk, error) {
	f, err := openDiskFile(h.local(path))
	if err != nil {
		return nil, err
	}
	return &disk{id: id, bytes: f.diskBytes(), layers: []*layer{{path: path, file: f}}, tracks: map[string]*track{}}, nil
}

func (d *disk) top() *layer { return d.layers[len(d.layers)-1] }

// write does what the guest does.
func (d *disk) write(w write, granule int64) error {
	if err := d.top().file.WriteAt(w.bytes(), w.off); err != nil {
		return err
	}
	d.log = append(d.log, w)
	for _, t := range d.tracks {
		t.mark(w.off, w.n, granule)
	}
	return nil
}

// freeze ends writing to the last file and begins a new one over it.
func (h *Host) freeze(d *disk) error {
	parent := d.top()
	data, err := parent.file.seal()
	if err != nil {
		return err
	}
	base := d.layers[0].path
	ext, format := ".avhdx", image.VHDX
	if isVHD(base) {
		ext, format = ".avhd", image.VHD
	}
	path := base[:strings.LastIndexByte(base, '.')] + "_" + newGUID() + ext
	img, err := openLayer(h.local(parent.path))
	if err != nil {
		return err
	}
	info := img.Info()
	img.Close()
	name := parent.path[strings.LastIndexByte(parent.path, '\\')+1:]
	err = createImage(h.local(path), image.CreateOptions{VirtualBytes: d.bytes, BlockBytes: 2 * mib, SectorBytes: info.SectorBytes, Parent: name, ParentFormat: format, ParentInfo: &info})
	if err != nil {
		return err
	}
	f, err := openDiskFile(h.local(path))
	if err != nil {
		return err
	}
	if err := f.relink(parent.path, data); err != nil {
		return err
	}
	d.layers = append(d.layers, &layer{path: path, file: f})
	return nil
}

// A layerImage is one file of a chain, read alone.
type layerImage interface {
	image.Image
	Info() image.Info
}

func openLayer(path string) (layerImage, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	var img layerImage
	if isVHD(path) {
		img, err = vhd.OpenLayer(f)
	} else {
		img, err = vhdx.OpenLayer(f)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

// merge writes what layer n+1 holds into layer n and takes n+1 out of the chain.
func (h *Host) merge(d *disk, n int) error {
	into, from := d.layers[n], d.layers[n+1]
	img, err := openLayer(h.local(from.path))
	if err != nil {
		return err
	}
	defer img.Close()
	buf := make([]byte, mib)
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: d.bytes}) {
		if err != nil {
			return err
		}
		for off := e.Off; e.Kind != image.Absent && off < e.End(); {
			p := buf[:min(int64(len(buf)), e.End()-off)]
			if _, err := img.ReadAt(p, off); err != nil && err != io.EOF {
				return err
			}
			if err := into.file.WriteAt(p, off); err != nil {
				return err
			}
			off += int64(len(p))
		}
	}
	data, err := into.file.seal()
	if err != nil {
		return err
	}
	if n+2 < len(d.layers) {
		if err := d.layers[n+2].file.relink(into.path, data); err != nil {
			return err
		}
	}
	if err := from.file.close(); err != nil {
		return err
	}
	d.layers = slices.Delete(d.layers, n+1, n+2)
	return os.Remove(h.local(from.path))
}

// replay writes what a guest would see after the first n writes. It knows
// nothing of the files.
func (d *disk) replay(n int, w io.WriterAt) error {
	if d.unknown {
		return fmt.Errorf("the disk held more than %d bytes when it was attached: what it must hold is not known", int64(maxBaseline))
	}
	if d.baseline != nil {
		buf := make([]byte, mib)
		for off := int64(0); ; {
			n, err := d.baseline.ReadAt(buf, off)
			if n > 0 {
				if _, err := w.WriteAt(buf[:n], off); err != nil {
					return fmt.Errorf("replaying: %w", err)
				}
			}
			if off += int64(n); err == io.EOF {
				break
			}
			if err != nil {
				return fmt.Errorf("replaying: %w", err)
			}
		}
	}
	for _, wr := range d.history(n) {
		if _, err := w.WriteAt(wr.bytes(), wr.off); err != nil {
			return fmt.Errorf("replaying: %w", err)
		}
	}
	return nil
}

// whole widens data at off to sectors, with what the log says is around it.
func (d *disk) whole(off int64, data []byte) write {
	sector := d.top().file.sectorSize()
	from, to := off/sector*sector, (off+int64(len(data))+sector-1)/sector*sector
	w := write{off: from, n: to - from, data: make([]byte, to-from)}
	if d.baseline != nil {
		_, _ = d.baseline.ReadAt(w.data, from) // behind its end there are zeros
	}
	for _, old := range d.history(len(d.log)) {
		if old.off < to && old.off+old.n > from {
			at := max(old.off, from)
			copy(w.data[at-from:], old.bytes()[at-old.off:])
		}
	}
	copy(w.data[off-from:], data)
	return w
}
