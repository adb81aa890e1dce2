package open

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// Chain walks the layers of the image at path, the image itself first and its
// base last, and gives visit each of them alone: what it does not hold is
// Absent. The layer is closed when visit returns; an error of visit ends the
// walk.
//
// Where a layer's parent cannot be opened, the layers above it have been
// visited and the error says what is missing, as that of Open does.
func Chain(path string, o Options, visit func(path string, layer image.Image) error) error {
	format, err := chain(path, o, visit)
	return renamed(err, path, format, o)
}

func chain(path string, o Options, visit func(path string, layer image.Image) error) (image.Format, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return "", err
	}
	opened := []image.File{f}
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	format := o.Format
	if format == "" {
		if format, _, err = detect(f, path); err != nil {
			return "", err
		}
	}
	seen := &files{dir: filepath.Dir(path)}
	parents := o.parents(f, format, seen)

	// A layer is opened twice: alone, to be looked at, and with a parent that
	// is opened alone, which is how its format makes sure of the right one.
	type layer struct {
		file   image.File
		dir    string
		format image.Format
		parent image.OpenParent
	}
	openLayer := func(l layer, alone bool) (image.Image, error) {
		oo := image.OpenOptions{Resolver: from(parents, l.file), Parent: l.parent, OnlyTop: alone}
		if len(opened) == 1 {
			oo.Snapshot = o.Snapshot
		}
		if l.format == image.OVA {
			return openAppliance(l.file, o.Disk, oo)
		}
		return openAs(l.file, l.dir, l.format, oo, seen)
	}
	var next *layer
	hook := func(f image.File, format image.Format, parent image.OpenParent) (image.Image, error) {
		l := layer{kept{f}, filepath.Dir(f.Name()), format, parent}
		img, err := openAs(l.file, l.dir, l.format, image.OpenOptions{Resolver: from(parents, f), OnlyTop: true}, seen)
		if err != nil {
			return nil, err
		}
		opened = append(opened, f)
		l.format = img.Info().Format // the child need not have said it
		next = &l
		return img, nil
	}
	for l := (layer{kept{f}, filepath.Dir(path), format, image.Parents(f, parents, hook)}); ; l = *next {
		img, err := openLayer(l, true)
		if err != nil {
			return format, err
		}
		err = visit(l.file.Name(), img)
		img.Close()
		if err != nil {
			return format, err
		}
		if o.OnlyTop {
			return format, nil
		}
		next = nil
		if img, err = openLayer(l, false); err != nil {
			return format, err
		}
		img.Close()
		if next == nil {
			return format, nil
		}
	}
}

// A kept is a File that somebody else closes.
type kept struct{ image.File }

func (kept) Close() error { return nil }

// SyscallConn is that of the file, for those who ask it for holes.
func (k kept) SyscallConn() (syscall.RawConn, error) {
	if c, ok := k.File.(syscall.Conn); ok {
		return c.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// Stat is that of the file, for those who compare files.
func (k kept) Stat() (os.FileInfo, error) {
	if s, ok := k.File.(interface{ Stat() (os.FileInfo, error) }); ok {
		return s.Stat()
	}
	return nil, errors.ErrUnsupported
}

// A RenamedError is the error of a chain whose parent is not where its child
// says, although its identity is found in another file.
type RenamedError struct {
	Parent   string // as the child names it
	Identity string
	File     string // that has the identity
	Err      error
}

func (e *RenamedError) Error() string { return e.Err.Error() }
func (e *RenamedError) Unwrap() error { return e.Err }

// renamed turns err, with which the chain of the image at path did not open,
// into a RenamedError if the parent that is missing lies in the allowed
// directory under another name.
func renamed(err error, path string, format image.Format, o Options) error {
	if o.ParentDir == "" || o.OnlyTop || !errors.Is(err, fault.ErrNotFound) && !errors.Is(err, image.ErrNotAllowed) && !errors.Is(err, fault.ErrCorrupt) {
		return err
	}
	if errors.As(err, new(*RenamedError)) {
		return err
	}
	o.Format = format
	var last image.Info
	var layers []string
	if _, again := chain(path, o, func(path string, layer image.Image) error {
		last = layer.Info()
		layers = append(layers, filepath.Clean(path))
		return nil
	}); again == nil || last.Parent == "" {
		return err
	}
	for _, id := range strings.Fields(last.FormatDetails["parent identity"]) {
		found := havingIdentity(o.ParentDir, last.ParentFormat, id)
		// A VMDK has its parent's identity until it is first written to.
		found = slices.DeleteFunc(found, func(path string) bool { return slices.Contains(layers, filepath.Clean(path)) })
		if len(found) == 1 {
			return &RenamedError{last.Parent, id, found[0], err}
		}
	}
	return err
}

// lookedAt bounds in how many files of a directory an identity is looked for.
const lookedAt = 256

// havingIdentity gives the images of format f right in dir that have the
// identity id.
func havingIdentity(dir string, f image.Format, id string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var found []string
	looked := 0
	for _, e := range entries {
		if named, _ := FormatByName(e.Name()); named != f || !e.Type().IsRegular() {
			continue
		}
		if looked++; looked > lookedAt {
			return nil
		}
		file, err := DirResolver{Dir: dir, Plain: true}.Resolve(e.Name())
		if err != nil {
			continue
		}
		img, err := openAs(file, dir, f, image.OpenOptions{OnlyTop: true}, &files{dir: dir})
		if err != nil {
			file.Close()
			continue
		}
		if img.Info().Identity == id {
			found = append(found, filepath.Join(dir, e.Name()))
		}
		img.Close()
	}
	return found
}
