package raw

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

func TestWriter(t *testing.T) {
	imagetest.Writer(t, imagetest.WriterTest{
		Create: func(path string, o image.CreateOptions) (image.Writer, error) { return Create(path, o) },
		Open:   func(path string) (image.Image, error) { return OpenPath(path) },
		Ext:    ".raw",
		Sizes:  []int64{1, 10<<40 + 1},
		Qemu:   "raw",
	})
}

func TestSamples(t *testing.T) {
	for _, s := range imagetest.SampleList(t) {
		if !strings.HasSuffix(s.Name, ".raw.gz") && !strings.HasSuffix(s.Name, "-flat.vmdk.gz") {
			continue
		}
		t.Run(s.Name, func(t *testing.T) {
			path, want := imagetest.Sample(t, s.Name)
			img, err := OpenPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			imagetest.Holds(t, img, img.Size(), want)
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			imagetest.Reader(t, img, f)
		})
	}
}

// An empty disk of 10 TiB costs nothing to walk, and what the file system
// calls a hole is Zero.
func TestHolesAreFoundAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "big.raw")
	w, err := Create(path, image.CreateOptions{VirtualBytes: 10 << 40})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte{1}, 5<<40); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	img, err := OpenPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var data, n int64
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; e.Kind == image.Data {
			data += e.Len
		}
	}
	if _, _, ok := image.NextData(img.file, 0, img.size); !ok {
		t.Skip("this system does not tell holes from data")
	}
	if data == 0 || data > 1<<20 || n > 3 {
		t.Errorf("%d bytes of data in %d extents", data, n)
	}
}

func TestZerosTakeNoRoom(t *testing.T) {
	path := filepath.Join(t.TempDir(), "zeros.raw")
	w, err := Create(path, image.CreateOptions{VirtualBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4<<20)
	p[1<<20] = 1
	if n, err := w.WriteAt(p, 12345); n != len(p) || err != nil {
		t.Fatal(n, err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	img, err := OpenPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if _, hole, ok := image.NextData(img.file, 0, img.size); ok && hole > 2<<20 {
		t.Errorf("one byte in a megabyte of zeros makes data up to %d", hole)
	}
}

func TestCreateRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "there.raw")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(path, image.CreateOptions{VirtualBytes: 512}); !errors.Is(err, os.ErrExist) {
		t.Errorf("an existing file: %v", err)
	}
	if _, err := Create(path+"2", image.CreateOptions{VirtualBytes: -1}); err == nil {
		t.Error("a negative size is accepted")
	}
	if p, _ := os.ReadFile(path); string(p) != "precious" {
		t.Errorf("the file that was there is now %q", p)
	}
}

// Into something that exists, zeros are written: they are news there.
func TestZerosOverwriteOldContent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "old.raw")
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 128<<10)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(f, image.CreateOptions{VirtualBytes: 128 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(make([]byte, 64<<10), 64<<10); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Repeat("x", 64<<10) + strings.Repeat("\x00", 64<<10); string(p) != want {
		t.Error("zeros did not replace what was there")
	}
}

func TestShrunkenSourceIsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shrinks.raw")
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	img, err := OpenPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if n, err := img.ReadAt(make([]byte, 4096), 2048); n != 2048 || !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("ReadAt = %d, %v", n, err)
	}
}

func TestDirectoryIsRefused(t *testing.T) {
	if _, err := OpenPath(t.TempDir()); err == nil {
		t.Error("a directory opens")
	}
}
