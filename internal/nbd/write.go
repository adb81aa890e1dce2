package nbd

import (
	"context"
	"fmt"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
)

// zeroStep bounds one request that carries no data: a server may take its time
// for it, and old ones count its length in 31 bits.
const zeroStep = 1 << 30

// WriteAt is WriteAtContext without a limit but Close.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext writes all of p or gives an error, after which any part of it
// may have been written. It must be aligned to the server's minimum block
// size. Nothing is durable before Flush. A ctx that ends while a request is
// being sent takes its connection along.
func (c *Client) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := c.writable(extent.Extent{Off: off, Len: int64(len(p))}); err != nil {
		return 0, err
	}
	err := c.do(ctx, c.pieces(off, int64(len(p)), c.export().max, func(at, n int64) *call {
		return &call{cmd: cmdWrite, off: off + at, length: uint32(n), payload: p[at : at+n]}
	}))
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// writable says why within can't be written.
func (c *Client) writable(within extent.Extent) error {
	e := c.export()
	switch {
	case c.ReadOnly():
		return fmt.Errorf("%v: %w", c.target, fault.ErrReadOnly)
	case within.Off < 0 || within.Len < 0 || within.Off > e.size || within.Len > e.size-within.Off:
		return fmt.Errorf("%v: write of %v, its size is %d", c.target, within, e.size)
	case within.Off%e.min != 0, within.Len%e.min != 0 && within.End() != e.size:
		return fmt.Errorf("%v: write of %v, its block size is %d", c.target, within, e.min)
	}
	return nil
}

// WriteZeroes makes within read as zeros. With hole the server may free its
// room. Alignment and durability are as in WriteAtContext.
func (c *Client) WriteZeroes(ctx context.Context, within extent.Extent, hole bool) error {
	if err := c.writable(within); err != nil {
		return err
	}
	if c.export().flags&flagSendWriteZeroes == 0 {
		zeros := make([]byte, min(c.export().max, within.Len))
		for at := int64(0); at < within.Len; at += int64(len(zeros)) {
			if _, err := c.WriteAtContext(ctx, zeros[:min(int64(len(zeros)), within.Len-at)], within.Off+at); err != nil {
				return err
			}
		}
		return nil
	}
	var flags uint16
	if !hole {
		flags = cmdFlagNoHole
	}
	return c.do(ctx, c.pieces(within.Off, within.Len, zeroStep, func(at, n int64) *call {
		return &call{cmd: cmdWriteZeroes, flags: flags, off: within.Off + at, length: uint32(n)}
	}))
}

// Trim says that the bytes of within are not needed any more; what they read
// as afterwards is unknown. Servers that can't do it are left in peace.
func (c *Client) Trim(ctx context.Context, within extent.Extent) error {
	if err := c.writable(within); err != nil {
		return err
	}
	if c.export().flags&flagSendTrim == 0 {
		return nil
	}
	return c.do(ctx, c.pieces(within.Off, within.Len, zeroStep, func(at, n int64) *call {
		return &call{cmd: cmdTrim, off: within.Off + at, length: uint32(n)}
	}))
}

// Flush makes everything durable that was written before, over whichever
// connection. A server without flush has nothing that it could lose.
func (c *Client) Flush(ctx context.Context) error {
	if c.export().flags&flagSendFlush == 0 {
		return nil
	}
	return c.one(ctx, &call{cmd: cmdFlush})
}
