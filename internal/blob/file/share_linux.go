package file

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
)

// bytelock asks for something about one byte, for this open file and not, as
// fcntl's older locks, for the whole process.
func (f *osShared) bytelock(cmd int, kind int16, at int64) (unix.Flock_t, error) {
	l := unix.Flock_t{Type: kind, Whence: io.SeekStart, Start: at, Len: 1}
	for {
		err := unix.FcntlFlock(f.Fd(), cmd, &l)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			return l, fault.ErrLocked
		case err != nil:
			return l, fmt.Errorf("%w: %w", ErrNoLocks, err)
		default:
			return l, nil
		}
	}
}

// Lock implements claims.File.
func (f *osShared) Lock(at int64) error {
	_, err := f.bytelock(unix.F_OFD_SETLK, unix.F_WRLCK, at)
	return err
}

// Unlock implements claims.File.
func (f *osShared) Unlock(at int64) error {
	_, err := f.bytelock(unix.F_OFD_SETLK, unix.F_UNLCK, at)
	return err
}

// Locked implements claims.File.
func (f *osShared) Locked(at int64) (bool, error) {
	l, err := f.bytelock(unix.F_OFD_GETLK, unix.F_WRLCK, at)
	return err == nil && l.Type != unix.F_UNLCK, err
}
