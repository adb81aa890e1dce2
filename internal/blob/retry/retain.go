package retry

import (
	"context"
	"time"

	"github.com/backstay/backstay/internal/blob"
)

var _ blob.Retainer = (*store)(nil)

// Retains implements blob.Retainer: false where the store underneath is none.
func (s *store) Retains(ctx context.Context) (can bool, err error) {
	r, ok := s.Store.(blob.Retainer)
	if !ok {
		return false, nil
	}
	err = s.do(ctx, "object lock of", s.String(), func(int) (err error) {
		can, err = r.Retains(ctx)
		return err
	})
	return can, err
}

// SetRetention implements blob.Retainer.
func (s *store) SetRetention(until func(name string) time.Time) {
	if r, ok := s.Store.(blob.Retainer); ok {
		r.SetRetention(until)
	}
}

// Retain implements blob.Retainer.
func (s *store) Retain(ctx context.Context, name string, until time.Time) error {
	return s.do(ctx, "retain", name, func(int) error { return s.Store.(blob.Retainer).Retain(ctx, name, until) })
}

// RetainedUntil implements blob.Retainer.
func (s *store) RetainedUntil(ctx context.Context, name string) (until time.Time, err error) {
	err = s.do(ctx, "retention of", name, func(int) (err error) {
		until, err = s.Store.(blob.Retainer).RetainedUntil(ctx, name)
		return err
	})
	return until, err
}
