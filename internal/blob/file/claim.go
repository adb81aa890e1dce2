package file

import (
	"context"
	"fmt"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/claims"
	"github.com/backstay/backstay/internal/fault"
)

// claimsFile is where writers of this directory tell each other what they are
// storing. It lies beside the locks, so that no listing shows it, and its dot
// keeps it apart from those that have names.
const claimsFile = lockDir + "/.claims"

var _ blob.Claimer = (*Store)(nil)

func (s *Store) newClaims() *claims.Log {
	shared, ok := s.fs.(SharedFS)
	if !ok {
		return nil
	}
	open := func() (claims.File, error) {
		if err := s.dirs.ensure(lockDir); err != nil {
			return nil, err
		}
		return shared.Share(claimsFile)
	}
	return claims.NewLog(open, func() error {
		if err := s.fs.Remove(claimsFile); err != nil && !missing(err) {
			return err
		}
		return nil
	})
}

// Claim implements blob.Claimer. Claims are seen by every process that has locks
// with this one, and it gives fault.ErrUnsupported where there are none, or where
// the place for claims takes no writes.
func (s *Store) Claim(ctx context.Context, t blob.Ticket, keys []blob.ClaimKey) (busy int, in map[int][32]byte, err error) {
	if s.claims == nil {
		return 0, nil, fmt.Errorf("claims: %w", fault.ErrUnsupported)
	}
	return s.claims.Claim(ctx, t, keys)
}

// Settle implements blob.Claimer.
func (s *Store) Settle(ctx context.Context, t blob.Ticket, in *[32]byte) error {
	if s.claims == nil {
		return fmt.Errorf("claims: %w", fault.ErrUnsupported)
	}
	return s.claims.Settle(ctx, t, in)
}
