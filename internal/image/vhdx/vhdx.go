// Package vhdx reads and writes VHDX, the image format of Hyper-V: fixed,
// dynamic and differencing disks.
//
//	0        "vhdxfile", the program that made it
//	64 KiB   header, twice: where the log is, and whether it must be replayed
//	192 KiB  table of regions, twice: where the rest is
//	1 MiB    log, metadata, block allocation table, blocks, in any order
//
// All numbers are little-endian and all regions begin at whole MiB. Headers,
// region tables and log entries have a CRC-32C; metadata, table and blocks
// have none.
package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// States of a block in the table. 4 and 5 are reserved.
const (
	stateNotPresent = 0 // the parent's, or nobody's
	stateUndefined  = 1
	stateZero       = 2
	stateUnmapped   = 3 // given back by the guest; may still have an offset
	statePresent    = 6
	statePartial    = 7 // the bitmap says which sectors
)

// bitmapBytes is the length of a bitmap of sectors, of which every chunk of a
// differencing disk has one.
const bitmapBytes = mib

// Image is a VHDX, opened read-only.
type Image struct {
	file     image.File
	src      io.ReaderAt // file, with what its log changes
	bytes    int64       // of src
	creator  string
	header   header
	meta     metadata
	regions  regions
	ratio    int64 // blocks in a chunk
	cut      bool  // the file may end inside its last block
	warnings []string

	pages *layer.Pages
	disk  layer.Disk
}

var _ image.Image = (*Image)(nil)

// Open opens a VHDX. A dirty log is replayed in memory. The parent of a
// differencing disk comes from parent, by the names that the locator gives,
// relative ones first, until one has the right DataWriteGuid; if parent is nil
// a differencing disk gives ErrNotAllowed. The Image owns f and its parent;
// where Open fails, f is still the caller's.
func Open(f image.File, parent image.OpenParent) (*Image, error) {
	img, err := OpenLayer(f)
	if err != nil {
		return nil, err
	}
	if img.meta.differencing {
		var warnings []string
		if img.disk.Parent, warnings, err = img.parent().Open(parent); err != nil {
			return nil, err
		}
		img.warnings = append(img.warnings, warnings...)
	}
	return img, nil
}

// OpenLayer opens one layer of a chain and no parent: what the layer does not
// hold is Absent and reads as zeros.
func OpenLayer(f image.File) (*Image, error) {
	if !Probe(f) {
		return nil, fmt.Errorf("%s is no VHDX: it does not begin with %q: %w", f.Name(), signature, fault.ErrCorrupt)
	}
	var id [512]byte
	if err := layer.ReadFull(f, f.Name(), id[:], 8); err != nil {
		return nil, err
	}
	img := &Image{file: f, src: f, bytes: f.Bytes(), creator: utf16Text(id[:])}
	var err error
	var good int
	if img.header, good, img.cut, err = readHeaders(f); err != nil {
		return nil, err
	}
	if good == 1 {
		img.warnings = append(img.warnings, "one of the two headers is damaged, as after a crash; the other was used")
	}
	if img.header.log != (guid{}) {
		r, err := replay(f, img.header)
		if err != nil {
			return nil, err
		}
		img.src, img.bytes = r, r.bytes
		img.warnings = append(img.warnings, fmt.Sprintf("dirty log: %d entries were replayed in memory", r.entries))
	}
	if img.regions, err = readRegions(img.src, f.Name(), img.bytes, img.header); err != nil {
		if strings.EqualFold(filepath.Ext(f.Name()), ".vhds") {
			return nil, fmt.Errorf("%s: a VHD set, which only says who uses the disk; its disk is in the .avhdx file: %w", f.Name(), fault.ErrUnsupported)
		}
		return nil, err
	}
	if img.regions.second {
		img.warnings = append(img.warnings, "the first region table is damaged; its copy was used")
	}
	if img.meta, err = readMetadata(img.src, f.Name(), img.regions.metadata); err != nil {
		return nil, err
	}
	img.ratio = chunkRatio(img.meta)
	if n := tableEntries(img.meta); n > img.regions.table.bytes/8 {
		return nil, fault.Corrupt(f.Name(), img.regions.table.off, "a table of %d bytes where %d entries are needed", img.regions.table.bytes, n)
	}
	img.pages = layer.NewPages(f.Name(), img.src, img.bytes)
	img.disk = layer.Disk{Name: f.Name(), File: img.src, Bytes: img.meta.diskBytes, Map: img.mapBlock, Holes: img.meta.fixed}
	return img, nil
}

// Probe says whether f begins like a VHDX.
func Probe(f image.File) bool {
	var p [len(signature)]byte
	n, _ := f.ReadAt(p[:], 0)
	return string(p[:n]) == signature
}

// chunkRatio is how many blocks share a bitmap of sectors.
func chunkRatio(m metadata) int64 { return bitmapBytes * 8 * m.logicalSector / m.blockBytes }

// tableEntries is how many entries the table has at least: the blocks', and
// one for a bitmap after those of every chunk.
func tableEntries(m metadata) int64 {
	blocks, ratio := (m.diskBytes+m.blockBytes-1)/m.blockBytes, chunkRatio(m)
	if m.differencing {
		return (blocks + ratio - 1) / ratio * (ratio + 1)
	}
	return blocks + max(blocks-1, 0)/ratio
}

// parent is what a differencing disk says of its parent.
func (img *Image) parent() layer.Child {
	return layer.Child{
		Name: img.file.Name(), Format: image.VHDX, Names: img.meta.parentNames(),
		Identities: img.meta.linkages(), IdentityName: "DataWriteGuid",
		Bytes: img.meta.diskBytes, SectorBytes: int(img.meta.logicalSector),
	}
}

// Size is the virtual size in bytes.
func (img *Image) Size() int64 { return img.disk.Bytes }

// ReadAt reads the virtual disk.
func (img *Image) ReadAt(p []byte, off int64) (int, error) { return img.disk.ReadAt(p, off) }

// Extents walks the virtual disk and, where the layer holds nothing, its
// parents.
func (img *Image) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return img.disk.Extents(ctx, within)
}

// Close closes the file and the parents.
func (img *Image) Close() error { return img.disk.Close(img.file) }

// Info tells what headers and metadata say. Identity is the DataWriteGuid, by
// which children know their parent.
func (img *Image) Info() image.Info {
	info := image.Info{
		Format: image.VHDX, Variant: "dynamic", Version: 1,
		VirtualBytes: img.meta.diskBytes, FileBytes: img.file.Bytes(),
		BlockBytes: img.meta.blockBytes, SectorBytes: int(img.meta.logicalSector),
		Creator:  img.creator,
		Identity: img.header.dataWrite.String(),
		Warnings: img.warnings,
		FormatDetails: map[string]string{
			"disk identity":         img.meta.diskID.String(),
			"physical sector bytes": fmt.Sprint(img.meta.physicalSector),
		},
	}
	switch {
	case img.meta.differencing:
		info.Variant = "differencing"
		info.ParentFormat = image.VHDX
		if names := img.meta.parentNames(); len(names) > 0 {
			info.Parent = names[0]
		}
		info.FormatDetails["parent identity"] = strings.Join(img.meta.linkages(), " ")
	case img.meta.fixed:
		info.Variant = "fixed"
	}
	return info
}

// entry reads an entry of the table, a state and an offset in the file, and
// counts how many of most entries from there on are the same.
func (img *Image) entry(n, most int64) (state int, off, same int64, err error) {
	p, err := img.pages.Peek(img.regions.table.off+8*n, 8, 8*most)
	if err != nil {
		return 0, 0, 0, err
	}
	e := binary.LittleEndian.Uint64(p)
	same = 1
	for p = p[8:]; len(p) >= 8 && binary.LittleEndian.Uint64(p) == e; p = p[8:] {
		same++
	}
	return int(e & 7), int64(e &^ (mib - 1) & (1<<63 - 1)), same, nil
}

// mapBlock looks a run of equal entries up, or a block that is in the file,
// or of a partial one a run of its bitmap.
func (img *Image) mapBlock(off, n int64) (image.Extent, error) {
	block, within := off/img.meta.blockBytes, off%img.meta.blockBytes
	e := image.Extent{Extent: extent.Extent{Off: off, Len: min(n, img.meta.blockBytes-within)}, FileOffset: -1}
	index := block + block/img.ratio
	// A run of blocks ends where a bitmap's entry comes between.
	most := min((within+n-1)/img.meta.blockBytes+1, img.ratio-block%img.ratio)
	state, at, same, err := img.entry(index, most)
	if err != nil {
		return e, err
	}
	bad := func(format string, args ...any) (image.Extent, error) {
		return e, fault.Corrupt(img.file.Name(), img.regions.table.off+8*index, "block %d: %w", block, fmt.Errorf(format, args...))
	}
	switch {
	case state == stateNotPresent, state == stateUndefined, state == stateZero, state == stateUnmapped:
		e.Len = min(n, same*img.meta.blockBytes-within)
		if state != stateNotPresent {
			e.Kind = image.Zero
		}
		return e, nil
	case state == statePartial && img.meta.differencing:
		var here bool
		if here, e.Len, err = img.run(off, e.Len); err != nil || !here {
			return e, err
		}
	case state != statePresent:
		return bad("state %d", state)
	}
	if at >= img.bytes {
		return bad("it lies at %d in a file of %d bytes", at, img.bytes)
	}
	if err := img.free(at, img.meta.blockBytes); err != nil {
		return bad("%w", err)
	}
	e.Kind, e.FileOffset = image.Data, at+within
	if left := img.bytes - e.FileOffset; left < e.Len {
		// Windows and qemu make the file as long as its blocks; disk2vhd lets
		// it end with its data, and leaves twin headers.
		switch {
		case !img.cut:
			return bad("it lies at %d, and the file of %d bytes ends inside it", at, img.bytes)
		case left > 0:
			e.Len = left
		default:
			e.Kind, e.FileOffset = image.Zero, -1
		}
	}
	return e, nil
}

// free says what is wrong with n bytes at off as a place for a block.
func (img *Image) free(off, n int64) error {
	i, _ := slices.BinarySearchFunc(img.regions.taken, off, func(r region, off int64) int {
		if r.end() <= off {
			return -1
		}
		return 1
	})
	if i < len(img.regions.taken) && img.regions.taken[i].off < off+n {
		return fmt.Errorf("it lies at %d, across the region at %d", off, img.regions.taken[i].off)
	}
	return nil
}

// run reads the bitmap of off's chunk: whether the byte at off is in the file,
// and for how many of n bytes, which end within the chunk, the answer is the
// same. The first sector is the least significant bit.
func (img *Image) run(off, n int64) (here bool, run int64, err error) {
	chunk := off / (img.ratio * img.meta.blockBytes)
	index := chunk*(img.ratio+1) + img.ratio
	state, at, _, err := img.entry(index, 1)
	if err != nil {
		return false, 0, err
	}
	if state != statePresent {
		return false, n, fault.Corrupt(img.file.Name(), img.regions.table.off+8*index, "the bitmap of chunk %d has state %d under a partial block", chunk, state)
	}
	err = img.free(at, bitmapBytes)
	if err == nil && at > img.bytes-bitmapBytes {
		err = fmt.Errorf("it lies at %d in a file of %d bytes", at, img.bytes)
	}
	if err != nil {
		return false, n, fault.Corrupt(img.file.Name(), img.regions.table.off+8*index, "the bitmap of chunk %d: %w", chunk, err)
	}
	sector := img.meta.logicalSector
	start := off - chunk*img.ratio*img.meta.blockBytes
	first := start / sector
	here, same, err := img.pages.Run(at, first, (start+n-1)/sector+1-first, layer.LowFirst)
	return here, min(n, (first+same)*sector-start), err
}
