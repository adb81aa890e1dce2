package imagetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Libvhdi is the disk that libvhdi reads from the VHD or VHDX at path and its
// parents beside it. t skips where nobody may mount what libvhdi shows.
func Libvhdi(t testing.TB, path string) *os.File {
	t.Helper()
	tool := Tool(t, "vhdimount")
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		Skip(t, "vhdimount needs FUSE: %v", err)
	} else {
		f.Close()
	}
	dir := t.TempDir()
	if out, err := exec.Command(tool, path, dir).CombinedOutput(); err != nil {
		t.Fatalf("vhdimount %s: %v\n%s", path, err, out)
	}
	t.Cleanup(func() {
		for range 3000 {
			if exec.Command("umount", dir).Run() == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Errorf("%s is still mounted", dir)
	})
	list, err := os.ReadDir(dir)
	if err != nil || len(list) == 0 {
		t.Fatalf("vhdimount shows no disk: %v", err)
	}
	// The base is vhdi1, and the disk itself comes last.
	f, err := os.Open(filepath.Join(dir, fmt.Sprintf("vhdi%d", len(list))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
