package blob

import (
	"context"
	"time"
)

// A Retainer is a Store that can keep an object until a time from everybody,
// also from who has every right that its clients have. Only the storage's own
// clock ends that.
type Retainer interface {
	// Retains says whether this store can. An error says why one that could
	// does not: fault.ErrUnsupported where it was not made for it.
	Retains(ctx context.Context) (bool, error)

	// SetRetention makes Put and Create keep each object until the time that
	// until gives for its name, unless that is zero. It is called before the
	// store is used.
	SetRetention(until func(name string) time.Time)

	// Retain keeps an object that is there until then at least. It never
	// shortens what was promised.
	Retain(ctx context.Context, name string, until time.Time) error

	// RetainedUntil is the time that was promised, zero for none.
	RetainedUntil(ctx context.Context, name string) (time.Time, error)
}
