package images

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
)

// hold claims a block device until it is closed, so that the kernel does not
// let anybody mount it. A QEMU that has the device open does not claim it.
func hold(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("block device %s is in use; back up a snapshot of it: %w", path, fault.ErrLocked)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}
