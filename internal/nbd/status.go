package nbd

import (
	"context"
	"fmt"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
)

// Flags of a Status in the contexts that we know.
const (
	StateHole  = 1 << 0 // base:allocation: takes no room
	StateZero  = 1 << 1 // base:allocation: reads as zeros
	StateDirty = 1 << 0 // qemu:dirty-bitmap: written since
)

// A Status is a range of an export with what a metadata context says of it.
type Status struct {
	extent.Extent
	Flags uint32
}

// BlockStatus walks within in ascending order without gaps, as context sees
// it. Neighbours may have the same flags. Iteration ends at the first error;
// fault.ErrUnsupported says that the server did not offer the context.
func (c *Client) BlockStatus(ctx context.Context, context string, within extent.Extent) iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		e := c.export()
		if _, ok := e.contexts[context]; !ok {
			yield(Status{}, fmt.Errorf("%v: meta context %q: %w", c.target, context, fault.ErrUnsupported))
			return
		}
		if within.Off < 0 || within.Len < 0 || within.Off > e.size || within.Len > e.size-within.Off {
			yield(Status{}, fmt.Errorf("%v: block status of %v, its size is %d", c.target, within, e.size))
			return
		}
		// Requests must be aligned, answers are cut to what was wanted.
		wide := within.Align(e.min, e.size)
		for at := wide.Off; at < wide.End(); {
			answer, err := c.status(ctx, context, extent.Extent{Off: at, Len: min(wide.End()-at, zeroStep)})
			if err != nil {
				yield(Status{}, err)
				return
			}
			for _, s := range answer {
				at = s.End()
				s.Extent = s.Intersect(within)
				if s.Len > 0 && !yield(s, nil) {
					return
				}
			}
		}
	}
}

// status asks once. The answer begins at the start of within, has no gaps, and
// may end early but not before its first byte.
func (c *Client) status(ctx context.Context, name string, within extent.Extent) ([]Status, error) {
	k := &call{cmd: cmdBlockStatus, off: within.Off, length: uint32(within.Len), meta: name}
	if err := c.one(ctx, k); err != nil {
		return nil, err
	}
	answer, err := parseStatus(k.status, within)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", c.target, err)
	}
	return answer, nil
}

// parseStatus reads the descriptors of one answer. The last may reach beyond
// what was asked and is cut; none may be empty, or a walk would never end.
func parseStatus(b []byte, within extent.Extent) ([]Status, error) {
	out := make([]Status, 0, len(b)/8)
	at := within.Off
	for ; len(b) >= 8; b = b[8:] {
		n := int64(be.Uint32(b))
		if n == 0 {
			return nil, protocolError("empty extent at %d in a block status", at)
		}
		if at >= within.End() {
			return nil, protocolError("block status of %v goes on at %d", within, at)
		}
		n = min(n, within.End()-at)
		out = append(out, Status{extent.Extent{Off: at, Len: n}, be.Uint32(b[4:])})
		at += n
	}
	if len(out) == 0 {
		return nil, protocolError("block status of %v is empty", within)
	}
	return out, nil
}
