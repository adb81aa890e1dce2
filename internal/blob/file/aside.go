package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// asideDir holds what was set aside. Its dot keeps it out of every listing and
// away from every name.
const asideDir = ".aside"

// SetAside takes an object away like Delete, but keeps its file, as
// .aside/UNDER/NAME in the store's directory. Under is one segment of a name.
// One that does not exist is no error; where the place is taken it is
// fault.ErrExists, and the object stays.
func (s *Store) SetAside(ctx context.Context, name, under string) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	if err := blob.CheckName(under); err != nil || dirOf(under) != "" {
		return fmt.Errorf("set %s aside under %q: %w", name, under, fault.ErrUnsupported)
	}
	to := asideDir + "/" + under + "/" + name
	err := s.dirs.ensure(dirOf(to))
	if err == nil {
		err = s.fs.RenameNew(name, to)
	}
	s.open.drop(name)
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s: there is one aside already: %w", name, fault.ErrExists)
	case missing(err):
		err = nil
	}
	// First the new name, then the loss of the old: a power cut may leave both,
	// never none.
	if err == nil {
		err = s.dirs.sync(dirOf(to))
	}
	if err == nil {
		err = s.dirs.sync(dirOf(name))
	}
	if err != nil && !missing(err) {
		return fmt.Errorf("%s: %w", name, classify(err))
	}
	return nil
}

// ForgetAside removes for good what was set aside under the names that old
// picks, and gives the number of files.
func (s *Store) ForgetAside(ctx context.Context, old func(under string) bool) (files int, err error) {
	entries, err := s.fs.ReadDir(asideDir)
	if missing(err) {
		return 0, nil
	}
	for _, e := range entries {
		if e.Dir && old(e.Name) {
			n, treeErr := s.removeTree(ctx, asideDir+"/"+e.Name)
			files += n
			err = errors.Join(err, treeErr)
		}
	}
	// Whoever sets aside next makes his directories again.
	s.dirs.forget()
	return files, err
}

func (s *Store) removeTree(ctx context.Context, dir string) (files int, err error) {
	entries, err := s.fs.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return files, ctx.Err()
		}
		name := dir + "/" + e.Name
		if e.Dir {
			n, err := s.removeTree(ctx, name)
			files += n
			if err != nil {
				return files, err
			}
			continue
		}
		if err := s.fs.Remove(name); err != nil && !missing(err) {
			return files, err
		}
		files++
	}
	if err := s.fs.Remove(dir); err != nil && !missing(err) {
		return files, err
	}
	return files, nil
}
