package demo

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// need skips a test where the demo can't run, unless it must.
func need(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "not root"
	}
	for _, p := range []string{"go", "libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "apt-get", "/sbin/mke2fs"} {
		if _, err := exec.LookPath(p); err != nil {
			why = err.Error()
		}
	}
	switch {
	case testing.Short():
		t.Skip("boots a guest")
	case why == "":
	case os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1":
		t.Fatal("this test may not be skipped here: ", why)
	default:
		t.Skip(why)
	}
}

func backstay(t *testing.T) string {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "backstay")
	if out, err := exec.Command("go", "build", "-o", exe, "github.com/backstay/backstay/cmd/backstay").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return exe
}

// leftBehind lists processes whose command line names dir.
func leftBehind(t *testing.T, dir string) (found []string) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if text, err := os.ReadFile(l); err == nil && bytes.Contains(text, []byte(dir)) {
			found = append(found, l+": "+string(bytes.ReplaceAll(text, []byte{0}, []byte{' '})))
		}
	}
	return found
}

// The whole story ends well, in the directory it was given, and leaves nothing.
func TestDemo(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	dir := filepath.Join(t.TempDir(), "state")
	var out bytes.Buffer
	if err := Run(ctx, Options{Dir: dir, Out: &out, Backstay: backstay(t)}); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"vda: full", "vdb: incremental", "no VMs on this host", "WORKLOAD CHECK OK bytes 180355072"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the demo does not say %q", want)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
	if left := leftBehind(t, dir); len(left) > 0 {
		t.Errorf("still running: %q", left)
	}
}

// An interruption while the guest runs leaves nothing either.
func TestDemoInterrupted(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	dir := filepath.Join(t.TempDir(), "state")
	out := &cancelOn{word: "$ backstay backup", cancel: cancel}
	err := Run(ctx, Options{Dir: dir, Out: out, Backstay: backstay(t)})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("ended with %v\n%s", err, out.text)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
	if left := leftBehind(t, dir); len(left) > 0 {
		t.Errorf("still running: %q", left)
	}
}

// cancelOn calls cancel, soon, when it is told the word.
type cancelOn struct {
	word   string
	cancel context.CancelFunc
	once   sync.Once
	text   []byte
}

func (c *cancelOn) Write(p []byte) (int, error) {
	c.text = append(c.text, p...)
	if bytes.Contains(c.text, []byte(c.word)) {
		c.once.Do(func() { time.AfterFunc(time.Second, c.cancel) })
	}
	return len(p), nil
}

func TestQuoted(t *testing.T) {
	got := strings.Join(Quoted([]string{"plain", "kvm:///system?socket=/x", "it's", ""}), " ")
	if want := `plain 'kvm:///system?socket=/x' 'it'\''s' ''`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
