//go:build unix

package file

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
)

var (
	noSpaceErrors  = []error{syscall.ENOSPC, syscall.EDQUOT}
	readOnlyErrors = []error{syscall.EROFS, syscall.EACCES, syscall.EPERM}
	notFoundErrors = []error{syscall.ENOTDIR, syscall.ELOOP}
)

// Gone implements File: a file whose last name was taken away has no links.
func (f osFile) Gone() bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) != nil || st.Nlink == 0
}

// handlesMayStay says that an open file hinders nobody from replacing it.
const handlesMayStay = true

// openFiles is how many files this process may have open; 0 if nobody says.
func openFiles() uint64 {
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) != nil {
		return 0
	}
	return uint64(r.Cur)
}

func syncDir(dir *os.File) error {
	err := dir.Sync()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) || errors.Is(err, syscall.EROFS) {
		// File systems that can't sync a directory write it through, or are
		// read-only and have nothing to write.
		return nil
	}
	return err
}

// flock takes or refuses at once. It ends with the last descriptor of this
// open file, so with the process at the latest.
func flock(f *os.File, exclusive bool) error {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return fault.ErrLocked
		case errors.Is(err, unix.ENOLCK), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOSYS):
			return fmt.Errorf("%w: %w", ErrNoLocks, err)
		default:
			return err
		}
	}
}
