package imagetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
)

// budget is how many bytes of a large image Reader compares one by one.
const budget = 64 << 20

// Reader holds img to the promises of image.Image; want is what the guest
// would see, and reads behind its end as zeros.
func Reader(t *testing.T, img image.Image, want io.ReaderAt) {
	t.Helper()
	size := img.Size()
	if info := img.Info(); info.VirtualBytes != size {
		t.Errorf("Info says %d bytes, Size says %d", info.VirtualBytes, size)
	}
	whole := extent.Extent{Len: size}
	extents := collect(t, img, whole)
	if t.Failed() {
		return
	}
	readAll(t, img, want, extents)
	readOddly(t, img, want, extents)
	readBehindEnd(t, img, want)
	readInParallel(t, img, want, extents)
	tileParts(t, img, extents)
	stopEarly(t, img, whole)
}

// collect walks within and checks that the extents tile it.
func collect(t *testing.T, img image.Image, within extent.Extent) []image.Extent {
	t.Helper()
	var list []image.Extent
	at := within.Off
	for e, err := range img.Extents(context.Background(), within) {
		if err != nil {
			t.Errorf("Extents of %v: %v", within, err)
			return list
		}
		if e.Off != at || e.Len <= 0 || e.End() > within.End() {
			t.Errorf("Extents of %v: %v comes where %d should begin", within, e, at)
			return list
		}
		if e.Kind != image.Data && (e.Compressed || e.FileOffset != -1) {
			t.Errorf("Extents of %v: %v is in no file, yet compressed or at a file offset", within, e)
		}
		at = e.End()
		list = append(list, e)
	}
	if at != within.End() {
		t.Errorf("Extents of %v end at %d", within, at)
	}
	return list
}

// A comparison reads two disks, of which want is right, into the same memory
// again and again. It serves one goroutine.
type comparison struct {
	img      image.Image
	want     io.ReaderAt
	got, ref []byte
}

// stale is what memory holds before a read: ReadAt must fill holes, not only
// skip them.
var stale = bytes.Repeat([]byte{0xa5}, 1<<20)

// same compares one range of at most 1 MiB, and tells in which bytes the two
// differ.
func (c *comparison) same(t *testing.T, off int64, n int) bool {
	t.Helper()
	c.got = append(c.got[:0], stale[:n]...)
	m, err := c.img.ReadAt(c.got, off)
	if err != nil && !(err == io.EOF && off+int64(m) == c.img.Size()) || m != int(min(int64(n), c.img.Size()-off)) {
		t.Errorf("ReadAt(%d bytes, %d) = %d, %v", n, off, m, err)
		return false
	}
	c.ref = append(c.ref[:0], stale[:n]...)
	r, err := c.want.ReadAt(c.ref, off)
	if err != nil && err != io.EOF {
		t.Fatal(err)
	}
	clear(c.ref[r:])
	got, ref := c.got[:m], c.ref[:m]
	if !bytes.Equal(got, ref) {
		i := 0
		for got[i] == ref[i] {
			i++
		}
		t.Errorf("ReadAt(%d bytes, %d): byte %d is %#02x, want %#02x", n, off, off+int64(i), got[i], ref[i])
		return false
	}
	return true
}

// readAll compares everything if img is small, else all its data up to the
// budget and samples of the rest.
func readAll(t *testing.T, img image.Image, want io.ReaderAt, extents []image.Extent) {
	t.Helper()
	const piece = 1<<20 - 512
	c := &comparison{img: img, want: want}
	left := int64(budget)
	for _, e := range extents {
		end := e.End()
		if e.Kind != image.Data && img.Size() > budget {
			end = min(end, e.Off+piece)
		}
		for off := e.Off; off < end && left > 0; off += piece {
			n := min(piece, end-off)
			left -= n
			if !c.same(t, off, int(n)) {
				t.Logf("in extent %+v", e)
				return
			}
		}
		if e.Kind != image.Data {
			c.got = append(c.got[:0], stale[:min(e.Len, piece)]...)
			p := c.got
			for _, off := range []int64{e.Off, e.End() - int64(len(p))} {
				if _, err := img.ReadAt(p, off); err != nil && err != io.EOF {
					t.Errorf("ReadAt in %+v: %v", e, err)
				} else if !isZero(p) {
					t.Errorf("%+v is not zero", e)
				}
			}
		}
	}
}

// oddRange is a range around a border of some extent, or anywhere.
func oddRange(r *rand.Rand, size int64, extents []image.Extent) (off int64, n int) {
	off = r.Int64N(size)
	if r.IntN(3) > 0 && len(extents) > 0 {
		off = extents[r.IntN(len(extents))].Off - 1000 + r.Int64N(2000)
		off = min(max(off, 0), size-1)
	}
	n = 1 + r.IntN(100)
	if r.IntN(2) == 0 {
		n = 1 + r.IntN(300<<10)
	}
	return off, n
}

func readOddly(t *testing.T, img image.Image, want io.ReaderAt, extents []image.Extent) {
	t.Helper()
	if img.Size() == 0 {
		return
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	c := &comparison{img: img, want: want}
	tries := 300
	if testing.Short() { // the race detector learns nothing here
		tries = 30
	}
	for range tries {
		off, n := oddRange(r, img.Size(), extents)
		if !c.same(t, off, n) {
			t.Logf("seed %d", seed)
			return
		}
	}
}

func readBehindEnd(t *testing.T, img image.Image, want io.ReaderAt) {
	t.Helper()
	size := img.Size()
	if n, err := img.ReadAt(nil, 0); n != 0 || err != nil && err != io.EOF {
		t.Errorf("ReadAt of nothing = %d, %v", n, err)
	}
	for _, off := range []int64{size, size + 1, size + 1<<40} {
		if n, err := img.ReadAt(make([]byte, 10), off); n != 0 || err != io.EOF {
			t.Errorf("ReadAt behind the end, at %d of %d = %d, %v; want 0, EOF", off, size, n, err)
		}
	}
	if _, err := img.ReadAt(make([]byte, 10), -1); err == nil || err == io.EOF {
		t.Errorf("ReadAt at -1 gives %v, want an error", err)
	}
	if size == 0 {
		return
	}
	start := max(size-7, 0)
	p, ref := make([]byte, 20), make([]byte, 20)
	n, err := img.ReadAt(p, start)
	if n != int(size-start) || err != io.EOF {
		t.Errorf("ReadAt across the end = %d, %v; want %d, EOF", n, err, size-start)
	}
	want.ReadAt(ref[:n], start)
	if !bytes.Equal(p[:n], ref[:n]) {
		t.Errorf("the last %d bytes are % x, want % x", n, p[:n], ref[:n])
	}
	if n, err := img.ReadAt(p[:1], size-1); n != 1 || err != nil && err != io.EOF {
		t.Errorf("ReadAt of the last byte = %d, %v", n, err)
	}
}

func readInParallel(t *testing.T, img image.Image, want io.ReaderAt, extents []image.Extent) {
	t.Helper()
	if img.Size() == 0 {
		return
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 2))
			c := &comparison{img: img, want: want}
			for range 60 {
				off, n := oddRange(r, img.Size(), extents)
				if !c.same(t, off, n) {
					return
				}
			}
		})
	}
	wg.Wait()
}

// tileParts asks for odd parts and compares with what the whole walk said.
func tileParts(t *testing.T, img image.Image, extents []image.Extent) {
	t.Helper()
	if img.Size() == 0 {
		return
	}
	r := rand.New(rand.NewPCG(3, 3))
	for range 30 {
		off, n := oddRange(r, img.Size(), extents)
		part := extent.Extent{Off: off, Len: min(int64(n), img.Size()-off)}
		i := 0
		for _, e := range collect(t, img, part) {
			for at := e.Off; at < e.End(); {
				for extents[i].End() <= at {
					i++
				}
				if w := extents[i]; w.Kind != e.Kind || w.Compressed != e.Compressed || w.Depth != e.Depth {
					t.Errorf("Extents of %v: %+v, but of everything: %+v", part, e, w)
					return
				}
				at = min(e.End(), extents[i].End())
			}
		}
		if t.Failed() {
			return
		}
	}
}

func stopEarly(t *testing.T, img image.Image, whole extent.Extent) {
	t.Helper()
	for range img.Extents(context.Background(), whole) {
		break // an iterator that goes on panics
	}
	if whole.Len == 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var got error
	for _, err := range img.Extents(ctx, whole) {
		got = err
	}
	if !errors.Is(got, context.Canceled) {
		t.Errorf("Extents under a cancelled context ends with %v", got)
	}
	for e, err := range img.Extents(context.Background(), extent.Extent{Off: whole.Len, Len: 10}) {
		t.Errorf("Extents behind the end gives %+v, %v", e, err)
	}
}
