package smb_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/backstay/backstay/internal/fault"
)

func TestFullVolume(t *testing.T) {
	long(t)
	s := server(t)
	dir := filepath.Join(s.Dir, "full")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatal(err)
		}
		t.Skipf("no tmpfs can be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c := dial(t, target(s))
	if err := c.Room(t.Context(), on("full"), 5<<20); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("room: %v", err)
	}
	f, err := c.Create(t.Context(), on(`full\disk.vhdx`))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(make([]byte, 8<<20), 0)
	if err == nil {
		err = f.Sync()
	}
	if !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("write: %v", err)
	}
	if err := errors.Join(f.Close(), c.Remove(t.Context(), on(`full\disk.vhdx`))); err != nil {
		t.Error(err)
	}
}
