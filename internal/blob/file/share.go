//go:build linux || windows

package file

import (
	"io/fs"
	"os"

	"github.com/backstay/backstay/internal/blob/claims"
)

var _ SharedFS = osFS{}

// Share implements SharedFS.
func (f osFS) Share(name string) (claims.File, error) {
	file, err := f.root.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return &osShared{file, f.root, name}, nil
}

// osShared is a claims.File.
type osShared struct {
	*os.File
	root *os.Root
	name string
}

func (f *osShared) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Gone compares files: a network file system keeps one that is open though its
// name was taken away, under another.
func (f *osShared) Gone() bool {
	ours, err := f.Stat()
	if err != nil {
		return true
	}
	named, err := f.root.Lstat(f.name)
	return err != nil || !os.SameFile(ours, named)
}
