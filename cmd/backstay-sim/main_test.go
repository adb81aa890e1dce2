package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/sim/hyperv/host"
)

// The command says where it answers, makes the disks, and ends when it is told
// to.
func TestHyperVCommand(t *testing.T) {
	dir := t.TempDir()
	password := filepath.Join(dir, "pw")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, in := io.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	c := hypervCommand()
	c.SetArgs([]string{"--dir", filepath.Join(dir, "hv"), "--password-file", password, "--vm", "web01=8M", "--guest-writes", "50"})
	c.SetOut(in)
	var talk bytes.Buffer
	c.SetErr(&talk)
	ended := make(chan error, 1)
	go func() { ended <- c.ExecuteContext(ctx) }()
	var told struct{ URL, Fingerprint string }
	if err := json.NewDecoder(out).Decode(&told); err != nil {
		t.Fatal(err)
	}
	if told.URL == "" || len(told.Fingerprint) != 64 {
		t.Errorf("%+v", told)
	}
	if disks, _ := filepath.Glob(filepath.Join(dir, "hv", "C", "VMs", "web01", "*", "*.vhdx")); len(disks) != 1 {
		t.Errorf("disks %v", disks)
	}
	stop()
	if err := <-ended; err != nil || talk.Len() > 0 {
		t.Errorf("%v %s", err, talk.String())
	}
}

func TestSizesOfDisks(t *testing.T) {
	for _, test := range []struct {
		text string
		want []host.DiskSpec // nil if it is refused
	}{
		{"a=512", []host.DiskSpec{{Bytes: 512}}},
		{"a=1K,2M,3G,4T", []host.DiskSpec{{Bytes: 1 << 10}, {Bytes: 2 << 20}, {Bytes: 3 << 30}, {Bytes: 4 << 40}}},
		{"a=64T", []host.DiskSpec{{Bytes: 64 << 40}}},
		{"a=65T", nil},
		{"a=", nil},
		{"a=0", nil},
		{"a=-1G", nil},
		{"a=M", nil},
		{"a=9223372036854775807T", nil},
		{"=1G", nil},
		{"a", nil},
	} {
		s, err := parseVM(test.text)
		if (err != nil) != (test.want == nil) {
			t.Errorf("%q: %v", test.text, err)
			continue
		}
		for n, d := range test.want {
			if s.Disks[n] != d {
				t.Errorf("%q: disk %d is %+v", test.text, n, s.Disks[n])
			}
		}
	}
}
