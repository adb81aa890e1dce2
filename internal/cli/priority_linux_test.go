package cli

import (
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// All threads step back, those that come later too. It happens in a process of
// its own: nobody may take it back without privileges.
func TestLetOthersGoFirst(t *testing.T) {
	const child = "BACKSTAY_TEST_PRIORITY"
	if os.Getenv(child) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestLetOthersGoFirst$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	letOthersGoFirst()
	var wg, all sync.WaitGroup
	all.Add(8)
	for range 8 {
		wg.Go(func() {
			runtime.LockOSThread() // and is not unlocked: each has one of its own
			all.Done()
			all.Wait()
			was, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
			if err != nil || 20-was < laterNice {
				t.Errorf("a thread has niceness %d, %v; want %d", 20-was, err, laterNice)
			}
		})
	}
	wg.Wait()
}
