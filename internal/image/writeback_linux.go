package image

import (
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// writebackBytes is how much of a new file is given to its disk at a time, and
// how far behind what is being written just now.
const writebackBytes = 16 << 20

// A Writeback has the system write a new file to its disk while it grows, and
// not all of it when it is synced at last. It promises nothing: what it did
// not do, the sync does. It is safe for concurrent use.
type Writeback struct {
	file    *os.File
	started atomic.Int64 // everything before it
}

// NewWriteback is for f, a new file.
func NewWriteback(f *os.File) *Writeback { return &Writeback{file: f} }

// Grown tells that the file was written up to end or thereabouts. It is cheap,
// and to be called after every write. No Writeback does nothing.
func (w *Writeback) Grown(end int64) {
	if w == nil {
		return
	}
	from := w.started.Load()
	to := end - writebackBytes
	if to-from < writebackBytes || !w.started.CompareAndSwap(from, to) {
		return
	}
	if conn, err := w.file.SyscallConn(); err == nil {
		conn.Control(func(fd uintptr) {
			// An error shows again, and to somebody who looks, at the sync.
			unix.SyncFileRange(int(fd), from, to-from, unix.SYNC_FILE_RANGE_WRITE)
		})
	}
}
