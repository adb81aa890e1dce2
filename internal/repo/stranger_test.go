package repo

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/secret"
)

// Whoever asks how it is used is told, with nothing installed and nothing set.
func TestTheStrangersHelp(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatal(err)
		}
		t.Skip("python3 is not installed")
	}
	for args, want := range map[string]string{"--help": "lists restore points", "": "lists restore points", "a b": "lists restore points", "nothere": "BACKSTAY_PASSWORD"} {
		cmd := exec.Command(python, append([]string{"-S", "../../docs/format/restore.py"}, strings.Fields(args)...)...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
		out, err := cmd.CombinedOutput()
		if (err == nil) != (args == "--help") || !strings.Contains(string(out), want) || strings.Contains(string(out), "Traceback") {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
}

// A reader that was written from docs/format in another language restores what
// we stored, through a differential and without our index.
func TestAStrangerRestores(t *testing.T) {
	// Debian's own Python has Debian's packages, whichever comes first in PATH.
	python := "/usr/bin/python3"
	if _, err := os.Stat(python); err != nil {
		python = "python3"
	}
	for _, probe := range [][]string{{python, "-c", "import sys; sys.argv = ['', '']; sys.path.insert(0, '../../docs/format'); import restore"}, {"zstd", "--version"}} {
		if out, err := exec.Command(probe[0], probe[1:]...).CombinedOutput(); err != nil {
			if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
				t.Fatalf("%s: %v: %s", probe[0], err, out)
			}
			t.Skipf("%s does not work here: %v", strings.Join(probe, " "), err)
		}
	}
	dir := filepath.Join(t.TempDir(), "repo")
	st, err := file.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	mustInit(t, st)
	r := mustOpen(t, st)
	// Five pages, so that a change of one is a differential.
	a := make([]byte, (4*manifest.Positions+2)*testChunk+999)
	for _, at := range []int64{0, 1030, 2050, 3080} {
		copy(a[at*testChunk:], text(uint64(at), 3000))
	}
	copy(a[int64(len(a))-999:], noise(5, 999))
	b := bytes.Clone(a)
	copy(b[1030*testChunk+5:], noise(6, 100))
	p := mustBackup(t, r, "web01", a, nil, nil)
	q := mustBackup(t, r, "web01", b, p, a)
	d, err := r.OpenDisk(bg, q.Disks[0].Manifest)
	if err != nil || d.base == nil {
		t.Fatalf("no differential: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "idx")); err != nil {
		t.Fatal(err)
	}
	restores := func(ref string, want []byte) {
		t.Helper()
		out := filepath.Join(t.TempDir(), "disk.raw")
		cmd := exec.Command(python, "../../docs/format/restore.py", dir, ref, "vda", out)
		cmd.Env = append(os.Environ(), "BACKSTAY_PASSWORD="+string(password.Reveal()))
		if msg, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, msg)
		}
		got, err := os.ReadFile(out)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: what came back differs: %v", ref, err)
		}
	}
	restores(p.Ref(), a)
	restores(q.Ref(), b)

	// A recovery key as people type it, instead of the passphrase.
	code := secret.NewRecovery()
	mustAdd(t, mustRing(t, st, testKey), NewKey{Recovery: code, KDF: cheap})
	cmd := exec.Command(python, "../../docs/format/restore.py", dir)
	cmd.Env = append(os.Environ(), "BACKSTAY_PASSWORD="+strings.ToLower(secret.PrintRecovery(code)))
	if msg, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(msg), q.Ref()) {
		t.Errorf("with a recovery key: %v: %s", err, msg)
	}

	// What was damaged and stored again is found where it lies now.
	packs, err := filepath.Glob(filepath.Join(dir, "data/*/*"))
	if err != nil || len(packs) == 0 {
		t.Fatalf("%q, %v", packs, err)
	}
	for _, pack := range packs {
		b, err := os.ReadFile(pack)
		if err == nil {
			b[64+100] ^= 1
			err = os.WriteFile(pack, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Check(bg, CheckOptions{Scrub: true}); err != nil {
		t.Fatal(err)
	}
	mustBackup(t, r, "web02", a, nil, nil)
	restores(p.Ref(), a)
}
