package vhd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

func openPath(path string) (image.Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	img, err := Open(f, parentsBeside(f, path))
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

// parentsBeside finds parents by their base name in the directory of path.
func parentsBeside(f image.File, path string) image.OpenParent {
	return image.Parents(f, beside(filepath.Dir(path)), func(f image.File, format image.Format, parent image.OpenParent) (image.Image, error) {
		return Open(f, parent)
	})
}

type beside string

func (dir beside) Resolve(name string) (image.File, error) {
	return image.OpenFile(filepath.Join(string(dir), filepath.Base(name)))
}

func TestWriter(t *testing.T) {
	w := imagetest.WriterTest{
		Create:   func(path string, o image.CreateOptions) (image.Writer, error) { return Create(path, o) },
		Open:     openPath,
		Ext:      ".vhd",
		SizeUnit: 512,
		Sizes:    []int64{2<<20 - 512, 2 << 20, 4<<20 + 512, MaxBytes},
		Qemu:     "vpc",
		QemuSkip: func(o image.CreateOptions) string {
			if o.VirtualBytes == 0 {
				return "qemu-img opens no VHD of 0 bytes"
			}
			return ""
		},
	}
	imagetest.Writer(t, w)
	w.Sizes = nil
	w.Variants = []image.CreateOptions{{Variant: "fixed"}, {Variant: "dynamic", BlockBytes: 8 << 20}}
	imagetest.Writer(t, w)
}

func TestCreateRefuses(t *testing.T) {
	for name, o := range map[string]image.CreateOptions{
		"over 2040 GiB":                 {VirtualBytes: MaxBytes + 1},
		"a negative size":               {VirtualBytes: -1},
		"a variant of another format":   {Variant: "streamOptimized"},
		"compression":                   {Compression: "zstd"},
		"odd blocks":                    {BlockBytes: 3 << 20},
		"blocks too small for the disk": {BlockBytes: 512 << 10, VirtualBytes: MaxBytes},
		"a differencing disk alone":     {Variant: "differencing"},
		"a parent that is unknown":      {Parent: "x.vhd"},
		"a parent of another format":    {Parent: "x.vhdx", ParentInfo: &image.Info{Format: image.VHDX}},
		"a parent of another size":      {Parent: "x.vhd", ParentInfo: &image.Info{Format: image.VHD, Identity: uuid{}.String(), VirtualBytes: 512}},
	} {
		path := filepath.Join(t.TempDir(), "disk.vhd")
		w, err := Create(path, o)
		if err == nil {
			w.Close()
			t.Errorf("%s is accepted", name)
			continue
		}
		if _, there := os.Stat(path); there == nil {
			t.Errorf("%s leaves a file", name)
		}
		if name == "over 2040 GiB" && !strings.Contains(err.Error(), "VHDX") {
			t.Errorf("%s: %v does not say what holds it", name, err)
		}
	}
}

func TestSamples(t *testing.T) {
	for _, s := range imagetest.SampleList(t) {
		if !strings.Contains(s.Name, ".vhd.") {
			continue
		}
		t.Run(s.Name, func(t *testing.T) {
			dir := t.TempDir()
			path, want := imagetest.SampleIn(t, dir, s.Name)
			if s.Name == "dfvfs/fat-differential.vhd.gz" {
				imagetest.SampleIn(t, dir, "dfvfs/fat-parent.vhd.gz")
			}
			img, err := openPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			t.Logf("%+v", img.Info())
			if img.Size() > 64<<30 {
				imagetest.Reader(t, img, strings.NewReader("")) // it is empty
				return
			}
			imagetest.Holds(t, img, img.Size(), want)
			if img.Info().Variant != "differencing" {
				imagetest.Reader(t, img, imagetest.QemuRaw(t, path, "vpc"))
			}
		})
	}
}

// A second reader that is not qemu-img.
func TestSevenZipReadsWhatWeWrite(t *testing.T) {
	for _, variant := range []string{"fixed", "dynamic"} {
		t.Run(variant, func(t *testing.T) {
			disk := imagetest.NewDisk(7, 9<<20+1536)
			path := filepath.Join(t.TempDir(), "disk.vhd")
			write(t, path, disk, image.CreateOptions{Variant: variant})
			dir := t.TempDir()
			out, err := exec.Command(imagetest.Tool(t, "7z"), "x", "-y", "-tVHD", "-o"+dir, path).CombinedOutput()
			if err != nil {
				t.Fatalf("7z: %v\n%s", err, out)
			}
			list, _ := os.ReadDir(dir)
			if len(list) != 1 {
				t.Fatalf("7z made %d files\n%s", len(list), out)
			}
			f, err := os.Open(filepath.Join(dir, list[0].Name()))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if got, want := imagetest.Hash(t, f, disk.Size()), imagetest.Hash(t, disk, disk.Size()); got != want {
				t.Errorf("7z reads another content")
			}
		})
	}
}

// A third one, by people who wrote their own specification of the format.
func TestLibvhdiReadsWhatWeWrite(t *testing.T) {
	for _, o := range []image.CreateOptions{{Variant: "fixed"}, {}, {BlockBytes: 512 << 10}, {BlockBytes: 16 << 20}} {
		disk := imagetest.NewDisk(8, 40<<20+512)
		path := filepath.Join(t.TempDir(), "disk.vhd")
		write(t, path, disk, o)
		if got, want := imagetest.Hash(t, imagetest.Libvhdi(t, path), disk.Size()), imagetest.Hash(t, disk, disk.Size()); got != want {
			t.Errorf("%+v: libvhdi reads another content", o)
		}
	}
}

func TestFixedDiskHasHoles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.vhd")
	w, err := Create(path, image.CreateOptions{VirtualBytes: 64 << 20, Variant: "fixed"})
	if err != nil {
		t.Fatal(err)
	}
	imagetest.FixedHasHoles(t, path, w, func(f image.File) (image.Image, error) { return OpenLayer(f) })
}

// write makes an image of disk at path.
func write(t testing.TB, path string, disk *imagetest.Disk, o image.CreateOptions) {
	t.Helper()
	o.VirtualBytes = disk.Size()
	w, err := Create(path, o)
	if err != nil {
		t.Fatal(err)
	}
	imagetest.Fill(t, w, disk)
}
