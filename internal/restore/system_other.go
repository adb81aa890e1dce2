//go:build !linux

package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/backstay/backstay/internal/fault"
)

func isQuota(error) bool { return false }

func freeBytes(string) (int64, bool) { return 0, false }

// renameNew renames from to to and gives fault.ErrExists if to is there.
func renameNew(from, to string) error {
	if info, err := os.Lstat(from); err == nil && info.Mode().IsRegular() {
		if err := os.Link(from, to); errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s: %w", to, fault.ErrExists)
		} else if err == nil {
			return os.Remove(from)
		}
	}
	if _, err := os.Lstat(to); err == nil {
		return fmt.Errorf("%s: %w", to, fault.ErrExists)
	}
	return os.Rename(from, to)
}

// lockImage has nothing to ask here: a program that uses an image keeps others
// from opening it.
func lockImage(*os.File) error { return nil }

func openForWriting(path string) (*os.File, error) { return os.OpenFile(path, os.O_RDWR, 0) }

func punch(*os.File, int64, int64) (bool, error) { return false, nil }

func nextData(*os.File, int64, int64) (data, hole int64, ok bool) { return 0, 0, false }

func refusedConnection(error) bool { return false }
