package repo

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// damagedRepo is a small repository with one object of every kind.
func damagedRepo(t *testing.T) (*mem.Store, *history) {
	st := mem.New()
	mustInit(t, st)
	r := mustOpen(t, st)
	h := &history{}
	a := append(text(1, 3*testChunk), noise(2, 500)...)
	b := bytes.Clone(a)
	copy(b, "changed")
	p := mustBackup(t, r, "web01", a, nil, nil)
	q := mustBackup(t, r, "web01", b, p, a)
	h.add(p, a)
	h.add(q, b)
	if err := r.MarkSuspect(bg, "web01", p.ID, "tracking lied"); err != nil {
		t.Fatal(err)
	}
	spare := mustBackup(t, r, "spare", noise(8, testChunk), nil, nil)
	if err := r.DeletePoint(bg, "spare", spare.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Begin(bg, SessionOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Check(bg, CheckOptions{Scrub: true}); err != nil {
		t.Fatal(err)
	}
	quarantineByHand(t, st, [32]byte{1, 2, 3}, 64)
	return st.Clone(), h
}

// Whichever bit flips in whichever object: a scrub without keys names the
// object, and nobody ever reads wrong data.
func TestEveryFlippedBitIsFound(t *testing.T) {
	st, h := damagedRepo(t)
	names, err := blobtest.Names(bg, st, "")
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for _, name := range names {
		kind, _, _ := strings.Cut(name, "/")
		kinds[kind] = true
		size, err := st.Size(bg, name)
		if err != nil {
			t.Fatal(err)
		}
		step := max(1, size/61) * int64(stride()) // primes keep it from hitting one field only
		for at := int64(0); at < size; at += step {
			bad := st.Clone()
			bit := byte(1) << (at % 8)
			if err := bad.Damage(name, func(b []byte) []byte { b[at] ^= bit; return b }); err != nil {
				t.Fatal(err)
			}
			mustNotLie(t, bad, h, name, at)
		}
	}
	for _, kind := range []string{"repo.json", "keys", "data", "idx", "man", "rp", "outcome", "session", "suspect", "epoch", "quarantine", "par", "scrub"} {
		if !kinds[kind] {
			t.Errorf("the repository has no %s", kind)
		}
	}
}

func mustNotLie(t *testing.T, bad *mem.Store, h *history, name string, at int64) {
	t.Helper()
	r, err := OpenKeyless(bg, bad)
	if err != nil {
		if name != "repo.json" || !errors.Is(err, fault.ErrCorrupt) && !errors.Is(err, fault.ErrUnsupported) {
			t.Fatalf("%s flipped at %d: open: %v", name, at, err)
		}
		return
	}
	rep, err := r.Check(bg, CheckOptions{Scrub: true})
	if err != nil && !errors.Is(err, fault.ErrCorrupt) {
		t.Fatalf("%s flipped at %d: scrub: %v", name, at, err)
	}
	found := err != nil
	for _, f := range slices.Concat(rep.Findings, rep.Unneeded) {
		found = found || f.Object == name
	}
	if !found {
		t.Fatalf("%s flipped at %d: scrub found %v", name, at, rep.Findings)
	}
	full, err := Open(bg, bad, testKey)
	if err != nil {
		if !strings.HasPrefix(name, "keys/") || !errors.Is(err, fault.ErrCorrupt) {
			t.Fatalf("%s flipped at %d: open: %v", name, at, err)
		}
		return
	}
	defer full.Close()
	points, err := full.Points(bg)
	if err != nil && !errors.Is(err, fault.ErrCorrupt) {
		t.Fatalf("%s flipped at %d: points: %v", name, at, err)
	}
	for _, p := range points {
		got, err := read(full, p)
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			t.Fatalf("%s flipped at %d: read: %v", name, at, err)
		}
		if err == nil && !bytes.Equal(got, h.content[p.ID]) {
			t.Fatalf("%s flipped at %d: %s reads wrong", name, at, p.Ref())
		}
	}
}

func onlyPack(t *testing.T, st *mem.Store) string {
	t.Helper()
	names, err := blobtest.Names(bg, st, packPrefix)
	if err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
	return names[0]
}

// A damaged pack is named with its offset, and so is every part of every disk
// that it hits; the next backup stores the lost chunk again.
func TestDamageIsNamedAndHealed(t *testing.T) {
	st, r := newRepo(t)
	content := noise(1, 4*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	q := mustBackup(t, r, "web02", content[testChunk:], nil, nil)
	names, _ := blobtest.Names(bg, st, packPrefix)
	var name string
	for _, n := range names {
		if size, _ := st.Size(bg, n); size > testChunk {
			name = n
		}
	}
	// The third record: chunk 2 of web01, chunk 1 of web02.
	const record = testChunk + 92
	at := int64(64 + 2*record + 1000)
	if err := st.Damage(name, func(b []byte) []byte { b[at] ^= 1; return b }); err != nil {
		t.Fatal(err)
	}
	want := map[string]extent.Extent{"web01": {Off: 2 * testChunk, Len: testChunk}, "web02": {Off: testChunk, Len: testChunk}}
	for _, o := range []CheckOptions{{Scrub: true}, {ReadData: true}} {
		rep, err := mustOpen(t, st).Check(bg, o)
		if err != nil {
			t.Fatal(err)
		}
		if len(rep.Findings) != 1 {
			t.Fatalf("%v", rep.Findings)
		}
		f := rep.Findings[0]
		if f.Object != name || f.Offset != 64+2*record || !errors.Is(f.Err, fault.ErrCorrupt) || !strings.Contains(f.Err.Error(), "pack "+name[8:16]) {
			t.Errorf("found %s at %d: %v", f.Object, f.Offset, f.Err)
		}
		if len(f.Hits) != 2 {
			t.Fatalf("hits %v", f.Hits)
		}
		for _, hit := range f.Hits {
			if hit.Disk != "vda" || hit.Range != want[hit.VM] {
				t.Errorf("hit %+v", hit)
			}
		}
	}
	keyless, err := OpenKeyless(bg, st)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := keyless.Check(bg, CheckOptions{Scrub: true})
	if err != nil || len(rep.Findings) != 1 || len(rep.Findings[0].Hits) != 2 || rep.Findings[0].Hits[0].VM != "" {
		t.Errorf("without keys: %+v, %v", rep, err)
	}

	r = mustOpen(t, st)
	_, err = read(r, p)
	var ce *fault.CorruptError
	if !errors.As(err, &ce) || ce.Object != "pack "+name[8:16] || ce.Offset != 64+2*record {
		t.Errorf("reading it: %v", err)
	}
	h := &history{}
	h.add(mustBackup(t, r, "web03", content, nil, nil), content)
	mustRead(t, r, h.points[0], content)
	again := mustOpen(t, st)
	mustRead(t, again, p, content)
	mustRead(t, again, q, content[testChunk:])
}

func TestTruncatedAndMissingPacks(t *testing.T) {
	content := noise(1, 4*testChunk)
	for _, c := range []struct {
		name string
		cut  int64 // bytes that stay; -1: the pack is gone
	}{{"gone", -1}, {"empty", 0}, {"half a header", 30}, {"half a record", 64 + testChunk/2}, {"two records", 64 + 2*(testChunk+92)}, {"no footer", 64 + 4*(testChunk+92) + 100}} {
		t.Run(c.name, func(t *testing.T) {
			st, r := newRepo(t)
			s, err := r.Begin(bg, SessionOptions{})
			if err != nil {
				t.Fatal(err)
			}
			w, _ := s.Disk(bg, int64(len(content)), "")
			for i := range int64(4) {
				if _, err := w.Put(bg, i, cut(content, i)); err != nil {
					t.Fatal(err)
				}
			}
			m, _ := w.Finish(bg)
			p := newPoint("web01", m, int64(len(content)))
			if err := s.Commit(bg, p); err != nil {
				t.Fatal(err)
			}
			name := onlyPack(t, st)
			if c.cut < 0 {
				st.Delete(bg, name)
			} else {
				st.Damage(name, func(b []byte) []byte { return b[:c.cut] })
			}
			r = mustOpen(t, st)
			d, err := r.OpenDisk(bg, m)
			if err != nil {
				t.Fatal(err)
			}
			err = d.Fetch(bg, extent.Extent{Len: d.Size()}, FetchOptions{}, func(off int64, data []byte) error {
				if !bytes.Equal(data, content[off:off+int64(len(data))]) {
					t.Errorf("wrong data at %d", off)
				}
				return nil
			})
			lost := c.cut < 64+4*(testChunk+92)
			var ce *fault.CorruptError
			if lost && (!errors.As(err, &ce) || ce.Object != "pack "+name[8:16]) || !lost && err != nil {
				t.Errorf("reading gave %v", err)
			}
			for _, o := range []CheckOptions{{}, {Scrub: true}} {
				rep, err := r.Check(bg, o)
				if err != nil {
					t.Fatal(err)
				}
				hits := 0
				for _, f := range rep.Findings {
					hits += len(f.Hits)
				}
				if len(rep.Findings) == 0 || lost && hits == 0 {
					t.Errorf("check %+v found %+v", o, rep.Findings)
				}
			}
			// The next backup stores what was lost and the old point is whole.
			next := mustBackup(t, r, "web02", content, nil, nil)
			mustRead(t, mustOpen(t, st), next, content)
			p.Config = map[string]point.Blob{"domain.xml": next.Config["domain.xml"]}
			p.VM = "web02"
			mustRead(t, mustOpen(t, st), p, content)
			// Vacuum keeps whatever is left.
			if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
				t.Fatal(err)
			}
			mustRead(t, mustOpen(t, st), next, content)
		})
	}
}

// The index is a cache: without it everything is still there.
func TestALostIndexIsRebuilt(t *testing.T) {
	st, r := newRepo(t)
	content := noise(1, 4*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	names, _ := blobtest.Names(bg, st, indexPrefix)
	if len(names) == 0 {
		t.Fatal("no index")
	}
	for _, name := range names {
		st.Delete(bg, name)
	}
	r = mustOpen(t, st)
	mustRead(t, r, p, content)
	q := mustBackup(t, r, "web02", content, nil, nil)
	if n := count(t, st, indexPrefix); n == 0 {
		t.Error("the next backup did not write it again")
	}
	mustRead(t, r, q, content)
	if n := count(t, st, packPrefix); n != 2 { // q's own holds its domain.xml
		t.Errorf("%d packs", n)
	}
}

func TestNewerFormatsAreNamed(t *testing.T) {
	st, _ := newRepo(t)
	st.Damage("repo.json", func([]byte) []byte { return []byte(`{"format":7,"shape":"unknown"}`) })
	_, err := Open(bg, st, testKey)
	if !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), "7") || !strings.Contains(err.Error(), "1") {
		t.Errorf("%v", err)
	}
}

// One record that cannot be read does not keep the others from being restored.
func TestADamagedRecordLeavesTheOthers(t *testing.T) {
	st, r := newRepo(t)
	a, b := mustBackup(t, r, "web01", noise(1, 100), nil, nil), mustBackup(t, r, "web02", noise(2, 100), nil, nil)
	names, _ := blobtest.Names(bg, st, pointPrefix)
	st.Damage(names[0], func(d []byte) []byte { d[40] ^= 1; return d })
	r = mustOpen(t, st)
	points, err := r.Points(bg)
	if !errors.Is(err, fault.ErrCorrupt) || len(points) != 1 {
		t.Errorf("%d points, %v", len(points), err)
	}
	left := points[0]
	if left.ID != a.ID && left.ID != b.ID {
		t.Errorf("left is %s", left.Ref())
	}
	if _, err := r.Point(bg, left.VM, left.ID); err != nil {
		t.Errorf("the point that is left: %v", err)
	}
	if _, err := r.Point(bg, left.VM, ""); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("the newest, while one is unreadable: %v", err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("vacuum while a point is unreadable: %v", err)
	}
}

func TestSuspectPoints(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, 100), nil, nil)
	if err := r.MarkSuspect(bg, "web01", p.ID, "tracking lied"); err != nil {
		t.Fatal(err)
	}
	got, err := mustOpen(t, st).Point(bg, "web01", "")
	if err != nil || got.Suspect != "tracking lied" {
		t.Errorf("%q, %v", got.Suspect, err)
	}
	names, _ := blobtest.Names(bg, st, suspectPrefix)
	st.Damage(names[0], func(d []byte) []byte { d[20] ^= 1; return d })
	if got, err = r.Point(bg, "web01", ""); err != nil || got.Suspect == "" {
		t.Errorf("with a damaged note: %q, %v", got.Suspect, err)
	}
	if err := r.DeletePoint(bg, "web01", p.ID); err != nil || count(t, st, suspectPrefix) != 0 {
		t.Errorf("delete left the note: %v", err)
	}
	if err := r.DeletePoint(bg, "web01", p.ID); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	if err := r.MarkSuspect(bg, "web01", p.ID, "x"); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("mark what is gone: %v", err)
	}
}
