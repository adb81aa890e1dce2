package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

func TestWriter(t *testing.T) {
	test := imagetest.WriterTest{
		Create: func(path string, o image.CreateOptions) (image.Writer, error) { return Create(path, o) },
		Open: func(path string) (image.Image, error) {
			f, err := image.OpenFile(path)
			if err != nil {
				return nil, err
			}
			return open(Open(f, image.OpenOptions{}))
		},
		Ext: ".qcow2",
		Variants: []image.CreateOptions{
			{},
			{Compression: "zlib"},
			{Compression: "zstd"},
			{Compression: "zstd", Level: 9},
			{BlockBytes: 2 << 20, Compression: "zstd"},
		},
		SizeUnit:  512,
		Sizes:     []int64{62<<30 + 512},
		Qemu:      "qcow2",
		QemuCheck: true,
	}
	imagetest.Writer(t, test)
	test.Variants = []image.CreateOptions{
		{BlockBytes: 512},
		{BlockBytes: 512, Compression: "zlib"},
	}
	test.Sizes = nil
	imagetest.Writer(t, test)
}

// mustWrite copies the given ranges of a disk into an image.
func mustWrite(t testing.TB, w image.Writer, disk *imagetest.Disk, ranges []extent.Extent) {
	t.Helper()
	for _, e := range ranges {
		p := make([]byte, e.Len)
		disk.ReadAt(p, e.Off)
		if _, err := w.WriteAt(p, e.Off); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// With room for two L2 tables only, most are written and read again while the
// image grows.
func TestTablesThatDoNotFitIntoMemory(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	disk := imagetest.NewDisk(3, 2<<20)
	for _, compression := range []string{"", "zlib"} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		w, err := Create(path, image.CreateOptions{VirtualBytes: disk.Size(), BlockBytes: 512, Compression: compression})
		if err != nil {
			t.Fatal(err)
		}
		w.tables.limit = 2
		var ranges []extent.Extent
		for off := int64(0); off < disk.Size(); off += 1024 {
			ranges = append(ranges, extent.Extent{Off: off, Len: 1024})
		}
		rand.Shuffle(len(ranges), func(i, j int) { ranges[i], ranges[j] = ranges[j], ranges[i] })
		mustWrite(t, w, disk, ranges)
		imagetest.Reader(t, mustOpen(t, path), disk)
		imagetest.Qemu(t, "check", "-f", "qcow2", path)
	}
}

// tiny compresses everything to one byte.
type tiny struct{}

func (tiny) deflate(dst, _ []byte) ([]byte, error) { return append(dst, 0), nil }

// Equal clusters pack to almost nothing, so that more of them would share a
// cluster of the file than its refcount can count.
func TestClustersThatPackToNothing(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	const cluster = 128 << 10
	w, err := Create(path, image.CreateOptions{VirtualBytes: cluster * 70000, BlockBytes: cluster, Compression: "zlib"})
	if err != nil {
		t.Fatal(err)
	}
	w.deflate = tiny{}
	p := make([]byte, cluster)
	p[0] = 1
	for i := range int64(70000) {
		if _, err := w.WriteAt(p, i*cluster); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	imagetest.Qemu(t, "check", "-f", "qcow2", path)
}

func TestOverlay(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	dir := t.TempDir()
	base := imagetest.NewDisk(7, 3<<20)
	if err := os.Rename(base.Save(t), filepath.Join(dir, "base.raw")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "top.qcow2")
	w, err := Create(path, image.CreateOptions{VirtualBytes: 3 << 20, Parent: "base.raw", ParentFormat: image.Raw, Compression: "zstd"})
	if err != nil {
		t.Fatal(err)
	}
	// Changed: the first 256 KiB to zeros, the last to something else.
	if _, err := w.WriteAt(make([]byte, 256<<10), 0); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, w, imagetest.NewDisk(8, 3<<20), []extent.Extent{{Off: 3<<20 - 256<<10, Len: 256 << 10}})
	imagetest.Qemu(t, "check", path)
	want := imagetest.QemuRaw(t, path, "qcow2")
	img := mustOpen(t, path)
	imagetest.Reader(t, img, want)
	mapOracle(t, path, img)
	p := make([]byte, 1<<20)
	q := make([]byte, 1<<20)
	img.ReadAt(p, 1<<20)
	base.ReadAt(q, 1<<20)
	if string(p) != string(q) {
		t.Error("what was not written is not the parent's")
	}
	img.ReadAt(p[:256<<10], 0)
	if strings.Trim(string(p[:256<<10]), "\x00") != "" {
		t.Error("zeros do not hide the parent")
	}
}

// Layers of all cluster sizes from changed extents: what was not written is
// the parent's, byte for byte, and who reads the chain is QEMU.
func TestOverlaysOfAllSizes(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	for _, compression := range []string{"", "zlib", "zstd"} {
		for cluster := int64(512); cluster <= 2<<20; cluster *= 16 {
			t.Run(fmt.Sprintf("%s %d", compression, cluster), func(t *testing.T) {
				dir := t.TempDir()
				const size = 5<<20 + 512*5
				base, changed := imagetest.NewDisk(7, size), imagetest.NewDisk(8, size)
				if err := os.Rename(base.Save(t), filepath.Join(dir, "base.raw")); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, "top.qcow2")
				w, err := Create(path, image.CreateOptions{
					VirtualBytes: size, BlockBytes: cluster, Compression: compression, Parent: "base.raw", ParentFormat: image.Raw,
				})
				if err != nil {
					t.Fatal(err)
				}
				set := extent.NewSet(extent.Extent{Off: 1000, Len: 5000}, extent.Extent{Off: 2 << 20, Len: 1 << 20}, extent.Extent{Off: size - 10, Len: 10})
				set = set.Align(cluster, size)
				mustWrite(t, w, changed, set.List())
				want := make([]byte, size)
				base.ReadAt(want, 0)
				for _, e := range set.List() {
					changed.ReadAt(want[e.Off:e.End()], e.Off)
				}
				imagetest.Qemu(t, "check", "-f", "qcow2", path)
				imagetest.Reader(t, mustOpen(t, path), bytes.NewReader(want))
				got := make([]byte, size)
				imagetest.QemuRaw(t, path, "qcow2").ReadAt(got, 0)
				if !bytes.Equal(got, want) {
					t.Error("QEMU reads something else")
				}
			})
		}
	}
}

// A second reader that shares no code with QEMU.
func TestSevenZipReadsWhatWeWrite(t *testing.T) {
	tool := imagetest.Tool(t, "7z")
	disk := imagetest.NewDisk(11, 6<<20)
	for _, o := range []image.CreateOptions{{}, {Compression: "zlib"}, {Compression: "zlib", BlockBytes: 4 << 10}, {BlockBytes: 2 << 20}} {
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.qcow2")
		o.VirtualBytes = disk.Size()
		w, err := Create(path, o)
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, w, disk, []extent.Extent{{Len: disk.Size()}})
		out, err := exec.Command(tool, "x", "-y", "-tQCOW", "-o"+filepath.Join(dir, "out"), path).CombinedOutput()
		if err != nil {
			t.Fatalf("%+v: 7z: %v\n%s", o, err, out)
		}
		files, err := filepath.Glob(filepath.Join(dir, "out", "*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%+v: 7z wrote %q, %v", o, files, err)
		}
		want := make([]byte, disk.Size())
		disk.ReadAt(want, 0)
		if !bytes.Equal(fileBytes(t, files[0]), want) {
			t.Errorf("%+v: 7z reads something else", o)
		}
	}
}

func fileBytes(t testing.TB, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	for i, o := range []image.CreateOptions{
		{VirtualBytes: -1},
		{VirtualBytes: 1<<63 - 1},
		{VirtualBytes: 1 << 20, BlockBytes: 1000},
		{VirtualBytes: 1 << 20, BlockBytes: 4 << 20},
		{VirtualBytes: 1 << 40, BlockBytes: 512},
		{VirtualBytes: 1 << 20, Compression: "lzma"},
		{VirtualBytes: 1 << 20, Compression: "zlib", Level: 10},
		{VirtualBytes: 1 << 20, Variant: "fixed"},
		{VirtualBytes: 1 << 20, Parent: "json:{}", ParentFormat: image.Raw},
		{VirtualBytes: 1 << 20, Parent: "base"},
		{VirtualBytes: 1 << 20, Parent: strings.Repeat("x", 500), ParentFormat: image.Raw, BlockBytes: 512},
	} {
		path := filepath.Join(dir, fmt.Sprint(i))
		if w, err := Create(path, o); err == nil {
			w.Close()
			t.Errorf("%+v is accepted", o)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%+v leaves a file", o)
		}
	}
}

func TestWarnsOfRounding(t *testing.T) {
	w, err := Create(filepath.Join(t.TempDir(), "a"), image.CreateOptions{VirtualBytes: 1000})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if len(w.Warnings()) != 1 {
		t.Errorf("warnings %q", w.Warnings())
	}
}

// A failed write must not become an image that lacks it.
func TestFinishAfterAFailedWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	w, err := Create(path, image.CreateOptions{VirtualBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	w.file.Close()
	if _, err := w.WriteAt([]byte(strings.Repeat("x", 64<<10)), 0); err == nil {
		t.Fatal("a write to a closed file is fine")
	}
	if err := w.Finish(); err == nil {
		t.Error("Finish forgets the error")
	}
}
