package backup_test

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// twoPoints is a world with a full and an incremental behind it, and with
// something to back up.
func twoPoints(t *testing.T, st blob.Store) *world {
	t.Helper()
	w := newWorld(t, st)
	w.vm.AddDisk("vda", 2*mib+777)
	w.vm.AddDisk("vdb", unit)
	w.vm.Write("vda", 0, noise(1, 2*mib))
	w.backUp("vda", "vdb")
	w.vm.Write("vda", mib, noise(2, unit))
	w.vm.Write("vdb", 0, noise(3, 1000))
	w.backUp("vda", "vdb")
	w.vm.Write("vda", unit+5, noise(4, unit))
	w.vm.Write("vda", 2*mib, noise(5, 777))
	return w
}

func (w *world) now() map[vm.DiskID][]byte {
	return map[vm.DiskID][]byte{"vda": w.vm.Contents("vda"), "vdb": w.vm.Contents("vdb")}
}

// survived checks all points after a crash, and that the next backup works.
// A point whose commit the dead process did not hear of may exist or not.
func (w *world) survived(st blob.Store, res backup2) {
	w.Helper()
	now := w.now()
	refs := w.verify(st, now)
	if res.ok && !slices.Contains(refs, res.ref) {
		w.Errorf("%s was reported committed, and there is only %q", res.ref, refs)
	}
	if len(refs) < 2 {
		w.Errorf("older points are missing: %q", refs)
	}
	next := w.try(w.Context(), st, "vda", "vdb")
	if next.Err != nil {
		w.Errorf("the next backup: %v", next.Err)
	}
	w.verify(st, now)
	w.wantClean(1)
}

// backup2 is what a backup that may have crashed reported.
type backup2 struct {
	ok  bool
	ref string
}

// stride is how far apart the calls are at which a test lets something break:
// every one is tried, but with -short, which runs under the race detector, one
// of seven.
func stride() int {
	if testing.Short() {
		return 7
	}
	return 1
}

// However far a backup got before the process was killed, every restore point
// that exists afterwards is complete, and the next backup works.
func TestBackupSurvivesKill(t *testing.T) {
	for _, c := range []struct {
		name  string
		crash func(int, blob.Store) *blobtest.Crash
	}{
		{"the last call is lost", blobtest.CrashAfter},
		{"the last call is done", blobtest.CrashAfterApplied},
	} {
		for n := 0; ; n += stride() {
			disk := mem.New()
			w := twoPoints(t, disk)
			st := c.crash(n, disk)
			res := w.try(t.Context(), st, "vda", "vdb")
			crashed := st.Crashed()
			if !crashed && res.Err != nil {
				t.Fatalf("%s: nothing crashed, and %v", c.name, res.Err)
			}
			got := backup2{ok: res.Err == nil}
			if got.ok {
				got.ref = res.Point.Ref()
			}
			w.survived(disk, got)
			if t.Failed() {
				t.Fatalf("%s: after %d changing calls", c.name, n)
			}
			if !crashed {
				t.Logf("%s: %d calls", c.name, n)
				break
			}
		}
	}
}

// The same with a power cut in every call to the file system, after which
// whatever was not synced may be lost or torn.
func TestBackupSurvivesPowerCut(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for n := rng.IntN(stride()); ; n += stride() {
		disk := filetest.New()
		w := twoPoints(t, file.OpenFS(disk, "disk"))
		disk.CutAfter(n)
		res := w.try(t.Context(), file.OpenFS(disk, "disk"), "vda", "vdb")
		off := disk.Off()
		if !off && res.Err != nil {
			t.Fatalf("the power stayed, and %v", res.Err)
		}
		got := backup2{ok: res.Err == nil}
		if got.ok {
			got.ref = res.Point.Ref()
		}
		w.survived(file.OpenFS(disk.Reboot(rng), "disk"), got)
		if t.Failed() {
			t.Fatalf("after %d changing calls, seed %d", n, seed)
		}
		if !off {
			t.Logf("%d calls", n)
			return
		}
	}
}

// A store that fails once, at any call, costs the run and nothing else.
func TestBackupSurvivesStoreErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
	}{
		{"full disk", fault.ErrNoSpace},
		{"lost reply", blobtest.ErrLostReply},
	} {
		for n := 0; ; n += stride() {
			disk := mem.New()
			w := twoPoints(t, disk)
			calls, failed := 0, false
			st := blobtest.Faulty(disk, func(call blobtest.Call) error {
				if call.Op.Mutates() {
					if calls++; calls == n+1 {
						failed = true
						return c.err
					}
				}
				return nil
			})
			res := w.try(t.Context(), st, "vda", "vdb")
			got := backup2{ok: res.Err == nil}
			if got.ok {
				got.ref = res.Point.Ref()
			} else if !errors.Is(res.Err, c.err) {
				t.Errorf("%s: %v", c.name, res.Err)
			}
			w.survived(disk, got)
			if t.Failed() {
				t.Fatalf("%s: at changing call %d", c.name, n)
			}
			if !failed {
				break
			}
		}
	}
}

// What a killed backup had stored is not stored again.
func TestNextBackupReusesWhatAKilledOneStored(t *testing.T) {
	reused := false
	for n := 0; ; n++ {
		disk := mem.New()
		w := memWorldOn(t, disk)
		st := blobtest.CrashAfter(n, disk)
		if res := w.try(t.Context(), st); res.Err == nil {
			break
		}
		packs, err := blobtest.Names(t.Context(), disk, "data/")
		if err != nil {
			t.Fatal(err)
		}
		d := w.wantDisk(w.backUp(), point.Full, "")
		switch {
		case len(packs) == 0 && d.Stats.NewBytes != mib:
			t.Errorf("killed after %d calls: nothing was stored, and only %d bytes were new", n, d.Stats.NewBytes)
		case len(packs) > 0 && d.Stats.NewBytes != 0:
			t.Errorf("killed after %d calls: packs %q were there, and %d bytes were stored again", n, packs, d.Stats.NewBytes)
		case len(packs) > 0:
			reused = true
		}
		w.verify(disk)
	}
	if !reused {
		t.Error("no crash came between the packs and the outcome")
	}
}

func memWorldOn(t *testing.T, st blob.Store) *world {
	w := newWorld(t, st)
	w.vm.AddDisk("vda", mib)
	w.vm.Write("vda", 0, noise(1, mib))
	return w
}

// A backup that showed no sign of life, so that a vacuum has fenced it, fails
// cleanly and may be repeated.
func TestFencedBackupMayBeRepeated(t *testing.T) {
	disk := mem.New()
	w := memWorldOn(t, disk)
	var started atomic.Bool
	r := w.mustOpen()
	defer r.Close()
	w.vm.OnRead("vda", func(int64, int) error {
		if started.CompareAndSwap(false, true) {
			other, err := repo.Open(t.Context(), disk, repo.Key{Passphrase: password})
			if err != nil {
				return err
			}
			defer other.Close()
			_, err = other.Vacuum(t.Context(), repo.VacuumOptions{Patience: time.Millisecond})
			return err
		}
		return nil
	})
	res := w.tryIn(t.Context(), r)
	if !errors.Is(res.Err, fault.ErrFenced) {
		t.Errorf("%v, want fault.ErrFenced", res.Err)
	}
	w.wantClean(0)
	w.backUp()
	if refs := w.verify(disk); len(refs) != 1 {
		t.Errorf("points %q", refs)
	}
}
