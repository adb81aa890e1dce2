// Package zstd compresses and expands single chunks, with libzstd where there
// is cgo and with klauspost/compress otherwise. Both write the same format.
package zstd

import "fmt"

// A Codec keeps the state of one worker, so that nothing is allocated for each
// chunk. It is not safe for concurrent use.
type Codec struct {
	codec
	level int
}

// Expand fills dst, whose length is that of the chunk, from a frame. It takes
// no memory that the frame asks for.
func (c *Codec) Expand(dst, frame []byte) error {
	if len(frame) == 0 || len(dst) == 0 {
		return fmt.Errorf("empty frame or chunk")
	}
	n, err := c.expand(dst, frame)
	if err != nil {
		return err
	}
	if n != len(dst) {
		return fmt.Errorf("frame expands to %d bytes, want %d", n, len(dst))
	}
	return nil
}
