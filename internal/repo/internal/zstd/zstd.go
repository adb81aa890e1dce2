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
	n, err := c.ExpandUpTo(dst, frame)
	if err == nil && n != len(dst) {
		err = fmt.Errorf("frame expands to %d bytes, want %d", n, len(dst))
	}
	return err
}

// ExpandUpTo fills the front of dst, which is at least as long as what comes
// out, and says how much that is.
func (c *Codec) ExpandUpTo(dst, frame []byte) (int, error) {
	if len(frame) == 0 || len(dst) == 0 {
		return 0, fmt.Errorf("empty frame or chunk")
	}
	n, err := c.expand(dst, frame)
	if err == nil && n > len(dst) {
		err = fmt.Errorf("frame expands to %d bytes, want %d at most", n, len(dst))
	}
	return n, err
}
