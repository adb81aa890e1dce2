package restore

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

func TestOnAFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m"); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatalf("mounting a small file system: %v", err)
		}
		t.Skipf("mounting a small file system: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	src := newDisk(8<<20, 1, 2, 3, 4, 5, 6, 7, 8)
	unknown := func(string) (int64, bool) { return 0, false }
	for name, o := range map[string]Options{
		"known before":     {Format: image.Raw},
		"found out later":  {Format: image.Raw, free: unknown},
		"qcow2":            {Format: image.Qcow2, free: unknown},
		"vhdx":             {Format: image.VHDX, free: unknown},
		"vmdk":             {Format: image.VMDK, free: unknown},
		"vhd":              {Format: image.VHD, free: unknown},
		"streamOptimized":  {Format: image.VMDK, Variant: "streamOptimized"},
		"compressed qcow2": {Format: image.Qcow2, Compression: "zstd"},
	} {
		_, err := Disk(t.Context(), "vda", src, filepath.Join(dir, "disk"), o)
		if !errors.Is(err, fault.ErrNoSpace) {
			t.Errorf("%s: %v", name, err)
		}
		if name == "known before" && !strings.Contains(err.Error(), "needs 4194304 bytes") {
			t.Errorf("%v does not say what is needed", err)
		}
		if ls(t, dir) != "" {
			t.Errorf("%s: left %q", name, ls(t, dir))
		}
	}
	// There is room for a little one, and holes take none.
	little := newDisk(128<<20, 3, 255)
	if _, err := Disk(t.Context(), "vda", little, filepath.Join(dir, "disk.raw"), Options{}); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "disk.raw")); !bytes.Equal(got, little.content) {
		t.Error("other bytes")
	}
}
