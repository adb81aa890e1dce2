// Package vdi reads VDI, the image format of VirtualBox: fixed, dynamic and
// differencing disks. It writes none.
//
//	header | block map | blocks
//
// All numbers are little-endian. The map has the number of each block in the
// file. A differencing image knows its parent by UUID and by no name.
package vdi

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

// Image is a VDI, opened read-only.
type Image struct {
	file     image.File
	header   header
	warnings []string
	pages    *layer.Pages
	disk     layer.Disk
}

var _ image.Image = (*Image)(nil)

// Open opens a VDI. The parent of a differencing image comes from parent, by
// the name "{UUID}.vdi": VirtualBox calls snapshots so, and for other parents
// who opens must know what their UUID is. If parent is nil a differencing
// image gives ErrNotAllowed. The Image owns f and its parent; where Open
// fails, f is still the caller's.
func Open(f image.File, parent image.OpenParent) (*Image, error) {
	img, err := OpenLayer(f)
	if err != nil {
		return nil, err
	}
	if img.header.kind == typeDifferencing {
		if err := img.openParent(parent); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// OpenLayer opens one layer of a chain and no parent: what the layer does not
// hold is Absent and reads as zeros.
func OpenLayer(f image.File) (*Image, error) {
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	img := &Image{file: f, header: *h, pages: layer.NewPages(f.Name(), f, f.Bytes())}
	if h.kind != typeDifferencing && h.parent != (uuid{}) {
		img.warnings = append(img.warnings, fmt.Sprintf("it names a parent, %s, though it is no differencing image; that was ignored", h.parent))
	}
	img.disk = layer.Disk{Name: f.Name(), File: f, Bytes: h.bytes, Map: img.mapBlocks, Holes: h.kind == typeFixed}
	return img, nil
}

// UUID reads which image f is, without opening anything else.
func UUID(f image.File) (string, error) {
	h, err := readHeader(f)
	if err != nil {
		return "", err
	}
	return h.id.String(), nil
}

// ParentName is what Open calls the parent of that UUID.
func ParentName(uuid string) string { return "{" + uuid + "}.vdi" }

func (img *Image) openParent(open image.OpenParent) error {
	name, want := img.file.Name(), img.header.parent
	if open == nil {
		return fmt.Errorf("%s: its parent, the VDI with UUID %s: %w", name, want, image.ErrNotAllowed)
	}
	p, err := open(ParentName(want.String()), image.VDI)
	if err != nil {
		return fmt.Errorf("%s: its parent, the VDI with UUID %s: %w", name, want, err)
	}
	parent, ok := p.(*Image)
	switch {
	case !ok:
		err = fmt.Errorf("%s: its parent is no VDI: %w", name, fault.ErrUnsupported)
	case parent.header.id != want:
		err = fault.Corrupt(name, 424, "its parent has the UUID %s, but what was found has %s", want, parent.header.id)
	case img.header.parentModified != uuid{} && parent.header.modified != img.header.parentModified:
		err = fault.Corrupt(name, 440, "its parent %s was written to since: its modification is %s and should be %s",
			want, parent.header.modified, img.header.parentModified)
	default:
		img.disk.Parent = p
		return nil
	}
	p.Close()
	return err
}

// mapBlocks looks up the block at off, and those behind it that continue it.
func (img *Image) mapBlocks(off, n int64) (image.Extent, error) {
	h := &img.header
	first, inner := off/h.blockBytes, off%h.blockBytes
	e := image.Extent{Extent: extent.Extent{Off: off, Len: n}, Kind: image.Absent, FileOffset: -1}
	at := h.mapAt + first*4
	p, err := img.pages.Peek(at, 4, ((inner+n-1)/h.blockBytes+1)*4)
	if err != nil {
		return e, err
	}
	entry := binary.LittleEndian.Uint32(p)
	blocks := int64(1)
	for ; len(p) >= int(blocks+1)*4; blocks++ {
		next := binary.LittleEndian.Uint32(p[blocks*4:])
		if entry >= blockZero && next != entry || entry < blockZero && (h.extraBytes > 0 || next != entry+uint32(blocks) || next >= blockZero) {
			break
		}
	}
	e.Len = min(n, blocks*h.blockBytes-inner)
	switch entry {
	case blockAbsent:
		return e, nil
	case blockZero:
		e.Kind = image.Zero
		return e, nil
	}
	e.Kind = image.Data
	e.FileOffset = h.dataAt + int64(entry)*(h.extraBytes+h.blockBytes) + h.extraBytes + inner
	switch left := img.file.Bytes() - e.FileOffset; {
	case left <= 0:
		return e, fault.Corrupt(img.file.Name(), at, "the block at disk offset %d lies at %d, behind the end of a file of %d bytes", off-inner, e.FileOffset-inner, img.file.Bytes())
	case left < e.Len:
		e.Len = left // and the next call says that the rest is not there
	}
	return e, nil
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

// Info tells what the header says.
func (img *Image) Info() image.Info {
	h := &img.header
	info := image.Info{
		Format: image.VDI, Version: int(h.version >> 16),
		VirtualBytes: h.bytes, FileBytes: img.file.Bytes(),
		BlockBytes: h.blockBytes, SectorBytes: sectorBytes,
		Creator: h.creator, Identity: h.id.String(), Warnings: img.warnings,
		FormatDetails: map[string]string{"modification identity": h.modified.String()},
	}
	if h.comment != "" {
		info.FormatDetails["comment"] = h.comment
	}
	switch h.kind {
	case typeDynamic:
		info.Variant = "dynamic"
	case typeFixed:
		info.Variant = "fixed"
	case typeDifferencing:
		info.Variant = "differencing"
		info.Parent = ParentName(h.parent.String())
		info.ParentFormat = image.VDI
		info.FormatDetails["parent identity"] = h.parent.String()
	}
	return info
}
