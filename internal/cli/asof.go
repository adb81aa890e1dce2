package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/s3"
)

// asOfFlag is the flag of commands that only read.
func (a *app) asOfFlag(f *pflag.FlagSet) {
	f.StringVar(&a.asOf, "as-of", "", `read the repository as it was then, from the versions that a bucket keeps: "2026-11-22 03:15" or 2026-11-22T03:15:00Z`)
}

// parseTime reads a moment, by this machine's zone if it names none.
func parseTime(s string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf(`%q is no time: want "2026-11-22 03:15" or 2026-11-22T03:15:00Z`, s)
}

// openPast opens the store as it was at --as-of.
func (a *app) openPast(ctx context.Context, at storeAt) (blob.Store, error) {
	then, err := parseTime(a.asOf)
	if err != nil {
		return nil, usage("--as-of: %w", err)
	}
	if at.s3 == nil {
		return nil, usage("--as-of needs a repository in a bucket that keeps versions (s3://)")
	}
	st, err := s3.Open(ctx, *at.s3, s3.Options{})
	if err != nil {
		return nil, storeHint(err)
	}
	past, err := st.AsOf(ctx, then)
	if err != nil {
		return nil, storeHint(fmt.Errorf("repository %s: %w", st, err))
	}
	return a.patient(past), nil
}
