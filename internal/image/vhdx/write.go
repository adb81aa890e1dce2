package vhdx

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

const (
	creator = "Backstay"

	logOffset      = 1 * mib // where Windows puts them
	metadataOffset = 2 * mib
	tableOffset    = 3 * mib

	leafBlocks = 4096 // blocks of which the writer keeps places together
)

// Writer writes a fixed, dynamic or differencing VHDX, from any number of
// goroutines in any order.
type Writer struct {
	file     *layer.Output
	early    *image.Writeback
	warnings []string

	limit int64 // what WriteAt takes: the virtual size as it was asked for
	meta  metadata
	ratio int64
	first int64 // where the blocks begin

	mu     sync.Mutex
	places [][]uint32               // leaves of MiB in the file, by block; 0 for none
	sparse map[int64]*layer.Sectors // of a differencing disk, blocks that are not whole yet
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
// default, or "fixed"; with a parent it is differencing. A VHDX has whole
// sectors: the disk is o.VirtualBytes rounded up to them, and ends in zeros
// where that added bytes.
func NewWriter(f image.Output, o image.CreateOptions) (*Writer, error) {
	return newWriter(&layer.Output{Output: f}, o)
}

func newWriter(f *layer.Output, o image.CreateOptions) (*Writer, error) {
	if o.VirtualBytes < 0 || o.Compression != "" {
		return nil, fmt.Errorf("a VHDX of %d bytes, compressed by %q", o.VirtualBytes, o.Compression)
	}
	m := metadata{logicalSector: int64(o.SectorBytes), physicalSector: 4096, blockBytes: o.BlockBytes, diskID: newGUID()}
	switch {
	case o.Parent != "" && (o.Variant == "" || o.Variant == "differencing"):
		if err := m.child(o); err != nil {
			return nil, err
		}
	case o.Parent != "" || o.Variant == "differencing":
		return nil, fmt.Errorf("a %s VHDX with the parent %q", o.Variant, o.Parent)
	case o.Variant == "fixed":
		m.fixed = true
	case o.Variant != "" && o.Variant != "dynamic":
		return nil, fmt.Errorf("no VHDX variant %q: take dynamic or fixed", o.Variant)
	}
	if m.logicalSector == 0 {
		m.logicalSector = 512
	}
	if m.logicalSector != 512 && m.logicalSector != 4096 {
		return nil, fmt.Errorf("a VHDX with sectors of %d bytes: take 512 or 4096", m.logicalSector)
	}
	if o.VirtualBytes > MaxBytes {
		return nil, fmt.Errorf("a VHDX holds at most 64 TiB, and the disk has %d bytes", o.VirtualBytes)
	}
	m.diskBytes = (o.VirtualBytes + m.logicalSector - 1) / m.logicalSector * m.logicalSector
	if m.blockBytes == 0 {
		m.blockBytes = usualBlock(m.diskBytes)
	}
	if m.blockBytes < minBlock || m.blockBytes > maxBlock || bits.OnesCount64(uint64(m.blockBytes)) != 1 {
		return nil, fmt.Errorf("a VHDX with blocks of %d bytes: take a power of two from 1 to 256 MiB", m.blockBytes)
	}
	if m.differencing && o.ParentInfo.VirtualBytes != m.diskBytes {
		return nil, fmt.Errorf("a VHDX of %d bytes over a parent of %d", m.diskBytes, o.ParentInfo.VirtualBytes)
	}
	w := &Writer{file: f, early: f.Writeback(), limit: o.VirtualBytes, meta: m, ratio: chunkRatio(m)}
	w.first = tableOffset + w.tableBytes()
	w.end = w.first
	blocks := w.blocks()
	if m.fixed {
		w.end += blocks * m.blockBytes
	} else {
		w.places = make([][]uint32, (blocks+leafBlocks-1)/leafBlocks)
	}
	if m.differencing {
		w.sparse = map[int64]*layer.Sectors{}
	}
	if m.diskBytes != o.VirtualBytes {
		w.warnings = append(w.warnings, fmt.Sprintf("a VHDX has whole sectors: the disk of %d bytes became %d", o.VirtualBytes, m.diskBytes))
	}
	if strings.HasPrefix(o.Parent, "/") && !strings.HasPrefix(o.Parent, "//") {
		w.warnings = append(w.warnings, fmt.Sprintf("a VHDX has names of Windows alone, so the parent %q is named as if it lay beside the image", o.Parent))
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	return w, nil
}

// usualBlock is 2 MiB, so that a small write costs little room, and more only
// where the table would pass 8 MiB, up to the 32 MiB that Windows takes.
func usualBlock(size int64) int64 {
	n := int64(2 * mib)
	for n < 32*mib && size/n > 1<<20 {
		n *= 2
	}
	return n
}

func newGUID() (g guid) {
	rand.Read(g[:])
	g[7], g[8] = g[7]&0xf|0x40, g[8]&0x3f|0x80
	return g
}

func (w *Writer) blocks() int64 {
	return (w.meta.diskBytes + w.meta.blockBytes - 1) / w.meta.blockBytes
}

func (w *Writer) tableBytes() int64 {
	return max(roundMiB(8*tableEntries(w.meta)), mib)
}

func roundMiB(n int64) int64 { return (n + mib - 1) / mib * mib }

// Unit is 1, and of a differencing disk its sector.
func (w *Writer) Unit() int64 {
	if w.meta.differencing {
		return w.meta.logicalSector
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
	for done := 0; done < len(p); {
		at := off + int64(done)
		part := p[done:]
		part = part[:min(int64(len(part)), w.meta.blockBytes-at%w.meta.blockBytes, chunk.MaxBytes)]
		zero := chunk.IsZero(part)
		if w.meta.differencing {
			w.mark(at, int64(len(part)))
		}
		if !zero {
			where := w.locate(at)
			if n, err := w.file.WriteAt(part, where); err != nil {
				return done + n, err
			}
			w.early.Grown(where + int64(len(part)))
		}
		done += len(part)
	}
	return len(p), nil
}

// locate gives a byte of the disk its place in the file. A new block is a hole
// behind the others until somebody writes to it.
func (w *Writer) locate(off int64) int64 {
	n, within := off/w.meta.blockBytes, off%w.meta.blockBytes
	if w.meta.fixed {
		return w.first + off
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.place(n) + within
}

// place is where block n lies, from now on. The caller holds w.mu.
func (w *Writer) place(n int64) int64 {
	leaf := &w.places[n/leafBlocks]
	if *leaf == nil {
		*leaf = make([]uint32, min(leafBlocks, w.blocks()-n/leafBlocks*leafBlocks))
	}
	if (*leaf)[n%leafBlocks] == 0 {
		(*leaf)[n%leafBlocks] = uint32(w.end / mib)
		w.end += w.meta.blockBytes
	}
	return int64((*leaf)[n%leafBlocks]) * mib
}

// Finish writes the metadata, and what makes the file a VHDX after everything
// else is durable.
func (w *Writer) Finish() error {
	steps := []func() error{
		w.placeSparse,
		func() error { return w.file.Truncate(w.end) },
		w.writeTable,
		w.writeBitmaps,
		func() error { return w.write(w.meta.encode(), metadataOffset) },
		func() error { return w.write(w.encodeRegions(), regions1) },
		func() error { return w.write(w.encodeRegions(), regions2) },
		w.file.Sync,
		w.writeHeaders,
		w.file.Finish,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (w *Writer) write(p []byte, off int64) error {
	_, err := w.file.WriteAt(p, off)
	return err
}

func (w *Writer) encodeRegions() []byte {
	return encodeRegions(region{tableOffset, w.tableBytes()}, region{metadataOffset, mib})
}

func (w *Writer) writeHeaders() error {
	h := header{sequence: 1, fileWrite: newGUID(), dataWrite: newGUID(), logBytes: metadataOffset - logOffset, logOffset: logOffset}
	if err := w.write(h.encode(), header1); err != nil {
		return err
	}
	h.sequence++
	if err := w.write(h.encode(), header2); err != nil {
		return err
	}
	id := make([]byte, 520)
	copy(id, signature)
	copy(id[8:], utf16Bytes(creator))
	return w.write(id, 0)
}

// writeTable writes a leaf at a time, and leaves holes for leaves that hold
// nothing.
func (w *Writer) writeTable() error {
	blocks := w.blocks()
	for from := int64(0); from < blocks; from += leafBlocks {
		to := min(from+leafBlocks, blocks)
		start := from + from/w.ratio
		p := make([]byte, 8*(to-1+(to-1)/w.ratio-start+1))
		used := false
		for n := from; n < to; n++ {
			if e := w.entry(n); e != 0 {
				binary.LittleEndian.PutUint64(p[8*(n+n/w.ratio-start):], e)
				used = true
			}
		}
		if used {
			if err := w.write(p, tableOffset+8*start); err != nil {
				return err
			}
		}
	}
	return nil
}

// entry is block n's in the table.
func (w *Writer) entry(n int64) uint64 {
	if w.meta.fixed {
		return uint64(w.first+n*w.meta.blockBytes) | statePresent
	}
	var at uint64
	if leaf := w.places[n/leafBlocks]; leaf != nil {
		at = uint64(leaf[n%leafBlocks]) * mib
	}
	s := w.sparse[n]
	switch {
	case s == nil && at == 0:
		return stateNotPresent
	case s == nil:
		return at | statePresent
	case s.Bits == nil && at == 0:
		return stateZero
	case s.Bits == nil:
		return at | statePresent
	}
	return at | statePartial
}

// Close closes the file and leaves it where it is.
func (w *Writer) Close() error { return w.file.Close() }

// Warnings says in what the image is not what its user may expect.
func (w *Writer) Warnings() []string { return w.warnings }
