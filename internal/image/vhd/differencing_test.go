package vhd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// chain writes a parent and a layer over it into dir, of which the layer has
// runs of grain sectors, and gives what the top of the chain must read as.
func chain(t testing.TB, dir string, size, grain int64, parent, child image.CreateOptions) (top string, want []byte) {
	t.Helper()
	disk := imagetest.NewDisk(1, size)
	base := filepath.Join(dir, "base.vhd")
	write(t, base, disk, parent)
	want = make([]byte, (size+511)/512*512)
	disk.ReadAt(want, 0)

	b, err := openPath(base)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	info := b.Info()
	child.VirtualBytes, child.Parent, child.ParentInfo = b.Size(), "base.vhd", &info
	top = filepath.Join(dir, "top.vhd")
	w, err := Create(top, child)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	sectors := int64(len(want) / 512)
	written := map[int64]bool{} // a writer takes each byte once
	for range 200 {
		from := r.Int64N(sectors) / grain * grain
		n := min((1+r.Int64N(40))*grain, sectors-from)
		for s := from; s < from+n; s++ {
			if written[s] {
				continue
			}
			written[s] = true
			p := want[s*512 : s*512+512]
			if clear(p); r.IntN(4) > 0 {
				for i := range p {
					p[i] = byte(r.Uint32())
				}
			}
			if _, err := w.WriteAt(p, s*512); err != nil {
				t.Fatal(err)
			}
		}
	}
	for s := int64(4096); s < min(3*4096, sectors); s++ { // one whole block, and one of zeros
		if !written[s] {
			p := want[s*512 : s*512+512]
			if clear(p); s < 2*4096 {
				p[0] = 1
			}
			if _, err := w.WriteAt(p, s*512); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return top, want
}

func TestLayerOverAParent(t *testing.T) {
	for _, size := range []int64{9<<20 + 1536, 8 << 20, 512} {
		for _, variant := range []string{"fixed", "dynamic"} {
			dir := t.TempDir()
			top, want := chain(t, dir, size, 1, image.CreateOptions{Variant: variant}, image.CreateOptions{})
			img, err := openPath(top)
			if err != nil {
				t.Fatal(err)
			}
			imagetest.Reader(t, img, bytes.NewReader(want))
			if got := img.Info(); got.Variant != "differencing" || got.Parent != "base.vhd" || len(got.Warnings) > 0 {
				t.Errorf("%+v", got)
			}
			img.Close()
			out := t.TempDir()
			if p, err := exec.Command(imagetest.Tool(t, "7z"), "x", "-y", "-tVHD", "-o"+out, top).CombinedOutput(); err != nil {
				t.Fatalf("7z: %v\n%s", err, p)
			}
			list, _ := os.ReadDir(out)
			if got, err := os.ReadFile(filepath.Join(out, list[0].Name())); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s parent of %d bytes: 7z reads another content (%v)", variant, size, err)
			}
		}
	}
}

// Of a layer, libvhdi gives zeros for sectors of the parent that follow sectors
// of the layer in one byte of the bitmap. Where there are none it is right.
func TestLibvhdiReadsLayersOfWhole4KiB(t *testing.T) {
	for _, variant := range []string{"fixed", "dynamic"} {
		top, want := chain(t, t.TempDir(), 9<<20+4096, 8, image.CreateOptions{Variant: variant}, image.CreateOptions{})
		got := make([]byte, len(want))
		if _, err := imagetest.Libvhdi(t, top).ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, want) {
			t.Errorf("over a %s parent: libvhdi reads another content (%v)", variant, err)
		}
	}
}

func TestParentIsFoundByItsIdentity(t *testing.T) {
	dir := t.TempDir()
	top, _ := chain(t, dir, 3<<20, 1, image.CreateOptions{}, image.CreateOptions{})

	f, err := image.OpenFile(top)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Open(f, nil); !errors.Is(err, image.ErrNotAllowed) || !strings.Contains(err.Error(), "base.vhd") {
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

	if err := os.Remove(filepath.Join(dir, "base.vhd")); err != nil {
		t.Fatal(err)
	}
	if _, err := openPath(top); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing parent: %v", err)
	}
	write(t, filepath.Join(dir, "base.vhd"), imagetest.NewDisk(1, 3<<20), image.CreateOptions{})
	if _, err := openPath(top); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "UUID") {
		t.Errorf("another parent of the same name: %v", err)
	}
	os.Remove(filepath.Join(dir, "base.vhd"))
	if err := os.Link(top, filepath.Join(dir, "base.vhd")); err != nil {
		t.Fatal(err)
	}
	if _, err := openPath(top); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "chain") {
		t.Errorf("a disk that is its own parent: %v", err)
	}
}

func TestParentNames(t *testing.T) {
	utf16le := func(s string) []byte {
		var p []byte
		for _, r := range s {
			p = append(p, byte(r), byte(r>>8))
		}
		return p
	}
	for _, c := range []struct {
		name string
		loc  map[string][]byte
		want []string
	}{
		{"windows", map[string][]byte{"W2ru": utf16le(`.\a.vhd`), "W2ku": utf16le(`C:\x\a.vhd`)}, []string{"a.vhd", `C:\x\a.vhd`}},
		{"a directory up", map[string][]byte{"W2ru": utf16le(`..\y\a.vhd`)}, []string{"../y/a.vhd", "a.vhd"}},
		{"xenserver", map[string][]byte{"MACX": []byte("file://./a%20b.vhd")}, []string{"a b.vhd"}},
		{"mac, absolute", map[string][]byte{"MACX": []byte("file:///d/a.vhd")}, []string{"/d/a.vhd", "a.vhd"}},
		{"old ones", map[string][]byte{"Wi2r": []byte(".\\a.vhd\x00junk")}, []string{"a.vhd"}},
		{"none", nil, nil},
		{"big-endian by mistake", map[string][]byte{"W2ru": {0, '.', 0, '\\', 0, 'a'}}, []string{"a"}},
		{"byte order marks", map[string][]byte{"W2ru": append([]byte{0xff, 0xfe}, utf16le(`.\a`)...), "W2ku": {0xfe, 0xff, 0, 'b'}}, []string{"a", "b"}},
		{"odd length", map[string][]byte{"W2ru": append(utf16le("a"), 'b')}, []string{"a"}},
	} {
		var h header
		var data []byte
		i := 0
		for _, code := range []string{"W2ru", "W2ku", "MACX", "Wi2r"} {
			if p, ok := c.loc[code]; ok {
				h.locators[i] = locator{code: code, bytes: uint32(len(p)), off: int64(len(data))}
				data = append(data, p...)
				i++
			}
		}
		got, err := h.parentNames(memory(data))
		if err != nil || strings.Join(got, "|") != strings.Join(c.want, "|") {
			t.Errorf("%s: %q, %v; want %q", c.name, got, err, c.want)
		}
	}
	if _, err := (header{locators: [8]locator{{code: "W2ru", bytes: 1 << 31}}}).parentNames(memory(nil)); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a name of 2 GiB: %v", err)
	}
}

// memory is a file in memory.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Bytes() int64                            { return int64(len(m)) }
func (m memory) Name() string                            { return "memory" }
func (m memory) Close() error                            { return nil }
