package open

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vdi"
)

// searched bounds how many files are asked for their UUID.
const searched = 10000

// A byUUID finds the parents of VDIs. They are known by UUID alone: VirtualBox
// calls snapshots by it, in a directory of their own, and the base as the user
// likes.
type byUUID struct {
	DirResolver
}

// From is r for the names in child.
func (r byUUID) From(child image.File) image.Resolver {
	r.DirResolver = r.DirResolver.From(child).(DirResolver)
	return r
}

// Resolve opens the file of that name or, if there is none, the one VDI in the
// directory or right beneath it whose UUID the name is.
func (r byUUID) Resolve(name string) (image.File, error) {
	f, err := r.DirResolver.Resolve(name)
	if !errors.Is(err, fault.ErrNotFound) {
		return f, err
	}
	var found []string
	tried := 0
	walk := fs.WalkDir(os.DirFS(r.Dir), ".", func(rel string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil // what cannot be listed is not searched
		case d.IsDir() && strings.Count(rel, "/") > 0:
			return fs.SkipDir
		case !strings.EqualFold(path.Ext(rel), ".vdi") || !d.Type().IsRegular():
			return nil
		}
		if tried++; tried > searched {
			return fmt.Errorf("%s: more than %d images in which %s was looked for", r.Dir, searched, name)
		}
		f, err := r.open(rel)
		if err != nil {
			return nil
		}
		defer f.Close()
		if id, err := vdi.UUID(f); err == nil && vdi.ParentName(id) == name {
			found = append(found, rel)
		}
		return nil
	})
	switch {
	case walk != nil:
		return nil, walk
	case len(found) == 0:
		return nil, err
	case len(found) > 1:
		// Copies of one image may differ by now, and nothing says which is right.
		return nil, fmt.Errorf("%s and %s both have the UUID of %s: %w", found[0], found[1], name, fault.ErrUnsupported)
	}
	return r.open(found[0])
}

// open opens what lies at rel in the directory.
func (r byUUID) open(rel string) (image.File, error) {
	f, err := openBeneath(r.Dir, filepath.ToSlash(rel))
	if err != nil {
		return nil, err
	}
	file, err := image.OSFile(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return file, nil
}
