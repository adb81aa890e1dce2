package backup_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/images"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/raw"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
)

// What a check found damaged is read from the guest by the next incremental,
// though nobody wrote to it: then the older point is whole again, too.
func TestAnIncrementalHealsThePointBefore(t *testing.T) {
	st := mem.New()
	w := newWorld(t, st)
	w.vm.AddDisk("vda", 4*mib)
	w.vm.Write("vda", mib, noise(1, unit))
	w.backUp()
	damage(t, st, "data/", middle)
	r := w.mustOpen()
	defer r.Close()
	if rep, err := r.Check(t.Context(), repo.CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 1 || rep.Unnoted != nil {
		t.Fatalf("%+v, %v", rep, err)
	}
	w.vm.Write("vda", 3*mib, noise(2, 100))
	w.vm.TakeReads("vda")
	res := w.backUp()
	d := w.wantDisk(res, point.Incremental, "")
	if d.Stats.RefillBytes != unit || d.Stats.NewBytes != 2*unit || d.Stats.ChangedBytes != grain {
		t.Errorf("stats %+v", d.Stats)
	}
	if !errors.Is(res.Damage, fault.ErrCorrupt) || len(res.Warnings) != 1 {
		t.Errorf("damage %v, warnings %q", res.Damage, res.Warnings)
	}
	w.verify(st) // both points
	again := w.mustOpen()
	defer again.Close()
	if rep, err := again.Check(t.Context(), repo.CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if res := w.backUp(); res.Damage != nil || res.Point.Disks[0].Stats.RefillBytes != 0 {
		t.Errorf("the one after it: %v, %+v", res.Damage, res.Point.Disks[0].Stats)
	}
}

// A restore point of no disk would look like protection.
func TestNoDiskIsLeft(t *testing.T) {
	w := memWorld(t, mib)
	w.vm.Exclude("vda", "excluded on request")
	res := w.try(t.Context(), w.store)
	if !errors.Is(res.Err, hypervisor.ErrNoDisk) || res.Point != nil {
		t.Errorf("%v", res.Err)
	}
	w.wantClean(0)
}

// Image files of one name from two directories share a history. That is right
// for one that moved, and said for all.
func TestImagesOfOneNameFromTwoPlaces(t *testing.T) {
	w := memWorld(t, mib)
	r := w.mustOpen()
	defer r.Close()
	run := func(dir, vm string) backup.Result {
		path := filepath.Join(dir, "disk.raw")
		if err := os.WriteFile(path, noise(1, mib), 0o600); err != nil {
			t.Fatal(err)
		}
		d := images.New("disk.raw", []images.File{{ID: "disk.raw", Path: path}}, func(path string) (image.Image, error) { return raw.OpenPath(path) })
		res := backup.Run(t.Context(), w.options(r), []backup.Job{{Driver: d, Name: "disk.raw", VM: vm, Source: path}})[0]
		if res.Err != nil {
			t.Fatal(res.Err)
		}
		return res
	}
	a, b := t.TempDir(), t.TempDir()
	for i, c := range []struct {
		dir, vm string
		warns   bool
	}{{a, "", false}, {a, "", false}, {b, "", true}, {b, "", false}, {a, "mine", false}, {b, "mine", false}} {
		res := run(c.dir, c.vm)
		warns := len(res.Point.Warnings) > 0 && strings.Contains(res.Point.Warnings[0], filepath.Join(a, "disk.raw"))
		if warns != c.warns {
			t.Errorf("run %d: warnings %q", i, res.Point.Warnings)
		}
	}
}
