package index

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// A Located is a key and its place.
type Located struct {
	Key   Key
	Place Place
}

// A Set is a table of what is new over runs of what is old. It is safe for
// concurrent use.
type Set struct {
	// Rank says how far a place can be relied on: 0 is best. Of several places
	// of a key the best counts, and of equals the newest.
	rank  func(Place) uint8
	fresh Table

	mu   sync.RWMutex
	runs []*Run // the newest first
}

// NewSet makes an empty set. Rank may be called from several goroutines.
func NewSet(rank func(Place) uint8) *Set { return &Set{rank: rank} }

// AddRun puts a run under what is known.
func (s *Set) AddRun(r *Run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	runs := append(slices.Clone(s.runs), r)
	slices.SortStableFunc(runs, func(a, b *Run) int {
		switch {
		case a.Generation > b.Generation:
			return -1
		case a.Generation < b.Generation:
			return 1
		}
		return 0
	})
	s.runs = runs
}

// Runs are all runs, the newest first. The slice must not be changed.
func (s *Set) Runs() []*Run {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.runs
}

// Insert notes the place of k over what runs say. If the table has one already,
// replace decides whether the new one takes over.
func (s *Set) Insert(k Key, p Place, replace func(old Place) bool) { s.fresh.Insert(k, p, replace) }

// Fresh finds the place of k as far as no run need be asked.
func (s *Set) Fresh(k Key) (Place, bool) { return s.fresh.Lookup(k) }

// FreshLen is how many chunks are in memory.
func (s *Set) FreshLen() int64 { return s.fresh.Len() }

// Lookup finds the place of k. An error is a PartError.
func (s *Set) Lookup(ctx context.Context, k Key) (p Place, ok bool, err error) {
	f, ok := s.fresh.lookup(&k)
	best := ^uint8(0)
	if ok {
		if best = s.rank(f.at); best == 0 {
			return f.at, true, nil
		}
	}
	for _, r := range s.Runs() {
		g, in, err := r.lookup(ctx, &k)
		if err != nil {
			return p, false, err
		}
		if !in {
			continue
		}
		if rank := s.rank(g.at); !ok || rank < best {
			f, ok, best = g, true, rank
		}
		if best == 0 {
			break
		}
	}
	if !ok {
		return p, false, nil
	}
	return f.at, true, nil
}

// A Result is what Resolve finds.
type Result struct {
	Place Place
	OK    bool
	ord   int64
	rank  uint8
}

// Resolve finds the places of keys, which ascend, each once. It reads each block of
// a run once and takes no memory for filters that nobody else asked for.
func (s *Set) Resolve(ctx context.Context, keys []Key) ([]Result, error) {
	out := make([]Result, len(keys))
	want := make([]int, 0, len(keys))
	for i := range keys {
		f, ok := s.fresh.lookup(&keys[i])
		if ok {
			out[i] = Result{f.at, true, f.ord, s.rank(f.at)}
		}
		if !ok || out[i].rank > 0 {
			want = append(want, i)
		}
	}
	base := s.fresh.slots()
	for _, r := range s.Runs() {
		if len(want) == 0 {
			break
		}
		err := r.batch(ctx, keys, want, func(i int, f found) {
			if rank := s.rank(f.at); !out[i].OK || rank < out[i].rank {
				out[i] = Result{f.at, true, base + f.ord, rank}
			}
		})
		if err != nil {
			return nil, err
		}
		base += r.entries
		want = slices.DeleteFunc(want, func(i int) bool { return out[i].OK && out[i].rank == 0 })
	}
	return out, nil
}

// Len is how many entries there are: of a chunk that was stored again, or moved
// by a vacuum that left its run alone, more than one.
func (s *Set) Len() int64 {
	n := s.fresh.Len()
	for _, r := range s.Runs() {
		n += r.Len()
	}
	return n
}

// Bytes is the memory that the set takes now.
func (s *Set) Bytes() int64 {
	n := s.fresh.Bytes()
	for _, r := range s.Runs() {
		n += r.Bytes()
	}
	return n
}

// Each calls fn with the place of every chunk, in the order of the keys if
// there are runs.
func (s *Set) Each(ctx context.Context, fn func(Key, Place) error) error {
	runs := s.Runs()
	if len(runs) == 0 {
		for k, p := range s.fresh.All() {
			if err := fn(k, p); err != nil {
				return err
			}
		}
		return nil
	}
	return s.Merge(ctx, runs, s.rank, fn)
}

// Lost gives the run and the keys of the part that turned out to be damaged; e
// is what Lookup or another method gave. To be done without it, the run must
// Lose it.
func (s *Set) Lost(e *PartError) (r *Run, keys Range, ok bool) {
	for _, r := range s.Runs() {
		for i := range r.parts {
			if r.parts[i].name == e.Object {
				return r, r.keys(i), true
			}
		}
	}
	return nil, keys, false
}

// Blame gives the part that says that k is at p, which turned out to be wrong;
// nil if that is in memory.
func (s *Set) Blame(ctx context.Context, k Key, p Place) (*PartError, error) {
	if f, ok := s.fresh.Lookup(k); ok && f == p {
		return nil, nil
	}
	for _, r := range s.Runs() {
		f, ok, err := r.lookup(ctx, &k)
		if err != nil {
			return nil, err
		}
		if ok && f.at == p {
			return &PartError{r.parts[r.part(&k)].name, &damage{fmt.Errorf("it is wrong about where chunk %x… lies", k[:4])}}, nil
		}
	}
	return nil, nil
}
