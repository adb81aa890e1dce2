//go:build linux

package lab

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// need skips a test where the lab can't run, unless it must.
func need(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "not root"
	}
	for _, p := range []string{"libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "apt-get", "/sbin/mke2fs"} {
		if _, err := exec.LookPath(p); err != nil {
			why = err.Error()
		}
	}
	switch {
	case testing.Short():
		t.Skip("boots a guest")
	case why == "":
	case os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1":
		t.Fatal("this test may not be skipped here: ", why)
	default:
		t.Skip(why)
	}
}

// startLab is a libvirt that ends with the test.
func startLab(t *testing.T, ctx context.Context) (*Libvirt, *Guest) {
	t.Helper()
	g, err := Build(ctx, "", BuildOptions{Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	l, err := StartLibvirt(ctx, t.TempDir(), LibvirtOptions{Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Stop(); err != nil {
			t.Error(err)
		}
	})
	return l, g
}

// The whole life of a guest: it boots, answers, is frozen and thawed, loses
// power, and finds its records sound; a copy taken while it was frozen is
// known as such.
func TestGuestLife(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	l, g := startLab(t, ctx)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err, l.VM("lab-life").SerialLog())
		}
	}
	disk := l.Path("vda.qcow2")
	must(g.CreateDisk(ctx, disk, DiskOptions{Bootable: true}))
	data := l.Path("vdb.raw")
	must(g.CreateDisk(ctx, data, DiskOptions{SizeBytes: 64 << 20, Label: DataLabel, FillBytes: 3<<20 + 5, Seed: 4}))
	vm, err := l.Define(ctx, g, VMOptions{Name: "lab-life", Disks: []VMDisk{{Path: disk}, {Path: data}}})
	must(err)
	start := time.Now()
	must(vm.Start(ctx))
	must(vm.WaitAgent(ctx))
	t.Logf("the agent answers after %v", time.Since(start))
	said, err := vm.Verify(ctx)
	must(err)
	if said != "WORKLOAD VERIFY OK new records 0" {
		t.Errorf("a new disk is %q", said)
	}
	said, err = vm.AgentExec(ctx, "/bin/workload", "check", "-dir", "/data2/fill")
	must(err)
	if want := "WORKLOAD CHECK OK bytes 3145733\n"; said != want {
		t.Errorf("the second disk is %q, not %q", said, want)
	}
	must(writes(ctx, vm))

	must(vm.Freeze(ctx))
	frozen, err := vm.Frozen(ctx)
	must(err)
	if !frozen {
		t.Error("not frozen after Freeze")
	}
	must(exec.Command("cp", disk, l.Path("frozen.qcow2")).Run())
	must(vm.Thaw(ctx))
	if frozen, err = vm.Frozen(ctx); frozen || err != nil {
		t.Error("frozen after Thaw", err)
	}
	if log := vm.SerialLog(); !strings.Contains(log, "LAB hook freeze: still") || !strings.Contains(log, "LAB hook thaw: writing") {
		t.Errorf("the hook did not run: %s", log)
	}
	must(l.Restart(ctx))
	must(writes(ctx, vm))

	at := len(vm.SerialLog())
	must(vm.Kill(ctx))
	must(vm.Start(ctx))
	must(vm.WaitSerial(ctx, at, "WORKLOAD VERIFY OK crash-consistent"))
	must(vm.WaitAgent(ctx))
	must(vm.Shutdown(ctx))

	// From the disk alone this time, as a restored VM would.
	copied, err := l.Define(ctx, g, VMOptions{Name: "lab-copy", FromDisk: true, NoAgent: true, Disks: []VMDisk{{Path: l.Path("frozen.qcow2")}}})
	must(err)
	must(copied.Start(ctx))
	must(copied.WaitSerial(ctx, 0, "WORKLOAD VERIFY OK app-consistent"))
	must(copied.WaitSerial(ctx, 0, "LAB ready: boot 2, agent 0, hook 1"))
}

// writes waits until the guest has written records that were not there before.
func writes(ctx context.Context, v *VM) error {
	before, err := v.Shell(ctx, "wc -c </data/wl/log")
	for after := before; err == nil && after == before; {
		if err = sleep(ctx, 100*time.Millisecond); err == nil {
			after, err = v.Shell(ctx, "wc -c </data/wl/log")
		}
	}
	return err
}

// Whatever /dev/kvm is here, the answer comes in time, and a "yes" was proved.
func TestProbeKVMEnds(t *testing.T) {
	need(t)
	g, err := Build(t.Context(), "", BuildOptions{Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	works := ProbeKVM(t.Context(), g)
	t.Logf("KVM works: %v, known after %v", works, time.Since(start))
	if took := time.Since(start); took > probeTime+2*time.Minute { // a busy machine ends a guest late
		t.Errorf("took %v", took)
	}
	if _, err := os.Stat("/dev/kvm"); err != nil && works {
		t.Error("KVM works without /dev/kvm")
	}
}
