package smb_test

import (
	"crypto/rand"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/winpath"
)

var _ image.File = (*smb.File)(nil)
var _ image.Output = (*smb.NewFile)(nil)

// fill writes each n-th MiB of w, beginning with MiB from.
func fill(t *testing.T, w image.Writer, size int64, from, n int64) {
	t.Helper()
	var wg sync.WaitGroup
	for g := range int64(3) {
		wg.Go(func() {
			p := make([]byte, 1<<20)
			for i := from + g*n; i<<20 < size; i += 3 * n {
				rand.Read(p)
				if _, err := w.WriteAt(p, i<<20); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// hosted opens the image at a Windows path through c, where the share is
// C:\VMs.
func hosted(t *testing.T, c *smb.Client, name string) image.Image {
	t.Helper()
	shares := smb.NewShares("hv1")
	if err := shares.Add(`C:\VMs=` + smbtest.Share); err != nil {
		t.Fatal(err)
	}
	find := func(p winpath.Path) (image.File, error) {
		at, err := shares.Find(p)
		if err != nil {
			return nil, err
		}
		f, err := c.Open(t.Context(), at, p.String())
		if err != nil {
			return nil, err
		}
		return f, nil
	}
	top, err := winpath.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := find(top)
	if err != nil {
		t.Fatal(err)
	}
	img, err := vhdx.Open(f, image.Parents(f, beside{find: find}, func(f image.File, _ image.Format, parent image.OpenParent) (image.Image, error) {
		return vhdx.Open(f, parent)
	}))
	if err != nil {
		f.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

// beside finds parents by the names that the files of a chain have on the host.
type beside struct {
	find  func(winpath.Path) (image.File, error)
	child string
}

func (b beside) From(child image.File) image.Resolver { return beside{b.find, child.Name()} }

func (b beside) Resolve(name string) (image.File, error) {
	p, err := winpath.Parse(name)
	if !winpath.Full(name) {
		if p, err = winpath.Parse(b.child); err == nil {
			p, err = p.Dir().Join(name)
		}
	}
	if err != nil {
		return nil, err
	}
	return b.find(p)
}

// local opens the same as the host would.
func local(t *testing.T, path, parents string) image.Image {
	t.Helper()
	img, err := open.Open(path, open.Options{ParentDir: parents})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

// A base and two layers over it, one of which names its parent by the host's
// own path, read through the share: while the host goes away and comes back.
func TestFrozenChain(t *testing.T) {
	long(t)
	s := server(t)
	const size = 18 << 20
	create := func(name string, o image.CreateOptions) (path string) {
		path = filepath.Join(s.Dir, name)
		os.Remove(path)
		o.VirtualBytes = size
		w, err := open.Create(path, image.VHDX, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(path) })
		fill(t, w, size, int64(len(name)%3), 3)
		return path
	}
	over := func(path, name string) image.CreateOptions {
		img, err := open.Open(path, open.Options{OnlyTop: true})
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		info := img.Info()
		return image.CreateOptions{Parent: name, ParentFormat: image.VHDX, ParentInfo: &info}
	}
	base := create("base.vhdx", image.CreateOptions{})
	one := create("one_1.avhdx", over(base, `C:\VMs\base.vhdx`))
	two := create("two.avhdx", over(one, `.\one_1.avhdx`))

	want := local(t, two, s.Dir)
	img := hosted(t, dial(t, target(s)), `C:\VMs\two.avhdx`)
	if size := img.Size(); size != want.Size() {
		t.Fatalf("%d bytes, want %d", size, want.Size())
	}
	if imagetest.Hash(t, img, img.Size()) != imagetest.Hash(t, want, want.Size()) {
		t.Error("other bytes than the local chain")
	}
	s.Kill()
	var wg sync.WaitGroup
	var got string
	wg.Go(func() { got = imagetest.Hash(t, img, img.Size()) })
	err := s.Run(t.Context())
	wg.Wait()
	if err != nil || got != imagetest.Hash(t, want, want.Size()) {
		t.Errorf("other bytes than the local chain: %v", err)
	}
}

// A log that Windows left dirty is replayed in memory, and the host's file
// stays as it is.
func TestDirtyLogOnAShare(t *testing.T) {
	long(t)
	s := server(t)
	sample, _ := imagetest.Sample(t, "discutils/vhdx-log-replay.vhdx.gz")
	p, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.Dir, "dirty.vhdx")
	if err := os.WriteFile(path, p, 0o444); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	img := hosted(t, dial(t, target(s)), `C:\VMs\dirty.vhdx`)
	if w := strings.Join(img.Info().Warnings, "; "); !strings.Contains(w, "dirty log") {
		t.Errorf("warnings %q", w)
	}
	// All that is data there, which without the replay is nothing.
	want := local(t, path, "")
	data := 0
	for e, err := range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == image.Data {
			data++
			if imagetest.Hash(t, io.NewSectionReader(img, e.Off, e.Len), e.Len) != imagetest.Hash(t, io.NewSectionReader(want, e.Off, e.Len), e.Len) {
				t.Errorf("%v has other bytes than the local file", e.Extent)
			}
		}
	}
	if data == 0 {
		t.Error("no data")
	}
	if now, err := os.ReadFile(path); err != nil || string(now) != string(p) {
		t.Errorf("the file on the host is another one now: %v", err)
	}
}

// A disk is made right on the share.
func TestDiskOnAShare(t *testing.T) {
	long(t)
	s := server(t)
	for _, variant := range []string{"dynamic", "fixed"} {
		t.Run(variant, func(t *testing.T) {
			path := filepath.Join(s.Dir, variant+".vhdx")
			os.Remove(path)
			t.Cleanup(func() { os.Remove(path) })
			f, err := dial(t, target(s)).Create(t.Context(), on(variant+".vhdx"))
			if err != nil {
				t.Fatal(err)
			}
			disk := imagetest.NewDisk(3, 8<<20+512)
			w, err := vhdx.NewWriter(f, image.CreateOptions{VirtualBytes: disk.Size(), Variant: variant})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			p := make([]byte, disk.Size())
			disk.ReadAt(p, 0)
			var wg sync.WaitGroup
			for off := 0; off < len(p); off += 1 << 20 {
				wg.Go(func() {
					if _, err := w.WriteAt(p[off:min(off+1<<20, len(p))], int64(off)); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			img := local(t, path, "")
			imagetest.Reader(t, img, disk)
			if v := img.Info().Variant; v != variant {
				t.Errorf("it became %s", v)
			}
			imagetest.Qemu(t, "check", "-f", "vhdx", path)
		})
	}
}
