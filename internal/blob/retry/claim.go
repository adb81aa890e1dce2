package retry

import (
	"context"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

var _ blob.Claimer = (*store)(nil)

// Claim implements blob.Claimer. It is not tried again: claims only save space,
// and are not worth waiting for.
func (s *store) Claim(ctx context.Context, t blob.Ticket, keys []blob.ClaimKey) (busy int, in map[int][32]byte, err error) {
	if c, ok := s.Store.(blob.Claimer); ok {
		return c.Claim(ctx, t, keys)
	}
	return 0, nil, fault.ErrUnsupported
}

// Settle implements blob.Claimer.
func (s *store) Settle(ctx context.Context, t blob.Ticket, in *[32]byte) error {
	if c, ok := s.Store.(blob.Claimer); ok {
		return c.Settle(ctx, t, in)
	}
	return fault.ErrUnsupported
}
