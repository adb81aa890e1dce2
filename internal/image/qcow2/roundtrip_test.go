package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"iter"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// checkRefcounts is qemu-img check in small, for images by our own writer:
// every cluster of the file is counted as often as something uses it.
func checkRefcounts(t testing.TB, p []byte) {
	t.Helper()
	be := binary.BigEndian
	h, err := readHeader(imagetest.Bytes("check", p))
	if err != nil {
		t.Fatal(err)
	}
	c := h.clusterBytes()
	if int64(len(p))%c != 0 {
		t.Fatalf("a file of %d bytes, which is not a multiple of %d", len(p), c)
	}
	uses := make([]int, int64(len(p))/c)
	use := func(what string, off, n int64) {
		if off < 0 || n <= 0 || off+n > int64(len(p)) {
			t.Fatalf("%s at %d, %d bytes long", what, off, n)
		}
		for i := off / c; i <= (off+n-1)/c; i++ {
			uses[i]++
		}
	}
	use("header", 0, 1)
	use("L1 table", h.l1Offset, max(int64(h.l1Entries)*8, 1))
	for i := range int64(h.l1Entries) {
		l1 := be.Uint64(p[h.l1Offset+i*8:])
		l2 := int64(l1 & offsetMask)
		if l2 == 0 {
			continue
		}
		if l1 != uint64(l2)|flagCopied {
			t.Fatalf("L1 entry %#x", l1)
		}
		use("L2 table", l2, c)
		for j := range c / 8 {
			e := be.Uint64(p[l2+j*8:])
			switch {
			case e == 0 || e == flagZero:
			case e&flagCompressed != 0:
				off, n := h.packed(e)
				if e&flagCopied != 0 {
					t.Fatalf("compressed entry %#x", e)
				}
				use("compressed cluster", off, min(n, int64(len(p))-off))
			case e != e&offsetMask|flagCopied:
				t.Fatalf("L2 entry %#x", e)
			default:
				use("cluster", int64(e&offsetMask), c)
			}
		}
	}
	tableClusters := int64(be.Uint32(p[56:]))
	use("refcount table", h.refcountOffset, tableClusters*c)
	for i := range tableClusters * c / 8 {
		if b := int64(be.Uint64(p[h.refcountOffset+i*8:])); b != 0 {
			use("refcount block", b, c)
		}
	}
	for i, n := range uses {
		at := h.refcountOffset + int64(i)/(c/2)*8
		block := int64(be.Uint64(p[at:]))
		got := 0
		if block != 0 {
			got = int(be.Uint16(p[block+int64(i)%(c/2)*2:]))
		}
		if got != n {
			t.Fatalf("cluster %d has refcount %d and is used %d times", i, got, n)
		}
	}
}

// FuzzRoundTrip writes a small image as the input says and reads it back. The
// input is settings, then a command per byte and cluster: leave it out, zeros,
// text or noise.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3, 2, 1, 0, 3, 2, 1, 0})
	f.Add([]byte{1, 1, 200, 2, 2, 2, 2, 2, 2, 2, 2})
	f.Add([]byte{2, 6, 77, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 0, 0, 0, 3})
	f.Add(append([]byte{5, 3, 1}, bytes.Repeat([]byte{2, 3, 1, 7, 0}, 200)...))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) < 3 || len(in) > 4096 {
			return
		}
		bits := uint32(9 + in[1]%8) // clusters of 512 bytes to 64 KiB
		cluster := int64(1) << bits
		o := image.CreateOptions{BlockBytes: cluster, Compression: []string{"", "zlib", "zstd"}[in[0]%3]}
		overlay := in[0]/3%2 == 1
		if overlay {
			o.Parent, o.ParentFormat = "base", image.Raw
		}
		steps := in[3:]
		if int64(len(steps))*cluster > 8<<20 {
			steps = steps[:8<<20/cluster]
		}
		o.VirtualBytes = max(int64(len(steps))*cluster-int64(in[2])*2, 0)
		parent := imagetest.NewDisk(1, max(o.VirtualBytes, 1))
		want := make([]byte, o.VirtualBytes)
		if overlay {
			parent.ReadAt(want, 0)
		}
		path := filepath.Join(dir, "fuzz.qcow2")
		os.Remove(path)
		made, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		w, err := NewWriter(made, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		w.fsync = func() error { return nil } // which takes most of the time
		w.tables.limit = 1 + int(in[2]%3)
		content := [4]*imagetest.Disk{2: imagetest.NewDisk(2, 64<<20), 3: imagetest.NewDisk(3, 64<<20)}
		// The order is forwards from the middle, then the first half, in
		// writes of one to four clusters.
		for half := range 2 {
			from, to := len(steps)/2, len(steps)
			if half == 1 {
				from, to = 0, from
			}
			for i := from; i < to; {
				if steps[i]%4 == 0 {
					i++
					continue
				}
				n := 1
				for n < 1+int(steps[i]>>6) && i+n < to && steps[i+n]%4 != 0 {
					n++
				}
				off := int64(i) * cluster
				end := min(off+int64(n)*cluster, o.VirtualBytes)
				if end <= off {
					break
				}
				p := make([]byte, end-off)
				for j := range n {
					if d := content[steps[i+j]%4]; d != nil && int64(j)*cluster < end-off {
						d.ReadAt(p[int64(j)*cluster:min(int64(j+1)*cluster, end-off)], off+int64(j)*cluster)
					}
				}
				if _, err := w.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				copy(want[off:], p)
				i += n
			}
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		checkRefcounts(t, file)
		img, err := Open(imagetest.Bytes("fuzz", file), image.OpenOptions{Parent: func(name string, _ image.Format) (image.Image, error) {
			return diskImage{parent}, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := img.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("it reads back different")
		}
	})
}

// diskImage is a made-up disk as the parent of an overlay.
type diskImage struct{ *imagetest.Disk }

func (diskImage) Close() error { return nil }

func (d diskImage) Info() image.Info { return image.Info{VirtualBytes: d.Size()} }

func (d diskImage) Extents(_ context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		yield(image.Extent{Extent: within, Kind: image.Data, FileOffset: -1}, nil)
	}
}
