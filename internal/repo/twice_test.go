package repo

import (
	"testing"

	"github.com/backstay/backstay/internal/point"
)

// What another writer stored between a Put and the pack is a duplicate in the
// end, and the point says so; a disk of the same session counts for itself.
func TestWhatOthersStoredFirstIsNotNew(t *testing.T) {
	st, r := newRepo(t)
	other := mustOpen(t, st)
	shared, own := noise(1, 4*testChunk), noise(2, 3*testChunk)
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p := newPoint("web01", "", 0)
	p.Disks = nil
	for _, content := range [][]byte{append(shared[:len(shared):len(shared)], own...), noise(3, 2*testChunk)} {
		w, err := s.Disk(bg, int64(len(content)), "")
		if err != nil {
			t.Fatal(err)
		}
		d := point.Disk{}
		for i := range int64(len(content)) / testChunk {
			put, err := w.Put(bg, i, cut(content, i))
			if err != nil || put.Kind != New {
				t.Fatalf("%+v, %v; want it new at first", put, err)
			}
			d.Stats.NewBytes += testChunk
			d.Stats.StoredBytes += put.StoredBytes
		}
		if d.Manifest, err = w.Finish(bg); err != nil {
			t.Fatal(err)
		}
		d.SizeBytes = int64(len(content))
		p.Disks = append(p.Disks, d)
		p.Stats.Add(d.Stats)
	}
	mustBackup(t, other, "web02", shared, nil, nil)
	if err := s.Commit(bg, p); err != nil {
		t.Fatal(err)
	}
	got, err := mustOpen(t, st).Point(bg, "web01", p.ID)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int64{3 * testChunk, 2 * testChunk} {
		if st := got.Disks[i].Stats; st.NewBytes != want || st.StoredBytes < want || st.StoredBytes > want+want/10 {
			t.Errorf("disk %d: %d bytes new, %d stored; want %d", i, st.NewBytes, st.StoredBytes, want)
		}
	}
	if got.Stats.NewBytes != 5*testChunk {
		t.Errorf("%d bytes new in all, want %d", got.Stats.NewBytes, 5*testChunk)
	}
}
