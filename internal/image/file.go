package image

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
)

// OpenFile opens path read-only as a File that OSFile describes. A device is
// allowed because the caller named it; what a header names goes through a
// Resolver instead.
func OpenFile(path string) (File, error) {
	// Look before opening: opening a FIFO waits for somebody to write to it.
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		return nil, fmt.Errorf("%s is a pipe, not a disk image", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	file, err := OSFile(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return file, nil
}

// OSFile makes a File of f, a regular file or a block device. The File owns f
// from then on and also has the methods SyscallConn and Stat of an *os.File,
// by which an Image may ask which parts are holes and Parents see a loop.
func OSFile(f *os.File) (File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	bytes := info.Size()
	switch mode := info.Mode(); {
	case mode.IsRegular():
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		// Stat says 0 for a block device; its end says the truth.
		if bytes, err = f.Seek(0, io.SeekEnd); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%s is neither a regular file nor a block device", f.Name())
	}
	return &osFile{f, bytes}, nil
}

type osFile struct {
	*os.File
	bytes int64
}

func (f *osFile) Bytes() int64 { return f.bytes }

// SyncDir makes the name of a new or renamed file durable: a power cut can
// keep a file's content and lose its name.
func SyncDir(path string) error {
	if runtime.GOOS == "windows" {
		return nil // it cannot be done there, and NTFS journals its names
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	err = d.Sync()
	d.Close()
	return err
}
