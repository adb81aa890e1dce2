//go:build linux && amd64

package kvm

import (
	"context"
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/lab"
	"github.com/backstay/backstay/internal/vm"
)

// What happens to a VM between two backups and in the middle of one. Each test
// is a row of the table in docs/design/kvm.md.

const (
	incremental = "vda incremental, vdb incremental, "
	rawAgain    = "vdc compared (" + reasonRaw + ")"
)

func TestQEMUKilled(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	// A bitmap that was never saved is gone with its QEMU,
	z := h.backup(repoA, nil, hypervisor.Options{})
	h.ok(h.web.Kill(h.ctx))
	h.up()
	a := h.backup(repoA, z, hypervisor.Options{})
	missing := "full (change tracking was lost: the bitmap is missing from the disk), "
	h.wantModes(a, "vda "+missing+"vdb "+missing+rawAgain)
	h.wantClean(a.checkpoint())
	// and one that was saved says that it missed something.
	h.ok(h.web.Destroy(h.ctx))
	h.ok(h.web.Start(h.ctx))
	h.ok(h.web.Kill(h.ctx))
	h.up()
	b := h.backup(repoA, a, hypervisor.Options{})
	broken := "full (change tracking was lost: the bitmap is inconsistent, because QEMU or the host went down), "
	h.wantModes(b, "vda "+broken+"vdb "+broken+rawAgain)
	h.wantClean(b.checkpoint()) // the broken bitmaps are gone, too
	h.write("vdb", 4096, 100, 3)
	h.wantModes(h.backup(repoA, b, hypervisor.Options{}), incremental+rawAgain)
}

func TestNewDiskAndDiskTakenAway(t *testing.T) {
	h := newHost(t)
	h.up() // plugging needs the guest's help
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.image("new.qcow2", "-f", "qcow2", "-o", "compat=1.1")
	h.ok(h.web.AttachDisk(h.ctx, lab.VMDisk{Path: h.lab.Path("new.qcow2"), Target: "vdd"}))
	b := h.backup(repoA, a, hypervisor.Options{})
	h.wantModes(b, incremental+rawAgain+", vdd full (new disk)")
	c := h.backup(repoA, b, hypervisor.Options{})
	h.wantModes(c, incremental+rawAgain+", vdd incremental")
	h.ok(h.web.DetachDisk(h.ctx, "vdd"))
	h.wait("vdd to go", func() bool {
		text, err := h.web.DomainXML(h.ctx)
		return err == nil && !strings.Contains(text, "new.qcow2")
	})
	d := h.backup(repoA, c, hypervisor.Options{})
	h.wantModes(d, incremental+rawAgain)
	h.wantClean(d.checkpoint())

	// A target's name may come back with another disk behind it.
	h.image("other.qcow2", "-f", "qcow2", "-o", "compat=0.10")
	h.ok(h.web.AttachDisk(h.ctx, lab.VMDisk{Path: h.lab.Path("other.qcow2"), Target: "vdd"}))
	e := h.backup(repoA, c, hypervisor.Options{})
	if !strings.HasSuffix(e.modes(), ", vdd compared ("+reasonOldQcow2+")") {
		t.Errorf("another image of version 2 was read as %s", e.modes())
	}
	h.ok(h.web.DetachDisk(h.ctx, "vdd"))
	h.wait("vdd to go", func() bool {
		text, err := h.web.DomainXML(h.ctx)
		return err == nil && !strings.Contains(text, "other.qcow2")
	})
}

func TestDiskResized(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	was := a.ids["vdb"].SizeBytes
	now := was + 16<<20
	_, err := h.lab.Virsh(h.ctx, "blockresize", "web01", h.lab.Path("vdb.qcow2"), strconv.FormatInt(now, 10)+"B")
	h.ok(err)
	b, err := h.begin(h.Driver, repoA, a, hypervisor.Options{})
	h.ok(err)
	h.wantModes(b, incremental+rawAgain)
	for _, k := range b.Disks() {
		if k.Info().ID != "vdb" {
			continue
		}
		tail := extent.Extent{Off: was, Len: now - was}
		changed, err := k.Changed(h.ctx, tail)
		h.ok(err)
		if k.Info().SizeBytes != now || !changed.Contains(tail) {
			t.Errorf("size %d, changed in the tail %v", k.Info().SizeBytes, changed.List())
		}
	}
	h.read(b, a)
	h.ok(b.Commit(h.ctx))
}

func TestShutOff(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.write("vdb", 2<<20, 4096, 4)
	h.ok(h.web.Shutdown(h.ctx))
	b, err := h.begin(h.Driver, repoA, a, hypervisor.Options{Consistency: vm.RequireApplication})
	h.ok(err)
	h.wantModes(b, incremental+rawAgain)
	if b.Grade() != vm.GradeApplication || b.Machine().State != "shut off" || b.FrozenFor() != 0 {
		t.Errorf("grade %s of a VM in state %s", b.Grade(), b.Machine().State)
	}
	if err := h.web.Start(h.ctx); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("the VM started while its disks were read: %v", err)
	}
	h.read(b, a)
	h.ok(b.Commit(h.ctx))
	if b.ids["vdb"].ChangeID != a.ids["vdb"].ChangeID {
		t.Error("the checkpoint is not the base any more, though there is no other")
	}
	h.wantClean(a.checkpoint())

	h.up()
	h.write("vdb", 3<<20, 4096, 5)
	c := h.backup(repoA, b, hypervisor.Options{})
	h.wantModes(c, incremental+rawAgain)
	h.wantClean(c.checkpoint())

	h.ok(h.web.Destroy(h.ctx))
	if _, err := h.begin(h.Driver, repoA, c, hypervisor.Options{Consistency: vm.RequireApplication}); !errors.Is(err, fault.ErrConsistency) {
		t.Errorf("a VM whose plug was pulled is application-consistent: %v", err)
	}
	d, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication})
	h.ok(err)
	if d.Grade() != vm.GradeCrash || len(d.Warnings()) != 1 {
		t.Errorf("grade %s, warnings %q", d.Grade(), d.Warnings())
	}
	h.read(d, nil)
	h.ok(d.Abort(h.ctx))
	h.wantClean(c.checkpoint())
}

// The bitmaps of a chain are in several images, which only a running QEMU puts
// together.
func TestExternalSnapshotAndBlockCommit(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.write("vdb", 1<<20, 4096, 6)
	_, err := h.lab.Virsh(h.ctx, "snapshot-create-as", "web01", "--disk-only", "--no-metadata", "--atomic",
		"--diskspec", "vda,snapshot=no", "--diskspec", "vdc,snapshot=no",
		"--diskspec", "vdb,snapshot=external,file="+h.lab.Path("overlay.qcow2"))
	h.ok(err)
	h.write("vdb", 6<<20, 4096, 7)
	b := h.backup(repoA, a, hypervisor.Options{})
	h.wantModes(b, incremental+rawAgain)

	h.write("vdb", 7<<20, 4096, 8)
	c := h.backup(repoA, b, hypervisor.Options{})
	h.wantModes(c, incremental+rawAgain)
	_, err = h.lab.Virsh(h.ctx, "blockcommit", "web01", "vdb", "--active", "--pivot", "--wait")
	h.ok(err)
	h.write("vdb", 8<<20, 4096, 9)
	d := h.backup(repoA, c, hypervisor.Options{})
	h.wantModes(d, incremental+rawAgain)
	h.wantClean(d.checkpoint())
}

func TestLibvirtRestartedInTheMiddle(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	b, err := h.begin(h.Driver, repoA, a, hypervisor.Options{})
	h.ok(err)
	h.ok(h.lab.Restart(h.ctx))
	h.read(b, a)
	h.ok(b.Commit(h.ctx))
	h.wantClean(b.checkpoint())
	c, err := h.begin(h.Driver, repoA, b, hypervisor.Options{})
	h.ok(err)
	h.wantModes(c, incremental+rawAgain)
	h.ok(h.lab.Restart(h.ctx))
	h.ok(c.Abort(h.ctx))
	h.wantClean(b.checkpoint())
}

func TestVMDestroyedInTheMiddle(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	for name, pull := range map[string]func(context.Context) error{"destroyed": h.web.Destroy, "killed": h.web.Kill} {
		b, err := h.begin(h.Driver, repoA, a, hypervisor.Options{})
		h.ok(err)
		h.ok(pull(h.ctx))
		if _, err := b.Disks()[0].ReadAt(make([]byte, 4096), 0); err == nil || !strings.Contains(err.Error(), "went down while it was read") {
			t.Errorf("%s: reading gives %v", name, err)
		}
		h.ok(b.Abort(h.ctx))
		h.wantClean(a.checkpoint())
		h.up()
		c := h.backup(repoA, a, hypervisor.Options{})
		if name == "destroyed" {
			h.wantModes(c, incremental+rawAgain)
		}
		h.wantClean(c.checkpoint())
		a = c
	}
}

func TestSecondBackupIsRefusedQuickly(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{})
	h.ok(err)
	for name, d := range map[string]*Driver{"of ours": h.Driver, "of another state directory": h.open(t.TempDir())} {
		start := time.Now()
		_, err := h.begin(d, repoB, nil, hypervisor.Options{})
		if !errors.Is(err, fault.ErrLocked) || time.Since(start) > 2*time.Minute {
			t.Errorf("a second backup %s: %v after %v", name, err, time.Since(start))
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	h.read(a, nil)
	h.ok(a.Commit(h.ctx))
	h.wantClean(a.checkpoint())
}

func TestTwoRepositories(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.write("vdb", 1<<20, 4096, 10)
	b := h.backup(repoB, nil, hypervisor.Options{})
	h.wantModes(b, "vda full (first backup), vdb full (first backup), vdc full (first backup)")
	h.write("vdb", 2<<20, 4096, 11)
	a2 := h.backup(repoA, a, hypervisor.Options{})
	h.wantModes(a2, incremental+rawAgain)
	h.write("vdb", 3<<20, 4096, 12)
	b2 := h.backup(repoB, b, hypervisor.Options{})
	h.wantModes(b2, incremental+rawAgain)
	h.wantClean(a2.checkpoint(), b2.checkpoint())
	mixed := h.backup(repoA, b2, hypervisor.Options{})
	if !strings.Contains(mixed.modes(), "vdb full (change tracking was lost: the previous checkpoint is another repository's)") {
		t.Errorf("a checkpoint of another repository was used: %s", mixed.modes())
	}
}

// libvirt forgot a checkpoint and its bitmap stayed: it is an orphan that
// would stand in the user's way.
func TestCheckpointForgotten(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	_, err := h.lab.Virsh(h.ctx, "checkpoint-delete", "web01", a.checkpoint(), "--metadata")
	h.ok(err)
	gone := "full (change tracking was lost: libvirt no longer has the checkpoint), "
	b := h.backup(repoA, a, hypervisor.Options{})
	h.wantModes(b, "vda "+gone+"vdb "+gone+rawAgain)
	h.wantClean(b.checkpoint())

	// The reverse: the bitmap of one disk is gone, the checkpoint is not.
	nodes, err := h.dom().nodes(h.ctx)
	h.ok(err)
	for _, n := range nodes {
		if _, ok := n.bitmap(b.checkpoint()); ok && strings.HasSuffix(n.File, "vdb.qcow2") {
			h.ok(h.dom().monitor(h.ctx, "block-dirty-bitmap-remove", map[string]any{"node": n.Name, "name": b.checkpoint()}, nil))
		}
	}
	c := h.backup(repoA, b, hypervisor.Options{})
	h.wantModes(c, "vda incremental, vdb full (change tracking was lost: the bitmap is missing from the disk), "+rawAgain)
	h.wantClean(c.checkpoint())
	h.ok(h.ResetTracking(h.ctx, "web01", repoA))
	h.wantClean()
}

// A client that does not read lets scratch space grow. The session is given
// up before that hurts anybody.
func TestScratchLimit(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	h.write("vdb", 0, 16<<20, 13)
	a, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{ScratchLimit: 2 << 20})
	h.ok(err)
	h.write("vdb", 0, 16<<20, 14)
	h.wait("the limit to be noticed", func() bool {
		_, err = a.Disks()[1].ReadAt(make([]byte, 4096), 0)
		return err != nil
	})
	if !errors.Is(err, fault.ErrNoSpace) || !strings.Contains(err.Error(), "limit of 2097152") {
		t.Errorf("reading gives %v", err)
	}
	h.write("vdb", 0, 4096, 15)
	h.ok(a.Abort(h.ctx))
	h.wantClean()
}

// A disk that only the definition makes read-only is read, and not tracked.
func TestReadOnlyDisk(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	h.image("ro.qcow2", "-f", "qcow2")
	_, err := h.lab.Virsh(h.ctx, "attach-disk", "web01", h.lab.Path("ro.qcow2"), "vdd", "--targetbus", "virtio", "--driver", "qemu",
		"--subdriver", "qcow2", "--mode", "readonly", "--live")
	h.ok(err)
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.wantModes(a, "vda full (first backup), vdb full (first backup), vdc full (first backup), vdd full (first backup)")
	h.wantModes(h.backup(repoA, a, hypervisor.Options{}), incremental+rawAgain+", vdd compared ("+reasonReadOnly+")")
	_, err = h.lab.Virsh(h.ctx, "detach-disk", "web01", "vdd", "--live")
	h.ok(err)
	h.wait("vdd to go", func() bool {
		text, err := h.web.DomainXML(h.ctx)
		return err == nil && !strings.Contains(text, "ro.qcow2")
	})
}

func TestExcludedDisk(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{Exclude: []vm.DiskID{"vda", "vdc"}})
	h.wantModes(a, "vdb full (first backup)")
	if m := a.Machine(); len(m.Disks) != 3 || m.Disks[0].Excluded != "excluded by request" || m.Disks[1].Excluded != "" {
		t.Errorf("disks %+v", m.Disks)
	}
	h.wantModes(h.backup(repoA, a, hypervisor.Options{}), "vda full (new disk), vdb incremental, vdc full (new disk)")
}

// When no disk is left that can track, the last checkpoint goes, too.
func TestNothingTracksAnyMore(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.wantClean(a.checkpoint())
	raw := hypervisor.Options{Exclude: []vm.DiskID{"vda", "vdb"}}
	b, err := h.begin(h.Driver, repoA, a, raw)
	h.ok(err)
	h.ok(b.Abort(h.ctx))
	h.wantClean(a.checkpoint())
	h.wantModes(h.backup(repoA, a, raw), rawAgain)
	h.wantClean()
}

func TestNothingThere(t *testing.T) {
	h := newHost(t)
	if _, err := h.Begin(h.ctx, "no such VM", hypervisor.Options{RepoID: repoA}); !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), `"no such VM"`) {
		t.Errorf("a VM that does not exist: %v", err)
	}
	uri, _, err := ParseSource("kvm:///system?socket=" + h.lab.Path("nobody-listens"))
	h.ok(err)
	if _, err := Open(h.ctx, Options{URI: uri}); !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), "libvirt is not running") {
		t.Errorf("no libvirt: %v", err)
	}
	machines, err := h.Machines(h.ctx)
	h.ok(err)
	for _, m := range machines {
		if m.Name == "web01" && len(m.Disks) == 3 && m.Disks[0].SizeBytes == 256<<20 && m.Disks[2].Format == "raw" {
			return
		}
	}
	t.Errorf("machines %+v", machines)
}

// image makes an empty 8 MiB image in the lab.
func (h *host) image(name string, args ...string) {
	h.Helper()
	create := append([]string{"create", "-q"}, append(args, h.lab.Path(name), "8M")...)
	if out, err := exec.Command("qemu-img", create...).CombinedOutput(); err != nil {
		h.Fatalf("%v: %s", err, out)
	}
}

func (h *host) wait(what string, is func() bool) {
	h.Helper()
	for !is() {
		select {
		case <-h.ctx.Done():
			h.Fatalf("waited in vain for %s", what)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
