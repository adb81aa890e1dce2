// Package file is a store in a directory.
//
// An object is a file of its name. It is written as a temporary file, synced,
// renamed to its name, and then the directory is synced: after a power cut the
// name leads to the whole object or to nothing. Objects that List has shown
// are durable too, so that a second process builds on nothing that may vanish.
// The directory is local or on any network file system that syncs when told.
package file

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/claims"
	"github.com/backstay/backstay/internal/fault"
)

const tmpDir = "tmp"

// A Store keeps objects in a directory; it is a blob.Store, a blob.Locker
// and, on most file systems, a blob.Claimer.
type Store struct {
	fs    FS
	url   string
	dirs  *dirs
	open  handles
	bufs  sync.Pool
	close func() error

	// claims are what the writers of all processes are storing; nil where the
	// file system has no place for them.
	claims  *claims.Log
	reserve reserve

	sweepOnce  sync.Once
	sweepErr   error
	releaseTmp func()
}

var _ blob.Store = (*Store)(nil)

// Create opens the store in dir, which it makes, with its parents, if it does
// not exist. It says nothing about what is in there.
func Create(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := makeAll(dir); err != nil {
		return nil, classify(err)
	}
	return Open(dir)
}

// makeAll is os.MkdirAll, durably.
func makeAll(dir string) error {
	if st, err := os.Stat(dir); err == nil && st.IsDir() {
		return nil
	}
	parent := filepath.Dir(dir)
	if parent == dir {
		return &fs.PathError{Op: "open", Path: dir, Err: fs.ErrNotExist}
	}
	if err := makeAll(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := os.Open(parent)
	if err != nil {
		return err
	}
	defer f.Close()
	return syncDir(f)
}

// Open opens the store in dir. It gives fault.ErrNotFound where there is no
// such directory.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		if missing(err) {
			return nil, fmt.Errorf("directory %s: %w", dir, fault.ErrNotFound)
		}
		return nil, err
	}
	s := OpenFS(osFS{root}, dir)
	s.KeepReserve()
	return s, nil
}

// OpenFS is Open for any file system; url names it in messages. Close closes f.
// It keeps no reserve.
func OpenFS(f FS, url string) *Store {
	s := &Store{fs: f, url: url, dirs: newDirs(f)}
	s.open.fs = f
	s.bufs.New = func() any { b := make([]byte, 1<<20); return &b }
	s.claims = s.newClaims()
	s.close = sync.OnceValue(func() error {
		s.open.closeAll()
		if s.claims != nil {
			_ = s.claims.Close()
		}
		if s.releaseTmp != nil {
			s.releaseTmp()
		}
		return f.Close()
	})
	return s
}

// Put implements blob.Store.
func (s *Store) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.store(ctx, name, body, size, s.fs.Rename)
}

// Create implements blob.Store.
func (s *Store) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.store(ctx, name, body, size, s.fs.RenameNew)
}

func (s *Store) store(ctx context.Context, name string, body io.ReaderAt, size int64, rename func(from, to string) error) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%s: size %d", name, size)
	}
	err := s.tryStore(ctx, name, body, size, rename)
	for full(err) && blob.IsFreeing(ctx) && s.release(size) {
		err = s.tryStore(ctx, name, body, size, rename)
	}
	if err == nil && !blob.IsFreeing(ctx) {
		s.keepReserve()
	}
	s.open.drop(name)
	if errors.Is(err, fs.ErrExist) {
		// Who is told that it exists may rely on it.
		if err := s.dirs.sync(dirOf(name)); err != nil {
			return fmt.Errorf("%s: %w", name, classify(err))
		}
		return fmt.Errorf("%s: %w", name, fault.ErrExists)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, classify(err))
	}
	return nil
}

func (s *Store) tryStore(ctx context.Context, name string, body io.ReaderAt, size int64, rename func(from, to string) error) error {
	if err := s.mayWrite(); err != nil {
		return err
	}
	tmp, err := s.write(ctx, body, size)
	if err != nil {
		return err
	}
	return s.publish(tmp, name, rename)
}

// write makes a temporary file that survives a power cut, and gives its name.
// After any error, one of fsync above all, there is no such file.
func (s *Store) write(ctx context.Context, body io.ReaderAt, size int64) (name string, err error) {
	var random [12]byte
	if _, err := rand.Read(random[:]); err != nil {
		return "", err
	}
	name = tmpDir + "/" + hex.EncodeToString(random[:])
	f, err := s.fs.Create(name)
	if err != nil {
		return "", err
	}
	err = s.copy(ctx, f, body, size)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		_ = s.fs.Remove(name) // swept later if this fails
		return "", err
	}
	return name, nil
}

func (s *Store) copy(ctx context.Context, f File, body io.ReaderAt, size int64) error {
	buf := s.bufs.Get().(*[]byte)
	defer s.bufs.Put(buf)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := (*buf)[:min(int64(len(*buf)), size-off)]
		if n, err := body.ReadAt(p, off); n < len(p) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("body: %w", err)
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// publish gives a temporary file its name.
func (s *Store) publish(tmp, name string, rename func(from, to string) error) error {
	dir := dirOf(name)
	err := s.dirs.ensure(dir)
	if err == nil {
		err = rename(tmp, name)
		if errors.Is(err, fs.ErrNotExist) { // the directory was taken away
			s.dirs.forget()
			if err = s.dirs.ensure(dir); err == nil {
				err = rename(tmp, name)
			}
		}
	}
	if err != nil {
		_ = s.fs.Remove(tmp)
		return err
	}
	return s.dirs.sync(dir)
}

func (s *Store) String() string { return s.url }

// Close lets go of open files and locks. It may be called twice; nothing else
// may be called afterwards.
func (s *Store) Close() error { return s.close() }

func check(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return blob.CheckName(name)
}

// classify puts what the system says about writing into our classes.
func classify(err error) error {
	for class, list := range map[error][]error{fault.ErrNoSpace: noSpaceErrors, fault.ErrReadOnly: readOnlyErrors} {
		for _, e := range list {
			if errors.Is(err, e) {
				return fmt.Errorf("%w: %w", class, err)
			}
		}
	}
	return err
}

// missing says that err means an object is not there, and no trouble.
func missing(err error) bool {
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	for _, e := range notFoundErrors {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
