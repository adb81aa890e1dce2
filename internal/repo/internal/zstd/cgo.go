//go:build cgo

package zstd

import "github.com/DataDog/zstd"

type codec struct{ ctx zstd.Ctx }

// New makes a Codec that compresses at libzstd's level.
func New(level int) *Codec { return &Codec{codec{zstd.NewCtx()}, level} }

// Compress gives src as a frame, in dst's memory if that suffices: Bound
// bytes always do.
func (c *Codec) Compress(dst, src []byte) ([]byte, error) {
	return c.ctx.CompressLevel(dst[:cap(dst)], src, c.level)
}

// Bound is the length of the longest frame for n bytes.
func Bound(n int) int { return zstd.CompressBound(n) }

func (c *codec) expand(dst, frame []byte) (int, error) {
	return c.ctx.DecompressInto(dst, frame)
}
