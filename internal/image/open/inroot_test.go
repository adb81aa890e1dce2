package open

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// What stands in for openat2 on old kernels and other systems refuses the same.
func TestOpenInRootFollowsNoLinks(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("links need a privilege there")
	}
	root := t.TempDir()
	dir := filepath.Join(root, "images")
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"secret", "images/disk", "images/sub/disk"} {
		if err := os.WriteFile(filepath.Join(root, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"link": "../secret", "inner": "disk", "subdir": "sub"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for rel, want := range map[string]error{
		"disk": nil, "sub/disk": nil, "link": errEscapes, "inner": errEscapes, "subdir/disk": errEscapes, "sub": errEscapes, "gone": fs.ErrNotExist,
	} {
		for name, f := range map[string]func(dir, rel string) (*os.File, error){"root": openInRoot, "beneath": openBeneath} {
			file, err := f(dir, rel)
			if !errors.Is(err, want) {
				t.Errorf("%s: %s gives %v, want %v", name, rel, err, want)
			}
			if err == nil {
				file.Close()
			}
		}
	}
}
