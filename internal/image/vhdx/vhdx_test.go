package vhdx

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

func TestSamples(t *testing.T) {
	for _, s := range imagetest.SampleList(t) {
		if !strings.Contains(s.Name, ".vhdx.") {
			continue
		}
		t.Run(s.Name, func(t *testing.T) {
			dir := t.TempDir()
			path, want := imagetest.SampleIn(t, dir, s.Name)
			if s.Name == "dfvfs/fat-differential.vhdx.gz" {
				imagetest.SampleIn(t, dir, "dfvfs/fat-parent.vhdx.gz")
			}
			img, err := openPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			t.Logf("%+v", img.Info())
			imagetest.Holds(t, img, img.Size(), want)
			if img.Info().Variant != "differencing" && len(img.Info().Warnings) == 0 {
				imagetest.Reader(t, img, imagetest.QemuRaw(t, path, "vhdx"))
			}
		})
	}
}

func TestWriter(t *testing.T) {
	w := imagetest.WriterTest{
		Create:    func(path string, o image.CreateOptions) (image.Writer, error) { return Create(path, o) },
		Open:      openPath,
		Ext:       ".vhdx",
		SizeUnit:  512,
		Sizes:     []int64{2<<20 - 512, 2 << 20, 4<<20 + 512, 5 << 30},
		Variants:  []image.CreateOptions{{}},
		Qemu:      "vhdx",
		QemuCheck: true,
		QemuSkip: func(o image.CreateOptions) string {
			if o.VirtualBytes == 0 {
				return "qemu-img opens no VHDX of 0 bytes"
			}
			return ""
		},
	}
	imagetest.Writer(t, w)
	w.Sizes = nil
	w.Variants = []image.CreateOptions{{Variant: "fixed"}}
	imagetest.Writer(t, w)
	w.Qemu = "" // no 4 KiB sectors
	w.SizeUnit = 4096
	w.Variants = []image.CreateOptions{{SectorBytes: 4096}}
	imagetest.Writer(t, w)
}

// What would take qemu-img long, because it reads every byte of a VHDX.
func TestLargeDisks(t *testing.T) {
	for _, o := range []image.CreateOptions{
		{VirtualBytes: MaxBytes},
		{VirtualBytes: 5<<40 + 512, BlockBytes: 1 << 20},
		{VirtualBytes: 5<<40 + 512, BlockBytes: 256 << 20},
		{VirtualBytes: 100 << 30, Variant: "fixed"},
		{VirtualBytes: 100 << 30, SectorBytes: 4096, BlockBytes: 1 << 20},
	} {
		disk := imagetest.NewDisk(1, o.VirtualBytes)
		path := filepath.Join(t.TempDir(), "disk.vhdx")
		write(t, path, disk, o)
		img, err := openPath(path)
		if err != nil {
			t.Fatal(err)
		}
		imagetest.Reader(t, img, disk)
		if t.Failed() {
			t.Fatalf("%+v", o)
		}
		img.Close()
	}
}

func TestCreateRefuses(t *testing.T) {
	for name, o := range map[string]image.CreateOptions{
		"over 64 TiB":                 {VirtualBytes: MaxBytes + 1},
		"a negative size":             {VirtualBytes: -1},
		"a variant of another format": {Variant: "streamOptimized"},
		"compression":                 {Compression: "zstd"},
		"odd blocks":                  {BlockBytes: 3 << 20},
		"blocks of 512 KiB":           {BlockBytes: 512 << 10},
		"sectors of 520 bytes":        {SectorBytes: 520},
		"a differencing disk alone":   {Variant: "differencing"},
		"a parent that is unknown":    {Parent: "x.vhdx"},
		"a parent of another format":  {Parent: "x.vhd", ParentInfo: &image.Info{Format: image.VHD}},
		"a parent of another size":    {Parent: "x.vhdx", ParentInfo: &image.Info{Format: image.VHDX, Identity: guid{1}.String(), VirtualBytes: 512, SectorBytes: 512}},
		"a parent with other sectors": {SectorBytes: 4096, Parent: "x.vhdx", ParentInfo: &image.Info{Format: image.VHDX, Identity: guid{1}.String(), SectorBytes: 512}},
	} {
		path := filepath.Join(t.TempDir(), "disk.vhdx")
		w, err := Create(path, o)
		if err == nil {
			w.Close()
			t.Errorf("%s is accepted", name)
		}
		if _, there := os.Stat(path); there == nil && err != nil {
			t.Errorf("%s leaves a file", name)
		}
	}
}

// A second reader that is not qemu-img. It takes only disks of whole eight
// sectors.
func TestSevenZipReadsWhatWeWrite(t *testing.T) {
	for _, o := range []image.CreateOptions{{}, {Variant: "fixed"}, {SectorBytes: 4096}} {
		disk := imagetest.NewDisk(7, 9<<20+8*4096)
		path := filepath.Join(t.TempDir(), "disk.vhdx")
		write(t, path, disk, o)
		if got, want := sevenZip(t, path), imagetest.Hash(t, disk, disk.Size()); got != want {
			t.Errorf("%+v: 7z reads another content", o)
		}
	}
}

// A third one, by people who wrote their own specification of the format. It
// takes the sizes and sectors that the others refuse.
func TestLibvhdiReadsWhatWeWrite(t *testing.T) {
	for _, o := range []image.CreateOptions{
		{}, {Variant: "fixed"}, {SectorBytes: 4096}, {BlockBytes: 1 << 20}, {BlockBytes: 256 << 20}, {Variant: "fixed", SectorBytes: 4096, BlockBytes: 8 << 20},
	} {
		disk := imagetest.NewDisk(8, 40<<20+4096)
		path := filepath.Join(t.TempDir(), "disk.vhdx")
		write(t, path, disk, o)
		if got, want := imagetest.Hash(t, imagetest.Libvhdi(t, path), disk.Size()), imagetest.Hash(t, disk, disk.Size()); got != want {
			t.Errorf("%+v: libvhdi reads another content", o)
		}
	}
}

// sevenZip is the hash of what 7z reads of path.
func sevenZip(t *testing.T, path string) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command(imagetest.Tool(t, "7z"), "x", "-y", "-tVHDX", "-o"+dir, path).CombinedOutput()
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
	info, _ := f.Stat()
	return imagetest.Hash(t, f, info.Size())
}

func TestFixedDiskHasHoles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.vhdx")
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
