package host_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
)

const snapshots = "Msvm_VirtualSystemSnapshotService"

// A checkpoint that is applied takes the disks back, more than once, and what
// is expected of later moments follows.
func TestACheckpointIsApplied(t *testing.T) {
	const size = 4 * mib
	b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: size}}})
	write := func(off int64, seed uint64) {
		t.Helper()
		if err := b.h.Write("web01", 0, off, mib, seed); err != nil {
			t.Fatal(err)
		}
	}
	now := func() []byte { return b.read(b.files(settings(b.id))[0]) }
	write(0, 1)
	first := b.checkpoint("2")
	write(mib, 2)
	second := b.checkpoint("2")
	apply := func(cp cim.Ref) args { return args{"Snapshot": cim.To(cp)} }
	if _, code := b.call(snapshots, "ApplySnapshot", apply(second)); code != 32775 {
		t.Errorf("to a VM that runs: %d", code)
	}
	b.state(b.vm, "3", 7)
	if _, code := b.call(snapshots, "ApplySnapshot", apply(first)); code != 32770 {
		t.Errorf("an older one: %d", code)
	}
	for round := range uint64(2) {
		write(2*mib, 3+round)
		_, job := b.job(snapshots, "ApplySnapshot", apply(second))
		b.must(job)
		b.same("applied", now(), b.expected(0, second.Keys["InstanceID"], size))
		b.same("expected now", b.expected(0, "", size), b.expected(0, second.Keys["InstanceID"], size))
	}
	if got := one(b, b.related(b.vm, "Msvm_LastAppliedSnapshot", "Msvm_VirtualSystemSettingData")); !got.Ref().Equal(second) {
		t.Errorf("last applied: %s", got.Ref().Path())
	}
	write(3*mib, 9)
	b.same("written since", now(), b.expected(0, "", size))
	recent := b.checkpoint("32768")
	write(0, 10)
	b.same("a checkpoint of it", b.read(b.files(recent)[0]), b.expected(0, recent.Keys["InstanceID"], size))
	for _, cp := range []cim.Ref{recent, second, first} {
		_, job := b.job(snapshots, "DestroySnapshot", args{"AffectedSnapshot": cim.To(cp)})
		b.must(job)
		b.same("merged", now(), b.expected(0, "", size))
	}
	if left, _ := filepath.Glob(filepath.Join(b.h.Local(`C:\VMs\web01\Virtual Hard Disks`), "*.avhdx")); left != nil {
		t.Errorf("left behind: %v", left)
	}
}

// A tree goes with all that is based on its root, and nothing else.
func TestATreeOfCheckpointsIsDestroyed(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib}}})
	var chain []cim.Ref
	for n := range 3 {
		if err := b.h.Write("web01", 0, int64(n)*4096, 4096, uint64(n+1)); err != nil {
			t.Fatal(err)
		}
		chain = append(chain, b.checkpoint("2"))
	}
	_, job := b.job(snapshots, "ClearSnapshotState", args{"SnapshotSettingData": cim.To(chain[0])})
	b.must(job)
	_, job = b.job(snapshots, "DestroySnapshotTree", args{"SnapshotSettingData": cim.To(chain[1])})
	b.must(job)
	if left := one(b, b.related(b.vm, "Msvm_SnapshotOfVirtualSystem", "Msvm_VirtualSystemSettingData")); !left.Ref().Equal(chain[0]) {
		t.Errorf("left: %s", left.Ref().Path())
	}
	if got := b.instance(settings(b.id)).Get("Parent").String(); got != chain[0].Path() {
		t.Errorf("the VM is based on %q", got)
	}
	b.same("now", b.read(b.files(settings(b.id))[0]), b.expected(0, "", mib))
	b.same("the first", b.read(b.files(chain[0])[0]), b.expected(0, chain[0].Keys["InstanceID"], mib))
}

// Of a disk that is passed through and of a VHD set no checkpoint can be taken:
// who does not ask to leave them out gets none.
func TestDisksWithoutCheckpoints(t *testing.T) {
	for _, spec := range []host.Spec{
		{Disks: []host.DiskSpec{{Bytes: mib}}, PassThrough: 1},
		{Disks: []host.DiskSpec{{Bytes: mib}, {Bytes: mib, Set: true}}},
	} {
		b := newBench(t, host.Options{}, spec)
		create := func(ignore bool) int {
			s := cim.New(cim.Virtualization, "Msvm_VirtualSystemSnapshotSettingData").Put("IgnoreNonSnapshottableDisks", cim.Bool(ignore))
			made, _ := b.job(snapshots, "CreateSnapshot", args{"AffectedSystem": cim.To(b.vm), "SnapshotType": cim.Text("32768"), "SnapshotSettings": cim.Text(s.Embedded())})
			return len(made)
		}
		if create(false) != 0 || create(true) != 1 {
			t.Errorf("%+v: checkpoints where there are none, or none where there are", spec)
		}
		path := b.files(settings(b.id))[0]
		b.same(path, b.read(path), b.expected(0, "", mib))
	}
}

// A disk grows while its VM runs, and not while there are checkpoints.
func TestADiskGrows(t *testing.T) {
	for _, fixed := range []bool{false, true} {
		if testing.Short() && fixed {
			continue
		}
		b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib, Fixed: fixed}}})
		if err := b.h.Write("web01", 0, mib-4096, 4096, 1); err != nil {
			t.Fatal(err)
		}
		path := b.files(settings(b.id))[0]
		bigger := func(n int) args { return args{"Path": cim.Text(path), "MaxInternalSize": cim.Number(n)} }
		const images = "Msvm_ImageManagementService"
		cp := b.checkpoint("32768")
		if _, code := b.call(images, "ResizeVirtualHardDisk", bigger(40*mib)); code != 32775 {
			t.Errorf("with a checkpoint: %d", code)
		}
		b.job("Msvm_VirtualSystemSnapshotService", "DestroySnapshot", args{"AffectedSnapshot": cim.To(cp)})
		_, job := b.job(images, "ResizeVirtualHardDisk", bigger(40*mib))
		b.must(job)
		if job.Class.Name != "Msvm_StorageJob" {
			t.Errorf("the job is an %s", job.Class.Name)
		}
		if err := b.h.Write("web01", 0, 39*mib, mib, 2); err != nil {
			t.Fatal(err)
		}
		b.same("larger", b.read(path), b.expected(0, "", 40*mib))
		if _, job := b.job(images, "ResizeVirtualHardDisk", bigger(mib)); job.Get("JobState").Uint() != 10 {
			t.Error("it shrank")
		}
		if _, code := b.call(images, "ResizeVirtualHardDisk", args{"Path": cim.Text(path + "x"), "MaxInternalSize": cim.Number(mib)}); code != 32779 {
			t.Errorf("a file that is not there: %d", code)
		}
	}
}

// A VM may lie on a share of another server.
func TestAVMOnAShare(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{Root: `\\fs01\vms\web01`, Disks: []host.DiskSpec{{Bytes: mib}}})
	path := b.files(settings(b.id))[0]
	if !strings.HasPrefix(path, `\\fs01\vms\web01\`) || !strings.Contains(b.h.Local(path), "/UNC/fs01/vms/web01/") {
		t.Errorf("%s is %s", path, b.h.Local(path))
	}
	if err := b.h.Write("web01", 0, 0, 4096, 1); err != nil {
		t.Fatal(err)
	}
	cp := b.checkpoint("32768")
	b.same("its checkpoint", b.read(b.files(cp)[0]), b.expected(0, cp.Keys["InstanceID"], mib))
	if _, err := os.Stat(b.h.Local(`\\?\UNC\fs01\vms\web01\Virtual Machines\` + b.id + ".vmcx")); err != nil {
		t.Error(err)
	}
}
