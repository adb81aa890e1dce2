package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zlib"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// made is a whole VMDK file of 1 MiB in memory.
func made(t testing.TB, o image.CreateOptions) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	disk := imagetest.NewDisk(11, 1<<20)
	o.VirtualBytes = disk.Size()
	w, err := vmdk.Create(path, o)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, disk.Size())
	if _, err := disk.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if p, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	return p
}

func openBytes(p []byte, dir *imagetest.Dir) (image.Image, error) {
	o := image.OpenOptions{}
	if dir != nil {
		o.Resolver = dir
	}
	d, err := vmdk.Open(imagetest.Bytes("hostile.vmdk", p), o)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// readsAll reads the whole of an image that opens.
func readsAll(p []byte, dir *imagetest.Dir) error {
	img, err := openBytes(p, dir)
	if err != nil {
		return err
	}
	defer img.Close()
	if img.Size() > 64<<20 {
		return nil
	}
	if _, err := img.ReadAt(make([]byte, img.Size()), 0); err != nil && err != io.EOF {
		return err
	}
	return nil
}

func put32(at int, v uint32) func([]byte) {
	return func(p []byte) { binary.LittleEndian.PutUint32(p[at:], v) }
}
func put64(at int, v uint64) func([]byte) {
	return func(p []byte) { binary.LittleEndian.PutUint64(p[at:], v) }
}

// The header's fields, by offset.
const (
	atFlags     = 8
	atCapacity  = 12
	atGrain     = 20
	atDesc      = 28
	atDescSize  = 36
	atTableSize = 44
	atRGD       = 48
	atGD        = 56
	atOverhead  = 64
	atAlgorithm = 77
)

func TestHostileSparseHeaders(t *testing.T) {
	good := made(t, image.CreateOptions{})
	if err := readsAll(good, nil); err != nil {
		t.Fatal(err)
	}
	gd := int(binary.LittleEndian.Uint64(good[atGD:])) * 512
	table := int(binary.LittleEndian.Uint32(good[gd:])) * 512
	rgd := int(binary.LittleEndian.Uint64(good[atRGD:])) * 512
	noSpare := put32(atFlags, 1)
	type edits = []func([]byte)
	for _, c := range []struct {
		name string
		edit edits
		want error // nil: only memory and time count
	}{
		{"version 0", edits{put32(4, 0)}, fault.ErrUnsupported},
		{"version 4", edits{put32(4, 4)}, fault.ErrUnsupported},
		{"text transfer", edits{func(p []byte) { p[75] = '\n' }}, fault.ErrCorrupt},
		{"capacity of all ones", edits{put64(atCapacity, 1<<64-1)}, fault.ErrCorrupt},
		{"capacity that overflows in bytes", edits{put64(atCapacity, 1<<55)}, fault.ErrCorrupt},
		{"capacity of 152 TiB", edits{put64(atCapacity, 152<<31)}, fault.ErrCorrupt},
		{"capacity of 2 sectors", edits{put64(atCapacity, 2)}, nil},
		{"grain of 0", edits{put64(atGrain, 0)}, fault.ErrCorrupt},
		{"grain of 3", edits{put64(atGrain, 3)}, fault.ErrCorrupt},
		{"grain of 2^63", edits{put64(atGrain, 1<<63)}, fault.ErrCorrupt},
		{"grain of 2^32", edits{put64(atGrain, 1<<32)}, fault.ErrCorrupt},
		{"grain of 1", edits{put64(atGrain, 1)}, nil},
		{"table of 0 entries", edits{put32(atTableSize, 0)}, fault.ErrCorrupt},
		{"table of 506 entries", edits{put32(atTableSize, 506)}, fault.ErrCorrupt},
		{"table of 2^31 entries", edits{put32(atTableSize, 1<<31)}, fault.ErrCorrupt},
		{"table of 1 entry", edits{put32(atTableSize, 1)}, nil},
		{"directory behind the end", edits{put64(atGD, 1<<30), noSpare}, fault.ErrCorrupt},
		{"directory behind the end, with a copy", edits{put64(atGD, 1<<30)}, nil},
		{"directory at 2^63", edits{put64(atGD, 1<<63), noSpare}, fault.ErrCorrupt},
		{"directory at 0", edits{put64(atGD, 0), noSpare}, fault.ErrCorrupt},
		{"directory in a footer that is not there", edits{put64(atGD, 1<<64-1)}, fault.ErrCorrupt},
		{"table behind the end", edits{put32(gd, 1<<31), noSpare}, fault.ErrCorrupt},
		{"table behind the end, with a copy", edits{put32(gd, 1<<31)}, nil},
		{"directory entry lost, with a copy", edits{put32(gd, 0)}, nil},
		{"both tables behind the end", edits{put32(gd, 1<<31), put32(rgd, 1<<31)}, fault.ErrCorrupt},
		{"table is the descriptor", edits{put32(gd, 1), noSpare}, fault.ErrCorrupt},
		{"table is itself the directory", edits{put32(gd, uint32(gd/512))}, nil},
		{"grain behind the end", edits{put32(table, 1<<32-1), noSpare}, fault.ErrCorrupt},
		{"grain behind the end, with a copy of its table", edits{put32(table, 1<<32-1)}, nil},
		{"grain is the descriptor", edits{put32(table, 1), noSpare}, fault.ErrCorrupt},
		{"two grains in one place", edits{put32(table+4, binary.LittleEndian.Uint32(good[table:]))}, nil},
		{"descriptor behind the end", edits{put64(atDesc, 1<<40)}, fault.ErrCorrupt},
		{"descriptor of 2^54 sectors", edits{put64(atDescSize, 1<<54)}, fault.ErrCorrupt},
		{"descriptor of 1 GiB", edits{put64(atDescSize, 2<<20)}, fault.ErrCorrupt},
		{"no descriptor", edits{put64(atDesc, 0)}, fault.ErrUnsupported},
		{"data behind the end", edits{put64(atOverhead, 1<<40)}, fault.ErrCorrupt},
		{"compressed by nothing known", edits{put32(atFlags, 1<<16|3), func(p []byte) { p[atAlgorithm] = 9 }}, fault.ErrUnsupported},
		{"said to be compressed", edits{put32(atFlags, 3<<16|3), func(p []byte) { p[atAlgorithm] = 1 }}, fault.ErrCorrupt},
		{"said to be compressed, without markers", edits{put32(atFlags, 1<<16|3), func(p []byte) { p[atAlgorithm] = 1 }}, fault.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := bytes.Clone(good)
			for _, f := range c.edit {
				f(p)
			}
			imagetest.Hostile(t, func() (image.Image, error) { return openBytes(p, nil) })
			if err := readsAll(p, nil); c.want != nil && !errors.Is(err, c.want) || c.want == nil && err != nil && !errors.Is(err, fault.ErrCorrupt) {
				t.Errorf("reading it gives %v, want %v", err, c.want)
			}
		})
	}
}

func packed(p []byte) []byte {
	var b bytes.Buffer
	w := zlib.NewWriter(&b)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

func TestHostileStreams(t *testing.T) {
	good := made(t, image.CreateOptions{Variant: vmdk.StreamOptimized})
	const first = 128 * 512 // the first grain's marker
	swap := func(content []byte) func([]byte) {
		return func(p []byte) {
			z := packed(content)
			put32(first+8, uint32(len(z)))(p)
			copy(p[first+12:], z)
		}
	}
	noise := make([]byte, 64<<10)
	imagetest.NewDisk(1, 1<<30).ReadAt(noise, 0)
	type edits = []func([]byte)
	for _, c := range []struct {
		name string
		edit edits
		want error
	}{
		{"grain holds more than a grain", edits{swap(make([]byte, 64<<10+1))}, fault.ErrCorrupt},
		{"grain is a bomb", edits{swap(make([]byte, 1<<28))}, fault.ErrCorrupt},
		{"grain holds less than a grain", edits{swap(make([]byte, 64<<10-1))}, fault.ErrCorrupt},
		{"grain of length 0", edits{put32(first+8, 0)}, fault.ErrCorrupt},
		{"grain of length 2^32-1", edits{put32(first+8, 1<<32-1)}, fault.ErrCorrupt},
		{"grain behind the end", edits{put32(first+8, 130<<10)}, nil},
		{"grain for another place", edits{put64(first, 128)}, fault.ErrCorrupt},
		{"grain with a flipped bit", edits{func(p []byte) { p[first+40] ^= 4 }}, fault.ErrCorrupt},
		{"grain whose checksum is wrong", edits{func(p []byte) {
			n := binary.LittleEndian.Uint32(p[first+8:])
			p[first+12+n-1] ^= 1
		}}, fault.ErrCorrupt},
		{"footer gone", edits{func(p []byte) { clear(p[len(p)-1024:]) }}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := bytes.Clone(good)
			for _, f := range c.edit {
				f(p)
			}
			imagetest.Hostile(t, func() (image.Image, error) { return openBytes(p, nil) })
			if err := readsAll(p, nil); c.want != nil && !errors.Is(err, c.want) || c.want == nil && err != nil && !errors.Is(err, fault.ErrCorrupt) {
				t.Errorf("reading it gives %v, want %v", err, c.want)
			}
		})
	}
}

// However much of a file is missing, no read gives zeros for what was there.
func TestTruncatedAnywhere(t *testing.T) {
	for _, variant := range []string{vmdk.MonolithicSparse, vmdk.StreamOptimized} {
		good := made(t, image.CreateOptions{Variant: variant})
		want := make([]byte, 1<<20)
		imagetest.NewDisk(11, 1<<20).ReadAt(want, 0)
		for n := 0; n < len(good); n += 512 {
			img, err := openBytes(good[:n:n], nil)
			if err != nil {
				if !errors.Is(err, fault.ErrCorrupt) {
					t.Errorf("%s cut at %d: %v", variant, n, err)
				}
				continue
			}
			p := make([]byte, 4096)
			for off := int64(0); off < img.Size(); off += int64(len(p)) {
				if _, err := img.ReadAt(p, off); err == nil && !bytes.Equal(p, want[off:off+4096]) {
					t.Fatalf("%s cut at %d: wrong bytes at %d", variant, n, off)
				} else if err != nil && !errors.Is(err, fault.ErrCorrupt) {
					t.Fatalf("%s cut at %d: %v", variant, n, err)
				}
			}
		}
	}
}

// A stream may have lost its footer, or never had one, and be whole.
func TestStreamsWithoutFooter(t *testing.T) {
	good := made(t, image.CreateOptions{Variant: vmdk.StreamOptimized})
	want := imagetest.NewDisk(11, 1<<20)
	footer := len(good) - 1024
	var directory int
	for at := footer - 512; ; at -= 512 { // back to the directory's marker
		if binary.LittleEndian.Uint32(good[at+12:]) == 2 && binary.LittleEndian.Uint32(good[at+8:]) == 0 {
			directory = at
			break
		}
	}
	for name, p := range map[string][]byte{
		"bytes appended":        append(bytes.Clone(good), make([]byte, 5000)...),
		"directory and no more": good[:footer-512],
		"no directory":          append(bytes.Clone(good[:directory]), make([]byte, 512)...),
	} {
		img, err := openBytes(p, nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		imagetest.Reader(t, img, want)
	}
	if _, err := openBytes(good[:directory], nil); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a stream that breaks off opens: %v", err)
	}
}

func TestHostileDescriptors(t *testing.T) {
	head := "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n"
	for _, c := range []struct {
		name, text string
		want       error
	}{
		{"a line of 100 MB", head + strings.Repeat("a", 100<<20), fault.ErrCorrupt},
		{"a line of 3 MB", head + "x=" + strings.Repeat("a", 3<<20) + "\nRW 8 ZERO\n", nil},
		{"a million extents", head + strings.Repeat("RW 1 ZERO\n", 1000000), fault.ErrCorrupt},
		{"four hundred thousand extents", head + strings.Repeat("RW 1 ZERO\n", 400000), fault.ErrCorrupt},
		{"ten thousand extents", head + strings.Repeat("RW 1 ZERO\n", 10000), nil},
		{"a million settings", head + strings.Repeat("a=1\n", 1000) + "RW 8 ZERO\n", nil},
		{"minus one sector", head + "RW -1 ZERO\n", fault.ErrCorrupt},
		{"2^63 sectors", head + "RW 9223372036854775808 ZERO\n", fault.ErrCorrupt},
		{"sectors that overflow in bytes", head + "RW 36028797018963968 ZERO\n", fault.ErrCorrupt},
		{"a sum that overflows", head + strings.Repeat("RW 140737488355327 ZERO\n", 4), fault.ErrCorrupt},
		{"an offset that overflows", head + "RW 1 FLAT \"a\" 36028797018963967\n", fault.ErrCorrupt},
		{"an offset of minus one", head + "RW 1 FLAT \"a\" -1\n", fault.ErrCorrupt},
		{"flat file too short", head + "RW 3 FLAT \"a\" 0\n", fault.ErrCorrupt},
		{"a name without an end", head + "RW 1 FLAT \"a", fault.ErrCorrupt},
		{"no name", head + "RW 1 FLAT\n", fault.ErrCorrupt},
		{"no type", head + "RW 1\n", fault.ErrCorrupt},
		{"no extents", head, fault.ErrCorrupt},
		{"unknown type", head + "RW 1 MAGIC \"a\"\n", fault.ErrUnsupported},
		{"two CIDs", head + "CID=00000001\nRW 1 ZERO\n", fault.ErrCorrupt},
		{"the same CID twice", head + "cid = 12345678\nRW 1 ZERO\n", nil},
		{"a CID that is none", head[:40] + "CID=wxyz\nRW 1 ZERO\n", fault.ErrCorrupt},
		{"invalid UTF-8", head + "ddb.x=\"\xff\xfe\"\nRW 1 ZERO\n", nil},
		{"version 9", "# Disk DescriptorFile\nversion=9\nRW 1 ZERO\n", fault.ErrUnsupported},
		{"version x", "# Disk DescriptorFile\nversion=x\nRW 1 ZERO\n", fault.ErrCorrupt},
		{"NOACCESS", head + "NOACCESS 1 FLAT \"a\" 0\n", fault.ErrUnsupported},
		{"raw device mapping", head + "RW 1 VMFSRDM \"a\"\n", fault.ErrUnsupported},
		{"physical device", strings.Replace(head, "custom", "fullDevice", 1) + "RW 1 FLAT \"/dev/sda\" 0\n", fault.ErrUnsupported},
		{"encrypted", head + "encryption.keySafe = \"vmware:key/list/(pair/...\"\nRW 1 ZERO\n", fault.ErrUnsupported},
		{"encrypted by an I/O filter", head + "RW 1 ZERO\nddb.iofilters = \"vmwcrypt\"\n", fault.ErrUnsupported},
		{"its own descriptor as a sparse extent", head + "RW 1 SPARSE \"hostile.vmdk\"\n", image.ErrNotAllowed},
		{"an absolute path", head + "RW 1 FLAT \"/etc/passwd\" 0\n", image.ErrNotAllowed},
		{"a path upwards", head + "RW 1 FLAT \"../secret\" 0\n", image.ErrNotAllowed},
		{"a snapshot without a file name", strings.Replace(head, "ffffffff", "00000007", 1) + "RW 1 ZERO\n", fault.ErrCorrupt},
		{"a snapshot", strings.Replace(head, "ffffffff", "00000007", 1) + "parentFileNameHint=\"hostile.vmdk\"\nRW 1 ZERO\n", image.ErrNotAllowed},
		{"Windows line ends, NULs and blanks", strings.ReplaceAll(head, "\n", " \r\n") + "RW\t1 ZERO\r\n rw  1   zero  \r\n\x00\x00RW 5 MAGIC", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := &imagetest.Dir{Files: map[string][]byte{"a": make([]byte, 1024)}}
			text := []byte(c.text)
			err := imagetest.Hostile(t, func() (image.Image, error) { return openBytes(text, dir) })
			if c.want == nil && err != nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("it gives %v, want %v", err, c.want)
			}
		})
	}
}

// A stream without a directory is walked marker by marker. A descriptor that
// names it for each of its extents must not have it walked each time.
func TestOneFileForManyExtents(t *testing.T) {
	p := made(t, image.CreateOptions{Variant: vmdk.StreamOptimized})
	p = append(p, make([]byte, 5000)...) // its footer is not where it should be
	var text strings.Builder
	text.WriteString("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n")
	for range 20000 {
		text.WriteString("RW 128 SPARSE \"x\"\n")
	}
	f := &countingFile{File: imagetest.Bytes("x", p)}
	if err := imagetest.Hostile(t, func() (image.Image, error) {
		d, err := vmdk.Open(imagetest.Bytes("many.vmdk", []byte(text.String())), image.OpenOptions{Resolver: f})
		if err != nil {
			return nil, err
		}
		return d, nil
	}); err != nil {
		t.Error(err)
	}
	if f.reads > 5000 {
		t.Errorf("the file is read %d times", f.reads)
	}
}

// A countingFile is the one file that there is.
type countingFile struct {
	image.File
	reads int
}

func (f *countingFile) Resolve(string) (image.File, error) { return f, nil }
func (f *countingFile) ReadAt(p []byte, off int64) (int, error) {
	f.reads++
	return f.File.ReadAt(p, off)
}

// A snapshot of itself, or of one that is a snapshot of it, ends by itself.
func TestChainThatComesBack(t *testing.T) {
	dir := t.TempDir()
	child := func(cid, parent, hint string) string {
		return "# Disk DescriptorFile\nversion=1\nCID=" + cid + "\nparentCID=" + parent + "\ncreateType=\"custom\"\nparentFileNameHint=\"" + hint + "\"\nRW 8 ZERO\n"
	}
	for name, text := range map[string]string{
		"self.vmdk": child("00000001", "00000001", "self.vmdk"),
		"a.vmdk":    child("00000001", "00000002", "b.vmdk"),
		"b.vmdk":    child("00000002", "00000001", "/elsewhere/a.vmdk"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"self.vmdk", "a.vmdk"} {
		if _, err := openPath(filepath.Join(dir, name)); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
