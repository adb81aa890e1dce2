//go:build !linux

package cli

// letOthersGoFirst does nothing here: the system's own scheduler decides.
func letOthersGoFirst() {}
