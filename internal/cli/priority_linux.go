package cli

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	laterNice = 10 // of 19: it gets a tenth of a processor that others want, and all of an idle one
	// laterIO is the last of the eight levels of best effort, as
	// linux/ioprio.h packs class and level.
	laterIO = 2<<13 | 7
)

// letOthersGoFirst lowers the priority of this process, for work that nobody
// waits for. In Linux it belongs to threads, and a new one has that of the
// thread that made it: so it goes through them until none is new.
func letOthersGoFirst() {
	done := map[int]bool{}
	for again := true; again; {
		again = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return // it is a courtesy
		}
		for _, t := range tasks {
			id, err := strconv.Atoi(t.Name())
			if err != nil || done[id] {
				continue
			}
			done[id], again = true, true
			if was, err := unix.Getpriority(unix.PRIO_PROCESS, id); err != nil || 20-was >= laterNice {
				continue // the call gives 20 less the niceness
			}
			_ = unix.Setpriority(unix.PRIO_PROCESS, id, laterNice)
			_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, 1, uintptr(id), laterIO) // 1: a thread
		}
	}
}
