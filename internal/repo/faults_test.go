package repo

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// A faultOp is an operation of which every call of the store fails once.
type faultOp struct {
	name string
	do   func(w *pairWorld, st blob.Store) error
}

// Those of TestEveryOperationBesideEveryOther and some that belong to no pair.
func faultOps() []faultOp {
	var ops []faultOp
	for _, op := range pairOps {
		if op.name != "backup over a point that goes" && op.name != "restore of a point that goes" {
			ops = append(ops, faultOp{op.name, op.do})
		}
	}
	return append(ops,
		faultOp{"repair of damage", func(w *pairWorld, st blob.Store) error {
			return w.open(st, func(r *Repository) error {
				rep, err := r.Repair(bg, RepairOptions{ReadData: true})
				for _, f := range rep.Left.Findings {
					err = errors.Join(err, fmt.Errorf("%s: %w", f.Object, f.Err))
				}
				for _, m := range rep.Mended {
					err = errors.Join(err, m.Err)
				}
				return err
			})
		}},
		faultOp{"suspect note", func(w *pairWorld, st blob.Store) error {
			return w.open(st, func(r *Repository) error { return r.MarkSuspect(bg, w.prev.VM, w.prev.ID, "tracking lied") })
		}},
		faultOp{"info and usage", func(w *pairWorld, st blob.Store) error {
			return w.open(st, func(r *Repository) error { _, err := r.Info(bg); return err })
		}},
	)
}

// damagePack makes a pack of the world need repair.
func damagePack(t *testing.T, st *mem.Store) {
	t.Helper()
	all := names(t, st, packPrefix)
	b, err := readObject(bg, st, all[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := put(bg, st, all[0], b); err != nil {
		t.Fatal(err)
	}
}

// Whatever call of the store fails, with a full disk or a broken one, done or
// not: the error says at which object, every point is whole, the same thing
// works when it is done again, and a vacuum leaves nothing of the failure.
func TestEveryCallFails(t *testing.T) {
	w := newPairWorld(t)
	hurt := w.base.Clone()
	damagePack(t, hurt)
	step := 13
	switch {
	case os.Getenv("BACKSTAY_SOAK") != "":
		step = 1
	case testing.Short():
		step = 41
	}
	kinds := []struct {
		name  string
		err   error
		reads bool
	}{
		{"full disk", fault.ErrNoSpace, false},
		{"input/output error", syscall.EIO, true},
		{"lost reply", fmt.Errorf("%w: %w", blobtest.ErrLostReply, syscall.EIO), false},
	}
	calls := 0
	for i, op := range faultOps() {
		base := w.base
		if op.name == "repair of damage" {
			base = hurt
		}
		for k, kind := range kinds {
			for at := (i + 2*k) % step; ; at += step {
				if !w.failOne(t, op, base, kind.err, kind.reads, at) {
					break
				}
				if calls++; t.Failed() {
					return
				}
			}
		}
	}
	t.Logf("%d calls failed", calls)
}

// failOne fails call number at of those that change something, or of those that
// read; it says whether there was one.
func (w *pairWorld) failOne(t *testing.T, op faultOp, base *mem.Store, with error, reads bool, at int) bool {
	disk := base.Clone()
	run := *w
	run.h = &history{content: map[point.ID][]byte{}}
	for id, b := range w.h.content {
		run.h.content[id] = b
	}
	var mu sync.Mutex
	n, failed := 0, blobtest.Call{}
	hit := false
	st := blobtest.Faulty(disk, func(call blobtest.Call) error {
		mu.Lock()
		defer mu.Unlock()
		// Beats come by the clock; a later one makes good for an earlier.
		if call.Op.Mutates() == reads || call.Op == blobtest.OpLock || strings.HasPrefix(call.Name, beatPrefix) {
			return nil
		}
		if n++; n != at+1 {
			return nil
		}
		hit, failed = true, call
		return fmt.Errorf("%s: %w", call.Name, with)
	})
	err := op.do(&run, st)
	if !hit {
		if err != nil {
			t.Errorf("%s: nothing failed, and %v", op.name, err)
		}
		return false
	}
	where := fmt.Sprintf("%s, call %d (%s %s) failed with %v", op.name, at, failed.Op, failed.Name, with)
	// Repair takes what cannot be read for what it is called to repair.
	if err != nil && !strings.Contains(err.Error(), failed.Name) && !errors.Is(err, fault.ErrFenced) && !(op.name == "repair of damage" && errors.Is(err, fault.ErrCorrupt)) {
		t.Errorf("%s: the error does not say where: %v", where, err)
	}
	if op.name != "repair of damage" {
		run.whole(t, where, disk)
	}
	// Once more, with nothing in the way.
	again := op.do(&run, disk)
	if again != nil && !isOne(again, []error{fault.ErrNotFound, fault.ErrExists}) {
		t.Errorf("%s: and again: %v", where, again)
	}
	if errors.Is(again, fault.ErrNotFound) && op.name != "point delete" && op.name != "keys" {
		t.Errorf("%s: and again: %v", where, again)
	}
	finish(t, disk)
	run.whole(t, where+", and a vacuum", disk)
	for _, prefix := range []string{sessionPrefix, beatPrefix, vacuumPrefix, indexPrefix + "tmp"} {
		if left := names(t, disk, prefix); len(left) > 0 {
			t.Errorf("%s: left behind: %q", where, left)
		}
	}
	mustHaveNoStrayParity(t, disk)
	if left := len(names(t, disk, keysPrefix)); left > 4 {
		t.Errorf("%s: %d keys are left", where, left)
	}
	return true
}

// whole checks every point.
func (w *pairWorld) whole(t *testing.T, where string, st blob.Store) {
	t.Helper()
	r, err := Open(bg, st, testKey)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	defer r.Close()
	points, err := r.Points(bg)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	for _, p := range points {
		want := w.was(p)
		if want == nil {
			want = w.other.content[p.Ref()]
		}
		if got, err := readDisk(r, p); err != nil || string(got) != string(want) {
			t.Errorf("%s: %s is lost: %v", where, p.Ref(), err)
		}
	}
	for _, p := range w.keep {
		if !slices.ContainsFunc(points, func(q *point.RestorePoint) bool { return q.ID == p.ID }) {
			t.Errorf("%s: %s is gone", where, p.Ref())
		}
	}
}
