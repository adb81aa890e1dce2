package lab

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// probeTime is long for a guest on hardware, which says hello after one
// second, and short for somebody who waits for the demo.
const probeTime = 8 * time.Second

// ProbeKVM starts a guest on /dev/kvm and reports whether it came to user
// space in time. A /dev/kvm that opens proves nothing: under some hypervisors
// the firmware runs, and then the kernel crawls or dies.
//
// A "no" is remembered next to the guest until the machine boots again.
func ProbeKVM(ctx context.Context, g *Guest) bool {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	kvm.Close()
	thisBoot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	memory := filepath.Join(filepath.Dir(g.Kernel), "no-kvm")
	if known, err := os.ReadFile(memory); err == nil && len(thisBoot) > 0 && bytes.Equal(known, thisBoot) {
		return false
	}
	works := probeKVM(ctx, g)
	if !works && ctx.Err() == nil {
		os.WriteFile(memory, thisBoot, 0o644)
	}
	return works
}

func probeKVM(ctx context.Context, g *Guest) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256", "-display", "none",
		"-nodefaults", "-no-user-config", "-no-reboot", "-serial", "stdio",
		"-kernel", g.Kernel, "-initrd", g.Initrd, "-append", quickBoot+" lab.probe")
	cmd.WaitDelay = time.Second
	serial, err := cmd.StdoutPipe()
	if err != nil {
		return false
	}
	// QEMU stops the guest after an internal error and waits for orders.
	cmd.Stderr = complaint(cancel)
	if cmd.Start() != nil {
		return false
	}
	said, _ := io.ReadAll(serial)
	cmd.Wait()
	return strings.Contains(string(said), "LAB probe good")
}

// A complaint calls itself when QEMU writes that KVM failed.
type complaint func()

func (c complaint) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("KVM internal error")) || bytes.Contains(p, []byte("failed to initialize kvm")) {
		c()
	}
	return len(p), nil
}
