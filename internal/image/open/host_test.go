package open_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/winpath"
)

// A host keeps files by their lower-case Windows path in local ones.
type host map[string]string

// hosted is a file of a host, which knows what it is.
type hosted struct {
	image.File
	name, id string
}

func (h hosted) Name() string     { return h.name }
func (h hosted) Identity() string { return h.id }

func (h host) open(name string) (image.File, error) {
	local, ok := h[strings.ToLower(name)]
	if !ok {
		return nil, fmt.Errorf("%s: %w", name, fault.ErrNotFound)
	}
	f, err := image.OpenFile(local)
	if err != nil {
		return nil, err
	}
	return hosted{noStat{f}, name, local}, nil
}

// noStat hides that the file is a local one.
type noStat struct{ image.File }

// resolver allows what lies beneath dirs.
func (h host) resolver(t *testing.T, dirs ...string) open.HostResolver {
	t.Helper()
	r := open.HostResolver{Open: func(p winpath.Path) (image.File, error) { return h.open(p.String()) }}
	for _, dir := range dirs {
		p, err := winpath.Parse(dir)
		if err != nil {
			t.Fatal(err)
		}
		r.Dirs = append(r.Dirs, p)
	}
	return r
}

func (h host) image(t *testing.T, name string, dirs ...string) (image.Image, error) {
	t.Helper()
	f, err := h.open(name)
	if err != nil {
		t.Fatal(err)
	}
	img, err := open.Hosted(f, h.resolver(t, dirs...))
	if err != nil {
		f.Close()
		return nil, err
	}
	t.Cleanup(func() { img.Close() })
	return img, nil
}

func TestHostedChain(t *testing.T) {
	for _, f := range []image.Format{image.VHDX, image.VHD} {
		t.Run(string(f), func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name+"."+string(f)) }
			disk := makeImage(t, at("base"), f, image.CreateOptions{})
			ext := "." + string(f)
			makeChild(t, at("one"), at("base"), `C:\Gold\base`+ext)
			makeChild(t, at("two"), at("one"), `.\one.a`+ext[1:])
			h := host{
				`c:\gold\base` + ext:            at("base"),
				`c:\vm\web01\one.a` + ext[1:]:   at("one"),
				`c:\vm\web01\two.a` + ext[1:]:   at("two"),
				`c:\other\base` + ext:           at("base"),
				`\\hv1\c$\gold\elsewhere` + ext: at("base"),
			}
			top := `C:\VM\web01\two.a` + ext[1:]
			img, err := h.image(t, top, `C:\vm\web01`, `c:\gold`)
			if err != nil {
				t.Fatal(err)
			}
			imagetest.Reader(t, img, disk)

			if _, err := h.image(t, top, `C:\VM`); !errors.Is(err, image.ErrNotAllowed) {
				t.Errorf("a parent outside: %v", err)
			}
			delete(h, `c:\gold\base`+ext)
			_, err = h.image(t, top, `C:\VM`, `C:\Gold`)
			if !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), `C:\Gold\base`) || strings.Contains(err.Error(), "\n") {
				t.Errorf("a parent that is missing: %v", err)
			}
			// What lies there now is another disk.
			makeImage(t, at("wrong"), f, image.CreateOptions{})
			h[`c:\gold\base`+ext] = at("wrong")
			if _, err = h.image(t, top, `C:\VM`, `C:\Gold`); !errors.Is(err, fault.ErrCorrupt) {
				t.Errorf("a parent of another identity: %v", err)
			}
		})
	}
}

// A chain that comes back to a file it has is found by what the file is, under
// whatever name.
func TestHostedLoop(t *testing.T) {
	dir := t.TempDir()
	base, child := filepath.Join(dir, "base.vhdx"), filepath.Join(dir, "child.vhdx")
	makeImage(t, base, image.VHDX, image.CreateOptions{})
	makeChild(t, child, base, `C:\vm\a.vhdx`)
	h := host{`c:\vm\child.vhdx`: child, `c:\vm\a.vhdx`: child}
	_, err := h.image(t, `C:\vm\child.vhdx`, `C:\vm`)
	if !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "in the chain already") {
		t.Error(err)
	}
}

func TestHostResolverRefuses(t *testing.T) {
	h := host{`c:\vm\web01\base.vhdx`: os.DevNull}
	r := h.resolver(t, `C:\vm\web01`)
	from := r.From(hosted{name: `C:\vm\web01\disk.vhdx`})
	for _, name := range []string{
		``, `..\base.vhdx`, `..\..\Windows\system.vhdx`, `..\..\..\base.vhdx`, `C:\vm\web010\base.vhdx`, `D:\vm\web01\base.vhdx`, `C:\vm\web01`,
		`C:\vm\web01\..\base.vhdx`, `C:base.vhdx`, `\vm\web01\base.vhdx`, `\\other\c$\vm\web01\base.vhdx`, `\\.\PhysicalDrive0`, `base.vhdx:stream`,
		`NUL`, `.\CON.vhdx`, `json:{}`, "base.vhdx\x00", `/etc/passwd`, `\\?\GLOBALROOT\Device\x`,
	} {
		if f, err := from.Resolve(name); !errors.Is(err, image.ErrNotAllowed) {
			t.Errorf("%q: %v, %v", name, f, err)
		}
	}
	if _, err := r.Resolve(`base.vhdx`); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("a relative name in no file: %v", err)
	}
	if _, err := r.From(hosted{name: "/tmp/disk.vhdx"}).Resolve(`base.vhdx`); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("a relative name in a file of no path: %v", err)
	}
}

func TestHostedByName(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.vhdx")
	makeImage(t, disk, image.VHDX, image.CreateOptions{})
	h := host{`c:\vm\disk.vhds`: disk, `c:\vm\disk.raw`: disk, `c:\vm\disk`: disk, `c:\vm\disk.vhd`: disk}
	for name, class := range map[string]error{
		`C:\vm\disk.vhds`: fault.ErrUnsupported, `C:\vm\disk.raw`: open.ErrFormat, `C:\vm\disk`: open.ErrFormat, `C:\vm\disk.vhd`: fault.ErrCorrupt,
	} {
		if _, err := h.image(t, name, `C:\vm`); !errors.Is(err, class) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
