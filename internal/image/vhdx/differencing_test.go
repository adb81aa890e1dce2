package vhdx

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// chain writes a parent and a layer over it into dir, and gives what the top
// of the chain must read as. The layer has whole blocks of fill and of data.
func chain(t testing.TB, dir string, size int64, fill byte, parent, child image.CreateOptions) (top string, want []byte) {
	t.Helper()
	disk := imagetest.NewDisk(1, size)
	base := filepath.Join(dir, "base.vhdx")
	write(t, base, disk, parent)
	b, err := openPath(base)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	want = make([]byte, b.Size())
	disk.ReadAt(want, 0)
	info := b.Info()
	child.VirtualBytes, child.Parent, child.ParentInfo = b.Size(), "base.vhdx", &info
	top = filepath.Join(dir, "top.vhdx")
	w, err := Create(top, child)
	if err != nil {
		t.Fatal(err)
	}
	unit := w.Unit()
	r := rand.New(rand.NewPCG(1, 2))
	sectors := size / unit
	written := map[int64]bool{} // a writer takes each byte once
	put := func(s int64, fill byte) {
		if s >= sectors || written[s] {
			return
		}
		written[s] = true
		p := want[s*unit : (s+1)*unit]
		for i := range p {
			p[i] = fill
		}
		if _, err := w.WriteAt(p, s*unit); err != nil {
			t.Fatal(err)
		}
	}
	whole := int64(2<<20) / unit
	for s := whole; s < 2*whole; s++ {
		put(s, fill)
		put(s+whole, 0xee)
	}
	for range 200 {
		from, fill := r.Int64N(sectors), byte(r.IntN(3))
		for s := from; s < from+1+r.Int64N(40); s++ {
			put(s, fill)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return top, want
}

func TestLayerOverAParent(t *testing.T) {
	for _, c := range []struct {
		name          string
		size          int64
		parent, child image.CreateOptions
	}{
		{"over dynamic", 9<<20 + 4096, image.CreateOptions{}, image.CreateOptions{}},
		{"over fixed", 9 << 20, image.CreateOptions{Variant: "fixed"}, image.CreateOptions{}},
		{"larger blocks than the parent's", 9 << 20, image.CreateOptions{BlockBytes: 1 << 20}, image.CreateOptions{BlockBytes: 32 << 20}},
		{"smaller blocks than the parent's", 9 << 20, image.CreateOptions{BlockBytes: 32 << 20}, image.CreateOptions{BlockBytes: 1 << 20}},
		{"4 KiB sectors", 9 << 20, image.CreateOptions{SectorBytes: 4096}, image.CreateOptions{}},
		{"4 KiB sectors, over a chunk's end", 33<<30 + 32<<10, image.CreateOptions{SectorBytes: 4096}, image.CreateOptions{}},
		{"over a chunk's end", 5 << 30, image.CreateOptions{}, image.CreateOptions{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if c.size > 1<<30 {
				farChain(t, dir, c.size, c.parent)
				return
			}
			top, want := chain(t, dir, c.size, 0, c.parent, c.child)
			img, err := openPath(top)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			imagetest.Reader(t, img, bytes.NewReader(want))
			info := img.Info()
			base, err := openPath(filepath.Join(dir, "base.vhdx"))
			if err != nil {
				t.Fatal(err)
			}
			defer base.Close()
			if info.Variant != "differencing" || info.Parent != "base.vhdx" || len(info.Warnings) > 0 ||
				info.FormatDetails["disk identity"] != base.Info().FormatDetails["disk identity"] {
				t.Errorf("%+v", info)
			}
			if c.child.BlockBytes == 0 && !holdsZeros(t, img) {
				t.Error("a block of zeros is not one in the table")
			}
			if sevenZip(t, top) != imagetest.Hash(t, bytes.NewReader(want), c.size) {
				t.Error("7z reads another content")
			}
			// Under a block of zeros, libvhdi shows the parent.
			top, want = chain(t, t.TempDir(), c.size, 0xcc, c.parent, c.child)
			if imagetest.Hash(t, imagetest.Libvhdi(t, top), c.size) != imagetest.Hash(t, bytes.NewReader(want), c.size) {
				t.Error("libvhdi reads another content")
			}
		})
	}
}

// holdsZeros says whether some extent of the top layer is Zero.
func holdsZeros(t *testing.T, img image.Image) bool {
	t.Helper()
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == image.Zero && e.Depth == 0 {
			return true
		}
	}
	return false
}

// farChain writes one sector on both sides of the end of a bitmap's chunk.
func farChain(t *testing.T, dir string, size int64, o image.CreateOptions) {
	base := filepath.Join(dir, "base.vhdx")
	write(t, base, imagetest.NewDisk(1, size), o)
	b, err := openPath(base)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	info := b.Info()
	w, err := Create(filepath.Join(dir, "top.vhdx"), image.CreateOptions{VirtualBytes: size, Parent: "base.vhdx", ParentInfo: &info})
	if err != nil {
		t.Fatal(err)
	}
	unit := w.Unit()
	border := bitmapBytes * 8 * unit
	for _, off := range []int64{0, border - unit, border, size - unit} {
		if _, err := w.WriteAt(bytes.Repeat([]byte{0xab}, int(unit)), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	img, err := openPath(filepath.Join(dir, "top.vhdx"))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var here []extent.Extent
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: size}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Depth == 0 && e.Kind == image.Data {
			here = append(here, e.Extent)
		}
	}
	var set extent.Set
	for _, e := range here {
		set.Add(e)
	}
	want := extent.NewSet(extent.Extent{Len: unit}, extent.Extent{Off: border - unit, Len: 2 * unit}, extent.Extent{Off: size - unit, Len: unit})
	if len(set.Subtract(want).List())+len(want.Subtract(set).List()) > 0 {
		t.Errorf("the layer holds %v, want %v", set, want)
	}
	p := make([]byte, 4*unit)
	q := make([]byte, 4*unit)
	for _, off := range []int64{0, border - 2*unit, size - 4*unit} {
		img.ReadAt(p, off)
		b.ReadAt(q, off)
		for i := range p {
			if want.Contains(extent.Extent{Off: off + int64(i), Len: 1}) {
				q[i] = 0xab
			}
		}
		if !bytes.Equal(p, q) {
			t.Errorf("wrong bytes at %d", off)
		}
	}
}

func TestParentIsFoundByItsIdentity(t *testing.T) {
	dir := t.TempDir()
	top, _ := chain(t, dir, 3<<20, 0, image.CreateOptions{}, image.CreateOptions{})
	base := filepath.Join(dir, "base.vhdx")

	f, err := image.OpenFile(top)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Open(f, nil); !errors.Is(err, image.ErrNotAllowed) || !strings.Contains(err.Error(), "base.vhdx") {
		t.Errorf("without an opener of parents: %v", err)
	}
	layer, err := OpenLayer(f)
	if err != nil {
		t.Fatal(err)
	}
	absent := false
	for e, err := range layer.Extents(context.Background(), extent.Extent{Len: layer.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		absent = absent || e.Kind == image.Absent && e.Depth == 0
	}
	if !absent {
		t.Error("the layer alone has nothing absent")
	}

	if err := os.Remove(base); err != nil {
		t.Fatal(err)
	}
	if _, err := openPath(top); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing parent: %v", err)
	}
	write(t, base, imagetest.NewDisk(1, 3<<20), image.CreateOptions{})
	if _, err := openPath(top); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "DataWriteGuid") {
		t.Errorf("another parent of the same name: %v", err)
	}
	os.Remove(base)
	if err := os.Link(top, base); err != nil {
		t.Fatal(err)
	}
	if _, err := openPath(top); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "chain") {
		t.Errorf("a disk that is its own parent: %v", err)
	}
}

func TestParentNames(t *testing.T) {
	for _, c := range []struct {
		name    string
		locator map[string]string
		want    []string
	}{
		{"windows", map[string]string{"relative_path": `.\a.vhdx`, "volume_path": `\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\a.vhdx`, "absolute_win32_path": `\\?\C:\x\a.vhdx`},
			[]string{"a.vhdx", `\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\a.vhdx`, `\\?\C:\x\a.vhdx`}},
		{"absolute alone", map[string]string{"absolute_win32_path": `C:\x\a.vhdx`}, []string{`C:\x\a.vhdx`, "a.vhdx"}},
		{"a directory up", map[string]string{"relative_path": `..\y\a.vhdx`}, []string{"../y/a.vhdx", "a.vhdx"}},
		{"none", map[string]string{}, nil},
	} {
		if got := (metadata{locator: c.locator}).parentNames(); strings.Join(got, "|") != strings.Join(c.want, "|") {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	m := metadata{locator: map[string]string{"parent_linkage": "{F88D4D92-6FCC-408D-9BEF-9B7C89F15C89}", "parent_linkage2": "{00000000-0000-0000-0000-000000000000}"}}
	if got := m.linkages(); len(got) != 1 || got[0] != "f88d4d92-6fcc-408d-9bef-9b7c89f15c89" {
		t.Errorf("linkages %q", got)
	}
}
