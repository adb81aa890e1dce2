package image

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// NextData gives the first byte of data in f at or behind off, and the first
// hole behind that, both at most limit, which lies behind off. ok is false
// where f cannot tell; then everything must be taken for data. What is no data
// reads as zeros; what is data may be zeros too.
func NextData(f File, off, limit int64) (data, hole int64, ok bool) {
	sc, is := f.(syscall.Conn)
	if !is {
		return 0, 0, false
	}
	conn, err := sc.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	var seekErr error
	// It moves the descriptor's position, which nobody uses.
	err = conn.Control(func(fd uintptr) {
		data, seekErr = unix.Seek(int(fd), off, unix.SEEK_DATA)
		if errors.Is(seekErr, unix.ENXIO) {
			data, hole, seekErr = limit, limit, nil // a hole up to the end
			return
		}
		if seekErr == nil && data < limit {
			hole, seekErr = unix.Seek(int(fd), data, unix.SEEK_HOLE)
		}
	})
	if err != nil || seekErr != nil || data < off {
		return 0, 0, false
	}
	if data >= limit {
		return limit, limit, true
	}
	if hole <= data {
		return 0, 0, false // a file system that contradicts itself
	}
	return data, min(hole, limit), true
}
