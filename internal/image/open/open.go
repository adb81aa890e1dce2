// Package open opens and creates virtual disk images of every format: it knows
// which format a file has and which further files it may name.
//
// The format is what the caller says. Where the caller says nothing:
//
//   - a file called .raw is raw, whatever it holds: its bytes are the guest's,
//     who may write the head of any format into them;
//   - a file called .img is raw, and refused if it looks like another format:
//     people call both so, and taking one for the other ruins the disk;
//   - the extension of another format must agree with the content;
//   - a file of no such name is what its content says, or raw if that says
//     nothing; a block device is raw, or refused if its content says otherwise;
//   - content that is two formats at once is refused.
//
// What is refused gives ErrFormat, and opens when the caller names the format.
package open

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/ova"
	"github.com/backstay/backstay/internal/image/qcow2"
	"github.com/backstay/backstay/internal/image/raw"
	"github.com/backstay/backstay/internal/image/vdi"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// ErrFormat says that a file's name and content leave its format in doubt.
var ErrFormat = errors.New("the image's format is in doubt")

// Options say how to open an image.
type Options struct {
	// Format is the image's format; empty to detect it.
	Format image.Format
	// ParentDir allows parents and data files in or beneath that directory;
	// where their names are relative, they are so to the file that names them.
	// Empty allows none, and then an image that needs one gives
	// image.ErrNotAllowed. Extents of a VMDK are allowed always, right beside
	// its descriptor.
	ParentDir string
	// OnlyTop leaves parents unopened: what they hold reads as zeros.
	OnlyTop bool
	// Snapshot is the internal snapshot of a qcow2 image to read, by name or ID.
	Snapshot string
	// Disk is which disk of an appliance to read, if it has several: its
	// number from 1, its ID or its file.
	Disk string
}

// Open opens the image at path. Errors: ErrFormat; image.ErrNotAllowed for one
// whose parents are not allowed; fault.ErrCorrupt, fault.ErrUnsupported.
func Open(path string, o Options) (image.Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	img, err := open(f, path, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

func open(f image.File, path string, o Options) (image.Image, error) {
	format, warning := o.Format, ""
	if format == "" {
		var err error
		if format, warning, err = detect(f, path); err != nil {
			return nil, err
		}
	}
	seen := &files{dir: filepath.Dir(path)}
	parents := o.parents(f, format, seen)
	opener := func(f image.File, format image.Format, parent image.OpenParent) (image.Image, error) {
		return openAs(f, filepath.Dir(f.Name()), format, image.OpenOptions{Resolver: from(parents, f), Parent: parent}, seen)
	}
	oo := image.OpenOptions{
		Resolver: from(parents, f), Parent: image.Parents(f, parents, opener),
		OnlyTop: o.OnlyTop, Snapshot: o.Snapshot,
	}
	var img image.Image
	var err error
	switch {
	case format == image.OVA:
		img, err = openAppliance(f, o.Disk, oo)
	case o.Disk != "":
		err = fmt.Errorf("%s: disk %q: only an appliance (.ova) has several disks: %w", f.Name(), o.Disk, fault.ErrNotFound)
	default:
		img, err = openAs(f, filepath.Dir(path), format, oo, seen)
	}
	if err != nil {
		return nil, renamed(err, path, format, o)
	}
	warnings := seen.moved
	if warning != "" {
		warnings = append([]string{warning}, warnings...)
	}
	if len(warnings) > 0 || len(seen.names) > 0 {
		img = described{img, warnings, seen.names}
	}
	return img, nil
}

// parents is what finds the parents and data files of the image in f.
func (o Options) parents(f image.File, format image.Format, seen *files) image.Resolver {
	if o.ParentDir == "" {
		return image.None
	}
	if format == image.VDI {
		return recorder{byUUID{DirResolver{Dir: o.ParentDir}}, seen}
	}
	// Those formats name their parent's identity, so a wrong file of the right
	// name is found out. QCOW2 does not, and libvirt writes absolute names: where
	// the disk was moved, what lies in the directory that the caller allowed is
	// taken, and said.
	r := DirResolver{Dir: o.ParentDir, ByBase: format != image.Qcow2}
	if format == image.Qcow2 {
		r.Moved = func(name, found string) {
			seen.moved = append(seen.moved, fmt.Sprintf("the image names %q; %s was taken for it, which this format cannot check", name, found))
		}
	}
	return recorder{r, seen}
}

// from is r for the names in f.
func from(r image.Resolver, f image.File) image.Resolver {
	if relative, ok := r.(image.RelativeResolver); ok {
		return relative.From(f)
	}
	return r
}

// files are the names of what was opened for the image in dir.
type files struct {
	dir   string
	names []string
	moved []string // warnings about those that lay elsewhere than the image says
}

// A recorder is a Resolver that notes what it opened.
type recorder struct {
	image.Resolver
	seen *files
}

// From is r for the names in child.
func (r recorder) From(child image.File) image.Resolver {
	return recorder{from(r.Resolver, child), r.seen}
}

// Resolve opens the file of that name.
func (r recorder) Resolve(name string) (image.File, error) {
	f, err := r.Resolver.Resolve(name)
	if err != nil {
		return nil, err
	}
	path, err := filepath.Rel(r.seen.dir, f.Name())
	if err != nil {
		if path, err = filepath.Abs(f.Name()); err != nil {
			f.Close()
			return nil, err
		}
	}
	if !slices.Contains(r.seen.names, path) {
		r.seen.names = append(r.seen.names, path)
	}
	return f, nil
}

// openAs opens f, which lies in dir, as what it was said to be.
func openAs(f image.File, dir string, format image.Format, o image.OpenOptions, seen *files) (image.Image, error) {
	if o.Snapshot != "" && format != image.Qcow2 {
		return nil, fmt.Errorf("%s: snapshot %q: %s images have no internal snapshots: %w", f.Name(), o.Snapshot, format, fault.ErrNotFound)
	}
	switch format {
	case image.Raw:
		return raw.Open(f), nil
	case image.Qcow2:
		return asImage(qcow2.Open(f, o))
	case image.VHD:
		if o.OnlyTop {
			return asImage(vhd.OpenLayer(f))
		}
		return asImage(vhd.Open(f, o.Parent))
	case image.VHDX:
		if o.OnlyTop {
			return asImage(vhdx.OpenLayer(f))
		}
		return asImage(vhdx.Open(f, o.Parent))
	case image.VDI:
		if o.OnlyTop {
			return asImage(vdi.OpenLayer(f))
		}
		return asImage(vdi.Open(f, o.Parent))
	case image.VMDK:
		// The extents are the disk itself, in several files.
		o.Resolver = recorder{DirResolver{Dir: dir, Plain: true}, seen}
		return asImage(vmdk.Open(f, o))
	case "":
		// A child that does not say what its parent is. The parent's content
		// is the last thing to ask: its guest could have written it.
		if _, ok := FormatByName(f.Name()); !ok {
			return nil, fmt.Errorf("%s: its child does not say what format it has: %w", f.Name(), ErrFormat)
		}
		// Where name and content disagree the child alone could say.
		format, _, err := detect(f, f.Name())
		if err != nil {
			return nil, fmt.Errorf("its child does not say what format it has: %w", err)
		}
		return openAs(f, dir, format, o, seen)
	}
	return nil, fmt.Errorf("%s: format %q: %w", f.Name(), format, fault.ErrUnsupported)
}

// asImage keeps a nil pointer from becoming an Image.
func asImage[I image.Image](img I, err error) (image.Image, error) {
	if err != nil {
		return nil, err
	}
	return img, nil
}

// A described is an image with what it does not know of itself.
type described struct {
	image.Image
	warnings []string
	files    []string
}

// Unwrap is the image itself, with what only its format can do.
func (d described) Unwrap() image.Image { return d.Image }

func (d described) Info() image.Info {
	info := d.Image.Info()
	info.Warnings = append(slices.Clip(info.Warnings), d.warnings...)
	info.Files = slices.Clone(d.files)
	return info
}

// Detect says which format the file at path has, by the rules of this package.
func Detect(path string) (image.Format, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	format, _, err := detect(f, path)
	return format, err
}

// detect also gives a warning for a raw file that looks like something else.
func detect(f image.File, path string) (format image.Format, warning string, err error) {
	doubt := func(why string, args ...any) (image.Format, string, error) {
		return "", "", fmt.Errorf("%s: %s: %w", path, fmt.Sprintf(why, args...), ErrFormat)
	}
	content := byContent(f)
	named, known := FormatByName(path)
	switch {
	case known && named == image.Raw && len(content) > 0 && strings.EqualFold(filepath.Ext(path), ".img"):
		return doubt("a file of that name may be raw, but it looks like %s", content[0])
	case known && named == image.Raw:
		if len(content) > 0 {
			warning = fmt.Sprintf("read as raw because of its name, but it looks like %s", content[0])
		}
		return image.Raw, warning, nil
	case len(content) > 1:
		return doubt("it is %s and %s at once", content[0], content[1])
	case known && len(content) == 1 && content[0] != named:
		return doubt("its name says %s and its content %s", named, content[0])
	case known:
		return named, "", nil // where the content says nothing, the format's own error says what is wrong
	case len(content) == 0:
		return image.Raw, "", nil
	case device(path):
		return doubt("a block device that begins like %s", content[0])
	}
	return content[0], "", nil
}

// byContent gives all formats that the bytes of f could be.
func byContent(f image.File) []image.Format {
	var list []image.Format
	for _, c := range []struct {
		format image.Format
		probe  func(image.File) bool
	}{
		{image.Qcow2, probeQcow2}, {image.VHDX, vhdx.Probe}, {image.VMDK, vmdk.Probe}, {image.VHD, vhd.Probe}, {image.VDI, vdi.Probe}, {image.OVA, ova.Probe},
	} {
		if c.probe(f) {
			list = append(list, c.format)
		}
	}
	return list
}

func probeQcow2(f image.File) bool {
	var magic [4]byte
	n, _ := f.ReadAt(magic[:], 0)
	return string(magic[:n]) == "QFI\xfb"
}

func device(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&os.ModeDevice != 0
}

// extensions of image files; the first of each format is what we write.
var extensions = []struct {
	ext    string
	format image.Format
}{
	{".raw", image.Raw}, {".img", image.Raw},
	{".qcow2", image.Qcow2},
	{".vhd", image.VHD}, {".vpc", image.VHD}, {".avhd", image.VHD},
	{".vhdx", image.VHDX}, {".avhdx", image.VHDX},
	{".vmdk", image.VMDK},
	{".vdi", image.VDI},
	{".ova", image.OVA},
}

// FormatByName goes by the extension of path; false for one that says nothing.
func FormatByName(path string) (image.Format, bool) {
	ext := strings.ToLower(filepath.Ext(path))
	for _, e := range extensions {
		if e.ext == ext {
			return e.format, true
		}
	}
	return "", false
}

// Create makes a new image of format f at path, which must not exist. A VMDK
// of several files makes the others beside it, as vmdk.Create says.
func Create(path string, f image.Format, o image.CreateOptions) (image.Writer, error) {
	switch f {
	case image.Raw:
		return asWriter(raw.Create(path, o))
	case image.Qcow2:
		return asWriter(qcow2.Create(path, o))
	case image.VHD:
		return asWriter(vhd.Create(path, o))
	case image.VHDX:
		return asWriter(vhdx.Create(path, o))
	case image.VMDK:
		return vmdk.Create(path, o)
	case image.OVA:
		return ova.Create(path, o)
	}
	return nil, fmt.Errorf("format %q: %w", f, fault.ErrUnsupported)
}

// asWriter keeps a nil pointer from becoming a Writer.
func asWriter[W image.Writer](w W, err error) (image.Writer, error) {
	if err != nil {
		return nil, err
	}
	return w, nil
}
