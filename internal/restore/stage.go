package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// partial is the directory in which a target called name is made.
func partial(name string) string { return "." + name + ".backstay-partial" }

// A stage is a directory beside a target, or in it, where its files are made
// until they are complete. While a restore lives it holds a lock on it, by
// which the next one tells a rival from a leftover.
type stage struct {
	dir   string // where files are made
	to    string // the directory that they move to
	whole bool   // to does not exist: dir itself becomes it
	force bool
	lock  *os.File
}

// stageFile prepares to make the file target.
func stageFile(target string, force bool) (*stage, error) {
	parent, name := filepath.Dir(target), filepath.Base(target)
	if name == "." || name == ".." || name == string(filepath.Separator) {
		return nil, fmt.Errorf("%s: not the name of a file", target)
	}
	if err := mustBeDir(parent); err != nil {
		return nil, err
	}
	if err := replaceable(target, force); err != nil {
		return nil, err
	}
	return newStage(&stage{dir: filepath.Join(parent, partial(name)), to: parent, force: force})
}

// stageIn prepares to put several new files into the directory parent, on
// behalf of what is called name.
func stageIn(parent, name string) (*stage, error) {
	if err := mustBeDir(parent); err != nil {
		return nil, err
	}
	return newStage(&stage{dir: filepath.Join(parent, partial(name)), to: parent})
}

// stageDir prepares to fill the directory target, which is made if it does not
// exist and must be empty, unless force.
func stageDir(target string, force bool) (*stage, error) {
	target = filepath.Clean(target)
	parent, name := filepath.Dir(target), filepath.Base(target)
	entries, err := os.ReadDir(target)
	inside := filepath.Join(target, partial("point"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := mustBeDir(parent); err != nil {
			return nil, err
		}
		return newStage(&stage{dir: filepath.Join(parent, partial(name)), to: target, whole: true})
	case err != nil:
		if info, serr := os.Stat(target); serr == nil && !info.IsDir() {
			return nil, fmt.Errorf("%s is no directory: %w", target, fault.ErrExists)
		}
		return nil, err
	case !force && slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() != filepath.Base(inside) }):
		return nil, fmt.Errorf("%s is not empty: %w", target, fault.ErrExists)
	}
	return newStage(&stage{dir: inside, to: target, force: force})
}

func mustBeDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("directory %s: %w", dir, fault.ErrNotFound)
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is no directory: %w", dir, fault.ErrNotFound)
	}
	return nil
}

// replaceable says why nothing may be put at target.
func replaceable(target string, force bool) error {
	info, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return fmt.Errorf("%s is a directory: %w", target, fault.ErrExists)
	case !force:
		return fmt.Errorf("%s: %w", target, fault.ErrExists)
	case !info.Mode().IsRegular():
		// A link leads to somebody else's file, and a device can't be replaced.
		return fmt.Errorf("%s is no regular file, which force does not replace: %w", target, fault.ErrExists)
	}
	// A running VM would go on with a file that has no name any more.
	f, err := os.OpenFile(target, os.O_RDWR, 0)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return nil // renaming needs no more than its directory
		}
		return err
	}
	defer f.Close()
	return lockImage(f)
}

func newStage(st *stage) (*stage, error) {
	for range 3 {
		err := os.Mkdir(st.dir, 0o700)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, classify(err)
		}
		lock, lerr := lockDir(st.dir)
		if lerr != nil {
			if errors.Is(lerr, fs.ErrNotExist) {
				continue // whoever had it is done at this moment
			}
			return nil, lerr
		}
		if err == nil {
			st.lock = lock
			return st, nil
		}
		// It was there and nobody holds it: a restore was killed.
		rerr := os.RemoveAll(st.dir)
		lock.Close()
		if rerr != nil {
			return nil, fmt.Errorf("what an earlier restore left: %w", rerr)
		}
	}
	return nil, fmt.Errorf("%s: %w by another restore", st.dir, fault.ErrLocked)
}

// collides says whether one of the staged files exists at its destination
// already, which is better known before hours of work than after.
func (st *stage) collides() error {
	if st.whole {
		return nil
	}
	names, err := st.files()
	for _, n := range names {
		if err := replaceable(filepath.Join(st.to, n), st.force); err != nil {
			return err
		}
	}
	return err
}

func (st *stage) files() ([]string, error) {
	entries, err := os.ReadDir(st.dir)
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// publish moves the files, which are durable, to where they belong; last is
// the one that makes the others count. If one can't be moved, those that
// appeared already go back.
func (st *stage) publish(last string) error {
	if st.whole {
		if err := image.SyncDir(filepath.Join(st.dir, "x")); err != nil {
			return err
		}
		if err := os.Chmod(st.dir, 0o755); err != nil { // the files are private
			return err
		}
		if err := renameNew(st.dir, st.to); err != nil {
			return err
		}
		return image.SyncDir(st.to)
	}
	names, err := st.files()
	if err != nil {
		return err
	}
	if i := slices.Index(names, last); i >= 0 {
		names = append(slices.Delete(names, i, i+1), last)
	}
	for i, n := range names {
		from, to := filepath.Join(st.dir, n), filepath.Join(st.to, n)
		move := renameNew
		if st.force {
			move = os.Rename
		}
		if err := move(from, to); err != nil {
			if !st.force {
				for _, m := range names[:i] {
					os.Rename(filepath.Join(st.to, m), filepath.Join(st.dir, m))
				}
			}
			return err
		}
	}
	return image.SyncDir(filepath.Join(st.to, "x"))
}

// discard removes what is left of the stage; after publish that is nothing of
// worth.
func (st *stage) discard() {
	if st.lock == nil {
		return
	}
	os.RemoveAll(st.dir)
	st.lock.Close()
	st.lock = nil
}
