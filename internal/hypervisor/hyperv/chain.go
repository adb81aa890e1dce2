package hyperv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/winpath"
)

// openChain opens a disk's file with its parents, as they lie on the host.
// Parents are opened only in shares by which the VM's own disks are reached.
// chain names all the files.
func openChain(ctx context.Context, fs files, file, format string, shares map[string]bool) (img image.Image, chain []string, err error) {
	top, err := openNamed(ctx, fs, file)
	if err != nil {
		return nil, nil, err
	}
	chain = []string{file}
	open := func(f image.File, _ image.Format, parent image.OpenParent) (image.Image, error) {
		if format == "vhd" {
			return vhd.Open(f, parent)
		}
		return vhdx.Open(f, parent)
	}
	img, err = open(top, "", image.Parents(top, parents{ctx: ctx, fs: fs, shares: shares, opened: &chain}, open))
	if err != nil {
		top.Close()
		return nil, nil, err
	}
	return img, chain, nil
}

// A named file is called as the host calls it.
type named struct {
	image.File
	name string
}

func (f named) Name() string { return f.name }

// Identity is the file's own, by which a loop of parents is known.
func (f named) Identity() string {
	if i, ok := f.File.(interface{ Identity() string }); ok {
		return i.Identity()
	}
	return ""
}

// ReadAt says of its errors that they are of the way to the file, and not of
// what is in it.
func (f named) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	if err != nil && err != io.EOF {
		err = &FilesError{err}
	}
	return n, err
}

func openNamed(ctx context.Context, fs files, name string) (image.File, error) {
	f, err := fs.open(ctx, name)
	if err != nil {
		return nil, err
	}
	return named{f, name}, nil
}

// parents opens what the headers of differencing disks name.
type parents struct {
	ctx    context.Context
	fs     files
	shares map[string]bool
	child  string
	opened *[]string // their full names, added to
}

var _ image.RelativeResolver = parents{}

func (r parents) From(child image.File) image.Resolver {
	r.child = child.Name()
	return r
}

func (r parents) Resolve(name string) (image.File, error) {
	full, err := from(r.child, name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", image.ErrNotAllowed, err)
	}
	share, err := r.fs.share(full)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", image.ErrNotAllowed, err)
	}
	if !r.shares[share] {
		return nil, fmt.Errorf("%q is in the share %s, where the VM has no disk: %w", full, share, image.ErrNotAllowed)
	}
	f, err := openNamed(r.ctx, r.fs, full)
	if err == nil {
		*r.opened = append(*r.opened, full)
	}
	return f, err
}

// from is the full name of what is called name in the file child.
func from(child, name string) (string, error) {
	if name == "" {
		return "", errors.New("it has no name")
	}
	if winpath.Full(name) {
		p, err := winpath.Parse(name)
		return p.String(), err
	}
	p, err := winpath.Parse(child)
	if err == nil {
		p, err = p.Dir().Join(name)
	}
	return p.String(), err
}

// sameFile says whether two full names are spelt for one file.
func sameFile(a, b string) bool {
	p, err := winpath.Parse(a)
	q, err2 := winpath.Parse(b)
	return err == nil && err2 == nil && strings.EqualFold(p.String(), q.String())
}

// volumeOf is what a file shares its space with: a drive, a share, a cluster's
// volume.
func volumeOf(name string) string {
	p, err := winpath.Parse(name)
	if err != nil {
		return ""
	}
	volume := p.Root()
	if first, rest, _ := strings.Cut(p.Below(), `\`); strings.EqualFold(first, "ClusterStorage") {
		second, _, _ := strings.Cut(rest, `\`)
		volume += `\` + first + `\` + second
	}
	return strings.ToLower(volume)
}

// readFile reads a small file of the host whole.
func readFile(ctx context.Context, fs files, name string, most int64) ([]byte, error) {
	f, err := fs.open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Bytes() > most {
		return nil, fmt.Errorf("%s has %d bytes: %w", name, f.Bytes(), fault.ErrUnsupported)
	}
	p := make([]byte, f.Bytes())
	n, err := f.ReadAt(p, 0)
	if n < len(p) {
		return nil, fmt.Errorf("%s: %d of %d bytes: %w", name, n, len(p), err)
	}
	return p, nil
}
