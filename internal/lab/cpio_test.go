package lab

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The kernel reads what cpio reads: names, modes, links and every byte, with
// lengths that are and are not a multiple of four.
func TestWriteCPIO(t *testing.T) {
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
			t.Fatal("this test may not be skipped here: ", err)
		}
		t.Skip(err)
	}
	tree, out := t.TempDir(), t.TempDir()
	for name, data := range map[string]string{"empty": "", "a/three": "abc", "a/four": "abcd", "a/b/init": strings.Repeat("x", 5001)} {
		file := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(data), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a/three", filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := writeCPIO(&archive, tree); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(cpio, "-i", "-d", "--quiet")
	cmd.Dir, cmd.Stdin = out, &archive
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	if said, err := exec.Command("diff", "-r", tree, out).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, said)
	}
	info, err := os.Stat(filepath.Join(out, "a/b/init"))
	if err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("a/b/init: %v, %v", info, err)
	}
}
