package repo

import (
	"slices"

	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// A twice counts what one disk's writer was told is new (Put) and what in the
// end was not stored, since another writer had stored it first. The session's
// mutex guards it.
type twice struct {
	plain  int64 // bytes of chunks
	stored int64 // bytes that they would have taken in packs
}

// storedTwice notes that the record e of chunk k is left out of its pack.
func (s *Session) storedTwice(k index.Key, e pack.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.pending[k]; t != nil {
		t.plain += int64(e.PLen)
		t.stored += e.Bytes()
	}
}

// countTwice takes what turned out to be a duplicate out of what the disks of
// points count as new. All packs are durable by now.
func (s *Session) countTwice(points []*point.RestorePoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := slices.Clone(s.writers)
	for _, p := range points {
		for i := range p.Disks {
			n := slices.IndexFunc(left, func(w *DiskWriter) bool { return w.made == p.Disks[i].Manifest })
			if n < 0 {
				continue
			}
			t := left[n].twice
			left = slices.Delete(left, n, n+1) // two disks may be the same
			for _, st := range []*point.Stats{&p.Disks[i].Stats, &p.Stats} {
				st.NewBytes = max(0, st.NewBytes-t.plain)
				st.StoredBytes = max(0, st.StoredBytes-t.stored)
			}
		}
	}
}
