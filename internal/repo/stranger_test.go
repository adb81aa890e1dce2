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

// python is the interpreter that can run the other reader; without one the test
// is skipped.
func python(t *testing.T) string {
	t.Helper()
	// Debian's own Python has Debian's packages, whichever comes first in PATH.
	python := "/usr/bin/python3"
	if _, err := os.Stat(python); err != nil {
		python = "python3"
	}
	probe := exec.Command(python, "-c", "import sys; sys.argv = ['', '']; sys.path.insert(0, '../../docs/format'); import restore")
	probe.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	if out, err := probe.CombinedOutput(); err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatalf("%s: %v: %s", python, err, out)
		}
		t.Skipf("%s does not work here: %v", python, err)
	}
	return python
}

// A reader that was written from docs/format in another language restores what
// we stored: disks of 64 MiB, through differentials and overlays, without our
// index, and with packs that lost their ends or were stored again.
func TestAStrangerRestores(t *testing.T) {
	python := python(t)
	dir := filepath.Join(t.TempDir(), "repo")
	st, err := file.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	mustInit(t, st)
	r := mustOpen(t, st)
	// 64 MiB of data on seven pages, so that a change of one is a differential.
	groups := int64(64 << 20 / (8 * testChunk))
	if testing.Short() {
		groups /= 8
	}
	apart := 6 * manifest.Positions / groups
	a := make([]byte, (6*manifest.Positions+2)*testChunk+999)
	for k := range groups {
		at := a[k*apart*testChunk:]
		copy(at, text(uint64(k), 3*testChunk))
		copy(at[3*testChunk:], noise(uint64(k), 5*testChunk))
	}
	copy(a[int64(len(a))-999:], noise(5, 999))
	b, at := bytes.Clone(a), 3*apart
	copy(b[at*testChunk+5:], "a change of a chunk of text")                     // the difference of a block
	copy(b[(at+5)*testChunk+9000:], noise(6, 3*block))                          // blocks anew
	copy(b[(at+4)*testChunk+testChunk-10:], "over the edge of chunks of noise") // two overlays
	copy(b[(at+6)*testChunk:], noise(7, testChunk))                             // a new chunk
	c := bytes.Clone(b)
	copy(c[(at+5)*testChunk+5:], "on the same base")
	copy(c[int64(len(c))-5:], "short")
	p := mustBackup(t, r, "web01", a, nil, nil)
	q := mustBackup(t, r, "web01", b, p, a)
	u := mustBackup(t, r, "web01", c, q, b)
	d, err := r.OpenDisk(bg, q.Disks[0].Manifest)
	if err != nil || d.base == nil {
		t.Fatalf("no differential: %v", err)
	}
	records, _ := packed(t, st)
	if n, _ := overlays(records); n != 4 {
		t.Fatalf("%d overlays", n)
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
		os.Remove(out)
	}
	restores(p.Ref(), a)
	restores(u.Ref(), c)

	// A recovery key as people type it, instead of the passphrase.
	code := secret.NewRecovery()
	mustAdd(t, mustRing(t, st, testKey), NewKey{Recovery: code, KDF: cheap})
	cmd := exec.Command(python, "../../docs/format/restore.py", dir)
	cmd.Env = append(os.Environ(), "BACKSTAY_PASSWORD="+strings.ToLower(secret.PrintRecovery(code)))
	if msg, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(msg), q.Ref()) {
		t.Errorf("with a recovery key: %v: %s", err, msg)
	}

	// Every pack loses a record and one its end. What was stored again is found
	// where it lies now, and an overlay whose base is gone has all it needs.
	packs, err := filepath.Glob(filepath.Join(dir, "data/*/*"))
	if err != nil || len(packs) == 0 {
		t.Fatalf("%q, %v", packs, err)
	}
	lost := refs(t, r, q)[at+5].base
	for i, pack := range packs {
		b, err := os.ReadFile(pack)
		if err == nil {
			b[64+100] ^= 1
			if at := bytes.Index(b, lost[:]); at >= 0 {
				b[at+60] ^= 1
			}
			if i == 0 {
				b = b[:len(b)-1]
			}
			err = os.WriteFile(pack, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, st)
	mustBackup(t, r, "web01", c, u, nil)
	restores(u.Ref(), c)
}
