package repo

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// block is what overlays are made of.
const block = 4096

// packed are all records in the store, by id, and the pack of each.
func packed(t testing.TB, st blob.Store) (records map[chunk.ID]pack.Entry, in map[chunk.ID]string) {
	t.Helper()
	records, in = map[chunk.ID]pack.Entry{}, map[chunk.ID]string{}
	for o, err := range st.List(bg, packPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		entries, err := pack.ReadEntries(&storeReader{bg, st, o.Name}, o.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			records[e.ID], in[e.ID] = e, o.Name
		}
	}
	return records, in
}

// overlays counts the overlays among them, and what they take.
func overlays(records map[chunk.ID]pack.Entry) (n int, bytes int64) {
	for _, e := range records {
		if e.Encoding == pack.Overlay {
			n++
			bytes += e.Bytes()
		}
	}
	return n, bytes
}

// touch changes a byte in each of n blocks of chunk i.
func touch(content []byte, i int64, n int, seed byte) []byte {
	out := bytes.Clone(content)
	for k := range n {
		out[i*testChunk+int64(k)*block+17] ^= seed
	}
	return out
}

// refs are how the disk of a point refers to its chunks.
func refs(t testing.TB, r *Repository, p *point.RestorePoint) (all []ref) {
	t.Helper()
	d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for i := range d.Chunks() {
		c, _, err := d.ref(bg, i)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

func TestAChangedChunkIsAnOverlay(t *testing.T) {
	st, r := newRepo(t)
	a := append(noise(1, 6*testChunk), noise(2, 1000)...)
	b := touch(touch(a, 1, 1, 1), 3, testChunk/block/2, 1)
	b = touch(b, 4, testChunk/block/2+1, 1)
	p := mustBackup(t, r, "web01", a, nil, nil)
	q := mustBackup(t, r, "web01", b, p, a)
	before, after := refs(t, r, p), refs(t, r, q)
	for i, c := range after {
		if want := i == 1 || i == 3; c.overlay() != want || want && c.base != before[i].id || c.id != r.ChunkID(cut(b, int64(i))) {
			t.Errorf("chunk %d: %v", i, c)
		}
	}
	records, _ := packed(t, st)
	if n, size := overlays(records); n != 2 || size > 1000+testChunk/2+1000 {
		t.Errorf("%d overlays of %d bytes", n, size)
	}

	// The next ones are on the same bases, never on an overlay, until they are
	// too large.
	c := touch(touch(b, 1, 2, 2), 3, testChunk/block, 2)
	u := mustBackup(t, r, "web01", c, q, b)
	last := refs(t, r, u)
	if last[1].base != before[1].id || last[3].overlay() {
		t.Errorf("then %v and %v", last[1], last[3])
	}

	// What is known is not stored again, overlay or not.
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(bg)
	w, err := s.Disk(bg, int64(len(a)), q.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range map[int64]struct {
		plain []byte
		kind  PutKind
	}{0: {cut(b, 0), Same}, 1: {cut(b, 1), Same}, 3: {cut(a, 3), Known}, 4: {cut(c, 4), Same}, 5: {cut(c, 1), New}} {
		if put, err := w.Put(bg, i, want.plain); err != nil || put.Kind != want.kind {
			t.Errorf("chunk %d: %+v, %v", i, put, err)
		}
	}
	w2, err := s.Disk(bg, int64(len(a)), p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	if put, err := w2.Put(bg, 1, cut(b, 1)); err != nil || put.Kind != Known {
		t.Errorf("an overlay that is stored: %+v, %v", put, err)
	}
	s.Abort(bg)

	// Their bases outlive the point that brought them.
	for _, gone := range []*point.RestorePoint{p, q} {
		if err := r.DeletePoint(bg, "web01", gone.ID); err != nil {
			t.Fatal(err)
		}
		keyless, err := OpenKeyless(bg, st)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := keyless.Vacuum(bg, VacuumOptions{}); err != nil {
			t.Fatal(err)
		}
		r = mustOpen(t, st)
		mustRead(t, r, u, c)
		mustCheck(t, r, CheckOptions{ReadData: true})
	}
}

func TestOverlaysCanBeSwitchedOff(t *testing.T) {
	st, r := newRepo(t)
	a := noise(1, 2*testChunk)
	p := mustBackup(t, r, "web01", a, nil, nil)
	s, err := r.Begin(bg, SessionOptions{NoOverlays: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(bg)
	w, err := s.Disk(bg, int64(len(a)), p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	put, err := w.Put(bg, 0, cut(touch(a, 0, 1, 1), 0))
	if err == nil {
		err = s.flush(bg)
	}
	records, _ := packed(t, st)
	if n, _ := overlays(records); err != nil || put.StoredBytes != fullRecord || n != 0 {
		t.Errorf("%+v, %d overlays, %v", put, n, err)
	}
}

// Neither the chunk that a backup just read to fill the rest of another, nor a
// whole disk of changes, is worth reads that lead to nothing.
func TestOverlaysCostFewReads(t *testing.T) {
	st := mem.New()
	mustInit(t, st)
	const chunks = 200
	a, b := noise(1, chunks*testChunk), noise(2, chunks*testChunk)
	reads := 0
	counted := countReads(st, packPrefix, &reads)
	r := mustOpen(t, counted)
	p := mustBackup(t, r, "web01", a, nil, nil)
	reads = 0
	mustBackup(t, r, "web01", b, p, a)
	if reads > missesInARow+chunks/tryEvery+8 {
		t.Errorf("%d reads for %d chunks that have nothing in common with what they were", reads, chunks)
	}
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(bg)
	w, err := s.Disk(bg, int64(len(a)), p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	reads = 0
	buf := make([]byte, testChunk)
	for i := range int64(20) {
		if err := w.ReadPrevious(bg, i, buf); err != nil {
			t.Fatal(err)
		}
		buf[5] ^= 1
		if put, err := w.Put(bg, i, buf); err != nil || put.StoredBytes > 1000 {
			t.Fatalf("%+v, %v", put, err)
		}
	}
	if reads != 20 {
		t.Errorf("%d reads to fill 20 chunks", reads)
	}
}

// A damaged base hits every point that has an overlay on it. The next backup
// makes whole what it can: all points whose chunk is the guest's still.
func TestADamagedBaseHeals(t *testing.T) {
	st, r := newRepo(t)
	a := noise(1, 3*testChunk)
	b, c := touch(a, 1, 2, 1), touch(a, 1, 3, 2)
	p := mustBackup(t, r, "web01", a, nil, nil)
	q := mustBackup(t, r, "web01", b, p, a)
	u := mustBackup(t, r, "web01", c, q, b)
	base := refs(t, r, p)[1].id
	records, in := packed(t, st)
	if err := st.Damage(in[base], func(b []byte) []byte { b[records[base].Off+500] ^= 1; return b }); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, st)
	rep, err := r.Check(bg, CheckOptions{ReadData: true})
	if err != nil || len(rep.Findings) != 1 || len(rep.Findings[0].Hits) != 3 {
		t.Fatalf("%+v, %v", rep, err)
	}
	for _, h := range rep.Findings[0].Hits {
		if h.Range != (extent.Extent{Off: testChunk, Len: testChunk}) {
			t.Errorf("%+v", h)
		}
	}
	for _, x := range []*point.RestorePoint{q, u} {
		if _, err := read(r, x); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s without the base of an overlay: %v", x.Ref(), err)
		}
	}

	// The chunk itself, where another VM brings it, is as good.
	copied := st.Clone()
	r2 := mustOpen(t, copied)
	mustBackup(t, r2, "web02", b, nil, nil)
	mustRead(t, r2, q, b)

	// An incremental backup that is told that nothing changed.
	heal := func(prev *point.RestorePoint, content []byte) *point.RestorePoint {
		t.Helper()
		s, err := r.Begin(bg, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Abort(bg)
		w, err := s.Disk(bg, int64(len(content)), prev.Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		set, err := w.Doubtful(bg, extent.Extent{Len: int64(len(content))})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range set.List() {
			if _, err := w.Put(bg, e.Off/testChunk, cut(content, e.Off/testChunk)); err != nil {
				t.Fatal(err)
			}
		}
		m, err := w.Finish(bg)
		if err != nil {
			t.Fatal(err)
		}
		xml, err := s.PutBlob(bg, []byte("<domain>web01</domain>"))
		if err != nil {
			t.Fatal(err)
		}
		x := newPoint("web01", m, int64(len(content)))
		x.Config = map[string]point.Blob{"domain.xml": xml}
		if err := s.Commit(bg, x); err != nil {
			t.Fatal(err)
		}
		return x
	}
	next := heal(u, c)
	if refs(t, r, next)[1].overlay() {
		t.Error("the new point relies on a base that is lost")
	}
	for _, again := range []*Repository{r, mustOpen(t, st)} {
		mustRead(t, again, u, c)
		mustRead(t, again, next, c)
		if _, err := read(again, q); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: %v", q.Ref(), err)
		}
	}
	rep, err = mustOpen(t, st).Check(bg, CheckOptions{ReadData: true})
	if err != nil || len(rep.Findings) != 1 || len(rep.Findings[0].Hits) != 2 {
		t.Errorf("%+v, %v", rep, err)
	}
	// Again there is nothing to do.
	before, _ := packed(t, st)
	heal(next, c)
	if after, _ := packed(t, st); len(after) != len(before) {
		t.Error("what was healed was healed again")
	}

	// A lost overlay alone is made anew.
	d := touch(c, 2, 1, 9)
	v := mustBackup(t, r, "web01", d, next, c)
	lost := r.recordID(refs(t, r, v)[2])
	records, in = packed(t, st)
	if err := st.Damage(in[lost], func(b []byte) []byte { b[records[lost].Off+90] ^= 1; return b }); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, st)
	if rep, err := r.Check(bg, CheckOptions{Scrub: true}); err != nil || len(rep.Findings) != 2 {
		t.Fatalf("%+v, %v", rep, err)
	}
	r = mustOpen(t, st)
	x := heal(v, d)
	if x.Disks[0].Manifest != v.Disks[0].Manifest {
		t.Error("the chunk is another now")
	}
	mustRead(t, r, v, d)

	// Without the points that are beyond help all is well, and vacuum takes what
	// is damaged.
	for _, gone := range []*point.RestorePoint{p, q, u} {
		if err := r.DeletePoint(bg, "web01", gone.ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, st)
	mustCheck(t, r, CheckOptions{ReadData: true})
	if n := count(t, st, quarantinePrefix); n != 0 {
		t.Errorf("%d notes are left", n)
	}
	mustRead(t, r, x, d)
}

// Histories of disks that change a little, with deletes, vacuums and damage in
// any order: a point reads as it was written or says that it is corrupt, and
// backups of what the guests still have make all whole whose bases are.
func TestOverlaysAgreeWithAModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		st := mem.New()
		if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
			t.Fatal(err)
		}
		r, err := Open(bg, st, testKey)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { r.Close() }()
		type kept struct {
			p *point.RestorePoint
			c []byte
		}
		var points []kept
		hurt := false
		backUp := func(prev *kept, content []byte, all bool) {
			s, err := r.Begin(bg, SessionOptions{NoOverlays: rapid.IntRange(0, 5).Draw(t, "off") == 0, Level: rapid.SampledFrom([]Level{LevelNone, LevelFast}).Draw(t, "level")})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Abort(bg)
			var pm point.ManifestID
			var old []byte
			if prev != nil {
				pm, old = prev.p.Disks[0].Manifest, prev.c
			}
			w, err := s.Disk(bg, int64(len(content)), pm)
			if err != nil {
				t.Fatal(err)
			}
			doubtful, err := w.Doubtful(bg, extent.Extent{Len: int64(len(content))})
			if err != nil {
				t.Fatal(err)
			}
			for i := range chunk.Count(int64(len(content)), testChunk) {
				part, was := cut(content, i), cut(old, i)
				at := extent.NewSet(extent.Extent{Off: i * testChunk, Len: int64(len(part))})
				if !all && bytes.Equal(part, was) && doubtful.Subtract(at).Bytes() == doubtful.Bytes() && prev != nil {
					continue
				}
				if rapid.Bool().Draw(t, "fill") {
					if err := w.ReadPrevious(bg, i, make([]byte, len(part))); err != nil && !errors.Is(err, fault.ErrCorrupt) {
						t.Fatal(err)
					}
				}
				if _, err := w.Put(bg, i, part); err != nil {
					t.Fatal(err)
				}
			}
			m, err := w.Finish(bg)
			if err != nil {
				t.Fatal(err)
			}
			p := newPoint("vm", m, int64(len(content)))
			if err := s.Commit(bg, p); err != nil {
				t.Fatal(err)
			}
			points = append(points, kept{p, content})
		}
		steps := map[string]func(*rapid.T){
			"backup": func(t *rapid.T) {
				if len(points) == 0 {
					backUp(nil, noise(rapid.Uint64Range(1, 3).Draw(t, "seed"), rapid.Int64Range(1, 5*testChunk).Draw(t, "size")), false)
					return
				}
				old := points[rapid.IntRange(0, len(points)-1).Draw(t, "previous")]
				content := bytes.Clone(old.c)
				switch n := int64(len(content)); rapid.IntRange(0, 7).Draw(t, "resize") {
				case 0:
					content = content[:rapid.Int64Range(n/2, n).Draw(t, "shrunk")]
				case 1:
					content = append(content, noise(4, rapid.Int64Range(0, testChunk).Draw(t, "more"))...)
				}
				for range rapid.IntRange(0, 4).Draw(t, "writes") {
					if len(content) == 0 {
						break
					}
					at := rapid.IntRange(0, len(content)-1).Draw(t, "at")
					n := rapid.SampledFrom([]int64{1, 300, block, 5 * block, testChunk / 2, testChunk}).Draw(t, "bytes")
					copy(content[at:], noise(rapid.Uint64Range(0, 2).Draw(t, "what"), n))
				}
				backUp(&old, content, false)
			},
			"delete": func(t *rapid.T) {
				if len(points) == 0 {
					t.Skip()
				}
				i := rapid.IntRange(0, len(points)-1).Draw(t, "which")
				if err := r.DeletePoint(bg, "vm", points[i].p.ID); err != nil {
					t.Fatal(err)
				}
				points = append(points[:i], points[i+1:]...)
			},
			"vacuum": func(t *rapid.T) {
				if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
					t.Fatal(err)
				}
			},
			"damage": func(t *rapid.T) {
				var packs []blob.Object
				for o, err := range st.List(bg, packPrefix) {
					if err != nil {
						t.Fatal(err)
					}
					packs = append(packs, o)
				}
				if len(packs) == 0 || rapid.IntRange(0, 3).Draw(t, "rarely") > 0 {
					t.Skip()
				}
				o := rapid.SampledFrom(packs).Draw(t, "pack")
				at := rapid.Int64Range(64, o.Bytes-1).Draw(t, "at")
				if err := st.Damage(o.Name, func(b []byte) []byte { b[at] ^= 1; return b }); err != nil {
					t.Fatal(err)
				}
				hurt = true
				if _, err := r.Check(bg, CheckOptions{ReadData: rapid.Bool().Draw(t, "read"), Scrub: true}); err != nil {
					t.Fatal(err)
				}
			},
			"reopen": func(t *rapid.T) {
				r.Close()
				if r, err = Open(bg, st, testKey); err != nil {
					t.Fatal(err)
				}
			},
		}
		steps["again"] = steps["backup"]
		t.Repeat(steps)
		// mustAgree reads all points; corrupt ones are only allowed after damage.
		mustAgree := func(corrupt bool) {
			for _, k := range points {
				d, err := r.OpenDisk(bg, k.p.Disks[0].Manifest)
				if err != nil {
					t.Fatal(err)
				}
				for _, ordered := range []bool{true, false} {
					got := make([]byte, len(k.c))
					err := d.Fetch(bg, extent.Extent{Len: d.Size()}, FetchOptions{Ordered: ordered, Workers: 1}, func(off int64, data []byte) error {
						copy(got[off:], data)
						if !bytes.Equal(data, cut(k.c, off/testChunk)) {
							return fmt.Errorf("%s: chunk at %d is wrong", k.p.Ref(), off)
						}
						return nil
					})
					if err != nil && !(corrupt && errors.Is(err, fault.ErrCorrupt)) {
						t.Fatal(err)
					}
					if err == nil && !bytes.Equal(got, k.c) {
						t.Fatalf("%s: something is missing", k.p.Ref())
					}
				}
			}
		}
		mustAgree(hurt)
		if !hurt {
			rep, err := r.Check(bg, CheckOptions{ReadData: true})
			if err != nil || len(rep.Findings) > 0 {
				t.Fatalf("%v %v", rep.Findings, err)
			}
			return
		}
		// As if each point's guest were there again, the oldest first. A second
		// pass is for what the first needed of a later one.
		for range 2 {
			if _, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil {
				t.Fatal(err)
			}
			for _, k := range points[:len(points):len(points)] {
				backUp(&k, k.c, true)
			}
		}
		mustAgree(false)
		rep, err := r.Check(bg, CheckOptions{ReadData: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range rep.Findings {
			if len(f.Hits) > 0 {
				t.Fatalf("%s at %d: %v %v", f.Object, f.Offset, f.Err, f.Hits)
			}
		}
	})
}

// countReads counts reads of objects under prefix.
func countReads(st blob.Store, prefix string, n *int) blob.Store {
	return blobtest.Faulty(st, func(c blobtest.Call) error {
		if c.Op == blobtest.OpReadAt && strings.HasPrefix(c.Name, prefix) {
			*n++
		}
		return nil
	})
}
