//go:build unix

package file

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

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

// entryIn is entry for a name that was read from the open directory self. Where
// there are a million of them it takes half of the time.
func entryIn(_ *os.Root, self *os.File, name string) (Entry, error) {
	var st unix.Stat_t
	var err error
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Fstatat(int(self.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return Entry{}, &os.PathError{Op: "lstat", Path: name, Err: err}
	}
	kind := st.Mode & unix.S_IFMT
	e := Entry{Name: name, Dir: kind == unix.S_IFDIR, Other: kind != unix.S_IFDIR && kind != unix.S_IFREG}
	if kind == unix.S_IFREG {
		e.Bytes, e.Written = st.Size, time.Unix(st.Mtim.Unix())
	}
	return e, nil
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
