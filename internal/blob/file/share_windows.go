package file

import (
	"errors"
	"fmt"

	"golang.org/x/sys/windows"

	"github.com/backstay/backstay/internal/fault"
)

// Lock implements claims.File.
func (f *osShared) Lock(at int64) error {
	err := windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_FAIL_IMMEDIATELY|windows.LOCKFILE_EXCLUSIVE_LOCK, 0, 1, 0, byteAt(at))
	switch {
	case errors.Is(err, windows.ERROR_LOCK_VIOLATION), errors.Is(err, windows.ERROR_IO_PENDING):
		return fault.ErrLocked
	case err != nil:
		return fmt.Errorf("%w: %w", ErrNoLocks, err)
	}
	return nil
}

// Unlock implements claims.File.
func (f *osShared) Unlock(at int64) error {
	return windows.UnlockFileEx(windows.Handle(f.Fd()), 0, 1, 0, byteAt(at))
}

// Locked implements claims.File.
func (f *osShared) Locked(at int64) (bool, error) {
	err := f.Lock(at)
	if errors.Is(err, fault.ErrLocked) {
		return true, nil
	}
	if err == nil {
		err = f.Unlock(at)
	}
	return false, err
}

func byteAt(at int64) *windows.Overlapped {
	return &windows.Overlapped{Offset: uint32(at), OffsetHigh: uint32(at >> 32)}
}
