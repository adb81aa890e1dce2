package repo

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// history is a repository with points whose content is known.
type history struct {
	points  []*point.RestorePoint
	content map[point.ID][]byte
}

func (h *history) add(p *point.RestorePoint, content []byte) {
	if h.content == nil {
		h.content = map[point.ID][]byte{}
	}
	h.points = append(h.points, p)
	h.content[p.ID] = content
}

// mustBeWhole checks that all points that exist are complete, that those in
// must do exist, and that nothing is found to be wrong.
func mustBeWhole(t *testing.T, st blob.Store, h *history, must ...*point.RestorePoint) *Repository {
	t.Helper()
	r := mustOpen(t, st)
	points, err := r.Points(bg)
	if err != nil {
		t.Fatal(err)
	}
	there := map[point.ID]bool{}
	for _, p := range points {
		there[p.ID] = true
		mustRead(t, r, p, h.content[p.ID])
	}
	for _, p := range must {
		if !there[p.ID] {
			t.Fatalf("%s is gone", p.Ref())
		}
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
	return r
}

func mustCheck(t *testing.T, r *Repository, o CheckOptions) CheckReport {
	t.Helper()
	rep, err := r.Check(bg, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range rep.Findings {
		t.Errorf("%s at %d: %v %v", f.Object, f.Offset, f.Err, f.Hits)
	}
	if t.Failed() {
		t.FailNow()
	}
	return rep
}

// noLocks hides that a store has locks, as a bucket has none.
type noLocks struct{ blob.Store }

// disks are the contents that the crash tests back up one after the other.
func disks() (a, b []byte) {
	a = append(noise(1, 12*testChunk), text(2, 3*testChunk+5)...)
	b = bytes.Clone(a)
	copy(b[2*testChunk:], noise(3, testChunk))
	copy(b[8*testChunk:], text(4, 2*testChunk))
	copy(b[10*testChunk+5000:], "little enough for an overlay")
	return a, b
}

// However far a backup got before the power went, every restore point that
// exists afterwards is complete, and the next backup works and stores nothing
// twice.
func TestBackupSurvivesCrash(t *testing.T) {
	a, b := disks()
	base := mem.New()
	mustInit(t, base)
	h := &history{}
	first := mustBackup(t, mustOpen(t, base), "web01", a, nil, nil)
	h.add(first, a)
	for _, applied := range []bool{false, true} {
		for n := 0; ; n += stride() {
			disk := base.Clone()
			crash := crashAfter(n, disk)
			if applied {
				crash = crashAfterApplied(n, disk)
			}
			p, err := runBackup(crash, b, first, a)
			if p != nil {
				h.add(p, b)
			}
			r := mustBeWhole(t, disk, h, first)
			next := mustBackup(t, r, "web01", b, first, a)
			h.add(next, b)
			mustBeWhole(t, disk, h, first, next)
			if packs := count(t, disk, packPrefix); n >= 2 && packs > 3 {
				t.Errorf("crash after %d: %d packs: the interrupted backup's were not reused", n, packs)
			}
			if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
				t.Fatalf("crash after %d: vacuum: %v", n, err)
			}
			mustBeWhole(t, disk, h, first, next)
			if err == nil {
				break // it needed only n writes
			}
			if n > 100 {
				t.Fatal("it never ends")
			}
		}
	}
}

func runBackup(st blob.Store, content []byte, prev *point.RestorePoint, prevContent []byte) (*point.RestorePoint, error) {
	r, err := Open(bg, st, testKey)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return backup(bg, r, "web01", content, prev, prevContent)
}

func count(t *testing.T, st blob.Store, prefix string) int {
	t.Helper()
	names, err := blobtest.Names(bg, st, prefix)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// garbageRepo is a repository in which vacuum finds work of every kind: a dead
// pack, a pack to rewrite, dead manifests, a session that died.
func garbageRepo(t *testing.T) (*mem.Store, *history, *point.RestorePoint) {
	st := mem.New()
	mustInit(t, st)
	r := mustOpen(t, st)
	h := &history{}
	a, b := disks()
	p := mustBackup(t, r, "web01", a, nil, nil)
	q := mustBackup(t, r, "web01", b, p, a)
	h.add(p, a)
	h.add(q, b)
	c := append(bytes.Clone(b[:3*testChunk]), noise(9, 20*testChunk)...)
	u := mustBackup(t, r, "db01", c, nil, nil)
	h.add(u, c)
	// keeps a little of a large pack
	k := bytes.Clone(c[3*testChunk : 5*testChunk])
	v := mustBackup(t, r, "db02", k, nil, nil)
	h.add(v, k)
	for _, gone := range []*point.RestorePoint{p, u} {
		if err := r.DeletePoint(bg, gone.VM, gone.ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := runBackup(crashAfter(3, st), noise(77, 5*testChunk), nil, nil); err == nil {
		t.Fatal("the crash did not happen")
	}
	return st, &history{points: []*point.RestorePoint{q, v}, content: h.content}, q
}

// On a full disk vacuum can copy nothing, and frees what it can without.
func TestVacuumOfAFullStore(t *testing.T) {
	st, h, _ := garbageRepo(t)
	full := blobtest.Faulty(st, func(c blobtest.Call) error {
		if c.Op == blobtest.OpPut && strings.HasPrefix(c.Name, packPrefix) {
			return fault.ErrNoSpace
		}
		return nil
	})
	r, err := OpenKeyless(bg, full)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := r.Vacuum(bg, VacuumOptions{})
	if err != nil || rep.DeletedPacks == 0 || rep.RewrittenPacks != 0 || rep.Kept.NoSpace == 0 || rep.FreedBytes <= 0 {
		t.Errorf("%+v, %v; want the packs to go in which nothing lives", rep, err)
	}
	mustBeWhole(t, st, h, h.points...)

	// With nothing that can go there is nothing to do but say so.
	if _, err := r.Vacuum(bg, VacuumOptions{}); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("%v, want that there is no space", err)
	}
	if r, err = OpenKeyless(bg, st); err != nil {
		t.Fatal(err)
	}
	if rep, err = r.Vacuum(bg, VacuumOptions{}); err != nil || rep.RewrittenPacks == 0 {
		t.Errorf("%+v, %v; with space again", rep, err)
	}
	mustBeWhole(t, st, h, h.points...)
}

// A pack with little waste stays as it is, unless somebody wants even that.
func TestVacuumByWaste(t *testing.T) {
	_, r := newRepo(t)
	content := noise(1, 20*testChunk)
	old := mustBackup(t, r, "web01", content, nil, nil)
	kept := mustBackup(t, r, "web02", content[:18*testChunk], nil, nil)
	if err := r.DeletePoint(bg, "web01", old.ID); err != nil {
		t.Fatal(err)
	}
	rep, err := r.Vacuum(bg, VacuumOptions{})
	if err != nil || rep.Kept.LittleWaste != 1 || rep.RewrittenPacks != 0 || rep.KeptWasteBytes < 2*testChunk {
		t.Errorf("%+v, %v; want one pack to stay", rep, err)
	}
	rep, err = r.Vacuum(bg, VacuumOptions{Waste: 1})
	if err != nil || rep.Kept.LittleWaste != 0 || rep.RewrittenPacks != 1 || rep.KeptWasteBytes != 0 || rep.FreedBytes < 2*testChunk {
		t.Errorf("%+v, %v; want it rewritten", rep, err)
	}
	mustRead(t, r, kept, content[:18*testChunk])
}

// However far a vacuum got, nothing is lost, and a second one finishes.
func TestVacuumSurvivesCrash(t *testing.T) {
	for _, locks := range []bool{true, false} {
		for _, applied := range []bool{false, true} {
			st, h, _ := garbageRepo(t)
			want := -1
			for n := 0; ; n += stride() {
				disk := st.Clone()
				view := func() blob.Store {
					if locks {
						return disk
					}
					return noLocks{disk}
				}
				crash := crashAfter(n, view())
				if applied {
					crash = crashAfterApplied(n, view())
				}
				r, err := OpenKeyless(bg, crash)
				if err != nil {
					t.Fatal(err)
				}
				rep, err := r.Vacuum(bg, VacuumOptions{})
				mustBeWhole(t, view(), h, h.points...)

				// A backup right after the crash must not build on what the
				// vacuum was about to delete.
				other := disk.Clone()
				dead := noise(9, 20*testChunk)
				r2 := mustOpen(t, noLocks{other})
				fresh := mustBackup(t, r2, "db03", dead, nil, nil)
				h.content[fresh.ID] = dead
				finish(t, noLocks{other})
				mustBeWhole(t, noLocks{other}, h, append(h.points, fresh)...)

				finish(t, view())
				mustBeWhole(t, view(), h, h.points...)
				mustHaveNoStrayParity(t, disk)
				if got := count(t, disk, packPrefix) + count(t, disk, manifestPrefix) + count(t, disk, pointPrefix); want < 0 {
					want = got
				} else if got != want {
					t.Errorf("crash after %d: %d objects are left, want %d", n, got, want)
				}
				if err == nil {
					if rep.DeletedPacks == 0 || rep.RewrittenPacks == 0 || rep.Revoked != 1 {
						t.Errorf("vacuum had less to do than meant: %+v", rep)
					}
					break
				}
				if n > 100 {
					t.Fatal("it never ends")
				}
			}
		}
	}
}

func finish(t *testing.T, st blob.Store) {
	t.Helper()
	r, err := OpenKeyless(bg, st)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// A vacuum frees what it can while a backup runs that relies on what the
// vacuum would free.
func TestVacuumBesideAWriter(t *testing.T) {
	for _, deletes := range []string{"before the vacuum", "while it waits"} {
		t.Run(deletes, func(t *testing.T) {
			st, r := newRepo(t)
			a, _ := disks()
			c := noise(5, 6*testChunk)
			p := mustBackup(t, r, "web01", a, nil, nil)
			q := mustBackup(t, r, "db01", c, nil, nil)
			s, err := r.Begin(bg, SessionOptions{})
			if err != nil {
				t.Fatal(err)
			}
			w, err := s.Disk(bg, int64(len(a)), p.Disks[0].Manifest)
			if err != nil {
				t.Fatal(err)
			}
			// One chunk of the previous point's own, one of a point that goes, one
			// that is new.
			for i, data := range [][]byte{cut(a, 3), cut(c, 1), noise(6, testChunk)} {
				if put, err := w.Put(bg, int64(i), data); err != nil || (put.Kind == New) != (i == 2) {
					t.Fatalf("%+v, %v", put, err)
				}
			}
			b := bytes.Clone(a)
			copy(b, cut(a, 3))
			copy(b[testChunk:], cut(c, 1))
			copy(b[2*testChunk:], noise(6, testChunk))
			drop := func() {
				for _, gone := range []*point.RestorePoint{p, q} {
					if err := r.DeletePoint(bg, gone.VM, gone.ID); err != nil {
						t.Error(err)
					}
				}
			}
			seen := blob.Store(st)
			if deletes == "before the vacuum" {
				drop()
			} else {
				seen = blobtest.Faulty(st, func(call blobtest.Call) error {
					if call.Op == blobtest.OpCreate && strings.HasPrefix(call.Name, epochPrefix) {
						drop()
					}
					return nil
				})
			}
			spare := noise(7, 9*testChunk)
			x := mustBackup(t, r, "spare", spare, nil, nil)
			if err := r.DeletePoint(bg, x.VM, x.ID); err != nil {
				t.Fatal(err)
			}
			rep, err := mustOpen(t, seen).Vacuum(bg, VacuumOptions{})
			if err != nil || rep.Running != 1 || rep.Revoked != 0 || rep.DeletedPacks == 0 {
				t.Fatalf("%+v, %v", rep, err)
			}
			m, err := w.Finish(bg)
			if err != nil {
				t.Fatal(err)
			}
			u := newPoint("web01", m, int64(len(b)))
			xml, err := s.PutBlob(bg, []byte("<domain>web01</domain>"))
			if err != nil {
				t.Fatal(err)
			}
			u.Config = map[string]point.Blob{"domain.xml": xml}
			if err := s.Commit(bg, u); err != nil {
				t.Fatal(err)
			}
			h := &history{}
			h.add(u, b)
			mustBeWhole(t, st, h, u)
			finish(t, st)
			mustBeWhole(t, st, h, u)
			for _, prefix := range []string{sessionPrefix, beatPrefix, vacuumPrefix} {
				if n := count(t, st, prefix); n > 1 {
					t.Errorf("%d objects are left under %s", n, prefix)
				}
			}
		})
	}
}

// pausable is st for a process that can be stopped as by SIGSTOP.
func pausable(st blob.Store) (paused blob.Store, pause, resume func()) {
	var mu sync.Mutex
	return blobtest.Faulty(st, func(blobtest.Call) error {
		mu.Lock()
		defer mu.Unlock()
		return nil
	}), mu.Lock, mu.Unlock
}

// A vacuum revokes a writer that shows no sign of life: if it wakes up again it
// fails cleanly and may be repeated.
func TestAPausedWriterIsFenced(t *testing.T) {
	st := mem.New()
	mustInit(t, st)
	a, _ := disks()
	stops, pause, resume := pausable(st)
	writer := mustOpen(t, stops)
	p := mustBackup(t, writer, "web01", a, nil, nil)
	s, err := writer.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(bg, int64(len(a)), p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	put, err := w.Put(bg, 1, cut(a, 0))
	if err != nil || put.Kind != Known {
		t.Fatalf("%+v, %v", put, err)
	}
	pause()
	other := mustOpen(t, st)
	if err := other.DeletePoint(bg, "web01", p.ID); err != nil {
		t.Fatal(err)
	}
	if rep, err := other.Vacuum(bg, VacuumOptions{Patience: 50 * time.Millisecond}); err != nil || rep.Revoked != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if count(t, st, packPrefix) != 0 {
		t.Fatal("the vacuum left packs")
	}
	resume()
	m, err := w.Finish(bg)
	if err == nil {
		err = s.Commit(bg, newPoint("web01", m, int64(len(a))))
	}
	if !errors.Is(err, fault.ErrFenced) {
		t.Errorf("commit of a revoked session: %v", err)
	}
	s.Abort(bg)
	// The same process goes on, its table being of before the vacuum.
	h := &history{}
	h.add(mustBackup(t, writer, "web01", a, nil, nil), a)
	mustBeWhole(t, st, h, h.points...)
}

// A whole backup fits in anywhere in a vacuum, and both are done.
func TestABackupAnywhereInAVacuum(t *testing.T) {
	st, h, _ := garbageRepo(t)
	for n := 1; ; n += stride() {
		disk := st.Clone()
		writer := mustOpen(t, noLocks{disk})
		dead := noise(9, 20*testChunk)
		calls, hit := 0, false
		var fresh *point.RestorePoint
		slow := blobtest.Faulty(noLocks{disk}, func(c blobtest.Call) error {
			if !c.Op.Mutates() {
				return nil
			}
			if calls++; calls == n {
				hit = true
				fresh = mustBackup(t, writer, "db03", dead, nil, nil)
				h.content[fresh.ID] = dead
			}
			return nil
		})
		r, err := OpenKeyless(bg, slow)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = r.Vacuum(bg, VacuumOptions{}); err != nil {
			t.Fatal(err)
		}
		must := h.points
		if fresh != nil {
			must = append(must, fresh)
		}
		mustBeWhole(t, noLocks{disk}, h, must...)
		finish(t, noLocks{disk})
		mustBeWhole(t, noLocks{disk}, h, must...)
		if !hit {
			return
		}
	}
}
