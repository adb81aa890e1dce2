package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
)

// A Bitmap is a persistent dirty bitmap: the parts of the disk that were
// written since it was made.
type Bitmap struct {
	Name string
	// Granularity is how many bytes of the disk a bit stands for.
	Granularity int64
	// InUse says that it was not stored properly and lacks writes.
	InUse bool
	// Auto says that QEMU records writes in it whenever the image is open.
	Auto bool
	// Unknown says that it has flags, a type or extra data of which we know
	// nothing, so that its bits may mean anything.
	Unknown bool

	table   int64
	entries int64
}

type bitmapsExt struct {
	count          uint32
	dirBytes       uint64
	directoryBegin int64
}

const (
	maxBitmaps        = 65535
	maxDirectoryBytes = 16 << 20
	bitmapHeaderBytes = 24

	bitmapInUse      = 1 << 0
	bitmapAuto       = 1 << 1
	bitmapExtraKnown = 1 << 2
)

func parseBitmapsExt(p []byte) (*bitmapsExt, error) {
	be := binary.BigEndian
	if len(p) != 24 {
		return nil, fmt.Errorf("bitmaps extension of %d bytes", len(p))
	}
	return &bitmapsExt{be.Uint32(p), be.Uint64(p[8:]), int64(be.Uint64(p[16:]))}, nil
}

// Bitmaps lists the persistent bitmaps.
func (img *Image) Bitmaps() []Bitmap { return img.bitmaps }

// readBitmaps reads the bitmap directory, and nothing that its entries name.
func (img *Image) readBitmaps() error {
	ext := img.header.bitmaps
	if ext == nil {
		return nil
	}
	c := img.header.clusterBytes()
	if ext.count > maxBitmaps || ext.dirBytes > maxDirectoryBytes {
		return img.corrupt(ext.directoryBegin, "%d bitmaps in a directory of %d bytes", ext.count, ext.dirBytes)
	}
	if ext.directoryBegin <= 0 || ext.directoryBegin%c != 0 || ext.directoryBegin > img.fileLimit()-int64(ext.dirBytes) {
		return img.corrupt(ext.directoryBegin, "bitmap directory of %d bytes in a file of %d", ext.dirBytes, img.file.Bytes())
	}
	r := &tableReader{img: img, off: ext.directoryBegin, end: ext.directoryBegin + int64(ext.dirBytes), view: img.ownView()}
	be := binary.BigEndian
	for range ext.count {
		at := r.off
		p, err := r.read(bitmapHeaderBytes)
		if err != nil {
			return fmt.Errorf("bitmap %d of %d: %w", len(img.bitmaps)+1, ext.count, err)
		}
		flags, kind, granularity := be.Uint32(p[12:]), p[16], p[17]
		b := Bitmap{
			table:   int64(be.Uint64(p)),
			entries: int64(be.Uint32(p[8:])),
			InUse:   flags&bitmapInUse != 0,
			Auto:    flags&bitmapAuto != 0,
		}
		nameBytes, extraBytes := int(be.Uint16(p[18:])), int64(be.Uint32(p[20:]))
		if granularity < 9 || granularity > 31 || nameBytes > maxNameBytes || extraBytes > maxDirectoryBytes {
			return img.corrupt(at, "bitmap of granularity 2^%d, %d bytes of name and %d of extra data", granularity, nameBytes, extraBytes)
		}
		b.Granularity = 1 << granularity
		b.Unknown = kind != 1 || flags&^(bitmapInUse|bitmapAuto|bitmapExtraKnown) != 0 || extraBytes > 0 && flags&bitmapExtraKnown == 0
		if _, err := r.read(int(extraBytes)); err != nil {
			return err
		}
		if p, err = r.read(nameBytes); err != nil {
			return err
		}
		b.Name = string(p)
		r.align(ext.directoryBegin)
		img.bitmaps = append(img.bitmaps, b)
	}
	return nil
}

// Changed walks what the bitmap of that name says was written, in ascending
// order; neighbours do not touch. It costs time in proportion to the bitmap's
// clusters and their set bits. A bitmap that cannot be trusted is an error:
// the caller reads the whole disk instead.
func (img *Image) Changed(ctx context.Context, name string) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		b, err := img.trustedBitmap(name)
		if err != nil {
			yield(extent.Extent{}, err)
			return
		}
		var pending extent.Extent
		ok := true
		emit := func(first, n int64) bool { // in bits
			e := extent.Extent{Off: first * b.Granularity, Len: n * b.Granularity}.Intersect(extent.Extent{Len: img.header.size})
			switch {
			case e.Len == 0:
			case pending.Len > 0 && pending.End() == e.Off:
				pending.Len += e.Len
			default:
				if pending.Len > 0 {
					ok = yield(pending, nil)
				}
				pending = e
			}
			return ok
		}
		if err := img.walkBitmap(ctx, b, emit); ok {
			if pending.Len > 0 && !yield(pending, nil) {
				return
			}
			if err != nil {
				yield(extent.Extent{}, err)
			}
		}
	}
}

// trustedBitmap finds a bitmap whose bits are as they were when the image was
// last written.
func (img *Image) trustedBitmap(name string) (*Bitmap, error) {
	object := fmt.Sprintf("%s: bitmap %q", img.file.Name(), name)
	for i := range img.bitmaps {
		b := &img.bitmaps[i]
		if b.Name != name {
			continue
		}
		if img.active != img.present {
			return nil, fmt.Errorf("%s is about the present state, not about a snapshot: %w", object, fault.ErrUnsupported)
		}
		perCluster := img.header.clusterBytes() * 8 // bits
		need := ((img.header.size+b.Granularity-1)/b.Granularity + perCluster - 1) / perCluster
		if why := img.trusted(b); why != "" {
			return nil, fmt.Errorf("%s %s: %w", object, why, fault.ErrUnsupported)
		}
		switch {
		case b.entries != need:
			return nil, img.corrupt(b.table, "bitmap %q has %d clusters, the disk needs %d", name, b.entries, need)
		case b.entries > 0 && (b.table <= 0 || b.table%img.header.clusterBytes() != 0 || b.table > img.fileLimit()-b.entries*8):
			return nil, img.corrupt(b.table, "the table of bitmap %q does not fit into a file of %d bytes", name, img.file.Bytes())
		}
		return b, nil
	}
	return nil, fmt.Errorf("%s: %w", object, fault.ErrNotFound)
}

// trusted says why the bitmap may lack writes, "" if it may not.
func (img *Image) trusted(b *Bitmap) string {
	switch {
	case img.header.autoclear&autoclearBitmaps == 0:
		return "was not kept up to date by who wrote the image last"
	case b.InUse:
		return "was not stored properly and lacks writes"
	case b.Unknown:
		return "is of an unknown kind"
	}
	return ""
}

// walkBitmap gives runs of set bits to emit until that returns false.
func (img *Image) walkBitmap(ctx context.Context, b *Bitmap, emit func(first, n int64) bool) error {
	table, content := img.ownView(), img.ownView()
	perCluster := img.header.clusterBytes() * 8
	for i := range b.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		at := b.table + i*8
		p, err := table(at, 8)
		if err != nil {
			return err
		}
		entry := binary.BigEndian.Uint64(p)
		host := int64(entry & offsetMask)
		switch {
		case entry&^(offsetMask|1) != 0:
			return img.corrupt(at, "bitmap table entry %#016x", entry)
		case host == 0 && entry&1 != 0:
			if !emit(i*perCluster, perCluster) {
				return nil
			}
			continue
		case host == 0:
			continue
		case host%img.header.clusterBytes() != 0:
			return img.corrupt(at, "bits at %d, which is not a cluster", host)
		}
		for off := int64(0); off < img.header.clusterBytes(); {
			p, err := content(host+off, img.header.clusterBytes()-off)
			if err != nil {
				return err
			}
			if !emitBits(p, i*perCluster+off*8, emit) {
				return nil
			}
			off += int64(len(p))
		}
	}
	return nil
}

// emitBits gives the runs of set bits in p, least significant first, of which
// the first has number base. len(p) is a multiple of 8.
func emitBits(p []byte, base int64, emit func(first, n int64) bool) bool {
	for ; len(p) >= 8; p, base = p[8:], base+64 {
		word := binary.LittleEndian.Uint64(p)
		for at := 0; word != 0; {
			skip := bits.TrailingZeros64(word)
			word >>= skip
			n := bits.TrailingZeros64(^word)
			if !emit(base+int64(at+skip), int64(n)) {
				return false
			}
			at += skip + n
			word >>= n // 0 for n = 64
		}
	}
	return true
}
