package imagetest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// A WriterTest says how to make and to read one format.
type WriterTest struct {
	// Create starts a new image at path.
	Create func(path string, o image.CreateOptions) (image.Writer, error)
	// Open reads the image at path.
	Open func(path string) (image.Image, error)

	Ext       string                // of the file's name, with the dot: ".qcow2"
	Variants  []image.CreateOptions // without sizes; none for the defaults alone
	SizeUnit  int64                 // the format's disks are multiples of this; 0 for 1
	Sizes     []int64               // further sizes to try
	Qemu      string                // qemu-img's name of the format; empty for no second opinion
	QemuCheck bool                  // qemu-img check knows the format
	// QemuSkip names what qemu-img cannot judge in a variant, empty if it can.
	QemuSkip func(o image.CreateOptions) string
}

// Writer writes disks of many sizes in several orders with every variant, and
// reads each back by our own reader and by qemu-img. With -short, which runs
// under the race detector, they are small disks written in parallel.
func Writer(t *testing.T, w WriterTest) {
	if len(w.Variants) == 0 {
		w.Variants = []image.CreateOptions{{}}
	}
	if w.SizeUnit == 0 {
		w.SizeUnit = 1
	}
	sizes := append([]int64{0, 512, 513, 64<<10 - 1, 64 << 10, 64<<10 + 512, 3<<20 + 12345, 40<<20 + 512}, w.Sizes...)
	for v, o := range w.Variants {
		for i, size := range sizes {
			if testing.Short() && size > 4<<20 {
				continue
			}
			o.VirtualBytes = size
			name := fmt.Sprintf("%s,%s,block=%d,level=%d/%d bytes", o.Variant, o.Compression, o.BlockBytes, o.Level, size)
			orders := []string{"ascending", "random", "parallel"}
			if v > 1 || i > 6 || testing.Short() { // all at once takes too long
				orders = orders[2:]
			}
			t.Run(name, func(t *testing.T) { w.roundTrip(t, o, orders) })
		}
	}
	t.Run("unfinished", w.unfinished)
	t.Run("out of range", w.outOfRange)
}

func (w WriterTest) roundTrip(t *testing.T, o image.CreateOptions, orders []string) {
	disk := NewDisk(uint64(o.VirtualBytes), o.VirtualBytes)
	raw := ""
	if w.Qemu != "" && o.VirtualBytes < 15<<40 { // the longest file of common file systems
		raw = disk.Save(t)
	}
	for _, order := range orders {
		path := filepath.Join(t.TempDir(), "disk"+w.Ext)
		img, err := w.Create(path, o)
		if err != nil {
			t.Fatalf("create: %v", err)
		}
		if img.Ordered() {
			if order != orders[len(orders)-1] {
				img.Close()
				continue
			}
			order = "ascending"
		}
		w.write(t, img, disk, order)
		if err := img.Finish(); err != nil {
			t.Fatalf("%s: Finish: %v", order, err)
		}
		if err := img.Close(); err != nil {
			t.Errorf("%s: Close after Finish: %v", order, err)
		}
		back, err := w.Open(path)
		if err != nil {
			t.Fatalf("%s: our own reader: %v", order, err)
		}
		if want := (o.VirtualBytes + w.SizeUnit - 1) / w.SizeUnit * w.SizeUnit; back.Size() != want {
			t.Errorf("%s: read back as %d bytes, want %d", order, back.Size(), want)
		}
		for _, warning := range back.Info().Warnings {
			t.Errorf("%s: our own reader warns: %s", order, warning)
		}
		Reader(t, back, disk)
		back.Close()
		if t.Failed() {
			t.Fatalf("order %s, file %s", order, path)
		}
		if raw == "" {
			continue
		}
		if w.QemuSkip != nil {
			if why := w.QemuSkip(o); why != "" {
				t.Logf("no second opinion: %s", why)
				continue
			}
		}
		QemuCompare(t, raw, "raw", path, w.Qemu)
		if w.QemuCheck {
			Qemu(t, "check", "-f", w.Qemu, path)
		}
	}
}

// pieces cuts what a copy of disk must write into ranges that are aligned to
// unit and of uneven lengths.
func pieces(disk *Disk, unit int64, r *rand.Rand) []extent.Extent {
	var list []extent.Extent
	for _, e := range disk.Written().Align(unit, disk.Size()).List() {
		for off := e.Off; off < e.End(); {
			n := min((1+r.Int64N(8))*unit, e.End()-off)
			if unit < 512 {
				n = min(1+r.Int64N(200<<10), e.End()-off)
			}
			list = append(list, extent.Extent{Off: off, Len: n})
			off += n
		}
	}
	return list
}

func (w WriterTest) write(t *testing.T, img image.Writer, disk *Disk, order string) {
	t.Helper()
	r := rand.New(rand.NewPCG(9, 9))
	list := pieces(disk, img.Unit(), r)
	put := func(e extent.Extent) error {
		p := make([]byte, e.Len)
		if _, err := disk.ReadAt(p, e.Off); err != nil && err != io.EOF {
			return err
		}
		n, err := img.WriteAt(p, e.Off)
		if err == nil && n != len(p) {
			err = io.ErrShortWrite
		}
		clear(p) // the Writer must not have kept p
		return err
	}
	if order != "ascending" {
		r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	}
	workers := 1
	if order == "parallel" {
		workers = 4
	}
	todo := make(chan extent.Extent, len(list))
	for _, e := range list {
		todo <- e
	}
	close(todo)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for e := range todo {
				if err := put(e); err != nil {
					t.Errorf("WriteAt %v: %v", e, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A writer that was closed without Finish must not have left a file that
// reads as an image of the same content. Raw and flat files have no header
// that could be missing, so only those that are refused are looked at.
func (w WriterTest) unfinished(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk"+w.Ext)
	disk := NewDisk(5, 1<<20)
	img, err := w.Create(path, image.CreateOptions{VirtualBytes: disk.Size()})
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, img, disk, "ascending")
	if err := img.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := img.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if w.Qemu == "" || w.Qemu == "raw" {
		return
	}
	if back, err := w.Open(path); err == nil {
		back.Close()
		t.Error("an unfinished image opens")
	}
}

func (w WriterTest) outOfRange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk"+w.Ext)
	img, err := w.Create(path, image.CreateOptions{VirtualBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	p := make([]byte, img.Unit())
	p[0] = 1
	for _, off := range []int64{-img.Unit(), 1 << 40, -1 << 63} {
		if _, err := img.WriteAt(p, off); err == nil {
			t.Errorf("WriteAt(%d) is accepted for a disk of 1 MiB", off)
		}
	}
}

// Fill writes the runs of disk in order and finishes.
func Fill(t testing.TB, w image.Writer, disk *Disk) {
	t.Helper()
	for _, e := range disk.Written().List() {
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

// FixedHasHoles is for formats that may give a disk all its room at once: what
// such a disk of 64 MiB at path does not hold takes no room, and costs nothing
// to read.
func FixedHasHoles(t *testing.T, path string, w image.Writer, open func(image.File) (image.Image, error)) {
	t.Helper()
	p := make([]byte, 4<<20)
	p[1<<20], p[2<<20-1] = 1, 1
	for _, off := range []int64{0, 10 << 20} {
		if _, err := w.WriteAt(p[off/10:][:1<<20], off); err != nil { // zeros first
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	f, err := image.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	img, err := open(f)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if _, _, ok := image.NextData(f, 0, f.Bytes()); !ok {
		t.Skip("this system does not tell holes from data")
	}
	var data int64
	for e, err := range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
		if err != nil || e.Kind == image.Absent {
			t.Fatal(e, err)
		}
		if e.Kind == image.Data {
			data += e.Len
		}
	}
	if data < 1<<20 || data > 2<<20 {
		t.Errorf("a megabyte was written, and %d bytes are data", data)
	}
}

// Qemu runs qemu-img and gives its output; t fails if it does.
func Qemu(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(Tool(t, "qemu-img"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// QemuCompare lets qemu-img compare two images; a longer one must end in
// zeros.
func QemuCompare(t testing.TB, a, formatA, b, formatB string) {
	t.Helper()
	Qemu(t, "compare", "-f", formatA, "-F", formatB, a, b)
}

// QemuRaw lets qemu-img convert an image to a raw file and opens that.
func QemuRaw(t testing.TB, path, format string) *os.File {
	t.Helper()
	out := filepath.Join(t.TempDir(), "qemu.raw")
	Qemu(t, "convert", "-f", format, "-O", "raw", path, out)
	f, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
