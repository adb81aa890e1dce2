package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/fake"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

func TestIncrementalReadsOnlyWhatChanged(t *testing.T) {
	w := memWorld(t, 8*mib+777)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	d := w.wantDisk(w.backUp(), point.Full, "first backup")
	if got, _ := w.vm.TakeReads("vda"); got != 4*mib || d.Stats.ReadBytes != got || d.Stats.NewBytes != got {
		t.Errorf("full: %d bytes read, stats %+v; want %d", got, d.Stats, 4*mib)
	}

	w.vm.Write("vda", mib+100, []byte("changed"))             // one grain of a chunk
	w.vm.Write("vda", 2*mib, noise(2, unit))                  // a whole chunk
	w.vm.Write("vda", 8*mib, noise(3, 777))                   // the short last chunk
	w.vm.Write("vda", 3*mib, noise(1, 4*mib)[3*mib:][:grain]) // the same bytes again
	d = w.wantDisk(w.backUp(), point.Incremental, "")
	want := extent.NewSet(
		extent.Extent{Off: mib, Len: grain}, extent.Extent{Off: 2 * mib, Len: unit},
		extent.Extent{Off: 8 * mib, Len: 777}, extent.Extent{Off: 3 * mib, Len: grain})
	got, what := w.vm.TakeReads("vda")
	if !slices.Equal(what.List(), want.List()) || got != want.Bytes() {
		t.Errorf("incremental read %d bytes, %v; want %v", got, what.List(), want.List())
	}
	if s := d.Stats; s.ReadBytes != got || s.ChangedBytes != got || s.RefillBytes != 0 || s.AuditBytes != 0 || s.NewBytes != 2*unit+777 {
		t.Errorf("stats %+v", s)
	}

	d = w.wantDisk(w.backUp(), point.Incremental, "")
	if got, what := w.vm.TakeReads("vda"); got != 0 || d.Stats.StoredBytes != 0 {
		t.Errorf("nothing changed, and %d bytes were read (%v), %d stored", got, what.List(), d.Stats.StoredBytes)
	}
	if refs := w.verify(w.store); len(refs) != 3 {
		t.Errorf("%d points", len(refs))
	}
	w.wantClean(1)
}

func TestDiscardBecomesAHole(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	w.backUp()
	w.vm.TakeReads("vda")
	w.vm.Discard("vda", extent.Extent{Off: mib, Len: 2 * mib})
	w.vm.Discard("vda", extent.Extent{Off: 3*mib + grain, Len: grain})
	w.wantDisk(w.backUp(), point.Incremental, "")
	if got, _ := w.vm.TakeReads("vda"); got > grain {
		t.Errorf("%d bytes of zeros were read, want %d at most", got, grain)
	}
	w.vm.Crash()
	w.vm.Discard("vda", extent.Extent{Len: mib})
	w.wantDisk(w.backUp(), point.Compared, "")
	w.vm.Crash()
	w.vm.Discard("vda", extent.Extent{Off: 3 * mib, Len: mib}) // the disk's last bytes
	w.wantDisk(w.backUp(), point.Compared, "")
	w.verify(w.store)
}

func TestLostTrackingReadsEverythingAndSaysWhy(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 2*mib))
	w.backUp()
	w.vm.TakeReads("vda")
	w.vm.Crash()
	w.vm.Write("vda", mib, noise(2, grain))
	d := w.wantDisk(w.backUp(), point.Compared, "change tracking was lost: the bitmap is inconsistent")
	if got, _ := w.vm.TakeReads("vda"); got != 2*mib {
		t.Errorf("%d bytes read, want all %d", got, 2*mib)
	}
	if d.Stats.NewBytes != unit {
		t.Errorf("%d bytes were new, want one chunk", d.Stats.NewBytes)
	}
	w.vm.Write("vda", 0, noise(3, 100))
	w.wantDisk(w.backUp(), point.Incremental, "") // and it recovers
	w.verify(w.store)
}

func TestTrackingLostInTheMiddle(t *testing.T) {
	w := memWorld(t, 2<<30) // two windows
	w.vm.Write("vda", 0, noise(1, mib))
	w.vm.Write("vda", 2<<30-mib, noise(2, mib))
	w.backUpSparse()
	w.vm.Write("vda", 0, noise(3, grain))
	w.vm.Write("vda", 2<<30-mib, noise(4, grain))
	w.vm.LoseTracking("vda", 1<<30+1)
	res := w.backUpSparse()
	w.wantDisk(res, point.Compared, "change tracking was lost")
	w.vm.LoseTracking("vda", -1)
	w.wantDisk(w.backUpSparse(), point.Incremental, "")
	r := w.mustOpen()
	defer r.Close()
	d, err := r.OpenDisk(t.Context(), res.Point.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	for off, want := range map[int64][]byte{0: noise(3, grain), grain: noise(1, mib)[grain:], 2<<30 - mib: noise(4, grain), 2<<30 - mib + grain: noise(2, mib)[grain:]} {
		got := make([]byte, len(want))
		if _, err := d.ReadAt(got, off); err != nil || !slices.Equal(got, want) {
			t.Errorf("other bytes at %d, %v", off, err)
		}
	}
}

// backUpSparse backs up without remembering the contents.
func (w *world) backUpSparse() backup.Result {
	w.Helper()
	r := w.mustOpen()
	defer r.Close()
	res := backup.Run(w.Context(), w.options(r), []backup.Job{w.job()})[0]
	if res.Err != nil {
		w.Fatal(res.Err)
	}
	return res
}

func TestSizesOfDisks(t *testing.T) {
	for _, size := range []int64{0, 1, 511, unit - 1, unit, unit + 1, 3*unit + 12345} {
		w := memWorld(t, size)
		for i := range 3 {
			if size > 0 {
				w.vm.Write("vda", size-1, noise(uint64(i), 1))
			}
			w.backUp()
		}
		if refs := w.verify(w.store); len(refs) != 3 {
			t.Errorf("%d bytes: %d points", size, len(refs))
		}
	}
}

func TestTenTiBOfNothing(t *testing.T) {
	tib := int64(1 << 40)
	if testing.Short() {
		tib >>= 4 // the race detector takes minutes for ten
	}
	w := memWorld(t, 10*tib)
	w.vm.Write("vda", 7*tib, noise(1, mib))
	w.wantDisk(w.backUpSparse(), point.Full, "first backup")
	w.vm.Write("vda", 9*tib, noise(2, grain))
	d := w.wantDisk(w.backUpSparse(), point.Incremental, "")
	if d.Stats.ReadBytes > unit {
		t.Errorf("%d bytes read", d.Stats.ReadBytes)
	}
}

func TestDiskGrowsAndShrinks(t *testing.T) {
	for _, c := range []struct {
		name     string
		from, to int64
		mode     point.Mode
	}{
		{"grows within its last chunk", mib + 1000, mib + 70000, point.Incremental},
		{"grows by chunks", mib + 1000, 3*mib + 5, point.Incremental},
		{"grows from nothing", 0, mib, point.Incremental},
		{"shrinks", 3*mib + 5, mib + 1000, point.Compared},
		{"shrinks within its last chunk", mib + 70000, mib + 1000, point.Compared},
		{"shrinks to nothing", mib, 0, point.Compared},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			w := memWorld(t, c.from)
			w.vm.Write("vda", 0, noise(1, int(c.from)))
			w.backUp()
			w.vm.Resize("vda", c.to)
			w.wantDisk(w.backUp(), c.mode, "")
			if c.to > c.from {
				w.vm.Write("vda", c.to-500, noise(2, 500))
				w.backUp()
			}
			w.verify(w.store)
		})
	}
}

// A disk is planned by the GiB: where it ended before is no bound to what it may
// have now.
func TestDiskGrowsByFar(t *testing.T) {
	for _, to := range []int64{1<<30 + 5, 2 << 30} {
		w := memWorld(t, mib+1000)
		w.vm.Write("vda", 0, noise(1, mib+1000))
		w.backUpSparse()
		w.vm.Resize("vda", to)
		w.vm.Write("vda", to-500, noise(2, 500))
		for range 2 { // and once it is of that size before
			d := w.wantDisk(w.backUpSparse(), point.Incremental, "")
			if d.SizeBytes != to {
				t.Errorf("it has %d bytes, want %d", d.SizeBytes, to)
			}
		}
		r := w.mustOpen()
		defer r.Close()
		points, err := r.Points(t.Context())
		if err != nil || len(points) != 3 {
			t.Fatalf("%d points, %v", len(points), err)
		}
		d, err := r.OpenDisk(t.Context(), points[1].Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		data, err := d.Data(t.Context(), extent.Extent{Len: to})
		if err != nil || len(data.List()) != 2 || data.Bytes() > 2*mib {
			t.Errorf("data at %v, %v", data.List(), err)
		}
		for off, want := range map[int64][]byte{0: noise(1, mib+1000), to - 500: noise(2, 500)} {
			got := make([]byte, len(want))
			if n, err := d.ReadAt(got, off); n < len(got) || !bytes.Equal(got, want) {
				t.Errorf("at %d there is something else, %v", off, err)
			}
		}
	}
}

// QEMU's bitmaps do not count growth as a write. Even under a driver that
// forgets it, nothing of the tail is missed.
func TestGrowthThatTrackingForgets(t *testing.T) {
	w := memWorld(t, mib+1000)
	w.vm.Write("vda", 0, noise(1, mib+1000))
	w.backUp()
	w.vm.Lie("vda", extent.Extent{Off: mib + 1000, Len: 2 * mib})
	w.vm.Resize("vda", 3*mib+1000)
	w.vm.Write("vda", mib+1000, noise(2, 2*mib))
	w.wantDisk(w.backUp(), point.Incremental, "")
	w.verify(w.store)
}

func TestNewRemovedAndExcludedDisks(t *testing.T) {
	w := memWorld(t, mib)
	w.vm.Write("vda", 0, noise(1, mib))
	w.backUp()
	w.vm.AddDisk("vdb", 2*mib)
	w.vm.Write("vdb", 0, noise(2, mib))
	w.vm.AddDisk("vdc", mib)
	w.vm.Exclude("vdc", "passed through from the host")
	res := w.backUp("vda", "vdb")
	w.wantDisk(res, point.Incremental, "")
	if d := res.Point.Disks[1]; d.Mode != point.Full || d.Reason != "new disk" {
		t.Errorf("new disk: %s (%s)", d.Mode, d.Reason)
	}
	if u := res.Point.Unprotected; len(u) != 1 || u[0].ID != "vdc" || u[0].Excluded != "passed through from the host" {
		t.Errorf("unprotected: %+v", u)
	}
	w.vm.RemoveDisk("vda")
	w.backUp("vdb")
	w.verify(w.store)
}

// What the summary and the record need to say.
func TestWhatThePointRecords(t *testing.T) {
	w := memWorld(t, mib)
	w.vm.Warn("a leftover was reaped")
	res := w.backUp()
	p := res.Point
	if p.VM != "web01" || p.Grade != vm.GradeFilesystem || p.FrozenFor != 5*time.Millisecond || p.Source != "fake://host1/web01" || p.Machine.UUID == "" {
		t.Errorf("%+v", p)
	}
	if !slices.Equal(p.Warnings, []string{"a leftover was reaped"}) || !slices.Equal(res.Warnings, p.Warnings) {
		t.Errorf("warnings %q and %q", p.Warnings, res.Warnings)
	}
	if p.Disks[0].ChangeID == "" {
		t.Error("no change id")
	}
	r := w.mustOpen()
	defer r.Close()
	if data, err := r.ReadBlob(t.Context(), p.Config["domain.xml"]); err != nil || !strings.Contains(string(data), "web01") {
		t.Errorf("domain.xml: %q, %v", data, err)
	}
}

func TestAVMThatIsNotThere(t *testing.T) {
	w := memWorld(t, mib)
	r := w.mustOpen()
	defer r.Close()
	j := w.job()
	j.Name = "db01"
	res := backup.Run(t.Context(), w.options(r), []backup.Job{j})[0]
	if !errors.Is(res.Err, fault.ErrNotFound) || !strings.Contains(res.Err.Error(), "db01") {
		t.Errorf("%v", res.Err)
	}
}

func TestConsistencyOrNothing(t *testing.T) {
	w := memWorld(t, mib)
	w.vm.Reach(vm.GradeCrash)
	res := w.try(t.Context(), w.store)
	if !errors.Is(res.Err, fault.ErrConsistency) || res.Point != nil {
		t.Errorf("%v", res.Err)
	}
	w.wantClean(0)
	if refs := w.verify(w.store); len(refs) > 0 {
		t.Errorf("points %q", refs)
	}
}

// One VM that fails fails alone, no matter how.
func TestSeveralVMs(t *testing.T) {
	w := newWorld(t, mem.New())
	r := w.mustOpen()
	defer r.Close()
	var mu sync.Mutex
	busy, most := map[string]int{}, 0 // reads in flight by disk
	var jobs []backup.Job
	for i := range 6 {
		name := fmt.Sprintf("vm%d", i)
		v := w.host.Add(name)
		for _, d := range []vm.DiskID{"vda", "vdb", "vdc"} {
			v.AddDisk(d, 2*mib)
			v.Write(d, 0, noise(uint64(i), 2*mib))
			key := name + string(d)
			v.OnRead(d, func(off int64, n int) error {
				mu.Lock()
				busy[key]++
				most = max(most, len(busy))
				mu.Unlock()
				time.Sleep(time.Millisecond)
				mu.Lock()
				defer mu.Unlock()
				if busy[key]--; busy[key] == 0 {
					delete(busy, key)
				}
				if i == 2 && d == "vdb" && off > 0 {
					return errors.New("the cable is out")
				}
				return nil
			})
		}
		if i == 4 {
			v.Fail(errors.New("no snapshot today"), nil)
		}
		jobs = append(jobs, backup.Job{Driver: w.host, Name: name, Source: name, Consistency: vm.Crash})
	}
	results := backup.Run(t.Context(), w.options(r), jobs)
	for i, res := range results {
		if res.VM != fmt.Sprintf("vm%d", i) {
			t.Errorf("result %d is of %s", i, res.VM)
		}
		switch i {
		case 2:
			if res.Err == nil || !strings.Contains(res.Err.Error(), "vm2: disk vdb: ") || !strings.Contains(res.Err.Error(), "the cable is out") {
				t.Errorf("vm2: %v", res.Err)
			}
		case 4:
			if res.Err == nil || !strings.Contains(res.Err.Error(), "no snapshot today") {
				t.Errorf("vm4: %v", res.Err)
			}
		default:
			if res.Err != nil {
				t.Error(res.Err)
			}
		}
	}
	points, err := r.Points(t.Context())
	if err != nil || len(points) != 4 {
		t.Errorf("%d points, %v; want 4", len(points), err)
	}
	// Nobody who failed is still taken for a writer.
	if _, err := r.Vacuum(t.Context(), repo.VacuumOptions{}); err != nil {
		t.Errorf("vacuum afterwards: %v", err)
	}
	if most > backup.DefaultDisks {
		t.Errorf("%d disks were read at once, want %d at most", most, backup.DefaultDisks)
	}
}

func TestVMsOfOneNameOnTwoHosts(t *testing.T) {
	w := memWorld(t, mib)
	other := fake.New("host2", w.clock.now)
	other.Add("web01").AddDisk("vda", mib)
	w.backUp()
	r := w.mustOpen()
	defer r.Close()
	j := w.job()
	j.Driver = other
	for range 2 {
		res := backup.Run(t.Context(), w.options(r), []backup.Job{j})[0]
		if res.Err != nil || res.VM != "web01@host2" || res.Point.VM != res.VM {
			t.Fatalf("%s, %v; want web01@host2", res.VM, res.Err)
		}
	}
	if res := w.backUp(); res.VM != "web01" {
		t.Errorf("the first is called %s now", res.VM)
	}
	// Under one name given by hand, one command refuses them.
	a, b := w.job(), j
	a.VM, b.VM = "both", "both"
	results := backup.Run(t.Context(), w.options(r), []backup.Job{a, b})
	if (results[0].Err == nil) == (results[1].Err == nil) {
		t.Errorf("%v and %v: want one refused", results[0].Err, results[1].Err)
	}
	for _, res := range results {
		if res.Err != nil && !errors.Is(res.Err, fault.ErrExists) {
			t.Error(res.Err)
		}
	}
}

func TestCancel(t *testing.T) {
	w := memWorld(t, 8*mib)
	w.vm.Write("vda", 0, noise(1, 8*mib))
	w.backUp()
	w.vm.Write("vda", 0, noise(2, 8*mib))
	ctx, cancel := context.WithCancel(t.Context())
	reads := 0
	var mu sync.Mutex
	w.vm.OnRead("vda", func(int64, int) error {
		mu.Lock()
		defer mu.Unlock()
		if reads++; reads == 5 {
			cancel()
		}
		return nil
	})
	res := w.try(ctx, w.store)
	if !errors.Is(res.Err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", res.Err)
	}
	w.wantClean(1)
	w.vm.OnRead("vda", nil)
	if refs := w.verify(w.store); len(refs) != 1 {
		t.Errorf("points %q", refs)
	}
	w.wantDisk(w.backUp(), point.Incremental, "")
	w.verify(w.store)
}

// The point is durable: what the host then does is no loss.
func TestHostFailsAfterTheOutcome(t *testing.T) {
	w := memWorld(t, mib)
	w.vm.Fail(nil, errors.New("libvirt went away"))
	res := w.backUp()
	if len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "libvirt went away") {
		t.Errorf("warnings %q", res.Warnings)
	}
	w.vm.Fail(nil, nil)
	w.backUp()
	if refs := w.verify(w.store); len(refs) != 2 {
		t.Errorf("points %q", refs)
	}
}

// A clock that went back must not make an older point the newest.
func TestClockGoesBack(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	first := w.backUp()
	back := func() {
		w.clock.mu.Lock()
		defer w.clock.mu.Unlock()
		w.clock.t = first.Point.Time.Add(-time.Hour)
	}
	before := first.Point
	for i := range 3 {
		back()
		w.vm.Write("vda", int64(i)*mib, noise(uint64(i)+2, grain))
		res := w.backUp()
		w.wantDisk(res, point.Incremental, "")
		if !res.Point.Time.After(before.Time) || len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "the clock is behind") {
			t.Errorf("%v after %v, warnings %q", res.Point.Time, before.Time, res.Warnings)
		}
		before = res.Point
	}
	w.clock.mu.Lock()
	w.clock.t = before.Time
	w.clock.mu.Unlock()
	if res := w.backUp(); len(res.Warnings) > 0 {
		t.Errorf("the clock is right again: %q", res.Warnings)
	}
	if refs := w.verify(w.store); len(refs) != 5 || refs[3] != before.Ref() {
		t.Errorf("order %q", refs)
	}
}

// The store is asked before the guest is touched.
func TestReadOnlyStoreCostsNoFreeze(t *testing.T) {
	w := memWorld(t, mib)
	st := blobtest.Faulty(w.store, func(c blobtest.Call) error {
		if c.Op.Mutates() {
			return fault.ErrReadOnly
		}
		return nil
	})
	w.vm.Fail(errors.New("the guest was touched"), nil)
	if res := w.try(t.Context(), st); !errors.Is(res.Err, fault.ErrReadOnly) {
		t.Errorf("%v, want fault.ErrReadOnly", res.Err)
	}
}

type countProgress struct {
	mu          sync.Mutex
	total, done int64
}

func (p *countProgress) Total(n int64) { p.mu.Lock(); p.total += n; p.mu.Unlock() }
func (p *countProgress) Add(n int64)   { p.mu.Lock(); p.done += n; p.mu.Unlock() }

func TestProgressAddsUp(t *testing.T) {
	w := memWorld(t, 4*mib+777)
	w.vm.AddDisk("vdb", 0)
	w.vm.Write("vda", mib, noise(1, mib))
	r := w.mustOpen()
	defer r.Close()
	for i := range 3 {
		var p countProgress
		o := w.options(r)
		o.Progress = &p
		if res := backup.Run(t.Context(), o, []backup.Job{w.job()})[0]; res.Err != nil {
			t.Fatal(res.Err)
		}
		if p.total != 4*mib+777 || p.done != p.total {
			t.Errorf("run %d: %d of %d done", i, p.done, p.total)
		}
		w.vm.Write("vda", int64(i)*mib+5, noise(2, grain))
	}
}
