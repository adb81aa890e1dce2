package open_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
)

func TestResolverStaysBeneath(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "images")
	for _, d := range []string{"images/sub", "images/..data"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"secret", "images/disk.vmdk", "images/sub/disk2.vmdk", "images/..data/odd"} {
		if err := os.WriteFile(filepath.Join(root, f), []byte(f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if runtime.GOOS != "windows" {
		for link, to := range map[string]string{
			"link": "../secret", "inner": "disk.vmdk", "linkdir": "..", "absolute": filepath.Join(root, "secret"), "proc": "/proc/self/root",
		} {
			if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}
		makeFifo(t, filepath.Join(dir, "fifo"))
		makeSpecial(t, filepath.Join(dir, "device"), filepath.Join(dir, "socket"))
	}
	const none = ""
	for _, c := range []struct {
		name                string
		plain, deep, byBase string // what each kind of resolver opens
	}{
		{"disk.vmdk", "images/disk.vmdk", "images/disk.vmdk", "images/disk.vmdk"},
		{"./disk.vmdk", none, "images/disk.vmdk", "images/disk.vmdk"},
		{`.\disk.vmdk`, none, "images/disk.vmdk", "images/disk.vmdk"},
		{"sub/disk2.vmdk", none, "images/sub/disk2.vmdk", "images/sub/disk2.vmdk"},
		{`sub\disk2.vmdk`, none, "images/sub/disk2.vmdk", "images/sub/disk2.vmdk"},
		{"sub/../disk.vmdk", none, "images/disk.vmdk", "images/disk.vmdk"},
		{"..data/odd", none, "images/..data/odd", "images/..data/odd"},
		{filepath.Join(dir, "disk.vmdk"), none, "images/disk.vmdk", "images/disk.vmdk"},
		{"../images/disk.vmdk", none, none, "images/disk.vmdk"},
		{"/vmfs/volumes/x/disk.vmdk", none, none, "images/disk.vmdk"},
		{`C:\vms\disk.vmdk`, none, none, "images/disk.vmdk"},
		{`\\server\share\disk.vmdk`, none, none, "images/disk.vmdk"},
		{"gone/disk.vmdk", none, none, "images/disk.vmdk"},
		{"../secret", none, none, none},
		{filepath.Join(root, "secret"), none, none, none},
		{"..", none, none, none},
		{".", none, none, none},
		{"", none, none, none},
		{"sub", none, none, none},
		{"disk.vmdk/", none, "images/disk.vmdk", "images/disk.vmdk"},
		{"disk.vmdk\x00.png", none, none, none},
		{"link", none, none, none},
		{"inner", none, none, none},
		{"absolute", none, none, none},
		{"linkdir/secret", none, none, none},
		{"linkdir/images/disk.vmdk", none, none, none},
		{"proc/etc/passwd", none, none, none},
		{"fifo", none, none, none},
		{"/dev/zero", none, none, none},
		{"/proc/self/fd/0", none, none, none},
		{`json:{"driver":"file","filename":"/etc/passwd"}`, none, none, none},
		{"nbd://host/disk", none, none, none},
		{`\\?\C:\vms\secret`, none, none, none},
		{`\\?\C:\vms\disk.vmdk`, none, none, "images/disk.vmdk"},
		{`\\.\PhysicalDrive0`, none, none, none},
		{`\\server\share\secret`, none, none, none},
		{`..\secret`, none, none, none},
		{`C:secret`, none, none, none},
		{"disk.vmdk:stream", none, none, none},
		{"disk.vmdk::$DATA", none, none, none},
		{"disk.vmdk/inside", none, none, none},
		{strings.Repeat("n", 300), none, none, none},
		{strings.Repeat("n/", 3000), none, none, none},
		{"device", none, none, none},
		{"socket", none, none, none},
	} {
		for i, want := range []string{c.plain, c.deep, c.byBase} {
			kind := open.DirResolver{Dir: dir, Plain: i == 0, ByBase: i == 2}
			start := time.Now()
			f, err := kind.Resolve(c.name)
			if time.Since(start) > time.Minute {
				t.Errorf("%q: it took %v", c.name, time.Since(start))
			}
			if err != nil {
				if want != none {
					t.Errorf("%+v: %q: %v", kind, c.name, err)
				}
				if !errors.Is(err, image.ErrNotAllowed) && !errors.Is(err, fault.ErrNotFound) {
					t.Errorf("%+v: %q: %v is neither refused nor missing", kind, c.name, err)
				}
				continue
			}
			p := make([]byte, f.Bytes())
			f.ReadAt(p, 0)
			f.Close()
			if string(p) != want {
				t.Errorf("%+v: %q opens %q, want %q", kind, c.name, p, want)
			}
		}
	}
}

// A name begins at the file that holds it, and ends beneath the directory all
// the same.
func TestNamesAreRelativeToTheirFile(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"vm/snaps/deep", "elsewhere"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"vm/base", "vm/snaps/base", "vm/snaps/one", "secret", "elsewhere/base"} {
		if err := os.WriteFile(filepath.Join(root, f), []byte(f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const none = ""
	for _, c := range []struct{ at, name, want, byBase string }{
		{"", "base", "vm/base", "vm/base"},
		{"vm", "base", "vm/base", "vm/base"},
		{"vm/snaps", "base", "vm/snaps/base", "vm/snaps/base"},
		{"vm/snaps", "../base", "vm/base", "vm/base"},
		{"vm/snaps", `..\base`, "vm/base", "vm/base"},
		{"vm/snaps/deep", "../one", "vm/snaps/one", "vm/snaps/one"},
		{"vm/snaps/deep", "one", none, none},
		{"vm/snaps", `D:\vms\one`, none, "vm/snaps/one"},
		{"vm/snaps/deep", `D:\vms\base`, none, "vm/base"},
		{"vm/snaps", "../../secret", none, none},
		{"vm/snaps", "../../elsewhere/base", none, "vm/snaps/base"},
		{"elsewhere", "base", "vm/base", "vm/base"}, // a directory that is not allowed is not where names begin
	} {
		for byBase, want := range map[bool]string{false: c.want, true: c.byBase} {
			kind := open.DirResolver{Dir: filepath.Join(root, "vm"), ByBase: byBase}
			if c.at != "" {
				kind.At = filepath.Join(root, c.at)
			}
			f, err := kind.Resolve(c.name)
			if err != nil {
				if want != none {
					t.Errorf("%+v: %q: %v", kind, c.name, err)
				}
				continue
			}
			p := make([]byte, f.Bytes())
			f.ReadAt(p, 0)
			f.Close()
			if string(p) != want {
				t.Errorf("%+v: %q opens %q, want %q", kind, c.name, p, want)
			}
		}
	}
}
