package open

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/winpath"
)

// A HostResolver opens the files of a Windows host that images there name:
// those that lie beneath the directories of the VM whose disk it is, and no
// others.
type HostResolver struct {
	// Dirs are the directories; none allows nothing.
	Dirs []winpath.Path
	// Open opens a file beneath one of Dirs. It says fault.ErrNotFound where
	// there is none. The File's Name is the path's String.
	Open func(winpath.Path) (image.File, error)
	// At is the directory where relative names begin.
	At winpath.Path
}

var _ image.RelativeResolver = HostResolver{}

// From is r for the names in child, which are relative to child's directory.
func (r HostResolver) From(child image.File) image.Resolver {
	r.At = winpath.Path{}
	if p, err := winpath.Parse(child.Name()); err == nil {
		r.At = p.Dir()
	}
	return r
}

// Resolve opens the file of that name.
func (r HostResolver) Resolve(name string) (image.File, error) {
	var p winpath.Path
	var err error
	if winpath.Full(name) {
		p, err = winpath.Parse(name)
	} else {
		p, err = r.At.Join(name)
	}
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", image.ErrNotAllowed, err)
	}
	for _, dir := range r.Dirs {
		if rest, ok := p.Under(dir); !ok || rest == "" {
			continue
		}
		f, err := r.Open(p)
		if errors.Is(err, fault.ErrNotFound) {
			return nil, fmt.Errorf("%s: no such file on the host: %w", p, fault.ErrNotFound)
		}
		return f, err
	}
	return nil, fmt.Errorf("%s lies in no directory of the VM: %w", p, image.ErrNotAllowed)
}

// Hosted opens the disk in f, a VHD or VHDX as it lies on a Windows host, with
// its parents, which r finds. The Image owns f; where Hosted fails, f is still
// the caller's. Errors as those of Open.
func Hosted(f image.File, r HostResolver) (image.Image, error) {
	return hosted(f, "", image.Parents(f, r, hosted))
}

// hosted opens one layer. Its name says its format, which for a parent is also
// its child's: no file is opened for what its content looks like.
func hosted(f image.File, format image.Format, parent image.OpenParent) (image.Image, error) {
	ext := strings.ToLower(path.Ext(f.Name()))
	var named image.Format
	switch ext {
	case ".vhdx", ".avhdx":
		named = image.VHDX
	case ".vhd", ".avhd":
		named = image.VHD
	case ".vhds":
		return nil, fmt.Errorf("%s: a VHD set, which several VMs share: %w", f.Name(), fault.ErrUnsupported)
	default:
		return nil, fmt.Errorf("%s: its name does not say that it is a VHD or VHDX: %w", f.Name(), ErrFormat)
	}
	if format != "" && format != named {
		return nil, fmt.Errorf("%s: its child says that it is a %s: %w", f.Name(), format, ErrFormat)
	}
	if named == image.VHD {
		return asImage(vhd.Open(f, parent))
	}
	return asImage(vhdx.Open(f, parent))
}
