// Package imagetest is the conformance suite of image formats: made-up disks
// to write, samples by others to read, hostile files to survive, and qemu-img
// for a second opinion.
package imagetest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
)

// A Disk is the made-up content of a disk of any size: holes between runs of
// zeros, text and noise, the same for the same seed. It takes room in
// proportion to its runs, so a disk of 62 TiB is no trouble. It is safe for
// concurrent use.
type Disk struct {
	size int64
	runs []run
}

type run struct {
	extent.Extent
	kind runKind
	seed uint64
}

type runKind uint8

const (
	zeros runKind = iota // written, and zero all the same
	text                 // compresses well
	noise                // does not compress
	kinds
)

// NewDisk makes a disk of size bytes. At most 16 MiB or so of it are not
// holes; runs begin and end at odd offsets, the first and the last byte are
// among the data.
func NewDisk(seed uint64, size int64) *Disk {
	d := &Disk{size: size}
	r := rand.New(rand.NewPCG(seed, uint64(size)))
	longest := min(256<<10, size/8+1)
	gap := max(2*longest, size/64)
	for off := int64(0); off < size; {
		n := min(1+r.Int64N(longest), size-off)
		d.runs = append(d.runs, run{extent.Extent{Off: off, Len: n}, runKind(r.IntN(int(kinds))), r.Uint64()})
		off += n
		if r.IntN(3) > 0 { // else the next run follows at once
			off += 1 + r.Int64N(gap)
		}
	}
	if size > 0 {
		d.runs[0].kind = text
		last := &d.runs[len(d.runs)-1]
		if last.End() == size {
			last.kind = noise
		} else {
			d.runs = append(d.runs, run{extent.Extent{Off: size - 1, Len: 1}, noise, seed | 1})
		}
	}
	return d
}

// Size is the size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Written is what a copy of the disk must write; all else is holes.
func (d *Disk) Written() extent.Set {
	var s extent.Set
	for _, r := range d.runs {
		s.Add(r.Extent)
	}
	return s
}

// ReadAt reads the disk as io.ReaderAt wants it.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off >= d.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > d.size-off
	if short {
		p = p[:d.size-off]
	}
	clear(p)
	want := extent.Extent{Off: off, Len: int64(len(p))}
	i := sort.Search(len(d.runs), func(i int) bool { return d.runs[i].End() > off })
	for ; i < len(d.runs) && d.runs[i].Off < want.End(); i++ {
		part := d.runs[i].Intersect(want)
		d.runs[i].fill(p[part.Off-off:][:part.Len], part.Off-d.runs[i].Off)
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// fill gives the bytes from at on, of which every eight depend on their place
// alone. The race detector, which would look at each of them apart, takes ten
// times as long over this as over what is tested with it, and p is its caller's
// own.
//
//go:norace
func (r run) fill(p []byte, at int64) {
	if r.kind == zeros {
		return
	}
	for len(p) > 0 {
		n := uint64(at) / 8
		x := n ^ r.seed // splitmix64
		if r.kind == text {
			x = n/512%7 ^ r.seed // 4 KiB of the same word
		}
		x += 0x9e3779b97f4a7c15
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		x = (x ^ x>>31) | 0x0101010101010101 // no byte is zero
		c := 8
		if at%8 == 0 && len(p) >= 8 {
			binary.LittleEndian.PutUint64(p, x)
		} else {
			var word [8]byte
			binary.LittleEndian.PutUint64(word[:], x)
			c = copy(p, word[at%8:])
		}
		p = p[c:]
		at += int64(c)
	}
}

// Save writes the disk to a new sparse file in a directory of t.
func (d *Disk) Save(t testing.TB) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(d.size); err != nil {
		t.Fatal(err)
	}
	for _, e := range d.Written().List() {
		p := make([]byte, e.Len)
		d.ReadAt(p, e.Off)
		if _, err := f.WriteAt(p, e.Off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// Hash is the SHA-256 of the first size bytes of r in hexadecimal.
func Hash(t testing.TB, r io.ReaderAt, size int64) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, io.NewSectionReader(r, 0, size), make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// isZero is chunk.IsZero for any length.
func isZero(p []byte) bool {
	for len(p) > chunk.MaxBytes {
		if !chunk.IsZero(p[:chunk.MaxBytes]) {
			return false
		}
		p = p[chunk.MaxBytes:]
	}
	return chunk.IsZero(p)
}
