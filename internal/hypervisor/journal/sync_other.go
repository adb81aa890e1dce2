//go:build !linux

package journal

// syncDir does nothing where directories can't be synced: there, the file
// system's own journal keeps renames in order.
func syncDir(string) error { return nil }
