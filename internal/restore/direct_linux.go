package restore

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/image"
)

// directUnit is the alignment in bytes of everything that goes around the page
// cache; no disk wants more.
const directUnit = 4096

// A directWriter writes a raw image around the page cache. A restore is busy
// with decoding, and to copy every byte once more into memory that is then
// written back at the end takes a sixth of the processor time and adds the
// disk's time to the rest instead of hiding behind it.
type directWriter struct {
	image.Writer // through the page cache: what is not aligned, and the sync at the end
	file         *os.File
	off          atomic.Bool // the file system turned out not to do it
	buffers      sync.Pool
}

// direct makes w, which writes the raw image path, write around the page cache
// where the file system can.
func direct(path string, w image.Writer) image.Writer {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return w
	}
	return &directWriter{Writer: w, file: f}
}

// WriteAt is called with pieces that begin at multiples of grain and so of
// directUnit; what is no such piece takes the long way.
func (w *directWriter) WriteAt(p []byte, off int64) (int, error) {
	n := len(p) / directUnit * directUnit
	if off%directUnit != 0 || n == 0 || w.off.Load() {
		return w.Writer.WriteAt(p, off)
	}
	q := p[:n]
	if uintptr(unsafe.Pointer(&q[0]))%directUnit != 0 {
		b := w.aligned(n)
		defer w.buffers.Put(b)
		q = (*b)[:copy(*b, q)]
	}
	if done, err := w.file.WriteAt(q, off); err != nil {
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
			return done, err
		}
		w.off.Store(true)
		return w.Writer.WriteAt(p, off)
	}
	if n == len(p) {
		return n, nil
	}
	rest, err := w.Writer.WriteAt(p[n:], off+int64(n))
	return n + rest, err
}

// aligned is a buffer of n bytes or more that begins where it must.
func (w *directWriter) aligned(n int) *[]byte {
	if b, _ := w.buffers.Get().(*[]byte); b != nil && len(*b) >= n {
		return b
	}
	b := make([]byte, n+directUnit)
	if r := int(uintptr(unsafe.Pointer(&b[0])) % directUnit); r != 0 {
		b = b[directUnit-r:]
	}
	b = b[:n]
	return &b
}

func (w *directWriter) Finish() error {
	if err := w.file.Close(); err != nil {
		return err
	}
	return w.Writer.Finish()
}

func (w *directWriter) Close() error {
	w.file.Close() // after Finish it was closed already
	return w.Writer.Close()
}
