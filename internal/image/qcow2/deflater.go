package qcow2

import (
	"fmt"
	"sync"

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
		if level == 0 {
			level = 6
		}
		if level < 1 || level > 9 {
			return nil, fmt.Errorf("zlib has no level %d", level)
		}
		return &zlibDeflater{sync.Pool{New: func() any { return newDeflateEncoder(level) }}}, nil
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

type zlibDeflater struct{ encoders sync.Pool }

func (d *zlibDeflater) deflate(dst, cluster []byte) ([]byte, error) {
	e := d.encoders.Get().(*deflateEncoder)
	dst = e.encode(dst, cluster)
	d.encoders.Put(e)
	return dst, nil
}
