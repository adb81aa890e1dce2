package repo

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
)

func mustHaveNoStrayParity(t *testing.T, st blob.Store) {
	t.Helper()
	names, err := blobtest.Names(bg, st, parityPrefix)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, err := st.Size(bg, strings.TrimPrefix(name, parityPrefix)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever points need can heal: after backups, and after a vacuum, which takes
// the parity of what it deletes.
func TestAllThatMattersHasParity(t *testing.T) {
	st, _, _ := garbageRepo(t)
	r := mustOpen(t, st)
	mustKeepAll := func(when string) {
		t.Helper()
		rep := mustCheck(t, r, CheckOptions{Scrub: true})
		if when == "with a dead session" {
			rep.Parity.Lacking = 0 // it may have died between a pack and its parity
		}
		if rep.Parity != (ParityState{Kept: true}) {
			t.Errorf("%s: %+v", when, rep.Parity)
		}
		for _, prefix := range []string{packPrefix, manifestPrefix, pointPrefix} {
			if n, par := count(t, st, prefix), count(t, st, parityPrefix+prefix); n == 0 || par != n && when != "with a dead session" {
				t.Errorf("%s: %d of %s, %d of their parity", when, n, prefix, par)
			}
		}
	}
	mustKeepAll("with a dead session")
	stray := parityPrefix + packName([32]byte{0xfe})
	if err := put(bg, st, stray, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if v, err := r.Vacuum(bg, VacuumOptions{DryRun: true}); err != nil || v.DeletedPacks == 0 || v.RewrittenPacks == 0 || count(t, st, stray) == 0 {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	mustKeepAll("after a vacuum")
	mustHaveNoStrayParity(t, st)

	names, err := blobtest.Names(bg, st, parityPrefix+packPrefix)
	if err != nil {
		t.Fatal(err)
	}
	st.Delete(bg, names[0])
	if rep := mustCheck(t, r, CheckOptions{}); rep.Parity.Lacking != 1 {
		t.Errorf("one is gone: %+v", rep.Parity)
	}
}

func TestARepositoryWithoutParity(t *testing.T) {
	st := mem.New()
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, st)
	mustBackup(t, r, "web01", noise(1, 3*testChunk), nil, nil)
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	if n := count(t, st, parityPrefix); n > 0 {
		t.Errorf("%d parity objects", n)
	}
	if rep := mustCheck(t, r, CheckOptions{}); rep.Parity != (ParityState{}) {
		t.Errorf("%+v", rep.Parity)
	}
	// The word is in a repository's head only where it is needed.
	b, err := readObject(bg, st, configName)
	if err != nil || bytes.Contains(b, []byte("parity")) {
		t.Errorf("%s, %v", b, err)
	}
}

// Parity must not be taken away from what appears while a vacuum sweeps.
func TestSweepSeesWhatIsNew(t *testing.T) {
	base, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, 3*testChunk), nil, nil)
	gone := mustBackup(t, r, "web02", noise(5, 3*testChunk), nil, nil)
	if err := r.DeletePoint(bg, gone.VM, gone.ID); err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n += stride() {
		st := base.Clone()
		hit := false
		slow := blobtest.Faulty(st, func(c blobtest.Call) error {
			if c.N == n {
				hit = true
				mustBackup(t, mustOpen(t, st), "web02", noise(uint64(n)+10, 3*testChunk), nil, nil)
			}
			return nil
		})
		sweeper := &Repository{st: slow, id: r.id, conf: r.conf}
		if err := sweeper.sweepParity(bg); err != nil {
			t.Fatal(err)
		}
		mustHaveNoStrayParity(t, st)
		after := mustOpen(t, st)
		mustRead(t, after, p, noise(1, 3*testChunk))
		if rep := mustCheck(t, after, CheckOptions{}); rep.Parity.Lacking > 0 {
			t.Errorf("a backup before call %d: %+v", n, rep.Parity)
		}
		if !hit {
			return
		}
	}
}

// A store that takes no parity takes no backup either: who asked for parity is
// told. But what is committed stays so.
func TestParityThatCannotBeStored(t *testing.T) {
	base, r := newRepo(t)
	mustBackup(t, r, "web01", noise(1, 3*testChunk), nil, nil)
	for _, prefix := range guarded {
		st := base.Clone()
		full := blobtest.Faulty(st, func(c blobtest.Call) error {
			if c.Op == blobtest.OpPut && strings.HasPrefix(c.Name, parityPrefix+prefix) {
				return fault.ErrNoSpace
			}
			return nil
		})
		p, err := runBackup(full, noise(2, 3*testChunk), nil, nil)
		if want := prefix == outcomePrefix; (err == nil) != want || !want && !errors.Is(err, fault.ErrNoSpace) {
			t.Errorf("%s: %v", prefix, err)
		}
		if err == nil {
			mustRead(t, mustOpen(t, st), p, noise(2, 3*testChunk))
		}
	}
}

// Packs of a backup that died have no parity. A check that reads them makes it;
// one that does not read them, or a store that takes no writes, leaves them.
func TestScrubMakesTheParityThatPacksLack(t *testing.T) {
	base, h, pack := wreckedRepo(t)
	lost := mustNames(t, base, parityPrefix+packPrefix)
	for _, name := range lost {
		if err := base.Delete(bg, name); err != nil {
			t.Fatal(err)
		}
	}
	n := int64(len(lost))
	for _, c := range []struct {
		name    string
		o       CheckOptions
		full    bool
		made    int64
		lacking int64
	}{
		{"inventory", CheckOptions{}, false, 0, n},
		{"scrub", CheckOptions{Scrub: true}, false, n, 0},
		{"read data", CheckOptions{ReadData: true}, false, n, 0},
		{"scrub of a full store", CheckOptions{Scrub: true}, true, 0, n},
	} {
		st := base.Clone()
		var view blob.Store = st
		if c.full {
			view = fullStore{st, t}
		}
		rep := mustCheck(t, mustOpen(t, view), c.o)
		if rep.Parity.Made != c.made || rep.Parity.Lacking != c.lacking {
			t.Errorf("%s: %+v, want %d made and %d lacking", c.name, rep.Parity, c.made, c.lacking)
		}
		if c.made == 0 {
			continue
		}
		if err := st.Damage(pack, func(b []byte) []byte { b[len(b)/2] ^= 4; return b }); err != nil {
			t.Fatal(err)
		}
		if rep := mustRepair(t, st, true, RepairOptions{Scrub: true}); len(rep.Left.Findings) > 0 {
			t.Errorf("%s: what was made does not heal: %+v", c.name, rep.Left.Findings)
		}
		mustBeWhole(t, st, h, h.points...)
	}
}
