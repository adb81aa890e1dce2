package fake_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/drivertest"
	"github.com/backstay/backstay/internal/hypervisor/fake"
	"github.com/backstay/backstay/internal/vm"
)

func TestConformance(t *testing.T) {
	drivertest.Run(t, func(t *testing.T) drivertest.Subject {
		h := fake.New("host1", time.Now)
		v := h.Add("web01")
		v.AddDisk("vda", 4<<20+12345)
		return drivertest.Subject{
			Driver: h, Name: "web01", Disk: "vda", Tracks: true,
			Write:        func(off int64, data []byte) { v.Write("vda", off, data) },
			LoseTracking: v.Crash,
		}
	})
}

func TestLyingTracking(t *testing.T) {
	h := fake.New("host1", time.Now)
	v := h.Add("web01")
	v.AddDisk("vda", 1<<20)
	s, err := h.Begin(t.Context(), "web01", hypervisor.Options{RepoID: "r", Consistency: vm.Crash})
	if err != nil {
		t.Fatal(err)
	}
	prev := map[vm.DiskID]hypervisor.PreviousDisk{"vda": {SizeBytes: 1 << 20, ChangeID: s.Disks()[0].ChangeID()}}
	if err := s.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.Lie("vda", extent.Extent{Off: 0, Len: 128 << 10})
	v.Write("vda", 0, []byte("hidden"))
	v.Write("vda", 512<<10, []byte("seen"))
	s, err = h.Begin(t.Context(), "web01", hypervisor.Options{RepoID: "r", Consistency: vm.Crash, Previous: prev})
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Disks()[0].Changed(t.Context(), extent.Extent{Len: 1 << 20})
	if err != nil || len(got.List()) != 1 || got.List()[0].Off != 512<<10 {
		t.Errorf("changed: %v, %v", got.List(), err)
	}
}

func TestGrades(t *testing.T) {
	for _, c := range []struct {
		reach vm.Grade
		ask   vm.Consistency
		want  vm.Grade
		warn  bool
	}{
		{vm.GradeApplication, vm.RequireApplication, vm.GradeApplication, false},
		{vm.GradeFilesystem, vm.RequireApplication, "", false},
		{vm.GradeFilesystem, vm.PreferApplication, vm.GradeFilesystem, true},
		{vm.GradeCrash, vm.Filesystem, "", false},
		{vm.GradeApplication, vm.Crash, vm.GradeCrash, false},
	} {
		h := fake.New("host1", time.Now)
		h.Add("web01").Reach(c.reach)
		s, err := h.Begin(t.Context(), "web01", hypervisor.Options{Consistency: c.ask})
		if c.want == "" {
			if !errors.Is(err, fault.ErrConsistency) {
				t.Errorf("%s of %s: %v", c.ask, c.reach, err)
			}
			continue
		}
		if err != nil || s.Grade() != c.want || (len(s.Warnings()) > 0) != c.warn {
			t.Errorf("%s of %s: %v %v", c.ask, c.reach, s, err)
		}
	}
}

func TestDiscardAndResize(t *testing.T) {
	h := fake.New("host1", time.Now)
	v := h.Add("web01")
	v.AddDisk("vda", 300<<10)
	v.Write("vda", 0, bytes.Repeat([]byte{7}, 300<<10))
	v.Discard("vda", extent.Extent{Off: 100, Len: 200 << 10})
	v.Resize("vda", 250<<10)
	v.Resize("vda", 400<<10)
	p := v.Contents("vda")
	want := make([]byte, 400<<10)
	for i := range want {
		if i < 100 || i >= 100+200<<10 && i < 250<<10 {
			want[i] = 7
		}
	}
	if !bytes.Equal(p, want) {
		t.Error("other bytes")
	}
}
