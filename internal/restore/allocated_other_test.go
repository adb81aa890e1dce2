//go:build !linux

package restore

import "testing"

// allocated can't be asked here.
func allocated(*testing.T, string) int64 { return 0 }
