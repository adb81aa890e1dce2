package qcow2

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/klauspost/compress/flate"

	"github.com/backstay/backstay/internal/fault"
)

// A deflater compresses one cluster to the end of dst. It may be called from
// several goroutines at once.
type deflater interface {
	deflate(dst, cluster []byte) ([]byte, error)
}

// newDeflater gives the deflater of a qcow2 compression type. Level 0 is the
// type's usual one.
func newDeflater(compression string, level int) (deflater, error) {
	switch compression {
	case "zlib":
		if level < 0 || level > 9 {
			return nil, fmt.Errorf("zlib has no level %d", level)
		}
		return zlibDeflater{}, nil
	case "zstd":
		if level == 0 {
			level = 3
		}
		if level < 1 || level > 22 {
			return nil, fmt.Errorf("zstd has no level %d", level)
		}
		return newZstdDeflater(level)
	}
	return nil, fmt.Errorf("qcow2 compression %q: %w", compression, fault.ErrUnsupported)
}

// zlibWindow is how far back a match may reach: QEMU's own clusters keep to
// it, and readers may rely on that.
const zlibWindow = 4 << 10

type zlibDeflater struct{}

type flateWriter struct {
	out bytes.Buffer
	w   *flate.Writer
}

var flateWriters sync.Pool // of *flateWriter

func (zlibDeflater) deflate(dst, cluster []byte) ([]byte, error) {
	fw, _ := flateWriters.Get().(*flateWriter)
	if fw == nil {
		fw = new(flateWriter)
		w, err := flate.NewWriterWindow(&fw.out, zlibWindow)
		if err != nil {
			return dst, err
		}
		fw.w = w
	}
	defer flateWriters.Put(fw)
	fw.out.Reset()
	fw.w.Reset(&fw.out)
	if _, err := fw.w.Write(cluster); err != nil {
		return dst, err
	}
	if err := fw.w.Close(); err != nil {
		return dst, err
	}
	return append(dst, fw.out.Bytes()...), nil
}
