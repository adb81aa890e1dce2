package index

import (
	"context"
	"slices"
)

// Twice calls fn with each chunk that is in memory and in runs too: its place in
// memory, and those in runs, the newest first. It reads each block of a run once.
// The set must not change meanwhile. An error of a run is a PartError.
func (s *Set) Twice(ctx context.Context, fn func(k Key, fresh Place, older []Place) error) error {
	runs := s.Runs()
	if len(runs) == 0 {
		return nil
	}
	var entries []Located
	var keys []Key
	var want []int
	older := map[int][]Place{}
	for i := range shards {
		entries = s.fresh.sorted(i, entries)
		keys, want = keys[:0], want[:0]
		for n := range entries {
			keys, want = append(keys, entries[n].Key), append(want, n)
		}
		clear(older)
		for _, r := range runs {
			err := r.batch(ctx, keys, want, func(n int, f found) { older[n] = append(older[n], f.at) })
			if err != nil {
				return err
			}
		}
		for n := range entries {
			// What a run says of the place in memory itself is nothing new.
			places := slices.DeleteFunc(older[n], func(p Place) bool { return p == entries[n].Place })
			if len(places) == 0 {
				continue
			}
			if err := fn(keys[n], entries[n].Place, places); err != nil {
				return err
			}
		}
	}
	return nil
}
