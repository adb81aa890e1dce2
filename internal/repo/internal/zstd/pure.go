//go:build !cgo

package zstd

import (
	"github.com/klauspost/compress/zstd"

	"github.com/backstay/backstay/internal/chunk"
)

type codec struct {
	enc *zstd.Encoder
	dec *zstd.Decoder
}

// New makes a Codec that compresses about as hard as libzstd's level.
func New(level int) *Codec {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)))
	if err != nil {
		panic(err) // only for bad options
	}
	// Nothing that is expanded is longer than a chunk and some room.
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*chunk.MaxBytes))
	if err != nil {
		panic(err)
	}
	return &Codec{codec{enc, dec}, level}
}

// Compress gives src as a frame, in dst's memory if that suffices: Bound
// bytes always do.
func (c *Codec) Compress(dst, src []byte) ([]byte, error) {
	return c.enc.EncodeAll(src, dst[:0]), nil
}

// Bound is the length of the longest frame for n bytes.
func Bound(n int) int { return n + n>>7 + 512 }

func (c *codec) expand(dst, frame []byte) (int, error) {
	// The cap keeps DecodeAll inside dst; a frame that is too long moves to
	// memory of its own, bounded above, and fails by its length.
	out, err := c.dec.DecodeAll(frame, dst[:0:len(dst)])
	if err == nil && len(out) > 0 && &out[0] != &dst[:1][0] {
		copy(dst, out)
	}
	return len(out), err
}
