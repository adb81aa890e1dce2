package file

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// OpenStamped is Open for a store whose files get as modification time what
// now says, and not what the machine's clock says: whoever keeps a time of his
// own can so tell an object's age. The time is durable when the object is. What
// other processes store there has the machine's time.
func OpenStamped(dir string, now func() time.Time) (*Store, error) {
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
	s := OpenFS(stampedFS{osFS{root}, now}, dir)
	s.KeepReserve()
	return s, nil
}

// Written is the modification time of the object's file.
func (s *Store) Written(ctx context.Context, name string) (time.Time, error) {
	if err := check(ctx, name); err != nil {
		return time.Time{}, err
	}
	e, err := s.fs.Stat(name)
	if missing(err) || err == nil && (e.Dir || e.Other) {
		err = fault.ErrNotFound
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: %w", name, err)
	}
	return e.Written, nil
}

type stampedFS struct {
	osFS
	now func() time.Time
}

func (f stampedFS) stamp(name string) error {
	t := f.now()
	return f.root.Chtimes(local(name), t, t)
}

func (f stampedFS) Create(name string) (File, error) {
	file, err := f.osFS.Create(name)
	if err != nil {
		return nil, err
	}
	return stampedFile{file, f, name}, nil
}

// Rename and RenameNew stamp again on Windows, where closing a file that was
// written may set its time.
func (f stampedFS) Rename(from, to string) error {
	if runtime.GOOS == "windows" {
		if err := f.stamp(from); err != nil {
			return err
		}
	}
	return f.osFS.Rename(from, to)
}

func (f stampedFS) RenameNew(from, to string) error {
	if runtime.GOOS == "windows" {
		if err := f.stamp(from); err != nil {
			return err
		}
	}
	return f.osFS.RenameNew(from, to)
}

type stampedFile struct {
	File
	fs   stampedFS
	name string
}

// Sync stamps first: what fsync makes durable includes the time.
func (f stampedFile) Sync() error {
	if err := f.fs.stamp(f.name); err != nil {
		return &fs.PathError{Op: "stamp", Path: f.name, Err: err}
	}
	return f.File.Sync()
}

// SyncName makes what List and Size say about name survive a power cut. Who is
// told that an object exists, without having stored it, may then rely on it.
func (s *Store) SyncName(name string) error {
	if err := blob.CheckName(name); err != nil {
		return err
	}
	if err := s.dirs.sync(dirOf(name)); err != nil {
		return fmt.Errorf("%s: %w", name, classify(err))
	}
	return nil
}
