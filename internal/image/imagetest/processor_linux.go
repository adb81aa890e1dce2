package imagetest

import (
	"syscall"
	"time"
)

// processorTime is what this process has used of processors; where that is not
// known, the time that has passed.
func processorTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return time.Since(begun)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

var begun = time.Now()
