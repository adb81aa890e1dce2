// Package raw reads and writes raw disk images: the disk's bytes and nothing
// else. A raw image has no header, so it has no damage either; its content
// belongs to the guest and never decides anything.
package raw

import (
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// Image is a raw disk image.
type Image struct {
	file image.File
	size int64
}

var _ image.Image = (*Image)(nil)

// OpenPath opens the file or block device at path.
func OpenPath(path string) (*Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	return Open(f), nil
}

// Open makes an Image of f, which belongs to it from then on. Every file is a
// raw image.
func Open(f image.File) *Image { return &Image{file: f, size: f.Bytes()} }

// Size is the length of the file in bytes, of which nothing is rounded.
func (img *Image) Size() int64 { return img.size }

// Close closes the file.
func (img *Image) Close() error { return img.file.Close() }

// ReadAt reads the file. A file that has shrunk since Open is an error of the
// class ErrCorrupt, because its missing end is nobody's zeros.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%s: read at negative offset %d", img.file.Name(), off)
	}
	if off >= img.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	short := int64(len(p)) > img.size-off
	if short {
		p = p[:img.size-off]
	}
	n, err := img.file.ReadAt(p, off)
	switch {
	case n < len(p) && err == io.EOF:
		return n, fault.Corrupt(img.file.Name(), off+int64(n), "the file shrank from %d bytes while it was read", img.size)
	case n < len(p):
		return n, err
	case short:
		return n, io.EOF
	}
	return n, nil
}

// Info says what little there is to say.
func (img *Image) Info() image.Info {
	return image.Info{Format: image.Raw, VirtualBytes: img.size, FileBytes: img.size}
}

// Extents gives the file system's holes as Zero and all else as Data. Where
// the file system or the File does not tell, everything is Data.
func (img *Image) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		within = within.Intersect(extent.Extent{Len: img.size})
		for off := within.Off; off < within.End(); {
			if err := ctx.Err(); err != nil {
				yield(image.Extent{}, err)
				return
			}
			kind, end := image.Data, within.End()
			if data, hole, ok := image.NextData(img.file, off, img.size); ok {
				if off < data {
					kind, end = image.Zero, min(data, end)
				} else {
					end = min(hole, end)
				}
			}
			e := image.Extent{Extent: extent.Extent{Off: off, Len: end - off}, Kind: kind, FileOffset: off}
			if kind == image.Zero {
				e.FileOffset = -1
			}
			if !yield(e, nil) {
				return
			}
			off = end
		}
	}
}
