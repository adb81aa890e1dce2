package open_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
)

// Whatever an image names, nothing outside of the directory is opened, and the
// answer is a file, a refusal or that there is none.
func FuzzResolve(f *testing.F) {
	root := f.TempDir()
	dir := filepath.Join(root, "images")
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o700); err != nil {
		f.Fatal(err)
	}
	for _, name := range []string{"secret", "images/in", "images/sub/in"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(filepath.Base(name)), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	for link, to := range map[string]string{"link": "../secret", "up": "..", "root": "/"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			f.Skip(err)
		}
	}
	for _, name := range []string{
		"in", "sub/in", "../secret", `..\secret`, "link", "up/secret", "root/etc/passwd", filepath.Join(root, "secret"),
		`C:\x\in`, `\\host\share\in`, `\\?\C:\in`, "in\x00", "sub/../../secret", "/proc/self/root/etc/passwd", "file:///etc/passwd", "./././in", "",
	} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		for _, r := range []open.DirResolver{
			{Dir: dir}, {Dir: dir, Plain: true}, {Dir: dir, ByBase: true}, {Dir: dir, ByBase: true, At: filepath.Join(dir, "sub")}, {Dir: dir, At: root},
		} {
			file, err := r.Resolve(name)
			if err != nil {
				if !errors.Is(err, image.ErrNotAllowed) && !errors.Is(err, fault.ErrNotFound) {
					t.Errorf("%+v: %q: %v", r, name, err)
				}
				continue
			}
			p := make([]byte, 16)
			n, _ := file.ReadAt(p, 0)
			if string(p[:n]) != "in" || !strings.HasPrefix(file.Name(), dir) {
				t.Errorf("%+v: %q opens %s", r, name, file.Name())
			}
			file.Close()
		}
	})
}

// Whatever a file of no telling name holds, it is some format or refused, and
// then opens as that or not at all.
func FuzzDetect(f *testing.F) {
	dir := f.TempDir()
	for _, format := range open.Formats() {
		path := filepath.Join(dir, "seed."+string(format))
		w, err := open.Create(path, format, image.CreateOptions{VirtualBytes: 64 << 10})
		if err != nil {
			f.Fatal(err)
		}
		if err := w.Finish(); err != nil {
			f.Fatal(err)
		}
		p, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if len(p) > 16<<10 { // headers are what matters, and long inputs are slow to change
			p = p[:16<<10]
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		format, err := open.Detect(path)
		if err != nil {
			if !errors.Is(err, open.ErrFormat) {
				t.Errorf("Detect: %v", err)
			}
			return
		}
		img, err := open.Open(path, open.Options{ParentDir: filepath.Dir(path)})
		if err != nil {
			return
		}
		defer img.Close()
		if got := img.Info().Format; got != format {
			t.Errorf("detected as %s, opened as %s", format, got)
		}
	})
}
