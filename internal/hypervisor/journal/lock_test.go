package journal

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// The second one is told who has it, and gets it when the first is done.
func TestLockIsOneRuns(t *testing.T) {
	dir := t.TempDir()
	first, _, err := TryLock(dir, "vm-1", ", cleaning up")
	if err != nil || first == nil {
		t.Fatalf("first: %v, %v", first, err)
	}
	second, who, err := TryLock(dir, "vm-1", "")
	if err != nil || second != nil {
		t.Fatalf("second: %v, %v", second, err)
	}
	if !strings.Contains(who, strconv.Itoa(os.Getpid())) || !strings.HasSuffix(who, ", cleaning up") {
		t.Errorf("it is held by %q", who)
	}
	other, _, err := TryLock(dir, "vm-2", "")
	if err != nil || other == nil {
		t.Fatalf("another machine: %v, %v", other, err)
	}
	other.Unlock()
	first.Unlock()
	if second, _, err = TryLock(dir, "vm-1", ""); err != nil || second == nil {
		t.Fatalf("after the first: %v, %v", second, err)
	}
	second.Unlock()
	second.Unlock()
}
