// Package vhd reads and writes VHD, the image format of Virtual PC and of
// Hyper-V's first generation: fixed, dynamic and differencing disks.
//
//	fixed:    data | footer
//	others:   footer copy | dynamic header | table | blocks | footer
//	block:    bitmap of its sectors | data
//
// All numbers are big-endian, the table counts in sectors of 512 bytes, and a
// checksum is a complemented sum of bytes.
package vhd

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// Image is a VHD, opened read-only.
type Image struct {
	file     image.File
	footer   footer
	header   header // unless fixed
	names    []string
	warnings []string

	dataEnd     int64           // blocks end here at the latest
	taken       []extent.Extent // of the file, where no block lies
	atEnd       bool            // the footer at the end is good, so a block that ends there is whole
	bitmapBytes int64           // before every block
	pages       *layer.Pages
	disk        layer.Disk
}

var _ image.Image = (*Image)(nil)

// Open opens a VHD. The parent of a differencing disk comes from parent, by
// the names that the header gives, relative ones first, until one has the
// right identity; if parent is nil a differencing disk gives ErrNotAllowed.
// The Image owns f and its parent; where Open fails, f is still the caller's.
func Open(f image.File, parent image.OpenParent) (*Image, error) {
	img, err := OpenLayer(f)
	if err != nil {
		return nil, err
	}
	if img.footer.kind == typeDifferencing {
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
	ft, end, atEnd, err := findFooter(f)
	if err != nil {
		return nil, err
	}
	img := &Image{file: f, footer: ft, dataEnd: end, atEnd: atEnd}
	if !atEnd {
		img.warnings = append(img.warnings, "the footer at the end is missing or damaged; its copy at the start was used")
	}
	if ft.savedState {
		img.warnings = append(img.warnings, "the disk belongs to a suspended virtual machine")
	}
	size := ft.virtualBytes()
	switch {
	case size < 0 || size%sectorBytes != 0:
		return nil, fault.Corrupt(f.Name(), end, "a size of %d bytes", size)
	case ft.kind == typeFixed && size > end:
		return nil, fault.Corrupt(f.Name(), end, "a fixed disk of %d bytes in a file that holds %d", size, end)
	case ft.kind == typeFixed:
		img.disk.Map, img.disk.Holes = mapFixed, true
	case ft.kind == typeDynamic || ft.kind == typeDifferencing:
		if err := img.readTables(size); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%s: VHD of type %d: %w", f.Name(), ft.kind, fault.ErrUnsupported)
	}
	img.disk.Name, img.disk.File, img.disk.Bytes = f.Name(), f, size
	return img, nil
}

// readTables reads what only a dynamic or differencing disk has.
func (img *Image) readTables(size int64) error {
	f, at := img.file, img.footer.dataOffset
	h, err := readHeader(f, at)
	if err != nil {
		return err
	}
	need := size / h.blockBytes
	if size%h.blockBytes > 0 {
		need++
	}
	if h.entries < need {
		return fault.Corrupt(f.Name(), at, "%d table entries where %d blocks are needed", h.entries, need)
	}
	bits := h.blockBytes / sectorBytes
	img.header = h
	img.bitmapBytes = ((bits+7)/8 + sectorBytes - 1) / sectorBytes * sectorBytes
	img.taken = []extent.Extent{{Len: footerBytes}, {Off: at, Len: headerBytes}, {Off: h.tableOffset, Len: 4 * need}}
	img.pages = layer.NewPages(f.Name(), f, f.Bytes())
	img.disk.Map = img.mapBlock
	if img.footer.kind == typeDifferencing {
		img.names, err = h.parentNames(f)
	}
	return err
}

// Probe says whether f has a VHD's footer. A raw disk may end in one too, if
// its guest wanted that, so a caller who knows the format should not ask.
func Probe(f image.File) bool {
	_, _, _, err := findFooter(f)
	return err == nil
}

// parent is what a differencing disk says of its parent.
func (img *Image) parent() layer.Child {
	return layer.Child{
		Name: img.file.Name(), Format: image.VHD, Names: img.names,
		Identities: []string{img.header.parent.String()}, IdentityName: "UUID",
		Bytes: img.disk.Bytes, SectorBytes: sectorBytes,
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

// Info tells what the footer and the header say.
func (img *Image) Info() image.Info {
	info := image.Info{
		Format: image.VHD, Version: 1,
		VirtualBytes: img.disk.Bytes, FileBytes: img.file.Bytes(), SectorBytes: sectorBytes,
		BlockBytes: img.header.blockBytes,
		Creator:    fmt.Sprintf("%s %d.%d", strings.TrimRight(img.footer.creator, " \x00"), img.footer.creatorVersion>>16, img.footer.creatorVersion&0xffff),
		Identity:   img.footer.id.String(),
		Warnings:   img.warnings,
		FormatDetails: map[string]string{
			"created":  epoch.Add(time.Duration(img.footer.stamp) * time.Second).Format(time.RFC3339),
			"geometry": fmt.Sprintf("%d/%d/%d", img.footer.geometry.cylinders, img.footer.geometry.heads, img.footer.geometry.sectors),
		},
	}
	info.Creator = strings.ToValidUTF8(info.Creator, "?")
	switch img.footer.kind {
	case typeFixed:
		info.Variant = "fixed"
	case typeDynamic:
		info.Variant = "dynamic"
	case typeDifferencing:
		info.Variant = "differencing"
		info.ParentFormat = image.VHD
		if len(img.names) > 0 {
			info.Parent = img.names[0]
		}
		info.FormatDetails["parent identity"] = img.header.parent.String()
	}
	return info
}

func mapFixed(off, n int64) (image.Extent, error) {
	return image.Extent{Extent: extent.Extent{Off: off, Len: n}, Kind: image.Data, FileOffset: off}, nil
}

// mapBlock looks a run of absent blocks up, or a block that is in the file, or
// of a differencing disk a run of its bitmap.
func (img *Image) mapBlock(off, n int64) (image.Extent, error) {
	e := image.Extent{Extent: extent.Extent{Off: off, Len: min(n, img.header.blockBytes-off%img.header.blockBytes)}, FileOffset: -1}
	at := img.header.tableOffset + off/img.header.blockBytes*4
	within := off % img.header.blockBytes
	p, err := img.pages.Peek(at, 4, 4*((within+n-1)/img.header.blockBytes+1))
	if err != nil {
		return e, err
	}
	sector := binary.BigEndian.Uint32(p)
	if sector == absent {
		blocks := int64(1)
		for p = p[4:]; len(p) >= 4 && binary.BigEndian.Uint32(p) == absent; p = p[4:] {
			blocks++
		}
		e.Len = min(n, blocks*img.header.blockBytes-within)
		return e, nil
	}
	bitmap := int64(sector) * sectorBytes
	block := bitmap + img.bitmapBytes
	for _, t := range img.taken {
		if bitmap < t.End() && t.Off < block+img.header.blockBytes {
			return e, fault.Corrupt(img.file.Name(), at, "the block at disk offset %d lies at %d, across what lies at %d", off-within, bitmap, t.Off)
		}
	}
	if img.footer.kind == typeDifferencing {
		first := within / sectorBytes
		here, same, err := img.pages.Run(bitmap, first, (within+e.Len-1)/sectorBytes+1-first, layer.HighFirst)
		if err != nil {
			return e, err
		}
		if e.Len = min(e.Len, (first+same)*sectorBytes-within); !here {
			return e, nil
		}
	}
	if block >= img.dataEnd {
		return e, fault.Corrupt(img.file.Name(), at, "the block at disk offset %d lies at %d of %d bytes", off-within, bitmap, img.dataEnd)
	}
	e.Kind, e.FileOffset = image.Data, block+within
	// Some writers let the file end inside the last block. That is no damage
	// as long as their footer follows.
	if left := img.dataEnd - e.FileOffset; left < e.Len {
		switch {
		case !img.atEnd:
			return e, fault.Corrupt(img.file.Name(), e.FileOffset, "the file ends inside the block at disk offset %d", off-within)
		case left > 0:
			e.Len = left
		default:
			e.Kind, e.FileOffset = image.Zero, -1
		}
	}
	return e, nil
}

// absent is the table's entry of a block that is not in the file.
const absent = 1<<32 - 1
