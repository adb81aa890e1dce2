package vmdk_test

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// seeds gives small VMDKs of our own, and those of the samples that are small
// enough to be changed quickly.
func seeds(f *testing.F) [][]byte {
	list := [][]byte{short(f, vmdk.MonolithicSparse), short(f, vmdk.StreamOptimized)}
	dir := os.Getenv("BACKSTAY_SAMPLES")
	if dir == "" {
		return list
	}
	for _, pattern := range []string{"*/*.vmdk", "*/*.vmdk.gz", "*/*.vmdk.bz2", "go-vmdk-parser/*.gz"} {
		paths, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, path := range paths {
			p, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			r := io.Reader(bytes.NewReader(p))
			switch {
			case strings.HasSuffix(path, ".gz"):
				if r, err = gzip.NewReader(r); err != nil {
					f.Fatal(err)
				}
			case strings.HasSuffix(path, ".bz2"):
				r = bzip2.NewReader(r)
			}
			if p, err = io.ReadAll(io.LimitReader(r, 1<<17)); err != nil {
				f.Fatal(err)
			}
			if len(p) < 1<<17 {
				list = append(list, p)
			}
		}
	}
	return list
}

// short is a VMDK of a few grains with a few words in them, and holes.
func short(t testing.TB, variant string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	w, err := vmdk.Create(path, image.CreateOptions{VirtualBytes: 256 << 10, BlockBytes: map[string]int64{vmdk.MonolithicSparse: 4 << 10}[variant], Variant: variant})
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 64 << 10, 192 << 10} {
		p := make([]byte, w.Unit())
		copy(p[w.Unit()/2:], "a few words")
		if _, err := w.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Images come from strangers' hypervisors. Whatever the bytes say, Open must
// not panic, loop, or allocate more than the file could justify.
func FuzzOpen(f *testing.F) {
	for _, p := range seeds(f) {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		// The same bytes stand in for every extent.
		img, err := openBytes(p, &imagetest.Dir{Files: map[string][]byte{"x": p, "sesparse.vmdk": p, "twoGbMaxExtentSparse-s001.vmdk": p}})
		if err != nil {
			return
		}
		defer img.Close()
		img.Info()
		buf := make([]byte, 200<<10)
		for _, off := range []int64{0, img.Size() / 2, img.Size() - 1000} {
			if off >= 0 {
				img.ReadAt(buf, off)
			}
		}
		at, n := int64(0), 0
		for e, err := range img.Extents(context.Background(), extent.Extent{Len: min(img.Size(), 1<<36)}) {
			if err != nil {
				break
			}
			if e.Off != at || e.Len <= 0 {
				t.Fatalf("extent %v comes where %d should begin", e, at)
			}
			if at = e.End(); n > 2000 {
				break
			}
			n++
		}
	})
}

// The text is a descriptor file, whose extents are short files of zeros.
func FuzzDescriptor(f *testing.F) {
	for _, text := range []string{
		"RW 8 FLAT \"x\" 0\nRW 8 ZERO\n", "rdonly 63 zero\n", "parentFileNameHint=\"x\"\nparentCID=1\nRW 1 VMFS \"x\"",
		"ddb.geometry.sectors = \"63\"\r\nRW 1 SPARSE x 5 partitionUUID device-id\r\n", "encoding=\"UTF-8\"\nCID=fffffffe\nCID = fffffffe\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p := []byte("# Disk DescriptorFile\nversion=1\n" + text)
		dir := &imagetest.Dir{Files: map[string][]byte{"x": make([]byte, 8192)}}
		img, err := openBytes(p, dir)
		if err != nil {
			return
		}
		defer img.Close()
		var sum int64
		for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
			if err != nil {
				break
			}
			sum += e.Len
		}
		if sum != img.Size() {
			t.Errorf("the extents add up to %d, the size is %d", sum, img.Size())
		}
		img.ReadAt(make([]byte, 4096), 0)
	})
}

// The bytes are what follows the head of a stream that has neither footer nor
// directory, so that every marker is looked at.
func FuzzStream(f *testing.F) {
	good := short(f, vmdk.StreamOptimized) // long inputs are changed a few times a second
	const first = 128 * 512
	f.Add(good[first:])
	f.Add(good[first : len(good)-1536])
	f.Add(append(good[first:len(good)-1024:len(good)-1024], make([]byte, 512)...))
	f.Fuzz(func(t *testing.T, tail []byte) {
		p := append(good[:first:first], tail...)
		img, err := openBytes(p, nil)
		if err != nil {
			if !errors.Is(err, fault.ErrCorrupt) && !errors.Is(err, fault.ErrUnsupported) {
				t.Fatalf("an error of no class: %v", err)
			}
			return
		}
		defer img.Close()
		buf := make([]byte, 100<<10)
		for off := int64(0); off < img.Size(); off += int64(len(buf)) {
			if _, err := img.ReadAt(buf, off); err != nil && err != io.EOF && !errors.Is(err, fault.ErrCorrupt) {
				t.Fatalf("an error of no class: %v", err)
			}
		}
	})
}

// Whatever is written reads back, and nothing else does.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint8(0), uint32(100000), uint64(1), []byte{1, 5, 2, 0, 9, 1})
	f.Add(uint8(1), uint32(3<<20), uint64(2), []byte{0, 1, 0, 1})
	f.Add(uint8(2), uint32(70000), uint64(3), []byte{0, 255})
	f.Add(uint8(3), uint32(200000), uint64(4), []byte{1, 1, 1, 1})
	f.Add(uint8(5), uint32(5000), uint64(5), []byte{0, 1})
	f.Fuzz(func(t *testing.T, kind uint8, size uint32, seed uint64, steps []byte) {
		size %= 8 << 20
		disk := imagetest.NewDisk(seed, int64(size))
		variant := vmdk.Variants[int(kind)%len(vmdk.Variants)]
		dir, err := os.MkdirTemp("", "vmdk-fuzz")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "disk.vmdk")
		w, err := vmdk.Create(path, image.CreateOptions{VirtualBytes: int64(size), Variant: variant})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		want := make([]byte, size)
		// Steps are lengths in units, to be skipped and written in turn.
		off := int64(0)
		for i, n := range steps {
			e := extent.Extent{Off: off, Len: int64(n) * w.Unit()}.Intersect(extent.Extent{Len: int64(size)})
			if off += int64(n) * w.Unit(); i%2 == 0 || e.Len == 0 {
				continue
			}
			p := want[e.Off:e.End()]
			if _, err := disk.ReadAt(p, e.Off); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if _, err := w.WriteAt(p, e.Off); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		img, err := openPath(path)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		got := make([]byte, img.Size())
		if n, err := img.ReadAt(got, 0); n != len(got) || err != nil && err != io.EOF {
			t.Fatalf("read %d of %d bytes: %v", n, len(got), err)
		}
		if len(got) < len(want) || !bytes.Equal(got[:len(want)], want) || len(bytes.Trim(got[len(want):], "\x00")) > 0 {
			t.Error("what was written reads back differently")
		}
	})
}
