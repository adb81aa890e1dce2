package raw

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/image"
)

// nextData is the first byte of data at or behind off and the first hole
// behind that, both at most size. ok is false where the file cannot tell.
// It moves the descriptor's position, which nobody uses.
func nextData(f image.File, off, size int64) (data, hole int64, ok bool) {
	sc, is := f.(syscall.Conn)
	if !is {
		return 0, 0, false
	}
	conn, err := sc.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	var seekErr error
	err = conn.Control(func(fd uintptr) {
		data, seekErr = unix.Seek(int(fd), off, unix.SEEK_DATA)
		if errors.Is(seekErr, unix.ENXIO) {
			data, hole, seekErr = size, size, nil // a hole up to the end
			return
		}
		if seekErr == nil && data < size {
			hole, seekErr = unix.Seek(int(fd), data, unix.SEEK_HOLE)
		}
	})
	if err != nil || seekErr != nil || data < off {
		return 0, 0, false
	}
	data, hole = min(data, size), min(hole, size)
	if data == off && hole <= off {
		return 0, 0, false // a file system that contradicts itself
	}
	return data, hole, true
}
