package vhd

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// MaxBytes is the largest virtual disk that Windows takes as VHD.
const MaxBytes = 2040 << 30

const (
	usualBlock  = 2 << 20
	tableOffset = footerBytes + headerBytes
	dataAlign   = 4096 // of every block's data, so that 4K sectors below are not torn
)

// Who reads a VHD by its geometry decides that by the creator. Under a name of
// our own qemu before 10 would cut the disk to whole cylinders, so the files
// say what Windows 10 says.
const (
	creator        = "win "
	creatorVersion = 0x000a0000
	creatorOS      = "Wi2k"
)

// Writer writes a fixed, dynamic or differencing VHD, from any number of
// goroutines in any order.
type Writer struct {
	file  *layer.Output
	early *image.Writeback

	limit  int64 // what WriteAt takes: the virtual size as it was asked for
	footer footer
	header header // unless fixed
	bitmap []byte // of a block that is whole

	locator  []byte // of a differencing disk: the parent's name
	warnings []string

	mu     sync.Mutex
	table  []uint32                 // block to sector, absent for none
	sparse map[int64]*layer.Sectors // of a differencing disk, the blocks that were written to
	end    int64                    // of the blocks
}

var _ image.Writer = (*Writer)(nil)

// Create makes the file path, which must not exist. Finish also syncs the
// directory, so that the file's name survives a power cut with its content.
func Create(path string, o image.CreateOptions) (*Writer, error) {
	return layer.Create(path, o, newWriter)
}

// NewWriter writes the image to f, a regular file whose content is dropped and
// which belongs to the Writer once there is one. The variant is "dynamic", the
// default, or "fixed"; with a parent it is differencing. A VHD has whole
// sectors: the disk is o.VirtualBytes rounded up to 512, and ends in zeros
// where that added bytes.
func NewWriter(f image.Output, o image.CreateOptions) (*Writer, error) {
	return newWriter(&layer.Output{Output: f}, o)
}

func newWriter(f *layer.Output, o image.CreateOptions) (*Writer, error) {
	if o.VirtualBytes < 0 || o.Compression != "" {
		return nil, fmt.Errorf("a VHD of %d bytes, compressed by %q", o.VirtualBytes, o.Compression)
	}
	if o.VirtualBytes > MaxBytes {
		return nil, fmt.Errorf("a VHD holds at most 2040 GiB, and the disk has %d bytes: VHDX holds it", o.VirtualBytes)
	}
	size := (o.VirtualBytes + sectorBytes - 1) / sectorBytes * sectorBytes
	w := &Writer{file: f, early: f.Writeback(), limit: o.VirtualBytes, footer: footer{
		features: 2, dataOffset: -1,
		stamp:   uint32(time.Since(epoch) / time.Second),
		creator: creator, creatorVersion: creatorVersion, creatorOS: creatorOS,
		originalBytes: size, currentBytes: size,
		geometry: newGeometry(size),
	}}
	rand.Read(w.footer.id[:])
	w.footer.id[6], w.footer.id[8] = w.footer.id[6]&0xf|0x40, w.footer.id[8]&0x3f|0x80
	switch {
	case o.Parent == "" && o.Variant == "fixed":
		w.footer.kind = typeFixed
	case o.Parent == "" && (o.Variant == "" || o.Variant == "dynamic"),
		o.Parent != "" && (o.Variant == "" || o.Variant == "differencing"):
		if o.BlockBytes == 0 {
			o.BlockBytes = usualBlock
		}
		if o.BlockBytes < 512<<10 || o.BlockBytes > 256<<20 || bits.OnesCount64(uint64(o.BlockBytes)) != 1 {
			return nil, fmt.Errorf("a VHD with blocks of %d bytes: take a power of two, best 2 MiB", o.BlockBytes)
		}
		w.dynamic(o.BlockBytes)
		// The table counts sectors in 32 bits, and bitmaps take room too.
		if n := w.header.entries * (w.header.blockBytes + int64(len(w.bitmap)) + dataAlign); n > (absent-1)*sectorBytes-w.end {
			return nil, fmt.Errorf("a VHD of %d bytes needs larger blocks than %d bytes", size, o.BlockBytes)
		}
		if o.Parent != "" {
			if err := w.child(o); err != nil {
				return nil, err
			}
		}
	case o.Parent != "" || o.Variant == "differencing":
		return nil, fmt.Errorf("a VHD of the variant %q with the parent %q", o.Variant, o.Parent)
	default:
		return nil, fmt.Errorf("no VHD variant %q: take dynamic or fixed", o.Variant)
	}
	if size != o.VirtualBytes {
		w.warnings = append(w.warnings, fmt.Sprintf("a VHD has whole sectors: the disk of %d bytes became %d", o.VirtualBytes, size))
	}
	if w.footer.kind == typeFixed && size%(1<<20) != 0 {
		w.warnings = append(w.warnings, fmt.Sprintf("Azure takes only fixed VHDs of whole MiB, and this disk has %d bytes", size))
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *Writer) dynamic(block int64) {
	size := w.footer.currentBytes
	w.footer.kind, w.footer.dataOffset = typeDynamic, footerBytes
	w.header = header{tableOffset: tableOffset, entries: (size + block - 1) / block, blockBytes: block}
	w.table = make([]uint32, w.header.entries)
	for i := range w.table {
		w.table[i] = absent
	}
	n := max(block/sectorBytes/8, sectorBytes)
	w.bitmap = bytes.Repeat([]byte{0xff}, int(n))
	w.end = tableOffset + int64(len(w.encodeTable()))
}

// place is the first offset from off on where a bitmap may lie, so that the
// data behind it is aligned.
func (w *Writer) place(off int64) int64 {
	n := int64(len(w.bitmap))
	return (off+n+dataAlign-1)/dataAlign*dataAlign - n
}

// Unit is 1, and of a differencing disk its sector.
func (w *Writer) Unit() int64 {
	if w.footer.kind == typeDifferencing {
		return sectorBytes
	}
	return 1
}

// Ordered is false.
func (w *Writer) Ordered() bool { return false }

// WriteAt writes p. Zeros make no block; in a differencing disk they hide the
// parent.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	if err := layer.InDisk(off, int64(len(p)), w.limit, w.Unit()); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		part := p[done:]
		at := off + int64(done)
		if w.footer.kind == typeFixed {
			part = part[:min(len(part), chunk.MaxBytes)]
		} else {
			block := w.header.blockBytes
			part = part[:min(int64(len(part)), block-at%block, chunk.MaxBytes)]
		}
		if w.footer.kind == typeDifferencing {
			w.mark(at, int64(len(part)))
		}
		if !chunk.IsZero(part) {
			if w.footer.kind != typeFixed {
				var err error
				if at, err = w.locate(at); err != nil {
					return done, err
				}
			}
			if n, err := w.file.WriteAt(part, at); err != nil {
				return done + n, err
			}
			w.early.Grown(at + int64(len(part)))
		}
		done += len(part)
	}
	return done, nil
}

// locate gives a byte of the disk its place in the file.
func (w *Writer) locate(off int64) (int64, error) {
	n, within := off/w.header.blockBytes, off%w.header.blockBytes
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.table[n] == absent {
		at := w.place(w.end)
		if _, err := w.file.WriteAt(w.bitmap, at); err != nil {
			return 0, err
		}
		w.table[n] = uint32(at / sectorBytes)
		w.end = at + int64(len(w.bitmap)) + w.header.blockBytes
	}
	return int64(w.table[n])*sectorBytes + int64(len(w.bitmap)) + within, nil
}

// encodeTable fills the last sector up with absent entries.
func (w *Writer) encodeTable() []byte {
	p := bytes.Repeat([]byte{0xff}, (4*len(w.table)+sectorBytes-1)/sectorBytes*sectorBytes)
	for i, s := range w.table {
		binary.BigEndian.PutUint32(p[4*i:], s)
	}
	return p
}

// Finish writes the table, and the footers after everything else is durable.
func (w *Writer) Finish() error {
	if err := w.writeSparse(); err != nil {
		return err
	}
	end := w.end
	if w.footer.kind == typeFixed {
		end = w.footer.currentBytes
	}
	if err := w.file.Truncate(end); err != nil {
		return err
	}
	if w.footer.kind != typeFixed {
		if _, err := w.file.WriteAt(w.encodeTable(), tableOffset); err != nil {
			return err
		}
		if _, err := w.file.WriteAt(w.header.encode(), footerBytes); err != nil {
			return err
		}
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	f := w.footer.encode()
	if w.footer.kind != typeFixed {
		if _, err := w.file.WriteAt(f, 0); err != nil {
			return err
		}
	}
	if _, err := w.file.WriteAt(f, end); err != nil {
		return err
	}
	return w.file.Finish()
}

// Close closes the file and leaves it where it is.
func (w *Writer) Close() error { return w.file.Close() }

// Warnings says in what the image is not what its user may expect.
func (w *Writer) Warnings() []string { return w.warnings }
