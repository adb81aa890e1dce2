package open

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// A DirResolver opens the files that images name, and only regular files
// beneath one directory, never through a symbolic link. A name of another host
// or system ("C:\vm\base.vhd", "/vmfs/volumes/…/disk.vmdk") is one that may not
// be opened, unless ByBase says to look for its last part.
type DirResolver struct {
	Dir string
	// Plain allows no directories in names: the file lies right in Dir.
	Plain bool
	// ByBase looks for the last part of a name that leads elsewhere. It is for
	// formats that tell a right file from a wrong one by its identity.
	ByBase bool
	// Moved makes Resolve look for the last part of an absolute name that leads
	// elsewhere, too, and is told what was found. It is for formats that can't
	// tell a wrong file, so whoever sets it passes that on.
	Moved func(name, found string)
	// At is the directory in or beneath Dir where relative names begin; Dir
	// itself if it is empty or lies elsewhere.
	At string
}

var _ image.RelativeResolver = DirResolver{}

// From is r for the names in child, which are relative to child's directory.
func (r DirResolver) From(child image.File) image.Resolver {
	r.At = filepath.Dir(child.Name())
	return r
}

// Resolve opens the file of that name.
func (r DirResolver) Resolve(name string) (image.File, error) {
	refused := fmt.Errorf("%q: %w", name, image.ErrNotAllowed)
	if strings.ContainsRune(name, 0) || len(name) > 4096 {
		return nil, refused
	}
	var candidates []string
	exact := 0
	if rel, ok := r.beneath(name); ok {
		candidates = append(candidates, rel)
		exact = 1
	}
	absolute := strings.HasPrefix(name, "/") || drive(name)
	if base := lastPart(name); (r.ByBase || r.Moved != nil && absolute) && local(base) {
		candidates = append(candidates, path.Join(r.start(), base), base)
	}
	var f *os.File
	err := refused
	for i, rel := range candidates {
		if i > 0 && rel == candidates[i-1] {
			continue
		}
		if f, err = openBeneath(r.Dir, rel); !missing(err) {
			if err == nil && r.Moved != nil && i >= exact {
				r.Moved(name, filepath.Join(r.Dir, filepath.FromSlash(rel)))
			}
			break
		}
	}
	if len(candidates) == 0 {
		return nil, refused
	}
	if missing(err) {
		return nil, fmt.Errorf("%q: no file of that name in %s: %w", name, r.Dir, fault.ErrNotFound)
	}
	if errors.Is(err, errEscapes) {
		return nil, fmt.Errorf("%q: %w (%w)", name, image.ErrNotAllowed, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	file, err := image.OSFile(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	return file, nil
}

// missing says whether err means that there is no such file, nor could be.
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ENAMETOOLONG)
}

// errEscapes is the reason not to open what a name leads to: a symbolic link,
// a device, a pipe, something outside.
var errEscapes = errors.New("not a regular file beneath its directory")

// beneath turns name into a path relative to the directory, with slashes. It
// is false for a name that leads elsewhere.
func (r DirResolver) beneath(name string) (string, bool) {
	if r.Plain {
		return name, lastPart(name) == name && local(name)
	}
	rel := name
	switch {
	case filepath.IsAbs(name):
		dir, err := filepath.Abs(r.Dir)
		if err != nil {
			return "", false
		}
		if rel, err = filepath.Rel(dir, name); err != nil {
			return "", false
		}
		rel = filepath.ToSlash(rel)
	case drive(name):
		return "", false
	case strings.Contains(name, `\`) && !strings.Contains(name, "/"):
		rel = strings.ReplaceAll(name, `\`, "/") // as Windows writes them: .\base.vhdx
	}
	if !filepath.IsAbs(name) {
		rel = path.Join(r.start(), rel)
	}
	rel = path.Clean(rel)
	return rel, local(rel)
}

// start is the directory, with slashes, where relative names begin, relative to
// Dir.
func (r DirResolver) start() string {
	if r.At == "" {
		return "."
	}
	dir, err := filepath.Abs(r.Dir)
	at, err2 := filepath.Abs(r.At)
	if err != nil || err2 != nil {
		return "."
	}
	rel, err := filepath.Rel(dir, at)
	if err != nil || !filepath.IsLocal(rel) {
		return "."
	}
	return filepath.ToSlash(rel)
}

func lastPart(name string) string { return name[strings.LastIndexAny(name, `/\`)+1:] }

// drive says whether name begins with a drive letter, as absolute names of
// Windows do.
func drive(name string) bool {
	return len(name) > 2 && name[1] == ':' && name[2] == '\\' && (name[0]|0x20 >= 'a' && name[0]|0x20 <= 'z')
}

// local says whether a relative path with slashes stays where it begins, on
// this system, and names no drive, stream or device.
func local(rel string) bool {
	if rel == "" || rel == "." || !filepath.IsLocal(filepath.FromSlash(rel)) {
		return false
	}
	return runtime.GOOS != "windows" || !strings.ContainsAny(rel, ":\\")
}

// openInRoot is openBeneath for systems and kernels that have no better way.
func openInRoot(dir, rel string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// Root follows links that stay inside; we follow none.
	parts := strings.Split(rel, "/")
	for i := range parts {
		info, err := root.Lstat(filepath.FromSlash(strings.Join(parts[:i+1], "/")))
		if err != nil {
			return nil, err
		}
		if last := i == len(parts)-1; last && !info.Mode().IsRegular() || !last && !info.IsDir() {
			return nil, errEscapes
		}
	}
	f, err := root.OpenFile(filepath.FromSlash(rel), os.O_RDONLY|nonblock, 0)
	if err != nil {
		return nil, err
	}
	return f, regular(f)
}

// regular closes f and says so if it is no regular file.
func regular(f *os.File) error {
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errEscapes
	}
	if err != nil {
		f.Close()
	}
	return err
}
