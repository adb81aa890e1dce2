package file

import (
	"errors"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// renameNew renames without replacing, where the file system can; done is
// false where it can't.
func renameNew(root *os.Root, from, to string) (done bool, err error) {
	src, err := root.Open(local(dirOf(from)))
	if err != nil {
		return true, err
	}
	defer src.Close()
	dst, err := root.Open(local(dirOf(to)))
	if err != nil {
		return true, err
	}
	defer dst.Close()
	err = unix.Renameat2(int(src.Fd()), path.Base(from), int(dst.Fd()), path.Base(to), unix.RENAME_NOREPLACE)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
		return false, nil
	}
	return true, &os.LinkError{Op: "renameat2", Old: from, New: to, Err: err}
}
