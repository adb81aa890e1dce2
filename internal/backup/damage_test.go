package backup_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/images"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/raw"
	"github.com/backstay/backstay/internal/point"
)

// damage flips a bit in the middle of every object with prefix.
func damage(t *testing.T, st *mem.Store, prefix string, offset func(n int) int) {
	t.Helper()
	names, err := blobtest.Names(t.Context(), st, prefix)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %q, %v", prefix, names, err)
	}
	for _, name := range names {
		if err := st.Damage(name, func(b []byte) []byte { b[offset(len(b))] ^= 4; return b }); err != nil {
			t.Fatal(err)
		}
	}
}

func middle(n int) int { return n / 2 }

// The rest of a partly changed chunk is rotten in the repository: it comes
// from the guest, is counted apart, and the damage is reported.
func TestRefillFromTheGuest(t *testing.T) {
	st := mem.New()
	w := newWorld(t, st)
	w.vm.AddDisk("vda", 4*mib)
	w.vm.Write("vda", 0, noise(1, unit))
	w.backUp()
	damage(t, st, "data/", middle)
	clear(w.want) // the first point is beyond help
	w.vm.Write("vda", 100, noise(2, 100))
	w.vm.TakeReads("vda")
	res := w.backUp()
	d := w.wantDisk(res, point.Incremental, "")
	if d.Stats.RefillBytes != unit || d.Stats.ChangedBytes != grain || d.Stats.ReadBytes != unit {
		t.Errorf("stats %+v", d.Stats)
	}
	if !errors.Is(res.Damage, fault.ErrCorrupt) || len(res.Warnings) == 0 || !strings.Contains(res.Warnings[0], "vda") {
		t.Errorf("damage %v, warnings %q", res.Damage, res.Warnings)
	}
	r := w.mustOpen()
	defer r.Close()
	got, err := readDisk(t.Context(), r, res.Point.Disks[0])
	if err != nil || string(got) != string(w.vm.Contents("vda")) {
		t.Errorf("the new point: %v", err)
	}
}

// Whatever rots of the previous point, the next backup works and is right.
func TestPreviousPointIsDamaged(t *testing.T) {
	for _, c := range []struct {
		name   string
		rot    func(t *testing.T, st *mem.Store)
		reason string
	}{
		{"manifests", func(t *testing.T, st *mem.Store) { damage(t, st, "man/", middle) }, "the previous restore point can't be read"},
		{"head of manifests", func(t *testing.T, st *mem.Store) { damage(t, st, "man/", func(int) int { return 3 }) }, "the previous restore point can't be read"},
		{"tail of manifests", func(t *testing.T, st *mem.Store) { damage(t, st, "man/", func(n int) int { return n - 1 }) }, "the previous restore point can't be read"},
		{"manifests are gone", func(t *testing.T, st *mem.Store) {
			names, _ := blobtest.Names(t.Context(), st, "man/")
			for _, n := range names {
				if err := st.Delete(t.Context(), n); err != nil {
					t.Fatal(err)
				}
			}
		}, "the previous restore point can't be read"},
		{"record", func(t *testing.T, st *mem.Store) { damage(t, st, "rp/", middle) }, "first backup"},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			for _, tracked := range []bool{true, false} {
				st := mem.New()
				w := newWorld(t, st)
				w.vm.AddDisk("vda", 4*mib+777)
				w.vm.Write("vda", 0, noise(1, 4*mib))
				if !tracked {
					w.vm.Untracked("vda")
				}
				w.backUp()
				w.vm.Write("vda", mib+5, noise(2, grain))
				c.rot(t, st)
				res := w.backUp()
				d := w.wantDisk(res, point.Full, c.reason)
				if res.Damage == nil {
					t.Error("the damage is not reported")
				}
				if d.Stats.NewBytes > 2*unit {
					t.Errorf("%d bytes were stored again", d.Stats.NewBytes)
				}
				r := w.mustOpen()
				defer r.Close()
				got, err := readDisk(t.Context(), r, res.Point.Disks[0])
				if err != nil || string(got) != string(w.vm.Contents("vda")) {
					t.Errorf("the new point: %v", err)
				}
				if c.name == "record" {
					continue
				}
				w.vm.Write("vda", 0, noise(3, 10))
				want := point.Incremental
				if !tracked {
					want = point.Compared
				}
				if res := w.backUp(); res.Point.Disks[0].Mode != want {
					t.Errorf("the one after it: %s (%s)", res.Point.Disks[0].Mode, res.Point.Disks[0].Reason)
				}
			}
		})
	}
}

// A source that says it is corrupt is read once, and blamed.
func TestCorruptSource(t *testing.T) {
	w := memWorld(t, mib)
	w.vm.Write("vda", 0, noise(1, mib))
	w.backUp()
	w.vm.Write("vda", 0, noise(2, mib))
	reads := 0
	w.vm.OnRead("vda", func(int64, int) error {
		reads++
		return fault.Corrupt("grain table", 512, "it is nonsense")
	})
	r := w.mustOpen()
	defer r.Close()
	o := w.options(r)
	o.Workers = 1
	res := backup.Run(t.Context(), o, []backup.Job{w.job()})[0]
	if !errors.Is(res.Err, fault.ErrCorrupt) || res.Damage != nil || reads > 1 {
		t.Errorf("%v, damage %v, %d reads", res.Err, res.Damage, reads)
	}
	w.wantClean(1)
}

// An image file that shrinks while it is read: one clear error, no point.
func TestImageShrinksWhileRead(t *testing.T) {
	w := memWorld(t, mib)
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, noise(1, 4*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	r := w.mustOpen()
	defer r.Close()
	run := func(open func(string) (image.Image, error)) backup.Result {
		d := images.New("disk.raw", []images.File{{ID: "disk.raw", Path: path}}, open)
		return backup.Run(t.Context(), w.options(r), []backup.Job{{Driver: d, Name: "disk.raw", Source: path}})[0]
	}
	plain := func(path string) (image.Image, error) { return raw.OpenPath(path) }
	w.wantDisk(run(plain), point.Full, "first backup")
	res := run(plain)
	if d := w.wantDisk(res, point.Compared, "nothing tracks changes of an image file"); d.Stats.StoredBytes != 0 || d.Stats.ReadBytes != 4*mib {
		t.Errorf("stats %+v", d.Stats)
	}
	res = run(func(path string) (image.Image, error) {
		img, err := raw.OpenPath(path)
		if err == nil {
			err = os.Truncate(path, mib)
		}
		return img, err
	})
	if res.Err == nil || !strings.Contains(res.Err.Error(), "shrank from 4194304 to 1048576 bytes") {
		t.Errorf("%v", res.Err)
	}
	points, err := r.Points(t.Context())
	if err != nil || len(points) != 2 {
		t.Errorf("%d points, %v", len(points), err)
	}
}
