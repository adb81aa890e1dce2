package repo

import (
	"bytes"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/blob/mem"
)

// Somebody exchanges records of restore points, or gives one another name.
// Repair puts each back where it belongs, and until then nothing that a record
// needs is vacuumed away.
func TestRepairPutsRecordsBack(t *testing.T) {
	base, h, _ := wreckedRepo(t)
	recs := mustNames(t, base, pointPrefix)
	a, b := recs[0], recs[1]
	move, exchange, without := moveObject, exchangeObjects, withoutParityOfRecords
	for _, c := range []struct {
		name    string
		hurt    func(t *testing.T, st *mem.Store)
		keyless bool // that heals it, too
	}{
		{"exchanged", func(t *testing.T, st *mem.Store) { exchange(t, st, a, b) }, false},
		{"exchanged, and no parity", func(t *testing.T, st *mem.Store) { without(t, st); exchange(t, st, a, b) }, false},
		{"exchanged with their parity", func(t *testing.T, st *mem.Store) {
			exchange(t, st, a, b)
			exchange(t, st, parityPrefix+a, parityPrefix+b)
		}, false},
		{"a number that the session never gave", func(t *testing.T, st *mem.Store) { move(t, st, a, a[:len(a)-1]+"7") }, true},
		{"the same of another session, without parity", func(t *testing.T, st *mem.Store) { without(t, st); move(t, st, a, b[:len(b)-1]+"7") }, false},
		{"no name of a record", func(t *testing.T, st *mem.Store) { move(t, st, a, a+".old") }, true},
		{"over another record", func(t *testing.T, st *mem.Store) { move(t, st, a, b) }, false},
		{"a copy", func(t *testing.T, st *mem.Store) {
			if err := put(bg, st, a+".old", mustReadObject(t, st, a)); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		for _, keyless := range []bool{false, true} {
			if keyless && !c.keyless {
				continue
			}
			st := base.Clone()
			c.hurt(t, st)
			if rep, err := mustOpen(t, st).Check(bg, CheckOptions{}); err != nil || len(rep.Findings) == 0 {
				t.Errorf("%s: check finds nothing, %v", c.name, err)
			}
			// A vacuum refuses, or leaves what the record needs.
			_, _ = mustOpen(t, st).Vacuum(bg, VacuumOptions{})
			before := st.Clone()
			mustRepair(t, st, keyless, RepairOptions{DryRun: true})
			mustBeSame(t, before, st)
			rep := mustRepair(t, st, keyless, RepairOptions{})
			if len(rep.Left.Findings) > 0 {
				t.Errorf("%s, keyless %v: left %+v of %+v", c.name, keyless, rep.Left.Findings, rep.Mended)
				continue
			}
			if got := mustNames(t, st, pointPrefix); !slices.Equal(got, recs) {
				t.Errorf("%s, keyless %v: records %v", c.name, keyless, got)
			}
			for _, name := range recs {
				if !bytes.Equal(mustReadObject(t, st, name), mustReadObject(t, base, name)) {
					t.Errorf("%s, keyless %v: %s is not what it was", c.name, keyless, name)
				}
			}
			if c.name == "exchanged with their parity" {
				mustRepair(t, st, keyless, RepairOptions{Scrub: true})
			}
			mustBeClean(t, st, h)
		}
	}
}

func moveObject(t *testing.T, st *mem.Store, from, to string) {
	t.Helper()
	raw := mustReadObject(t, st, from)
	if err := st.Delete(bg, from); err != nil {
		t.Fatal(err)
	}
	if err := put(bg, st, to, raw); err != nil {
		t.Fatal(err)
	}
}

func exchangeObjects(t *testing.T, st *mem.Store, x, y string) {
	t.Helper()
	bytesOfY := mustReadObject(t, st, y)
	moveObject(t, st, x, y)
	if err := put(bg, st, x, bytesOfY); err != nil {
		t.Fatal(err)
	}
}

func withoutParityOfRecords(t *testing.T, st *mem.Store) {
	t.Helper()
	for _, name := range mustNames(t, st, parityPrefix+pointPrefix) {
		if err := st.Delete(bg, name); err != nil {
			t.Fatal(err)
		}
	}
}

// A repair that dies between putting back one of two records and the other has
// lost neither, also where nothing but their bytes says what they were.
func TestRepairOfExchangedRecordsSurvivesCrash(t *testing.T) {
	base, h, _ := wreckedRepo(t)
	recs := mustNames(t, base, pointPrefix)
	for n := 0; ; n++ {
		st := base.Clone()
		withoutParityOfRecords(t, st)
		exchangeObjects(t, st, recs[0], recs[1])
		_, err := mustOpen(t, crashAfter(n, st)).Repair(bg, RepairOptions{})
		if rep := mustRepair(t, st, false, RepairOptions{}); len(rep.Left.Findings) > 0 {
			t.Fatalf("crash after %d: %+v", n, rep.Left.Findings)
		}
		if got := mustNames(t, st, pointPrefix); !slices.Equal(got, recs) {
			t.Fatalf("crash after %d: records %v", n, got)
		}
		for _, name := range recs {
			if !bytes.Equal(mustReadObject(t, st, name), mustReadObject(t, base, name)) {
				t.Fatalf("crash after %d: %s is not what it was", n, name)
			}
		}
		if err == nil {
			mustBeClean(t, st, h)
			return
		}
		if n > 50 {
			t.Fatal("it never ends")
		}
	}
}

// What stands beside a record waits for it while it lies under another name.
func TestAProtectionOutlivesAnotherName(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, testChunk), nil, nil)
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{Why: "audit"}); err != nil {
		t.Fatal(err)
	}
	name := mustNames(t, st, pointPrefix)[0]
	moveObject(t, st, name, name+".old")
	mustVacuum(t, mustOpen(t, st))
	mustRepair(t, st, false, RepairOptions{})
	points, err := mustOpen(t, st).Points(bg)
	if err != nil || len(points) != 1 || !points[0].Protected || points[0].ProtectedWhy != "audit" {
		t.Fatalf("%+v, %v; want the point back, and protected", points, err)
	}
}

// A record whose point was deleted and vacuumed away does not come back because
// somebody had copied it: what it needs is gone, and that is said.
func TestRepairBringsNothingBackThatLeadsNowhere(t *testing.T) {
	st, r := newRepo(t)
	h := &history{}
	gone := mustBackup(t, r, "web01", noise(1, 9*testChunk), nil, nil)
	name := mustNames(t, st, pointPrefix)[0]
	raw := mustReadObject(t, st, name)
	outcomes := mustNames(t, st, outcomePrefix)
	said := mustReadObject(t, st, outcomes[0])
	kept := noise(2, 9*testChunk)
	h.add(mustBackup(t, r, "web02", kept, nil, nil), kept)
	if err := r.DeletePoint(bg, "web01", gone.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := put(bg, st, outcomes[0], said); err != nil {
		t.Fatal(err)
	}
	if err := put(bg, st, name+".old", raw); err != nil {
		t.Fatal(err)
	}
	rep := mustRepair(t, st, false, RepairOptions{})
	if len(rep.Mended) == 0 || rep.Mended[0].Object != name || rep.Mended[0].Err == nil {
		t.Errorf("%+v; want it said that what the record needs is gone", rep.Mended)
	}
	if names := mustNames(t, st, pointPrefix); len(names) != 2 || !slices.Contains(names, name+".old") || slices.Contains(names, name) {
		t.Errorf("records %v; want the copy left alone, and no point that leads nowhere", names)
	}
	if _, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{}); err != nil {
		t.Errorf("vacuum beside it: %v", err)
	}
	mustRead(t, mustOpen(t, st), h.points[0], kept)
}
