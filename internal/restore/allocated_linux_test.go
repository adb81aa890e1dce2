package restore

import (
	"os"
	"syscall"
	"testing"
)

// allocated is the room in bytes that the file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}
