package restore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// machine is a restore point of two disks and two files of definition.
func machine() (*fakeRepo, *point.RestorePoint) {
	r := &fakeRepo{disks: map[point.ManifestID]*fakeDisk{"m0": newDisk(4<<20, 0, 3), "m1": newDisk(3<<20, 1)}}
	p := &point.RestorePoint{ID: "20261122T031500Z-7f3a9c01", VM: "web/01", Disks: []point.Disk{
		{Disk: vm.Disk{ID: "vda", Format: "qcow2"}, Manifest: "m0"},
		{Disk: vm.Disk{ID: "data.vhdx", Format: "raw"}, Manifest: "m1"},
	}, Config: map[string]point.Blob{"domain.xml": r.blob("<domain/>"), "nvram": r.blob("vars")}}
	return r, p
}

func TestDirectoryHoldsTheWholePoint(t *testing.T) {
	for _, c := range []struct {
		name  string
		there bool
		o     Options
		want  string
	}{
		{"new", false, Options{}, "data.raw domain.xml nvram vda.qcow2"},
		{"empty", true, Options{}, "data.raw domain.xml nvram vda.qcow2"},
		{"one format for all", false, Options{Format: image.Raw}, "data.raw domain.xml nvram vda.raw"},
		{"images of several files", true, Options{Format: image.VMDK, Variant: "monolithicFlat"},
			"data-flat.vmdk data.vmdk domain.xml nvram vda-flat.vmdk vda.vmdk"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, p := machine()
			base := t.TempDir()
			target := filepath.Join(base, "out")
			if c.there {
				os.Mkdir(target, 0o700)
			}
			res, err := Directory(t.Context(), r, p, target+"/", c.o)
			if err != nil {
				t.Fatal(err)
			}
			if got := ls(t, target); got != c.want {
				t.Errorf("holds %q, want %q", got, c.want)
			}
			if got := ls(t, base); got != "out" {
				t.Errorf("left %q", got)
			}
			if len(res.Disks) != 2 || res.Disks[1].Disk != "data.vhdx" || len(res.Files) != 2 {
				t.Errorf("result %+v", res)
			}
			if _, err := os.Stat(res.Disks[0].Target); err != nil {
				t.Error(err)
			}
			if got, _ := os.ReadFile(filepath.Join(target, "nvram")); string(got) != "vars" {
				t.Errorf("nvram holds %q", got)
			}
			if c.o.Format != image.VMDK {
				if got, _ := os.ReadFile(res.Disks[1].Target); !bytes.Equal(got, r.disks["m1"].content) {
					t.Error("the raw disk has other bytes")
				}
			}
			// Once there, it is not overwritten but by force.
			if _, err := Directory(t.Context(), r, p, target, c.o); !errors.Is(err, fault.ErrExists) {
				t.Errorf("the second time: %v", err)
			}
			c.o.Force = true
			if _, err := Directory(t.Context(), r, p, target, c.o); err != nil {
				t.Errorf("by force: %v", err)
			}
			if got := ls(t, target); got != c.want {
				t.Errorf("by force it holds %q", got)
			}
		})
	}
}

func TestDirectoryIsWholeOrNotAtAll(t *testing.T) {
	for name, break_ := range map[string]func(*fakeRepo, *point.RestorePoint){
		"second disk corrupt": func(r *fakeRepo, _ *point.RestorePoint) { r.disks["m1"].corrupt = 1 },
		"second disk missing": func(r *fakeRepo, _ *point.RestorePoint) { delete(r.disks, "m1") },
		"file corrupt":        func(r *fakeRepo, p *point.RestorePoint) { delete(r.blobs, p.Config["nvram"].Chunks[0]) },
		"nothing in it":       func(_ *fakeRepo, p *point.RestorePoint) { p.Disks, p.Config = nil, nil },
	} {
		for _, there := range []bool{false, true} {
			r, p := machine()
			break_(r, p)
			base := t.TempDir()
			target := filepath.Join(base, "out")
			if there {
				os.Mkdir(target, 0o700)
			}
			if _, err := Directory(t.Context(), r, p, target, Options{}); err == nil {
				t.Errorf("%s: no error", name)
			}
			if there && ls(t, target) != "" || !there && ls(t, base) != "" {
				t.Errorf("%s: left %q", name, ls(t, base))
			}
		}
	}
}

func TestNamesFromAHypervisorStayInTheDirectory(t *testing.T) {
	taken := map[string]bool{}
	var got []string
	for _, id := range []vm.DiskID{"vda", "VDA", "../../etc/passwd", "..", "", "a.vhd", "a.vmdk", "a.vhdx", `C:\x`, "a\x00b"} {
		got = append(got, diskFile(id, image.Raw, taken))
	}
	want := []string{"vda.raw", "VDA-2.raw", "%2E.%2F..%2Fetc%2Fpasswd.raw", "%2E..raw", "unnamed.raw", "a.raw", "a.vmdk.raw", "a.vhdx.raw", "C%3A%5Cx.raw", "a%00b.raw"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestSelect(t *testing.T) {
	_, p := machine()
	for id, want := range map[string]vm.DiskID{"vda": "vda", "0": "vda", "1": "data.vhdx", "data.vhdx": "data.vhdx", "": "", "2": "", "vdb": ""} {
		if d, err := Select(p, id); d.ID != want || (err == nil) != (want != "") {
			t.Errorf("%q gave %q, %v", id, d.ID, err)
		}
	}
	p.Disks = p.Disks[:1]
	if d, err := Select(p, ""); err != nil || d.ID != "vda" {
		t.Errorf("the only disk: %v", err)
	}
}

// A fakeHost makes VMs in memory.
type fakeHost struct {
	dir   string
	taken bool
	fail  error
	made  *Definition
}

func (h *fakeHost) Exists(context.Context, string) (bool, error) { return h.taken, nil }
func (h *fakeHost) ImageDir(context.Context) (string, error)     { return h.dir, nil }
func (h *fakeHost) Define(_ context.Context, d Definition) (hypervisor.Built, error) {
	h.made = &d
	return hypervisor.Built{Name: d.Name}, h.fail
}

func TestVMOnAHost(t *testing.T) {
	r, p := machine()
	h := &fakeHost{dir: t.TempDir()}
	res, err := VM(t.Context(), r, p, h, VMOptions{Name: "new", Start: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := ls(t, h.dir); got != "new-data.raw new-vda.qcow2" {
		t.Errorf("images %q", got)
	}
	d := h.made
	if d == nil || d.Name != "new" || !d.Start || string(d.Config["domain.xml"]) != "<domain/>" ||
		d.Disks["vda"] != (DiskImage{filepath.Join(h.dir, "new-vda.qcow2"), image.Qcow2}) || res.Disks[0].Target != d.Disks["vda"].Path {
		t.Errorf("defined %+v", d)
	}
}

func TestVMThatCantBeMadeLeavesNoDisks(t *testing.T) {
	no := errors.New("no such network")
	for name, c := range map[string]struct {
		break_ func(*fakeRepo, *fakeHost)
		want   error
		left   string
	}{
		"define fails":  {func(_ *fakeRepo, h *fakeHost) { h.fail = no }, no, ""},
		"name is taken": {func(_ *fakeRepo, h *fakeHost) { h.taken = true }, fault.ErrExists, ""},
		"corrupt disk":  {func(r *fakeRepo, _ *fakeHost) { r.disks["m1"].corrupt = 1 }, fault.ErrCorrupt, ""},
		"a disk of that name": {func(_ *fakeRepo, h *fakeHost) { os.WriteFile(filepath.Join(h.dir, "new-data.raw"), nil, 0o600) },
			fault.ErrExists, "new-data.raw"},
	} {
		r, p := machine()
		h := &fakeHost{dir: t.TempDir()}
		c.break_(r, h)
		if _, err := VM(t.Context(), r, p, h, VMOptions{Name: "new"}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if got := ls(t, h.dir); got != c.left {
			t.Errorf("%s: left %q", name, got)
		}
	}
}
