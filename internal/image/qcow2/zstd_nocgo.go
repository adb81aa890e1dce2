//go:build !cgo

package qcow2

import "github.com/klauspost/compress/zstd"

type zstdDeflater struct{ encoder *zstd.Encoder }

func newZstdDeflater(level int) (deflater, error) {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		return nil, err
	}
	return zstdDeflater{e}, nil
}

func (d zstdDeflater) deflate(dst, cluster []byte) ([]byte, error) {
	return d.encoder.EncodeAll(cluster, dst), nil
}
