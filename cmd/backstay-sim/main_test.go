package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backstay/backstay/internal/cli"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// Both programs are this one, under their names.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"backstay":     func() { os.Exit(cli.Main(os.Args[1:])) },
		"backstay-sim": main,
	})
}

// simulated starts backstay-sim hyperv as a process, until the test ends, and
// says how to name its host, with the directory in which all lies.
func simulated(t *testing.T, flags ...string) (source, dir string) {
	t.Helper()
	dir = t.TempDir()
	password := filepath.Join(dir, "pw")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("backstay-sim", append([]string{"hyperv", "--dir", filepath.Join(dir, "hv"), "--user", "backup", "--password-file", password}, flags...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("backstay-sim: %v", err)
		}
	})
	var told struct{ URL, Fingerprint string }
	if err := json.NewDecoder(out).Decode(&told); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(told.URL)
	if err != nil {
		t.Fatal(err)
	}
	return "hyperv://backup@" + u.Host + "/NAME?fingerprint=sha256:" + told.Fingerprint, dir
}

// What the flags promise goes wrong for the program that people use, which says
// so or goes on.
func TestTroubleThroughBothPrograms(t *testing.T) {
	for _, c := range []struct {
		trouble []string
		vm      string // or the host alone
		fails   bool
		says    string
	}{
		{[]string{"fail-job=CreateSnapshot"}, "/web01", true, "a writer of the guest failed"},
		{[]string{"html=3"}, "", true, "hint: what answers there is not WinRM"},
		{[]string{"401=2", "drop=4"}, "", false, "requests with their answers"},
	} {
		t.Run(strings.Join(c.trouble, ","), func(t *testing.T) {
			if testing.Short() && !c.fails {
				t.Skip("waits before it tries again")
			}
			flags := []string{"--vm", "web01=8M"}
			for _, x := range c.trouble {
				flags = append(flags, "--trouble", x)
			}
			source, dir := simulated(t, flags...)
			args := []string{"hyperv", "record", "--out", filepath.Join(dir, "out"), strings.Replace(source, "/NAME", c.vm, 1), "--state-dir", filepath.Join(dir, "state"), "--host-password-file", filepath.Join(dir, "pw")}
			if c.vm != "" {
				args = append(args, "--cycle")
			}
			out, err := exec.Command("backstay", args...).CombinedOutput()
			if (err != nil) != c.fails || !strings.Contains(string(out), c.says) {
				t.Errorf("%v: %s", err, out)
			}
			// Also one that ended early is kept, and says so.
			text, err := os.ReadFile(filepath.Join(dir, "out"))
			if early := strings.Contains(string(text), `"failed":true`); err != nil || early != c.fails {
				t.Errorf("the recording says that it failed: %v, %v", early, err)
			}
		})
	}
}

func TestTroublesThatAreNone(t *testing.T) {
	for text, want := range map[string]string{
		"sickness": "there is no trouble", "drop=0": "not positive", "drop=x": "invalid", "expired=1": "takes no value", "fail-job": "needs a value",
		"fail-job=": "needs a value", "refuse=X": "trouble refuse", "refuse=:1": "names no method", "slow-jobs=5": "missing unit", "small-envelope=100": "not between", "short-answers=-1": "not positive",
	} {
		if _, _, err := parseTroubles([]string{"drop", text}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

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
