package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/smb/smbtest"
)

// The whole story ends well and leaves nothing.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	smbtest.Run(t, smbtest.Options{}) // or skips
	backstay, err := exec.LookPath("backstay")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "state")
	var out bytes.Buffer
	if err := runDemo(t.Context(), &out, backstay, dir); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"scsi0:0: full", "scsi0:1: incremental", "application", "VM web01-again", "== Done"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the demo does not say %q:\n%s", want, out.String())
		}
	}
	if n := strings.Count(out.String(), "| identical"); n != 4 {
		t.Errorf("%d disks were compared:\n%s", n, out.String())
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
}
