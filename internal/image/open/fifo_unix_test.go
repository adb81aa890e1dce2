//go:build unix

package open_test

import (
	"net"
	"syscall"
	"testing"
)

// makeSpecial makes a device, if we may, and a socket.
func makeSpecial(t *testing.T, device, socket string) {
	if err := syscall.Mknod(device, syscall.S_IFCHR|0o600, 1<<8|5); err != nil { // /dev/zero
		t.Logf("no device to try: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Logf("no socket to try: %v", err)
		return
	}
	t.Cleanup(func() { l.Close() })
}

func makeFifo(t *testing.T, path string) {
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
}
