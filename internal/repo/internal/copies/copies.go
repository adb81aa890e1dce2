// Package copies keeps copies of a store's immutable objects on the local disk:
// as many as fit, each whole, and all of them safe to delete at any time.
package copies

import (
	"context"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// A Source reads objects; a blob.Store is one.
type Source interface {
	ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error)
	Size(ctx context.Context, name string) (int64, error)
}

const (
	pieceBytes = 4 << 20 // of an object, read at once
	tempPrefix = "tmp-"
	// tempAge is how old a half-made copy is when its maker must be dead.
	tempAge = 24 * time.Hour
)

// A Dir is a Source that keeps a copy of each object it is asked for. Several
// processes may share a directory, and several Dirs a parent, whose size is
// bounded over all of them. Trouble with the local disk is never an error: then
// the store is asked. It is safe for concurrent use.
type Dir struct {
	src    Source
	parent string
	dir    string
	max    int64

	mu   sync.Mutex
	open map[string]*held
}

// held is the copy of one object.
type held struct {
	mu sync.Mutex // held while it is made
	f  *os.File   // nil: there is none, ask the store
	ok bool       // somebody tried
}

// New keeps copies of objects of src in parent/name, and at most max bytes in
// parent, the last used longest. Directories are made with the first copy.
func New(src Source, parent, name string, max int64) *Dir {
	return &Dir{src: src, parent: parent, dir: filepath.Join(parent, name), max: max, open: map[string]*held{}}
}

// local is the file name of an object's copy.
func (d *Dir) local(name string) string { return filepath.Join(d.dir, path.Base(name)) }

// ReadAt reads from the copy, which it makes first, or else from the store.
func (d *Dir) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	h := d.get(ctx, name)
	if h == nil {
		return d.src.ReadAt(ctx, name, p, off)
	}
	n, err := h.ReadAt(p, off)
	if n == len(p) || err == io.EOF {
		return n, err
	}
	return d.src.ReadAt(ctx, name, p, off)
}

func (d *Dir) get(ctx context.Context, name string) *os.File {
	d.mu.Lock()
	h := d.open[name]
	if h == nil {
		h = &held{}
		d.open[name] = h
	}
	d.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.ok {
		f, err := d.make(ctx, name)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			h.f = f
		}
		h.ok = true
	}
	return h.f
}

// make opens the copy of an object, or makes one.
func (d *Dir) make(ctx context.Context, name string) (*os.File, error) {
	if f, err := os.Open(d.local(name)); err == nil {
		now := time.Now()
		os.Chtimes(d.local(name), now, now) // for room
		return f, nil
	}
	size, err := d.src.Size(ctx, name)
	if err != nil {
		return nil, err
	}
	if !d.room(size) {
		return nil, errors.New("it does not fit")
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(d.dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	if d.fill(ctx, f, name, size) == nil {
		err := os.Rename(f.Name(), d.local(name))
		if err == nil {
			return f, nil
		}
		// Where an open file cannot be renamed, it is opened again.
		f.Close()
		if err = os.Rename(f.Name(), d.local(name)); err == nil {
			return os.Open(d.local(name))
		}
	}
	f.Close()
	os.Remove(f.Name())
	return nil, errors.New("it could not be copied")
}

func (d *Dir) fill(ctx context.Context, f *os.File, name string, size int64) error {
	buf := make([]byte, min(pieceBytes, size))
	for off := int64(0); off < size; {
		n, err := d.src.ReadAt(ctx, name, buf[:min(pieceBytes, size-off)], off)
		if n == 0 && err == nil {
			err = io.ErrUnexpectedEOF
		}
		if n == 0 {
			return err
		}
		if _, err := f.Write(buf[:n]); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// room makes room for n bytes: what was not used for longest goes.
func (d *Dir) room(n int64) bool {
	type file struct {
		path  string
		bytes int64
		used  time.Time
	}
	var files []file
	total := int64(0)
	dirs, _ := os.ReadDir(d.parent)
	for _, sub := range dirs {
		entries, _ := os.ReadDir(filepath.Join(d.parent, sub.Name()))
		for _, e := range entries {
			info, err := e.Info()
			if err != nil || !info.Mode().IsRegular() {
				continue
			}
			at := filepath.Join(d.parent, sub.Name(), e.Name())
			if strings.HasPrefix(e.Name(), tempPrefix) && time.Since(info.ModTime()) > tempAge {
				os.Remove(at)
				continue
			}
			files = append(files, file{at, info.Size(), info.ModTime()})
			total += info.Size()
		}
	}
	if n > d.max {
		return false
	}
	slices.SortFunc(files, func(a, b file) int { return a.used.Compare(b.used) })
	for _, f := range files {
		if total+n <= d.max {
			break
		}
		if os.Remove(f.path) == nil {
			total -= f.bytes
		}
	}
	return total+n <= d.max
}

// Drop forgets the copy of an object, which may be damaged. It says whether
// there was one.
func (d *Dir) Drop(name string) bool {
	d.mu.Lock()
	h := d.open[name]
	delete(d.open, name)
	d.mu.Unlock()
	there := os.Remove(d.local(name)) == nil
	if h == nil {
		return there
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	// Readers may still have the file: it is closed when they are done with it,
	// by the collector.
	return there || h.f != nil
}

// Only removes all copies but those of the objects named.
func (d *Dir) Only(names func(base string) bool) {
	entries, _ := os.ReadDir(d.dir)
	for _, e := range entries {
		if !names(e.Name()) && !strings.HasPrefix(e.Name(), tempPrefix) {
			os.Remove(filepath.Join(d.dir, e.Name()))
		}
	}
}

// Close closes the files that are open.
func (d *Dir) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, h := range d.open {
		h.mu.Lock()
		if h.f != nil {
			h.f.Close()
		}
		h.mu.Unlock()
		delete(d.open, name)
	}
}
