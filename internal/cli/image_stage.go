package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// mayReplace says why no image may be put at path. An image is never converted
// onto itself: it would be gone if the result were of no use.
func mayReplace(path, source string, force bool) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if src, err := os.Stat(source); err == nil && os.SameFile(src, info) {
		return usage("%s is the image to convert; choose another target", path)
	}
	switch {
	case !force:
		return withHint(fmt.Errorf("%s: %w", path, fault.ErrExists), "choose another target, or --force to replace it")
	case !info.Mode().IsRegular():
		// A link leads to somebody else's file, and a device can't be replaced.
		return withHint(fmt.Errorf("%s is no regular file: %w", path, fault.ErrExists), "choose another target: --force replaces files alone")
	}
	return nil
}

// stageImage lets create make an image, which may be several files, in a
// directory beside target under their final names, and moves them to where
// they belong when create returned nil.
func stageImage(target, source string, force bool, create func(path string) error) error {
	dir, name := filepath.Dir(target), filepath.Base(target)
	stage, err := os.MkdirTemp(dir, "."+name+".*.partial")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("directory %s: %w", dir, fault.ErrNotFound)
		}
		return err
	}
	defer os.RemoveAll(stage)
	if err := create(filepath.Join(stage, name)); err != nil {
		return err
	}
	entries, err := os.ReadDir(stage)
	if err != nil {
		return err
	}
	// The target itself comes last: it makes the others count.
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.Name() == name {
			continue
		}
		if err := mayReplace(filepath.Join(dir, e.Name()), source, force); err != nil {
			return err
		}
		names = append(names, e.Name())
	}
	names = append(names, name)
	for i, n := range names {
		to := filepath.Join(dir, n)
		if err := putFile(filepath.Join(stage, n), to, force); err != nil {
			if !force {
				for _, done := range names[:i] {
					os.Remove(filepath.Join(dir, done))
				}
			}
			return err
		}
	}
	return image.SyncDir(target)
}

// putFile moves a file. Without force it never replaces one, even if that
// appeared a moment ago.
func putFile(from, to string, force bool) error {
	if force {
		return os.Rename(from, to)
	}
	err := os.Link(from, to)
	switch {
	case err == nil:
		return os.Remove(from)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s: %w", to, fault.ErrExists)
	}
	// A file system without hard links.
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", to, fault.ErrExists)
	}
	return os.Rename(from, to)
}
