//go:build unix

package journal

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
)

func lockFile(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fault.ErrLocked
	}
	return err
}
