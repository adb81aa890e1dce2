package backup_test

import (
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// A VM that is off makes no new bitmap: its point hands on the old change ID.
// When the storage then goes back to before that point, the bitmap goes back
// with it and knows nothing of what the point holds.
func TestRollBackToBeforeAnOfflineBackup(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	w.backUp()
	w.vm.Write("vda", 0, noise(2, grain))
	w.vm.SetOff(true)
	rollBack := w.vm.Save()
	w.vm.SetOff(false)
	w.vm.Write("vda", 2*mib, noise(3, mib))
	w.vm.SetOff(true)
	w.wantDisk(w.backUp(), point.Incremental, "")
	rollBack()
	w.wantDisk(w.backUp(), point.Incremental, "") // off
	w.vm.SetOff(false)
	w.vm.Write("vda", mib, noise(4, grain))
	w.wantDisk(w.backUp(), point.Incremental, "") // running
	w.vm.Write("vda", 3*mib, noise(5, grain))
	w.vm.TakeReads("vda")
	d := w.wantDisk(w.backUp(), point.Incremental, "") // on the newest again
	if d.Stats.ReadBytes != grain {
		t.Errorf("%d bytes read, want %d", d.Stats.ReadBytes, grain)
	}
	if refs := w.verify(w.store); len(refs) != 5 {
		t.Errorf("%d points", len(refs))
	}
}

// Once the point is deleted that the bitmap counts from, nothing tells what
// the bitmap says.
func TestOfflineBackupWhoseBaseWasDeleted(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	first := w.backUp()
	w.vm.SetOff(true)
	rollBack := w.vm.Save()
	w.vm.Write("vda", 2*mib, noise(2, mib))
	w.backUp()
	r := w.mustOpen()
	defer r.Close()
	if err := r.DeletePoint(t.Context(), "web01", first.Point.ID); err != nil {
		t.Fatal(err)
	}
	rollBack()
	d := w.wantDisk(w.backUp(), point.Compared, "the restore point that change tracking counts from is gone")
	if d.ChangeID != "" {
		t.Errorf("change id %q was handed on", d.ChangeID)
	}
	w.vm.SetOff(false)
	w.wantDisk(w.backUp(), point.Compared, "")
	w.wantDisk(w.backUp(), point.Incremental, "")
	w.verify(w.store)
}

// A bitmap that was caught lying is not handed on by the point that caught it.
func TestOfflineBackupDoesNotHandOnALie(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	w.backUp()
	w.vm.Lie("vda", extent.Extent{Len: mib})
	w.vm.Write("vda", 0, noise(2, grain))
	w.vm.SetOff(true)
	w.audit = 1
	if d := w.wantDisk(w.backUp(), point.Compared, "lied"); d.ChangeID != "" {
		t.Errorf("change id %q was handed on", d.ChangeID)
	}
	w.audit = -1
	if res := w.backUp(); !strings.Contains(res.Point.Disks[0].Reason, "no checkpoint") {
		t.Errorf("%s (%s)", res.Point.Disks[0].Mode, res.Point.Disks[0].Reason)
	}
	w.verify(w.store)
}

// Where the point that the bitmap counts from can't be read, the next one does
// not lead there again.
func TestOfflineBackupOnADamagedBase(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	w.backUp()
	damage(t, w.store.(*mem.Store), "man/", func(n int) int { return n - 1 })
	w.vm.SetOff(true)
	d := w.wantDisk(w.backUp(), point.Full, "the previous restore point can't be read")
	if d.ChangeID != "" {
		t.Errorf("change id %q was handed on", d.ChangeID)
	}
	if res := w.backUp(); res.Damage != nil {
		t.Errorf("it builds on the damaged one again: %v", res.Damage)
	}
}
