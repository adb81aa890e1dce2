package imagetest

import (
	"os"
	"testing"
)

// MemoryDir is a directory of t in memory where the system has such, for
// fuzzers of writers: syncing to a disk would be all that they do.
func MemoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "backstay-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
