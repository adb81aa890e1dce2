//go:build cgo

package qcow2

import (
	"sync"

	"github.com/DataDog/zstd"
)

// zstdDeflater uses the reference library, whose contexts are dear to make and
// so are kept.
type zstdDeflater struct {
	level    int
	contexts sync.Pool // of zstd.Ctx
}

func newZstdDeflater(level int) (deflater, error) {
	return &zstdDeflater{level: level, contexts: sync.Pool{New: func() any { return zstd.NewCtx() }}}, nil
}

func (d *zstdDeflater) deflate(dst, cluster []byte) ([]byte, error) {
	c := d.contexts.Get().(zstd.Ctx)
	defer d.contexts.Put(c)
	bound := zstd.CompressBound(len(cluster))
	if cap(dst)-len(dst) < bound {
		grown := make([]byte, len(dst), 2*cap(dst)+bound)
		copy(grown, dst)
		dst = grown
	}
	packed, err := c.CompressLevel(dst[len(dst):cap(dst)], cluster, d.level)
	if err != nil {
		return dst, err
	}
	return dst[:len(dst)+len(packed)], nil // it is where dst goes on
}
