package convert_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/image/raw"
)

type target struct {
	format image.Format
	o      image.CreateOptions
}

func (c target) String() string {
	return fmt.Sprintf("%s,%s,%s", c.format, c.o.Variant, c.o.Compression)
}

var targets = []target{
	{image.Raw, image.CreateOptions{}},
	{image.Qcow2, image.CreateOptions{}},
	{image.Qcow2, image.CreateOptions{Compression: "zstd"}},
	{image.Qcow2, image.CreateOptions{BlockBytes: 2 << 20}},
	{image.VHD, image.CreateOptions{Variant: "dynamic"}},
	{image.VHD, image.CreateOptions{Variant: "fixed"}},
	{image.VHDX, image.CreateOptions{Variant: "dynamic"}},
	{image.VHDX, image.CreateOptions{Variant: "fixed"}},
	{image.VMDK, image.CreateOptions{Variant: "monolithicSparse"}},
	{image.VMDK, image.CreateOptions{Variant: "monolithicFlat"}},
	{image.VMDK, image.CreateOptions{Variant: "streamOptimized"}},
}

func copyTo(t *testing.T, src image.Image, c target) image.Image {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk."+string(c.format))
	c.o.VirtualBytes = src.Size()
	w, err := open.Create(path, c.format, c.o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var last atomic.Int64
	_, err = convert.Copy(t.Context(), w, src, convert.Options{Progress: func(done, total int64) {
		if done <= last.Swap(done) || total != src.Size() {
			t.Errorf("%v: progress goes to %d of %d", c, done, total)
		}
	}})
	if err != nil {
		t.Fatalf("%v: %v", c, err)
	}
	if last.Load() != src.Size() {
		t.Errorf("%v: progress ends at %d of %d", c, last.Load(), src.Size())
	}
	if err := w.Finish(); err != nil {
		t.Fatalf("%v: %v", c, err)
	}
	img, err := open.Open(path, open.Options{Format: c.format})
	if err != nil {
		t.Fatalf("%v: %v", c, err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

// Copying knows no formats, so a few pairs of each stand for all, and with
// -short, which runs under the race detector, one.
func TestPairsCopyAndCompareEqual(t *testing.T) {
	disk := imagetest.NewDisk(3, 9<<20+1536)
	first, err := raw.OpenPath(disk.Save(t))
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	steps := []int{1, 0, 4}
	if testing.Short() {
		steps = steps[:1]
	}
	for i, from := range targets {
		src := copyTo(t, first, from)
		for _, step := range steps {
			to := targets[(i+step)%len(targets)]
			got := copyTo(t, src, to)
			c, err := convert.Compare(t.Context(), first, got, convert.Options{})
			if err != nil || !c.Identical || c.Offset != -1 {
				t.Errorf("%v to %v: %+v, %v", from, to, c, err)
			}
			imagetest.Reader(t, got, disk)
		}
	}
}

// A fakeImage has extents as a test wants them.
type fakeImage struct {
	*imagetest.Disk
	extents []image.Extent
	bad     int64 // reads that touch this byte fail; 0 for none
}

var errBad = fault.Corrupt("fake", 0, "as asked")

func (f fakeImage) ReadAt(p []byte, off int64) (int, error) {
	if f.bad >= off && f.bad < off+int64(len(p)) && f.bad != 0 {
		return 0, errBad
	}
	return f.Disk.ReadAt(p, off)
}
func (f fakeImage) Close() error     { return nil }
func (f fakeImage) Info() image.Info { return image.Info{VirtualBytes: f.Size()} }
func (f fakeImage) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		if f.extents == nil {
			yield(image.Extent{Extent: within, Kind: image.Data}, nil)
			return
		}
		for _, e := range f.extents {
			if !yield(e, ctx.Err()) {
				return
			}
		}
	}
}

func TestDamageInTheSourceEndsTheCopy(t *testing.T) {
	for _, variant := range []string{"monolithicSparse", "streamOptimized"} {
		src := fakeImage{Disk: imagetest.NewDisk(1, 64<<20), bad: 40 << 20}
		w, err := open.Create(filepath.Join(t.TempDir(), "x.vmdk"), image.VMDK, image.CreateOptions{VirtualBytes: src.Size(), Variant: variant})
		if err != nil {
			t.Fatal(err)
		}
		_, err = convert.Copy(t.Context(), w, src, convert.Options{})
		if !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: copy of a damaged image gives %v", variant, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := convert.Copy(ctx, w, src, convert.Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: a cancelled copy gives %v", variant, err)
		}
		w.Close()
	}
}

// A unitWriter keeps its caller to the promises of image.Writer.
type unitWriter struct {
	t    *testing.T
	unit int64
	size int64
	seen extent.Set
	last int64
}

func (w *unitWriter) Unit() int64   { return w.unit }
func (w *unitWriter) Ordered() bool { return true }
func (w *unitWriter) Finish() error { return nil }
func (w *unitWriter) Close() error  { return nil }
func (w *unitWriter) WriteAt(p []byte, off int64) (int, error) {
	e := extent.Extent{Off: off, Len: int64(len(p))}
	switch {
	case off%w.unit != 0 || e.Len%w.unit != 0 && e.End() != w.size:
		w.t.Errorf("%v is not in units of %d", e, w.unit)
	case off < w.last:
		w.t.Errorf("%v comes behind %d", e, w.last)
	case w.seen.Within(e).Bytes() != 0:
		w.t.Errorf("%v is written twice", e)
	}
	w.seen.Add(e)
	w.last = e.End()
	return len(p), nil
}

func TestRaggedExtentsAreWrittenInWholeUnitsOnce(t *testing.T) {
	const k = 1 << 10
	disk := imagetest.NewDisk(8, 5<<20+77)
	for _, unit := range []int64{1, 512, 64 * k, 2048 * k} {
		var list []image.Extent
		for off := int64(0); off < disk.Size(); {
			for _, n := range []int64{1, 100, 3000, 70 * k, 5, 1100 * k} {
				n = min(n, disk.Size()-off)
				if n == 0 {
					break
				}
				list = append(list, image.Extent{Extent: extent.Extent{Off: off, Len: n}, Kind: image.Kind(len(list) % 3), FileOffset: -1})
				off += n
			}
		}
		w := &unitWriter{t: t, unit: unit, size: disk.Size()}
		if _, err := convert.Copy(t.Context(), w, fakeImage{Disk: disk, extents: list}, convert.Options{}); err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			if e.Kind != image.Data || w.seen.Contains(e.Extent) {
				continue
			}
			for _, m := range extent.NewSet(e.Extent).Subtract(w.seen).List() {
				p := make([]byte, m.Len)
				if disk.ReadAt(p, m.Off); len(bytes.Trim(p, "\x00")) > 0 {
					t.Fatalf("unit %d: %v of %v was not written", unit, m, e)
				}
			}
		}
	}
}

func TestCompareFindsTheFirstDifference(t *testing.T) {
	disk := imagetest.NewDisk(4, 20<<20)
	p := make([]byte, disk.Size())
	if _, err := disk.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	a := raw.Open(imagetest.Bytes("a", p))
	for _, at := range []int64{0, 1, 1<<20 - 1, 1 << 20, 7654321, disk.Size() - 1} {
		q := append([]byte(nil), p...)
		q[at] ^= 1
		q[disk.Size()-1] ^= 2
		c, err := convert.Compare(t.Context(), a, raw.Open(imagetest.Bytes("b", q)), convert.Options{})
		if err != nil || c.Identical || c.Offset != at {
			t.Errorf("a difference at %d gives %+v, %v", at, c, err)
		}
	}
	longer := raw.Open(imagetest.Bytes("c", append(append([]byte(nil), p...), make([]byte, 5000)...)))
	if c, err := convert.Compare(t.Context(), longer, a, convert.Options{}); err != nil || !c.Identical || c.SameSize {
		t.Errorf("zeros behind the end: %+v, %v", c, err)
	}
	longer = raw.Open(imagetest.Bytes("c", append(append([]byte(nil), p...), 0, 0, 7)))
	if c, err := convert.Compare(t.Context(), a, longer, convert.Options{}); err != nil || c.Identical || c.Offset != disk.Size()+2 {
		t.Errorf("a byte behind the end: %+v, %v", c, err)
	}
}
