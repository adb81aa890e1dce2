package open

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/qcow2"
	"github.com/backstay/backstay/internal/image/raw"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// Options say what may be opened, and how it is to be understood.
type Options struct {
	// Format is what the caller knows the image to be; then its content is not
	// asked. "" goes by the name, and by the content where the name says
	// nothing.
	Format image.Format
	// ParentDir is where parents may be opened; "" allows none, and an image
	// that has one is refused with image.ErrNotAllowed.
	ParentDir string
	// OnlyTop shows the image without its parent.
	OnlyTop bool
	// Snapshot is the internal snapshot to show.
	Snapshot string
}

// Open opens the image at path read-only. Of what its header names it opens
// extents and data files that lie beside it, and parents only as o allows.
func Open(path string, o Options) (image.Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	format := o.Format
	if format == "" {
		if format, err = detect(path, f); err != nil {
			f.Close()
			return nil, err
		}
	}
	io := image.OpenOptions{Resolver: DirResolver{Dir: filepath.Dir(path), Plain: true}, OnlyTop: o.OnlyTop, Snapshot: o.Snapshot}
	if o.ParentDir != "" && !o.OnlyTop {
		r := DirResolver{Dir: o.ParentDir, ByBase: true}
		io.Parent = image.Parents(f, r, func(f image.File, format image.Format, parent image.OpenParent) (image.Image, error) {
			if format == "" {
				if format, err = detect(f.Name(), f); err != nil {
					return nil, err
				}
			}
			return as(f, format, image.OpenOptions{Resolver: DirResolver{Dir: filepath.Dir(f.Name()), Plain: true}, Parent: parent})
		})
	}
	img, err := as(f, format, io)
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

// as opens f as an image of that format. If it fails f is still open.
func as(f image.File, format image.Format, o image.OpenOptions) (image.Image, error) {
	if o.Snapshot != "" && format != image.Qcow2 {
		return nil, fmt.Errorf("%s: snapshot %q: a %s image has no internal snapshots: %w", f.Name(), o.Snapshot, format, fault.ErrNotFound)
	}
	// Each case returns a nil Image of its own where it fails, not a nil
	// pointer in an Image.
	switch format {
	case image.Raw:
		return raw.Open(f), nil
	case image.Qcow2:
		if img, err := qcow2.Open(f, o); err != nil {
			return nil, err
		} else {
			return img, nil
		}
	case image.VHD:
		open := func() (*vhd.Image, error) { return vhd.Open(f, o.Parent) }
		if o.OnlyTop {
			open = func() (*vhd.Image, error) { return vhd.OpenLayer(f) }
		}
		if img, err := open(); err != nil {
			return nil, err
		} else {
			return img, nil
		}
	case image.VHDX:
		open := func() (*vhdx.Image, error) { return vhdx.Open(f, o.Parent) }
		if o.OnlyTop {
			open = func() (*vhdx.Image, error) { return vhdx.OpenLayer(f) }
		}
		if img, err := open(); err != nil {
			return nil, err
		} else {
			return img, nil
		}
	case image.VMDK:
		if img, err := vmdk.Open(f, o); err != nil {
			return nil, err
		} else {
			return img, nil
		}
	}
	return nil, fmt.Errorf("image format %q: %w", format, fault.ErrUnsupported)
}

var extensions = map[string]image.Format{
	".raw": image.Raw, ".qcow2": image.Qcow2, ".qcow": image.Qcow2, ".vhd": image.VHD, ".avhd": image.VHD, ".vpc": image.VHD,
	".vhdx": image.VHDX, ".avhdx": image.VHDX, ".vmdk": image.VMDK,
}

// FormatByName is the format that the extension of path stands for.
func FormatByName(path string) (image.Format, bool) {
	f, ok := extensions[strings.ToLower(filepath.Ext(path))]
	return f, ok
}

// detect finds out what an image is that nobody named. Its name comes first:
// the content of a raw disk is the guest's, which may have written anything.
func detect(path string, f image.File) (image.Format, error) {
	if format, ok := FormatByName(path); ok {
		return format, nil
	}
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeDevice != 0 {
		return image.Raw, nil
	}
	found := probe(f)
	if strings.EqualFold(filepath.Ext(path), ".img") && found != image.Raw {
		// Both are common, and only people know which it is.
		return "", fmt.Errorf("%s is called a raw image and looks like %s: say which with --format: %w", path, found, fault.ErrUnsupported)
	}
	return found, nil
}

// probe goes by the content alone.
func probe(f image.File) image.Format {
	var head [4]byte
	f.ReadAt(head[:], 0)
	switch {
	case string(head[:]) == "QFI\xfb":
		return image.Qcow2
	case vhdx.Probe(f):
		return image.VHDX
	case vmdk.Probe(f):
		return image.VMDK
	case vhd.Probe(f):
		return image.VHD
	}
	return image.Raw
}

// Create makes a new image at path, which must not exist. What has the name
// before Finish returned is no image yet.
func Create(path string, format image.Format, o image.CreateOptions) (image.Writer, error) {
	switch format {
	case image.Raw:
		return writer(raw.Create(path, o))
	case image.Qcow2:
		return writer(qcow2.Create(path, o))
	case image.VHD:
		return writer(vhd.Create(path, o))
	case image.VHDX:
		return writer(vhdx.Create(path, o))
	case image.VMDK:
		return vmdk.Create(path, o)
	}
	return nil, fmt.Errorf("image format %q: %w", format, fault.ErrUnsupported)
}

// writer keeps a nil pointer from becoming a Writer that is not nil.
func writer[W image.Writer](w W, err error) (image.Writer, error) {
	if err != nil {
		return nil, err
	}
	return w, nil
}
