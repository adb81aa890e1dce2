//go:build !linux

package imagetest

import "time"

// processorTime is what this process has used of processors; where that is not
// known, the time that has passed.
func processorTime() time.Duration { return time.Since(begun) }

var begun = time.Now()
