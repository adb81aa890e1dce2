package repo

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// agedRepo is a disk of four pages after eight days, of which the first, one in
// between and the last are left: what the newest point needs lies in the packs of
// all days, between what it does not need. Contents are the seeds of the chunks.
func agedRepo(t *testing.T, st blob.Store) (points []*point.RestorePoint, contents []map[int64]uint64) {
	t.Helper()
	mustInit(t, st)
	r := mustOpen(t, st)
	const size = 4 * manifest.Positions * testChunk
	rng := rand.New(rand.NewPCG(1, 2))
	now := map[int64]uint64{}
	var prev point.ManifestID
	for day := range int64(8) {
		s, err := r.Begin(bg, SessionOptions{NoOverlays: true})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Disk(bg, size, prev)
		if err != nil {
			t.Fatal(err)
		}
		for i := int64(0); i < 4*manifest.Positions; i += 32 {
			if day > 0 && rng.IntN(3) > 0 {
				continue
			}
			now[i] = uint64(1000*day + i/32)
			if _, err := w.Put(bg, i, agedChunk(now[i])); err != nil {
				t.Fatal(err)
			}
		}
		if prev, err = w.Finish(bg); err != nil {
			t.Fatal(err)
		}
		p := newPoint("web01", prev, size)
		if err := s.Commit(bg, p); err != nil {
			t.Fatal(err)
		}
		points, contents = append(points, p), append(contents, maps.Clone(now))
	}
	for _, i := range []int{6, 5, 3, 2, 1} {
		if err := r.DeletePoint(bg, points[i].VM, points[i].ID); err != nil {
			t.Fatal(err)
		}
		points, contents = slices.Delete(points, i, i+1), slices.Delete(contents, i, i+1)
	}
	return points, contents
}

func agedChunk(seed uint64) []byte {
	p := make([]byte, testChunk)
	copy(p, noise(seed, 3000))
	return p
}

// mustReadAged reads all points.
func mustReadAged(t *testing.T, st blob.Store, points []*point.RestorePoint, contents []map[int64]uint64) {
	t.Helper()
	r := mustOpen(t, st)
	for i, p := range points {
		d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		found := 0
		err = d.Fetch(bg, extent.Extent{Len: d.Size()}, FetchOptions{Ordered: true}, func(off int64, data []byte) error {
			seed, ok := contents[i][off/testChunk]
			if found++; !ok || !bytes.Equal(data, agedChunk(seed)) {
				return fmt.Errorf("chunk %d differs", off/testChunk)
			}
			return nil
		})
		if err != nil || found != len(contents[i]) {
			t.Fatalf("%s: %d of %d chunks, %v", p.Ref(), found, len(contents[i]), err)
		}
	}
	if rep := mustCheck(t, r, CheckOptions{ReadData: true}); len(rep.Findings) > 0 {
		t.Fatalf("%+v", rep.Findings)
	}
}

// What a vacuum copies lies as the newest point reads it: everything that it needs
// before anything that only older ones need, page by page.
func TestVacuumKeepsTheNewestPointInOrder(t *testing.T) {
	st := mem.New()
	points, contents := agedRepo(t, st)
	// Without keys, as an operator would.
	keyless, err := OpenKeyless(bg, st)
	if err != nil {
		t.Fatal(err)
	}
	defer keyless.Close()
	before := names(t, st, packPrefix)
	if rep, err := keyless.Vacuum(bg, VacuumOptions{}); err != nil || rep.RewrittenPacks < 3 {
		t.Fatalf("%+v, %v", rep, err)
	}
	mustReadAged(t, st, points, contents)
	r := mustOpen(t, st)
	d, err := r.OpenDisk(bg, points[2].Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	page := map[string]int{} // of the records that the newest point needs
	err = d.walk(bg, 0, d.Chunks(), func(i int64, c ref) error {
		page[c.id.String()] = int(i / manifest.Positions)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	copied, needed, older := 0, 0, 0
	for _, name := range names(t, st, packPrefix) {
		if slices.Contains(before, name) {
			continue
		}
		copied++
		entries, _ := pack.Scan(mustReadObject(t, st, name), r.id)
		last := 0
		for _, e := range entries {
			at, ok := page[e.ID.String()]
			switch {
			case !ok:
				older++
			case older > 0:
				t.Fatalf("%s at %d is the newest point's, behind what is not", e.ID.Short(), e.Off)
			case at < last:
				t.Fatalf("%s of page %d behind page %d", e.ID.Short(), at, last)
			default:
				needed++
				last = at
			}
		}
	}
	if copied != 1 || needed < 10 || older < 10 {
		t.Fatalf("%d new packs with %d records of the newest point and %d of others", copied, needed, older)
	}
}

// However many records there are, they are put into order some at a time.
func TestVacuumOrdersSomeAtATime(t *testing.T) {
	defer func(n int) { movesAtOnce = n }(movesAtOnce)
	movesAtOnce = 10
	st := mem.New()
	points, contents := agedRepo(t, st)
	if rep, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{}); err != nil || rep.RewrittenPacks < 3 {
		t.Fatalf("%+v, %v", rep, err)
	}
	mustReadAged(t, st, points, contents)
}
