package index

import (
	"context"
	"slices"
)

// markBatch is how many keys are looked up together, at most: 16 bytes each.
const markBatch = 8 << 20

// A Marks is a set of the chunks of a Set that no longer changes: one bit an
// entry. It is not safe for concurrent use.
type Marks struct {
	s     *Set
	bits  []uint64
	batch int
	wait  []Key
	visit func(k Key, p Place, known, fresh bool) error
}

// NewMarks makes an empty set over s. From then on s must not change. Keys that
// are marked are looked up many at a time: visit is then told of each, whether s
// knows it at all, and whether it was not yet in the set. Of the same key marked
// twice within a batch it is told once.
func (s *Set) NewMarks(visit func(k Key, p Place, known, fresh bool) error) *Marks {
	n := s.fresh.freeze()
	for _, r := range s.Runs() {
		n += r.entries
	}
	batch := markBatch
	if n < 8*markBatch {
		batch = max(1<<16, int(n/8))
	}
	return &Marks{s: s, bits: make([]uint64, (n+63)/64), batch: batch, visit: visit}
}

// Mark puts k into the set.
func (m *Marks) Mark(ctx context.Context, k Key) error {
	m.wait = append(m.wait, k)
	if len(m.wait) < m.batch {
		return nil
	}
	return m.Flush(ctx)
}

// Flush looks up what was marked; call it when all is.
func (m *Marks) Flush(ctx context.Context) error {
	keys := SortKeys(m.wait)
	m.wait = m.wait[:0]
	// The results of a batch take more than its keys: a part at a time.
	const step = 1 << 20
	for len(keys) > 0 {
		n := min(step, len(keys))
		res, err := m.s.Resolve(ctx, keys[:n])
		if err != nil {
			return err
		}
		for i := range res {
			fresh := false
			if at := &res[i]; at.OK {
				word, bit := &m.bits[at.ord/64], uint64(1)<<(at.ord%64)
				fresh = *word&bit == 0
				*word |= bit
			}
			if err := m.visit(keys[i], res[i].Place, res[i].OK, fresh); err != nil {
				return err
			}
		}
		keys = keys[n:]
	}
	return nil
}

// Marked gives the places of those of keys that are in the set. Keys may be in
// any order; all that was marked must be flushed.
func (m *Marks) Marked(ctx context.Context, keys []Key) (map[Key]Place, error) {
	sorted := SortKeys(slices.Clone(keys))
	res, err := m.s.Resolve(ctx, sorted)
	if err != nil {
		return nil, err
	}
	out := make(map[Key]Place, len(sorted))
	for i := range res {
		if at := &res[i]; at.OK && m.bits[at.ord/64]&(1<<(at.ord%64)) != 0 {
			out[sorted[i]] = at.Place
		}
	}
	return out, nil
}

// SortKeys sorts keys in place and drops those that are there twice.
func SortKeys(keys []Key) []Key {
	slices.SortFunc(keys, func(a, b Key) int { return a.Compare(&b) })
	return slices.Compact(keys)
}
