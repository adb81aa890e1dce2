package qcow2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/raw"
)

// beside is a Resolver that allows the names in a directory.
type beside string

func (dir beside) Resolve(name string) (image.File, error) {
	return image.OpenFile(filepath.Join(string(dir), filepath.Base(name)))
}

// openPath opens an image with everything in its directory allowed.
func openPath(path string, o image.OpenOptions) (*Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	o.Resolver = beside(filepath.Dir(path))
	o.Parent = image.Parents(f, o.Resolver, openFormat)
	img, err := Open(f, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

func openFormat(f image.File, format image.Format, parent image.OpenParent) (image.Image, error) {
	switch format {
	case image.Raw:
		return raw.Open(f), nil
	case image.Qcow2, "":
		return Open(f, image.OpenOptions{Resolver: beside(filepath.Dir(f.Name())), Parent: parent})
	}
	return nil, fmt.Errorf("format %q in a test", format)
}

func mustOpen(t testing.TB, path string) *Image {
	t.Helper()
	img, err := openPath(path, image.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

func TestSamples(t *testing.T) {
	for _, s := range imagetest.SampleList(t) {
		if !strings.Contains(s.Features, "qcow2") {
			continue
		}
		t.Run(s.Name, func(t *testing.T) {
			dir := t.TempDir()
			path, want := imagetest.SampleIn(t, dir, s.Name)
			if strings.Contains(s.Name, "backing-chain") {
				for i := range 3 {
					imagetest.SampleIn(t, dir, fmt.Sprintf("dissect/backing-chain-%d.qcow2.gz", i+1))
				}
			}
			img := mustOpen(t, path)
			t.Logf("%+v", img.Info())
			imagetest.Holds(t, img, img.Size(), want)
			imagetest.Reader(t, img, imagetest.QemuRaw(t, path, "qcow2"))
			mapOracle(t, path, img)
		})
	}
}

// variants are the kinds of qcow2 that qemu-img can make.
var variants = []struct {
	name, options string
	compress      bool
}{
	{"version 2", "compat=0.10", false},
	{"version 2, compressed", "compat=0.10", true},
	{"version 3", "compat=1.1", false},
	{"zlib", "compression_type=zlib", true},
	{"zstd", "compression_type=zstd", true},
	{"clusters of 512", "cluster_size=512", false},
	{"clusters of 512, compressed", "cluster_size=512", true},
	{"clusters of 4 KiB, zstd", "cluster_size=4096,compression_type=zstd", true},
	{"clusters of 2 MiB", "cluster_size=2M", false},
	{"clusters of 2 MiB, compressed", "cluster_size=2M", true},
	{"clusters of 2 MiB, zstd", "cluster_size=2M,compression_type=zstd", true},
	{"extended L2", "extended_l2=on", false},
	{"extended L2, clusters of 16 KiB", "extended_l2=on,cluster_size=16k", false},
	{"extended L2, compressed", "extended_l2=on", true},
	{"lazy refcounts", "lazy_refcounts=on", false},
	{"refcounts of 1 bit", "refcount_bits=1", false},
	{"refcounts of 64 bits", "refcount_bits=64", false},
	{"data file", "data_file=DIR/data.file", false},
	{"raw data file", "data_file=DIR/data.file,data_file_raw=on", false},
	{"preallocated metadata", "preallocation=metadata", false},
}

func TestWhatQemuWrites(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	disk := imagetest.NewDisk(1, 9<<20+1536)
	source := disk.Save(t)
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", strings.ReplaceAll(v.options, "DIR", dir)}
			if v.compress {
				args = append(args, "-c")
			}
			imagetest.Qemu(t, append(args, source, path)...)
			img := mustOpen(t, path)
			imagetest.Reader(t, img, disk)
			mapOracle(t, path, img)
		})
	}
}

// An image that was made with all its tables costs what its data are, not what
// its disk is.
func TestHolesUnderPreallocatedTables(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	imagetest.Qemu(t, "create", "-f", "qcow2", "-o", "preallocation=metadata", path, "1G")
	qemuIO(t, path, "write -P 7 512M 64k")
	img := mustOpen(t, path)
	if _, hole, ok := image.NextData(img.file, 0, img.file.Bytes()); !ok || hole == img.file.Bytes() {
		t.Skip("no holes in files here")
	}
	var data int64
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == image.Data {
			data += e.Len
		}
	}
	if data < 64<<10 || data > 8<<20 {
		t.Errorf("%d bytes of data where 64 KiB were written", data)
	}
}

type qemuExtent struct {
	Start, Length int64
	Depth         int
	Present       bool
	Zero, Data    bool
	Offset        *int64
}

// mapOracle compares Extents with qemu-img map. Either looks for holes in the
// file where the other does not, so that zeros may be the other's data;
// everything else must agree.
func mapOracle(t *testing.T, path string, img *Image) {
	t.Helper()
	out, err := exec.Command(imagetest.Tool(t, "qemu-img"), "map", "--output=json", "-f", "qcow2", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var theirs []qemuExtent
	if err := json.Unmarshal(out, &theirs); err != nil {
		t.Fatal(err)
	}
	var i int
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		for at := e.Off; at < e.End(); {
			for theirs[i].Start+theirs[i].Length <= at {
				i++
			}
			q := theirs[i]
			agree := true
			zeros := func() bool {
				p := make([]byte, min(e.End(), q.Start+q.Length)-at)
				img.ReadAt(p, at)
				return strings.Trim(string(p), "\x00") == ""
			}
			switch e.Kind {
			case image.Absent:
				agree = !q.Data && q.Zero
			case image.Zero:
				agree = q.Present && q.Depth == e.Depth && (q.Zero && !q.Data || zeros())
			case image.Data:
				agree = q.Present && q.Depth == e.Depth
				if agree && !q.Data {
					agree = zeros()
				}
				if agree && e.FileOffset >= 0 && (q.Offset == nil || *q.Offset+at-q.Start != e.FileOffset+at-e.Off) {
					agree = false
				}
			}
			if !agree {
				t.Errorf("at %d we say %+v, qemu-img %+v", at, e, q)
				return
			}
			at = min(e.End(), q.Start+q.Length)
		}
	}
}

// qemuIO runs commands of qemu-io on path.
func qemuIO(t testing.TB, path string, commands ...string) {
	t.Helper()
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out, err := exec.Command(imagetest.Tool(t, "qemu-io"), append(args, path)...).CombinedOutput(); err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("qemu-io %v: %v\n%s", commands, err, out)
	}
}

func TestChain(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	for _, extended := range []string{"off", "on"} {
		t.Run("extended_l2="+extended, func(t *testing.T) {
			dir := t.TempDir()
			base, mid, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "mid.qcow2"), filepath.Join(dir, "top.qcow2")
			// The base is shorter than its overlay and ends inside a cluster.
			disk := imagetest.NewDisk(2, 5<<20+512*3)
			if err := os.Rename(disk.Save(t), base); err != nil {
				t.Fatal(err)
			}
			o := "extended_l2=" + extended
			imagetest.Qemu(t, "create", "-f", "qcow2", "-o", o, "-b", "base.raw", "-F", "raw", mid, "6M")
			qemuIO(t, mid, "write -P 0x11 1M 70000", "write -z 2M 1M", "write -P 0x22 5M 300k")
			imagetest.Qemu(t, "create", "-f", "qcow2", "-o", o, "-b", "mid.qcow2", "-F", "qcow2", top, "8M")
			qemuIO(t, top, "write -P 0x33 2100k 10k", "write -z 64k 192k", "discard 4M 64k", "write -P 0x44 7M 1k")
			want := imagetest.QemuRaw(t, top, "qcow2")
			img := mustOpen(t, top)
			imagetest.Reader(t, img, want)
			mapOracle(t, top, img)

			only, err := openPath(top, image.OpenOptions{OnlyTop: true})
			if err != nil {
				t.Fatal(err)
			}
			defer only.Close()
			var kinds [3]int64
			for e, err := range only.Extents(context.Background(), extent.Extent{Len: only.Size()}) {
				if err != nil {
					t.Fatal(err)
				}
				kinds[e.Kind] += e.Len
			}
			if kinds[image.Absent] < 6<<20 || kinds[image.Zero] < 192<<10 {
				t.Errorf("only the top holds %v", kinds)
			}
		})
	}
}

func TestInternalSnapshots(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	imagetest.Qemu(t, "create", "-f", "qcow2", path, "4M")
	qemuIO(t, path, "write -P 1 0 1M")
	imagetest.Qemu(t, "snapshot", "-c", "first", path)
	qemuIO(t, path, "write -P 2 512k 1M")
	imagetest.Qemu(t, "snapshot", "-c", "second", path)
	qemuIO(t, path, "write -P 3 0 3M")
	img := mustOpen(t, path)
	if s := img.Info().Snapshots; len(s) != 2 || s[0] != "first" || s[1] != "second" {
		t.Errorf("snapshots %q", s)
	}
	for _, name := range []string{"first", "second", "1", "2"} {
		img, err := openPath(path, image.OpenOptions{Snapshot: name})
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		out := filepath.Join(t.TempDir(), "out.raw")
		imagetest.Qemu(t, "convert", "-l", name, "-f", "qcow2", "-O", "raw", path, out)
		f, err := os.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		imagetest.Reader(t, img, f)
	}
	if _, err := openPath(path, image.OpenOptions{Snapshot: "third"}); err == nil {
		t.Error("a snapshot that does not exist opens")
	}
}

func TestPersistentBitmaps(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	// With small clusters the bitmap takes several of them.
	imagetest.Qemu(t, "create", "-f", "qcow2", "-o", "cluster_size=512", path, "64M")
	qemuIO(t, path, "write -P 1 0 1M")
	imagetest.Qemu(t, "bitmap", "--add", "-g", "512", path, "fine")
	imagetest.Qemu(t, "bitmap", "--add", "-g", "1M", path, "coarse")
	qemuIO(t, path, "write -P 2 3072 512", "write -P 2 4096 1024", "write -P 2 10M 8M", "write -P 2 67108352 512")
	imagetest.Qemu(t, "bitmap", "--add", "-g", "64k", path, "empty")
	imagetest.Qemu(t, "bitmap", "--disable", path, "coarse")
	img := mustOpen(t, path)
	if b := img.Info().Bitmaps; len(b) != 3 {
		t.Errorf("bitmaps %q", b)
	}
	for name, want := range map[string][]extent.Extent{
		"fine":   {{Off: 3072, Len: 512}, {Off: 4096, Len: 1024}, {Off: 10 << 20, Len: 8 << 20}, {Off: 64<<20 - 512, Len: 512}},
		"coarse": {{Off: 0, Len: 1 << 20}, {Off: 10 << 20, Len: 8 << 20}, {Off: 63 << 20, Len: 1 << 20}},
		"empty":  nil,
	} {
		var got []extent.Extent
		for e, err := range img.Changed(context.Background(), name) {
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got = append(got, e)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	for _, err := range img.Changed(context.Background(), "none") {
		if err == nil {
			t.Error("a bitmap that does not exist is empty instead")
		}
	}
}

func TestNothingIsOpenedUnasked(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	dir := t.TempDir()
	base, top, ext := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2"), filepath.Join(dir, "ext.qcow2")
	imagetest.Qemu(t, "create", "-f", "raw", base, "1M")
	imagetest.Qemu(t, "create", "-f", "qcow2", "-b", base, "-F", "raw", top)
	imagetest.Qemu(t, "create", "-f", "qcow2", "-o", "data_file="+base, ext, "1M")
	for _, path := range []string{top, ext} {
		f, err := image.OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := Open(f, image.OpenOptions{}); !errors.Is(err, image.ErrNotAllowed) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, name := range []string{"json:{}", "nbd://host/x", "rbd:x", "fat:rw:/tmp", "a\x00b", ""} {
		if err := plainName(name); !errors.Is(err, image.ErrNotAllowed) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"base.raw", "/tmp/a:b", "./a:b", "../x"} {
		if err := plainName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}
