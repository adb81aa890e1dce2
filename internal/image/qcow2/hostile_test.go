package qcow2

import (
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// made is a small image by our own writer: four clusters of 512 bytes, of
// which the third is a hole, then a hole of some L2 tables.
func made(t testing.TB, o image.CreateOptions) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made.qcow2")
	o.VirtualBytes, o.BlockBytes = 256<<10, 512
	w, err := Create(path, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int64{0, 1, 3} {
		if _, err := w.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 512), i*512); err != nil {
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

func u32(p []byte, off int, x uint32) { binary.BigEndian.PutUint32(p[off:], x) }
func u64(p []byte, off int, x uint64) { binary.BigEndian.PutUint64(p[off:], x) }

// tables finds the L1 table and the first L2 table of made.
func tables(p []byte) (l1, l2 int) {
	l1 = int(binary.BigEndian.Uint64(p[40:]))
	return l1, int(binary.BigEndian.Uint64(p[l1:]) & offsetMask)
}

func TestHostile(t *testing.T) {
	plain := made(t, image.CreateOptions{})
	packed := made(t, image.CreateOptions{Compression: "zlib"})
	zstandard := made(t, image.CreateOptions{Compression: "zstd"})
	for _, c := range []struct {
		name   string
		of     []byte
		change func(p []byte) []byte
		want   error // nil where the image is odd and good
	}{
		{"unchanged", plain, nil, nil},
		{"empty file", nil, nil, fault.ErrCorrupt},
		{"only a magic", []byte(magic), nil, fault.ErrCorrupt},
		{"516 bytes that claim 152 TiB", plain, func(p []byte) []byte { u64(p, 24, 152<<40); return p[:516] }, fault.ErrCorrupt},

		{"virtual size 0", plain, func(p []byte) []byte { u64(p, 24, 0); return p }, nil},
		{"virtual size 2^63-1", plain, func(p []byte) []byte { u64(p, 24, 1<<63-1); return p }, fault.ErrCorrupt},
		{"virtual size 2^64-1", plain, func(p []byte) []byte { u64(p, 24, 1<<64-1); return p }, fault.ErrCorrupt},
		{"virtual size not of sectors", plain, func(p []byte) []byte { u64(p, 24, 1001); return p }, nil},
		{"clusters of 2^63", plain, func(p []byte) []byte { u32(p, 20, 63); return p }, fault.ErrCorrupt},
		{"clusters of 1 byte", plain, func(p []byte) []byte { u32(p, 20, 0); return p }, fault.ErrCorrupt},

		{"L1 of 2^31 entries", plain, func(p []byte) []byte { u32(p, 36, 1<<31); return p }, fault.ErrCorrupt},
		{"L1 of 2^31 entries for a disk that needs them", plain, func(p []byte) []byte {
			u32(p, 36, 1<<31)
			u64(p, 24, 1<<46)
			return p
		}, fault.ErrCorrupt},
		{"L1 that the file cannot hold", plain, func(p []byte) []byte {
			u32(p, 36, 1<<22)
			u64(p, 24, 1<<37)
			return p
		}, fault.ErrCorrupt},
		{"L1 too short", plain, func(p []byte) []byte { u32(p, 36, 1); return p }, fault.ErrCorrupt},
		{"L1 behind the end", plain, func(p []byte) []byte { u64(p, 40, 1<<40); return p }, fault.ErrCorrupt},
		{"L1 at 2^63", plain, func(p []byte) []byte { u64(p, 40, 1<<63); return p }, fault.ErrCorrupt},
		{"L1 at an odd place", plain, func(p []byte) []byte { u64(p, 40, 513); return p }, fault.ErrCorrupt},
		{"L1 in the header", plain, func(p []byte) []byte { u64(p, 40, 0); return p }, fault.ErrCorrupt},
		{"L2 behind the end", plain, func(p []byte) []byte { l1, _ := tables(p); u64(p, l1, 1<<40); return p }, fault.ErrCorrupt},
		{"L2 is the L1", plain, func(p []byte) []byte { l1, _ := tables(p); u64(p, l1, uint64(l1)); return p }, nil},
		{"L2 is itself a cluster", plain, func(p []byte) []byte { _, l2 := tables(p); u64(p, l2, uint64(l2)|flagCopied); return p }, nil},
		{"cluster behind the end", plain, func(p []byte) []byte { _, l2 := tables(p); u64(p, l2, 1<<50|flagCopied); return p }, fault.ErrCorrupt},
		{"cluster at the greatest offset", plain, func(p []byte) []byte { _, l2 := tables(p); u64(p, l2, offsetMask); return p }, fault.ErrCorrupt},
		{"two clusters share an offset", plain, func(p []byte) []byte { _, l2 := tables(p); copy(p[l2:l2+8], p[l2+8:l2+16]); return p }, nil},

		{"an unknown feature", plain, func(p []byte) []byte { u64(p, 72, 1<<40); return p }, fault.ErrUnsupported},
		{"an unknown version", plain, func(p []byte) []byte { u32(p, 4, 4); return p }, fault.ErrUnsupported},
		{"encrypted", plain, func(p []byte) []byte { u32(p, 32, 2); return p }, fault.ErrUnsupported},
		{"compression without its feature bit", plain, func(p []byte) []byte { p[104] = 1; return p }, fault.ErrCorrupt},
		{"compression bit without a compression", plain, func(p []byte) []byte { u64(p, 72, incompatCompression); return p }, fault.ErrCorrupt},
		{"header longer than its cluster", plain, func(p []byte) []byte { u32(p, 100, 1<<31); return p }, fault.ErrCorrupt},
		{"header of an odd length", plain, func(p []byte) []byte { u32(p, 100, 109); return p }, fault.ErrCorrupt},
		{"refcounts of 2^7 bits", plain, func(p []byte) []byte { u32(p, 96, 7); return p }, fault.ErrCorrupt},
		{"extended L2 with small clusters", plain, func(p []byte) []byte { u64(p, 72, incompatExtendedL2); return p }, fault.ErrCorrupt},
		{"a header extension of 4 GiB", plain, func(p []byte) []byte { u32(p, 112, 99); u32(p, 116, 1<<32-1); return p }, fault.ErrCorrupt},
		{"a backing file's name of 4 GiB", plain, func(p []byte) []byte { u64(p, 8, 200); u32(p, 16, 1<<32-1); return p }, fault.ErrCorrupt},
		{"a backing file's name far away", plain, func(p []byte) []byte { u64(p, 8, 1<<63); u32(p, 16, 9); return p }, fault.ErrCorrupt},
		{"a data file without a name", plain, func(p []byte) []byte { u64(p, 72, incompatDataFile); return p }, image.ErrNotAllowed},

		// Snapshots and bitmaps are told of in warnings; the disk is good.
		{"65536 snapshots in nothing", plain, func(p []byte) []byte { u32(p, 60, 65536); u64(p, 64, 512); return p }, nil},
		{"2^32-1 snapshots", plain, func(p []byte) []byte { u32(p, 60, 1<<32-1); u64(p, 64, 512); return p }, nil},
		{"snapshots at 2^63", plain, func(p []byte) []byte { u32(p, 60, 1); u64(p, 64, 1<<63); return p }, nil},
		{"a bitmap directory of 2^60 bytes", plain, func(p []byte) []byte { bitmapsExtension(p, 1, 1<<60, 512); return p }, nil},
		{"a bitmap directory at 2^63", plain, func(p []byte) []byte { bitmapsExtension(p, 1, 24, 1<<63); return p }, nil},
		{"2^32-1 bitmaps", plain, func(p []byte) []byte { bitmapsExtension(p, 1<<32-1, 24, 512); return p }, nil},

		{"compressed", packed, nil, nil},
		{"compressed cluster behind the end", packed, func(p []byte) []byte { _, l2 := tables(p); u64(p, l2, flagCompressed|1<<50); return p }, fault.ErrCorrupt},
		{"compressed cluster that ends early", packed, func(p []byte) []byte { clear(p[512:700]); return p }, fault.ErrCorrupt},
		{"compressed clusters share a range", packed, func(p []byte) []byte { _, l2 := tables(p); copy(p[l2:l2+8], p[l2+8:l2+16]); return p }, nil},
		{"deflate bomb", packed, func(p []byte) []byte {
			var b bytes.Buffer
			w, _ := flate.NewWriter(&b, 9)
			w.Write(make([]byte, 10<<20))
			w.Close()
			return compressedAtEnd(p, b.Bytes())
		}, fault.ErrCorrupt},
		{"zstd", zstandard, nil, nil},
		{"zstd bomb", zstandard, func(p []byte) []byte {
			e, _ := zstd.NewWriter(nil)
			return compressedAtEnd(p, e.EncodeAll(make([]byte, 10<<20), nil))
		}, fault.ErrCorrupt},
		{"zstd frame that says 2^60 bytes", zstandard, func(p []byte) []byte {
			return compressedAtEnd(p, []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x10, 3, 0, 0})
		}, fault.ErrCorrupt},
		{"zstd window of 2 TiB", zstandard, func(p []byte) []byte {
			return compressedAtEnd(p, []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0xff, 1, 0, 0, 0, 0, 0})
		}, fault.ErrCorrupt},
		{"zstd frames of nothing", zstandard, func(p []byte) []byte {
			return compressedAtEnd(p, bytes.Repeat([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0}, 40))
		}, fault.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := bytes.Clone(c.of)
			if c.change != nil {
				p = c.change(p)
			}
			err := imagetest.Hostile(t, func() (image.Image, error) {
				return open(Open(imagetest.Bytes("hostile", p), image.OpenOptions{}))
			})
			switch {
			case c.want == nil && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != nil && !errors.Is(err, c.want):
				t.Errorf("error %v, want %v", err, c.want)
			case err != nil:
				t.Log(err)
			}
		})
	}
}

// open keeps a nil *Image from becoming an Image that is not nil.
func open(img *Image, err error) (image.Image, error) {
	if err != nil {
		return nil, err
	}
	return img, nil
}

func bitmapsExtension(p []byte, count uint32, bytes, at uint64) {
	u32(p, 112, extBitmaps)
	u32(p, 116, 24)
	u32(p, 120, count)
	u64(p, 128, bytes)
	u64(p, 136, at)
}

// compressedAtEnd makes the first cluster the compressed data at the end of
// the file, as long as an entry can say.
func compressedAtEnd(p, data []byte) []byte {
	_, l2 := tables(p)
	u64(p, l2, flagCompressed|1<<61|uint64(len(p)))
	return append(append(p, data...), make([]byte, 1024)...)
}

// However an image is cut, what is still served is right.
func TestCutAnywhere(t *testing.T) {
	for _, compression := range []string{"", "zlib"} {
		whole := made(t, image.CreateOptions{Compression: compression})
		img, err := Open(imagetest.Bytes("whole", whole), image.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, img.Size())
		if _, err := img.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		for n := range whole {
			img, err := Open(imagetest.Bytes("cut", whole[:n]), image.OpenOptions{})
			if err != nil {
				if !errors.Is(err, fault.ErrCorrupt) {
					t.Errorf("cut at %d: %v", n, err)
				}
				continue
			}
			// A last cluster that is cut reads as zeros, so the end of the
			// tables must lie behind the cut for a change to be seen.
			if n%512 != 0 {
				continue
			}
			for off := int64(0); off < img.Size(); off += 512 {
				p := make([]byte, 512)
				if _, err := img.ReadAt(p, off); err == nil && !bytes.Equal(p, want[off:][:512]) {
					t.Errorf("cut at %d: the cluster at %d reads wrong", n, off)
				} else if err != nil && !errors.Is(err, fault.ErrCorrupt) {
					t.Errorf("cut at %d: %v", n, err)
				}
			}
		}
	}
}

// Many L1 entries that name one table of zeros make a disk of a terabyte out
// of a small file; the first extents must come at once.
func TestOneTableManyTimes(t *testing.T) {
	const cluster = 64 << 10
	p := make([]byte, 4*cluster)
	copy(p, made(t, image.CreateOptions{})[:112])
	u32(p, 20, 16)
	u64(p, 24, 8192*512<<20) // 4 TiB
	u32(p, 36, 8192)
	u64(p, 40, cluster)
	for i := range 8192 {
		u64(p, cluster+i*8, 2*cluster)
		u64(p, 2*cluster+i*8, flagZero)
	}
	if err := imagetest.Hostile(t, func() (image.Image, error) {
		return open(Open(imagetest.Bytes("many", p), image.OpenOptions{}))
	}); err != nil {
		t.Error(err)
	}
}

func TestLoopsAndDepth(t *testing.T) {
	dir := t.TempDir()
	overlay := func(name, parent string) string {
		path := filepath.Join(dir, name)
		w, err := Create(path, image.CreateOptions{VirtualBytes: 1 << 20, Parent: parent, ParentFormat: image.Qcow2})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	self := overlay("self", "self")
	a := overlay("a", "b")
	overlay("b", "a")
	deep := overlay("deep0", "deep1")
	for i := 1; i < 230; i++ {
		overlay(fmt.Sprintf("deep%d", i), fmt.Sprintf("deep%d", i+1))
	}
	for _, path := range []string{self, a, deep} {
		_, err := openPath(path, image.OpenOptions{})
		if !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := openPath(overlay("orphan", "gone"), image.OpenOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a parent that is gone: %v", err)
	}
}

// A subcluster cannot be both zero and data, nor data of a cluster that is
// not there.
func TestSubclusterBitmaps(t *testing.T) {
	const cluster = 16 << 10
	base := make([]byte, 4*cluster)
	copy(base, made(t, image.CreateOptions{})[:112])
	u32(base, 20, 14)
	u64(base, 72, incompatExtendedL2)
	u64(base, 24, cluster)
	u32(base, 36, 1)
	u64(base, 40, cluster)
	u64(base, cluster, 2*cluster)
	for _, c := range []struct {
		name          string
		entry, bitmap uint64
		bad           bool
	}{
		{"nothing", 0, 0, false},
		{"all data", 3 * cluster, 1<<32 - 1, false},
		{"all zero, without a cluster", 0, (1<<32 - 1) << 32, false},
		{"both", 3 * cluster, 1 | 1<<32, true},
		{"data without a cluster", 0, 1, true},
		{"compressed with a bitmap", flagCompressed | 3*cluster, 1, true},
	} {
		p := bytes.Clone(base)
		u64(p, 2*cluster, c.entry)
		u64(p, 2*cluster+8, c.bitmap)
		img, err := Open(imagetest.Bytes(c.name, p), image.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := img.ReadAt(make([]byte, cluster), 0); errors.Is(err, fault.ErrCorrupt) != c.bad {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// Bitmaps that may lack writes are refused, since a backup that believed them
// would be wrong.
func TestBitmapsThatLie(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	imagetest.Qemu(t, "create", "-f", "qcow2", path, "4M")
	imagetest.Qemu(t, "bitmap", "--add", path, "b")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := readHeader(imagetest.Bytes("good", good))
	if err != nil {
		t.Fatal(err)
	}
	dir := int(h.bitmaps.directoryBegin)
	for _, c := range []struct {
		name   string
		change func(p []byte)
		want   error
	}{
		{"unchanged", func([]byte) {}, nil},
		{"written by one who does not know bitmaps", func(p []byte) { u64(p, 88, 0) }, fault.ErrUnsupported},
		{"in use", func(p []byte) { p[dir+15] |= bitmapInUse }, fault.ErrUnsupported},
		{"an unknown flag", func(p []byte) { p[dir+12] = 0x80 }, fault.ErrUnsupported},
		{"an unknown type", func(p []byte) { p[dir+16] = 2 }, fault.ErrUnsupported},
		{"a table of the wrong length", func(p []byte) { u32(p, dir+8, 1<<31) }, fault.ErrCorrupt},
		{"a table behind the end", func(p []byte) { u64(p, dir, 1<<40) }, fault.ErrCorrupt},
	} {
		p := bytes.Clone(good)
		c.change(p)
		img, err := Open(imagetest.Bytes(c.name, p), image.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var last error
		for _, err := range img.Changed(context.Background(), "b") {
			last = err
		}
		if !errors.Is(last, c.want) {
			t.Errorf("%s: %v, want %v", c.name, last, c.want)
		}
	}
}

// FuzzOpen: images come from strangers' hypervisors. Whatever the bytes say,
// nothing panics, loops, or takes more memory than the file could justify.
func FuzzOpen(f *testing.F) {
	for _, o := range []image.CreateOptions{{}, {Compression: "zlib"}, {Compression: "zstd"}, {Parent: "x", ParentFormat: image.Raw}} {
		f.Add(made(f, o))
	}
	addOthers(f)
	f.Fuzz(exercise)
}

// FuzzTables lets the input be the tables of snapshots and bitmaps in an image
// that is good otherwise.
func FuzzTables(f *testing.F) {
	base := made(f, image.CreateOptions{})
	be := binary.BigEndian
	snapshot := make([]byte, 40+24+2)
	l1, l2 := tables(base)
	be.PutUint64(snapshot, uint64(l1))
	be.PutUint32(snapshot[8:], 8)
	be.PutUint16(snapshot[12:], 1)
	be.PutUint16(snapshot[14:], 1)
	be.PutUint32(snapshot[36:], 24)
	be.PutUint64(snapshot[48:], 256<<10)
	copy(snapshot[64:], "1s")
	bitmap := make([]byte, 24+1)
	be.PutUint64(bitmap, uint64(l2)) // its entries name clusters, as a bitmap's do
	be.PutUint32(bitmap[8:], 1)
	bitmap[16], bitmap[17], bitmap[19], bitmap[24] = 1, 9, 1, 'b'
	f.Add(uint32(1), uint32(1), snapshot, bitmap)
	f.Add(uint32(65536), uint32(65535), snapshot, bitmap)
	f.Fuzz(func(t *testing.T, snapshots, bitmaps uint32, table, directory []byte) {
		p := bytes.Clone(base)
		u32(p, 60, snapshots)
		u64(p, 64, uint64(len(p)))
		p = append(append(p, table...), make([]byte, -len(table)&511)...)
		bitmapsExtension(p, bitmaps, uint64(len(directory)), uint64(len(p)))
		u64(p, 88, autoclearBitmaps)
		exercise(t, append(append(p, directory...), make([]byte, -len(directory)&511)...))
	})
}

// exercise does with an image what people do.
func exercise(t *testing.T, p []byte) {
	var img *Image
	imagetest.Hostile(t, func() (image.Image, error) {
		var err error
		img, err = Open(imagetest.Bytes("fuzz", p), image.OpenOptions{OnlyTop: true})
		return open(img, err)
	})
	if img == nil {
		return
	}
	for i, s := range img.Snapshots() {
		if i == 3 {
			break
		}
		imagetest.Hostile(t, func() (image.Image, error) {
			return open(Open(imagetest.Bytes("fuzz", p), image.OpenOptions{OnlyTop: true, Snapshot: s.Name}))
		})
	}
	for i, b := range img.Bitmaps() {
		if i == 3 {
			break
		}
		n := 0
		var last extent.Extent
		for e, err := range img.Changed(context.Background(), b.Name) {
			if err != nil {
				break
			}
			if e.Off < last.End() || e.Len <= 0 || e.End() > img.header.size {
				t.Fatalf("changed %v after %v on a disk of %d", e, last, img.header.size)
			}
			last = e
			if n++; n == 1000 {
				break
			}
		}
	}
	// What is read in one piece and in two is the same.
	n := min(img.Size(), 8<<10)
	a, b := make([]byte, n), make([]byte, n)
	_, errA := img.ReadAt(a, 0)
	_, errB := img.ReadAt(b[:n/3], 0)
	if errB == nil || errB == io.EOF {
		_, errB = img.ReadAt(b[n/3:], n/3)
	}
	if (errA == nil || errA == io.EOF) && (errB == nil || errB == io.EOF) && !bytes.Equal(a, b) {
		t.Error("two reads disagree")
	}
}

// addOthers adds small images by qemu-img and the samples, where there are
// any.
func addOthers(f *testing.F) {
	add := func(path string) {
		p, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if len(p) <= 256<<10 { // the fuzzer gets nowhere with long ones
			f.Add(p)
		}
	}
	if os.Getenv("BACKSTAY_SAMPLES") != "" {
		for _, name := range []string{"dfvfs/ext2.qcow2.gz", "dfvfs-old/image.qcow2.gz", "cdi/invalid-qcow-large-json.img.gz", "virtnbdbackup/vm5-sda.qcow2.gz"} {
			path, _ := imagetest.Sample(f, name)
			add(path)
		}
	}
	if _, err := exec.LookPath("qemu-io"); err != nil {
		return
	}
	path := filepath.Join(f.TempDir(), "seed.qcow2")
	imagetest.Qemu(f, "create", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
	imagetest.Qemu(f, "bitmap", "--add", "-g", "512", path, "b")
	qemuIO(f, path, "write -P 1 0 2k", "write -z 3k 1k", "write -c -P 2 4k 512")
	imagetest.Qemu(f, "snapshot", "-c", "s", path)
	qemuIO(f, path, "write -P 3 1k 2k")
	add(path)
	imagetest.Qemu(f, "create", "-f", "qcow2", "-o", "cluster_size=16k,extended_l2=on", path, "256k")
	qemuIO(f, path, "write -P 1 0 2k", "write -z 3k 1k", "write -c -P 2 16k 16k")
	add(path)
}
