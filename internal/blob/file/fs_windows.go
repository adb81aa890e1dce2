package file

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"

	"github.com/backstay/backstay/internal/fault"
)

var (
	noSpaceErrors  = []error{windows.ERROR_DISK_FULL, windows.ERROR_HANDLE_DISK_FULL, windows.ERROR_DISK_QUOTA_EXCEEDED}
	readOnlyErrors = []error{windows.ERROR_WRITE_PROTECT, windows.ERROR_ACCESS_DENIED}
	notFoundErrors = []error{windows.ERROR_DIRECTORY, windows.ERROR_PATH_NOT_FOUND}
)

// Gone implements File; handles are not kept here, so nobody asks.
func (f osFile) Gone() bool { return true }

// handlesMayStay is false because an open file could not be replaced.
const handlesMayStay = false

// openFiles is not asked for, since none stay open.
func openFiles() uint64 { return 0 }

func syncDir(*os.File) error { return nil }

// lockAt is far behind what the file holds, so that the holder's name in it
// can be read while it is locked.
const lockAt = 1 << 30

func flock(f *os.File, exclusive bool) error {
	flags := uint32(windows.LOCKFILE_FAIL_IMMEDIATELY)
	if exclusive {
		flags |= windows.LOCKFILE_EXCLUSIVE_LOCK
	}
	err := windows.LockFileEx(windows.Handle(f.Fd()), flags, 0, 1, 0, &windows.Overlapped{OffsetHigh: lockAt})
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING) {
		return fault.ErrLocked
	}
	return err
}

// entryIn is entry for a name that was read from the directory dir.
func entryIn(dir *os.Root, _ *os.File, name string) (Entry, error) { return entry(dir, name) }
