package images_test

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/images"
)

// loop makes a block device.
func loop(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("losetup", "-f", "--show", newFile(t, "disk", 1<<20)).CombinedOutput()
	if err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatalf("losetup: %v: %s", err, out)
		}
		t.Skipf("no loop devices here: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", dev).Run() })
	return dev
}

// Nothing tells who writes to a block device, so the most is done that can be.
func TestBlockDevice(t *testing.T) {
	dev := loop(t)
	d := images.New("web01", []images.File{{ID: "disk", Path: dev}}, openRaw)
	claim := func() error {
		f, err := os.OpenFile(dev, os.O_RDONLY|os.O_EXCL, 0)
		if err == nil {
			t.Cleanup(func() { f.Close() })
		}
		return err
	}
	s := begin(t, d, hypervisor.Options{})
	if w := s.Warnings(); len(w) != 1 || !strings.Contains(w[0], dev+" is a block device") {
		t.Errorf("warnings %q", w)
	}
	if err := claim(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("claimed while it is read: %v", err)
	}
	s.Abort(t.Context())
	if err := claim(); err != nil {
		t.Fatalf("still held afterwards: %v", err)
	}
	if _, err := d.Begin(t.Context(), "web01", hypervisor.Options{}); !errors.Is(err, fault.ErrLocked) || !strings.Contains(err.Error(), dev) {
		t.Errorf("%v: want fault.ErrLocked with the device", err)
	}
}
