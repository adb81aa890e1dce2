package journal

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"

	"github.com/backstay/backstay/internal/fault"
)

// lockAt is far behind what the file holds, so that the holder's name in it
// can be read while it is locked.
const lockAt = 1 << 30

func lockFile(f *os.File) error {
	err := windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_FAIL_IMMEDIATELY|windows.LOCKFILE_EXCLUSIVE_LOCK,
		0, 1, 0, &windows.Overlapped{OffsetHigh: lockAt})
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING) {
		return fault.ErrLocked
	}
	return err
}
