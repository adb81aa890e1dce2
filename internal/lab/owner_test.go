//go:build linux

package lab

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const ownerVariable = "BACKSTAY_LAB_TEST_OWNER"

// Where the variable names a directory, this process is the one that
// TestLabEndsWithItsOwner kills.
func TestMain(m *testing.M) {
	dir := os.Getenv(ownerVariable)
	if dir == "" {
		os.Exit(m.Run())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	err := func() error {
		g, err := Build(ctx, "", BuildOptions{})
		if err != nil {
			return err
		}
		l, err := StartLibvirt(ctx, dir, LibvirtOptions{})
		if err != nil {
			return err
		}
		vm, err := l.Define(ctx, g, VMOptions{Name: "orphan"})
		if err != nil {
			return err
		}
		return vm.Start(ctx)
	}()
	fmt.Println("owner:", err)
	select {}
}

// A lab whose process is killed without a word ends by itself.
func TestLabEndsWithItsOwner(t *testing.T) {
	need(t)
	dir := filepath.Join(t.TempDir(), "lab")
	owner := exec.Command(os.Args[0], "-test.run=^$")
	owner.Env = append(os.Environ(), ownerVariable+"="+dir)
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	running := processesOf(t, dir)
	owner.Process.Kill()
	owner.Wait()
	if line != "owner: <nil>\n" {
		t.Fatal(line)
	}
	if len(running) < 3 {
		t.Errorf("of keeper, libvirtd and QEMU only %q were running", running)
	}
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		left := processesOf(t, dir)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still running: %q", left)
		}
	}
}

// processesOf lists the processes whose command lines name dir, without the
// two that are this test.
func processesOf(t *testing.T, dir string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && bytes.Contains(text, []byte(dir)) {
			found = append(found, string(text[:min(len(text), 40)]))
		}
	}
	return found
}
