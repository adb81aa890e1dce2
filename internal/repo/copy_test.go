package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/secret"
)

// small is a page for newSource that makes small disks.
const small = 12

// A sourceRepo is a repository with two VMs and several points each, sharing
// chunks, with a suspect point and disks that grew and shrank.
type sourceRepo struct {
	st      *mem.Store
	r       *Repository
	points  []*point.RestorePoint
	content map[string][]byte // by ref
}

// newSource makes one. Data lie a page of chunks apart: with manifest.Positions
// there are differentials.
func newSource(t testing.TB, page int64) *sourceRepo {
	s := &sourceRepo{content: map[string][]byte{}}
	s.st, s.r = newRepo(t)
	add := func(name string, b []byte, prev *point.RestorePoint) *point.RestorePoint {
		var old []byte
		if prev != nil {
			old = s.content[prev.Ref()]
		}
		p := mustBackup(t, s.r, name, b, prev, old)
		s.points = append(s.points, p)
		s.content[p.Ref()] = b
		return p
	}
	a := make([]byte, (4*page+2)*testChunk+999)
	for i, at := range []int64{0, page + 6, 2*page + 2, 3*page + 8} {
		copy(a[at*testChunk:], noise(uint64(i), 3*testChunk))
	}
	p := add("web01", a, nil)
	b := bytes.Clone(a)
	copy(b[(page+6)*testChunk:], noise(50, testChunk))
	clear(b[(page+7)*testChunk : (page+8)*testChunk]) // a hole where data were
	q := add("web01", b, p)
	c := append(bytes.Clone(b), text(7, 3*testChunk)...) // it grew, its last chunk was short
	add("web01", c, q)
	db := slices.Concat(noise(1, 3*testChunk), text(3, testChunk+77))
	d := add("db/01", db, nil)
	f := add("db/01", db[:testChunk*2+5], d)
	db2 := bytes.Clone(db[:testChunk*2+5])
	db2[testChunk+100] ^= 1 // an overlay
	add("db/01", db2, f)
	if err := s.r.MarkSuspect(bg, q.VM, q.ID, "tracking lied"); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.points, err = s.r.Points(bg); err != nil {
		t.Fatal(err)
	}
	return s
}

func copyAll(ctx context.Context, from, to *Repository, points []*point.RestorePoint) (map[string]PointCopy, error) {
	got := map[string]PointCopy{}
	err := from.CopyPoints(ctx, to, CopyOptions{Points: points, Told: func(c PointCopy) { got[c.Point.Ref()] = c }})
	return got, err
}

func mustCopy(t testing.TB, from, to *Repository, points []*point.RestorePoint, state string) map[string]PointCopy {
	t.Helper()
	got, err := copyAll(bg, from, to, points)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(points) {
		t.Fatalf("told of %d points, want %d", len(got), len(points))
	}
	for ref, c := range got {
		if c.State != state || state == CopyThere && (c.SentBytes != 0 || c.ReadBytes != 0) {
			t.Errorf("%s: %+v, want %s", ref, c, state)
		}
	}
	return got
}

// whole says whether all of the source's points are in r as they were.
func (s *sourceRepo) whole(t testing.TB, r *Repository) {
	t.Helper()
	points, err := r.Points(bg)
	if err != nil || len(points) != len(s.points) {
		t.Fatalf("%d points, want %d: %v", len(points), len(s.points), err)
	}
	for i, p := range points {
		want := s.points[i]
		if p.Ref() != want.Ref() || !p.Time.Equal(want.Time) || p.Grade != want.Grade || p.Suspect != want.Suspect || p.Stats != want.Stats {
			t.Errorf("%+v, want %+v", p, want)
		}
		mustReadDisk(t, r, p, s.content[p.Ref()])
	}
	rep, err := r.Check(bg, CheckOptions{ReadData: true})
	if err != nil || len(rep.Findings) > 0 {
		t.Errorf("check: %+v, %v", rep.Findings, err)
	}
}

// mustReadDisk is mustRead without the assumption that chunks have the size of
// the test's.
func mustReadDisk(t testing.TB, r *Repository, p *point.RestorePoint, want []byte) {
	t.Helper()
	d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: content differs: %v", p.Ref(), err)
	}
	if b, err := r.ReadBlob(bg, p.Config["domain.xml"]); err != nil || string(b) != "<domain>"+p.VM+"</domain>" {
		t.Errorf("%s: domain.xml is %q, %v", p.Ref(), b, err)
	}
}

// names are the objects under a prefix.
func names(t testing.TB, st blob.Store, prefix string) (all []string) {
	t.Helper()
	for o, err := range st.List(bg, prefix) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, o.Name)
	}
	return all
}

// records are all records in packs, by chunk, as they are sealed.
func records(t testing.TB, st blob.Store, id [16]byte) map[chunk.ID]string {
	t.Helper()
	out := map[chunk.ID]string{}
	for _, name := range names(t, st, packPrefix) {
		b, err := readObject(bg, st, name)
		if err != nil {
			t.Fatal(err)
		}
		good, _ := pack.Scan(b, id)
		for _, e := range good {
			if out[e.ID] != "" {
				t.Errorf("chunk %s is stored twice", e.ID.Short())
			}
			out[e.ID] = string(b[e.Off:e.End()])
		}
	}
	return out
}

// Whatever the other repository's keys and chunks are, all points arrive as
// they were, and the same copy again sends nothing.
func TestCopyArrivesWhole(t *testing.T) {
	s := newSource(t, manifest.Positions)
	for name, size := range map[string]int64{"other keys": testChunk, "other keys and larger chunks": 4 * testChunk} {
		t.Run(name, func(t *testing.T) {
			st := mem.New()
			if err := Init(bg, st, InitOptions{ChunkBytes: size, Passphrase: secret.New([]byte("other")), KDF: cheap}); err != nil {
				t.Fatal(err)
			}
			to, err := Open(bg, st, pass("other"))
			if err != nil {
				t.Fatal(err)
			}
			if s.r.Same(to) {
				t.Fatal("they are the same")
			}
			mustCopy(t, s.r, to, s.points, CopyDone)
			s.whole(t, to)
			records(t, st, to.id) // none twice
			before := names(t, st, "")
			to, err = Open(bg, st, pass("other"))
			if err != nil {
				t.Fatal(err)
			}
			mustCopy(t, s.r, to, s.points, CopyThere)
			if after := names(t, st, ""); !slices.Equal(before, after) {
				t.Errorf("the same copy again made %q of %q", after, before)
			}
		})
	}
}

// Into a chunk size that is smaller, from a source with large ones.
func TestCopyIntoSmallerChunks(t *testing.T) {
	st := mem.New()
	if err := Init(bg, st, InitOptions{ChunkBytes: 4 * testChunk, Passphrase: password, KDF: cheap}); err != nil {
		t.Fatal(err)
	}
	s := newSource(t, small)
	big := mustOpen(t, st)
	mustCopy(t, s.r, big, s.points, CopyDone)
	_, to := newRepo(t)
	points, err := big.Points(bg)
	if err != nil {
		t.Fatal(err)
	}
	mustCopy(t, big, to, points, CopyDone)
	s.whole(t, to)
}

// A replica gets the records as they are sealed, and every key of the source
// opens it. What the other side has is not even read.
func TestReplicaMovesCiphertext(t *testing.T) {
	s := newSource(t, manifest.Positions)
	mustAdd(t, mustRing(t, s.st, testKey), newPass("second", "bob"))
	st := mem.New()
	if err := s.r.Replicate(bg, st); err != nil {
		t.Fatal(err)
	}
	if err := s.r.Replicate(bg, st); !errors.Is(err, fault.ErrExists) {
		t.Errorf("a replica over a replica: %v", err)
	}
	if p, err := st.Size(bg, parityPrefix+configName); err != nil || p == 0 {
		t.Errorf("repo.json of a replica would not heal: %v", err)
	}
	to, err := Open(bg, st, pass("second"))
	if err != nil {
		t.Fatal(err)
	}
	if !s.r.Same(to) {
		t.Fatal("it is no replica")
	}
	got := mustCopy(t, s.r, to, s.points, CopyDone)
	s.whole(t, to)
	from, there := records(t, s.st, s.r.id), records(t, st, to.id)
	for id, rec := range there {
		// The few bytes of a machine's definition may be sealed again.
		if e, _, err := pack.ParseRecordHeader([]byte(rec)); from[id] != rec && (err != nil || e.PLen > 100) {
			t.Errorf("chunk %s was sealed again", id.Short())
		}
	}
	if len(from) != len(there) {
		t.Errorf("%d records there, %d here", len(there), len(from))
	}
	var read, stored int64
	overlays := 0
	for _, c := range got {
		read += c.ReadBytes
	}
	for id := range from {
		e, _, err := pack.ParseRecordHeader([]byte(from[id]))
		if err != nil {
			t.Fatal(err)
		}
		stored += int64(e.PLen)
		if e.Encoding == pack.Overlay {
			overlays++
		}
	}
	if overlays == 0 {
		t.Error("there was no overlay")
	}
	if read > stored {
		t.Errorf("read %d bytes of chunks, all that exist are %d", read, stored)
	}
}

// However far a copy got, the points that are there are whole, and the same
// command again sends no chunk twice and finishes.
func TestCopySurvivesCrash(t *testing.T) {
	for _, replica := range []bool{false, true} {
		s := newSource(t, small)
		for n := 0; ; n += max(3, stride()) {
			st := mem.New()
			if replica {
				if err := s.r.Replicate(bg, st); err != nil {
					t.Fatal(err)
				}
			} else {
				mustInit(t, st)
			}
			var err error
			if to, oerr := Open(bg, crashAfter(n, st), testKey); oerr != nil {
				err = oerr
			} else {
				_, err = copyAll(bg, s.r, to, s.points)
			}
			to := mustOpen(t, st)
			points, perr := to.Points(bg)
			if perr != nil {
				t.Fatalf("stopped after %d operations: %v", n, perr)
			}
			for _, p := range points {
				mustReadDisk(t, to, p, s.content[p.Ref()])
			}
			if _, err := copyAll(bg, s.r, to, s.points); err != nil {
				t.Fatalf("again after %d operations: %v", n, err)
			}
			s.whole(t, to)
			records(t, st, to.id)
			if err == nil {
				break
			}
		}
	}
}

// Damage in the source costs the points that it hits, by name, and no others.
func TestCopyLeavesDamagedPointsOut(t *testing.T) {
	for _, replica := range []bool{false, true} {
		s := newSource(t, small)
		// What is damaged is a chunk that one point alone has: the last of web01's
		// second.
		hit := s.points[slices.IndexFunc(s.points, func(p *point.RestorePoint) bool { return p.Suspect != "" })]
		d, err := s.r.OpenDisk(bg, hit.Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		id, _, err := d.Chunk(bg, small+6)
		if err != nil {
			t.Fatal(err)
		}
		wants := []want{{ref: ref{id: id}}}
		h, err := s.r.locate(bg, wants)
		if err != nil {
			t.Fatal(err)
		}
		name := h.packs[wants[0].place.Pack].name()
		b, err := readObject(bg, s.st, name)
		if err != nil {
			t.Fatal(err)
		}
		b[wants[0].place.Off+100] ^= 1
		if err := put(bg, s.st, name, b); err != nil {
			t.Fatal(err)
		}
		st := mem.New()
		if replica {
			if err := s.r.Replicate(bg, st); err != nil {
				t.Fatal(err)
			}
		} else {
			mustInit(t, st)
		}
		to := mustOpen(t, st)
		got, err := copyAll(bg, s.r, to, s.points)
		if err != nil {
			t.Fatal(err)
		}
		damaged := 0
		for ref, c := range got {
			has := bytes.Contains(s.content[ref], noise(50, testChunk))
			if (c.State == CopyFailed) != has || (c.Err != nil) != has {
				t.Errorf("%s: %s, %v", ref, c.State, c.Err)
			}
			if has {
				damaged++
				if !errors.Is(c.Err, fault.ErrCorrupt) || !strings.Contains(c.Err.Error(), "pack") {
					t.Errorf("%s: %v", ref, c.Err)
				}
			}
		}
		points, err := to.Points(bg)
		if err != nil || len(points) != len(s.points)-damaged || damaged == 0 {
			t.Errorf("%d points of %d arrived, %d are damaged: %v", len(points), len(s.points), damaged, err)
		}
		for _, p := range points {
			mustReadDisk(t, to, p, s.content[p.Ref()])
		}
		if rep, err := to.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) > 0 {
			t.Errorf("check: %+v, %v", rep.Findings, err)
		}
	}
}

// Deleting here deletes nothing there; what was deleted there comes back only
// when it is copied again; and a chunk that was damaged there is healed by the
// next point that has it.
func TestCopyAfterDeletes(t *testing.T) {
	s := newSource(t, small)
	st, to := newRepo(t)
	mustCopy(t, s.r, to, s.points, CopyDone)
	gone := s.points[0]
	if err := s.r.DeletePoint(bg, gone.VM, gone.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	mustCopy(t, s.r, to, s.points[1:], CopyThere)
	s.whole(t, to)
	// Now there, one in the middle: it is built on what is left.
	back := s.points[len(s.points)-2]
	if err := to.DeletePoint(bg, back.VM, back.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := to.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	got, err := copyAll(bg, s.r, mustOpen(t, st), s.points[1:])
	if err != nil || got[back.Ref()].State != CopyDone {
		t.Fatalf("%+v, %v", got[back.Ref()], err)
	}
	s.whole(t, mustOpen(t, st))
}

// A suspicion that came after the copy is brought over too.
func TestCopyBringsSuspicion(t *testing.T) {
	s := newSource(t, small)
	_, to := newRepo(t)
	mustCopy(t, s.r, to, s.points, CopyDone)
	if err := s.r.MarkSuspect(bg, s.points[0].VM, s.points[0].ID, "later"); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.points, err = s.r.Points(bg); err != nil {
		t.Fatal(err)
	}
	mustCopy(t, s.r, to, s.points, CopyThere)
	p, err := to.Point(bg, s.points[0].VM, s.points[0].ID)
	if err != nil || p.Suspect != "later" {
		t.Errorf("%+v, %v", p, err)
	}
}

// An increment costs what changed and not the disk.
func TestCopyReadsOnlyWhatChanged(t *testing.T) {
	_, r := newRepo(t)
	a := noise(1, 200*testChunk)
	p := mustBackup(t, r, "a", a, nil, nil)
	b := bytes.Clone(a)
	copy(b[17*testChunk:], noise(2, testChunk))
	q := mustBackup(t, r, "a", b, p, a)
	_, to := newRepo(t)
	mustCopy(t, r, to, []*point.RestorePoint{p}, CopyDone)
	got := mustCopy(t, r, to, []*point.RestorePoint{p, q}[1:], CopyDone)
	if c := got[q.Ref()]; c.ReadBytes != testChunk || c.SentBytes < testChunk || c.SentBytes > testChunk+200 {
		t.Errorf("%s for one changed chunk of %d", fmt.Sprint(c.ReadBytes, c.SentBytes), testChunk)
	}
}
