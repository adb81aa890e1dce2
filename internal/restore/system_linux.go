package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
)

func isQuota(err error) bool { return errors.Is(err, unix.EDQUOT) }

// freeBytes is what an ordinary user may still write in dir.
func freeBytes(dir string) (int64, bool) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil || s.Blocks == 0 {
		return 0, false
	}
	return int64(s.Bavail) * int64(s.Frsize), true
}

// renameNew renames from to to and gives fault.ErrExists if to is there.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%s: %w", to, fault.ErrExists)
	case !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS):
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	// The file system can't promise it. A link to a file can.
	if info, serr := os.Lstat(from); serr == nil && info.Mode().IsRegular() {
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

// lockDir opens dir and locks it, until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("%s: %w by another restore", dir, fault.ErrLocked)
	}
	// Meanwhile the one who had it may have taken it away.
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &a), unix.Stat(dir, &b)); err != nil || a.Ino != b.Ino || a.Dev != b.Dev {
		f.Close()
		return nil, fs.ErrNotExist
	}
	return f, nil
}

// QEMU marks an image that it uses by locking single bytes of the file: 100+n
// for a permission n that it has, 200+n for one that it grants nobody else.
const (
	qemuHas    = 100
	qemuDenies = 200
	qemuBytes  = 64 // more than there are permissions
)

// lockImage refuses an image that QEMU, qemu-nbd, qemu-img or anyone with a
// flock uses, and otherwise holds it as QEMU would until f is closed.
func lockImage(f *os.File) error {
	inUse := fmt.Errorf("%s is in use by another program: %w", f.Name(), fault.ErrLocked)
	for _, from := range []int64{qemuHas, qemuDenies} {
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: from, Len: qemuBytes}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err == nil && l.Type != unix.F_UNLCK {
			return inUse
		}
	}
	for _, from := range []int64{qemuHas, qemuDenies} {
		l := unix.Flock_t{Type: unix.F_RDLCK, Start: from, Len: qemuBytes}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return inUse
		}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return inUse
	}
	return nil // file systems without locks have no way to refuse
}

// openForWriting opens the image or block device path. A device that is
// mounted or otherwise claimed is refused.
func openForWriting(path string) (*os.File, error) {
	flags := os.O_RDWR
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeDevice != 0 {
		flags |= unix.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s is in use: %w", path, fault.ErrLocked)
	}
	return f, err
}

// punch makes a range of f a hole; false where f can't have one there.
func punch(f *os.File, off, n int64) (bool, error) {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return false, nil
	}
	return err == nil, err
}

// nextData is the first data of f at or behind off and the first hole behind
// that; ok is false where f can't tell.
func nextData(f *os.File, off, size int64) (data, hole int64, ok bool) {
	data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size, true
	}
	if err != nil {
		return 0, 0, false
	}
	hole, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
	if err != nil || hole <= data || data < off {
		return 0, 0, false
	}
	return min(data, size), min(hole, size), true
}

func refusedConnection(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }
