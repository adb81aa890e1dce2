package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// counted counts the reads of a file.
type counted struct {
	io.ReaderAt
	reads int
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	return c.ReaderAt.ReadAt(p, off)
}

// blocks is a Map of blocks of 10 bytes at the given places in the file; -1 is
// absent and -2 zero.
func blocks(places ...int64) func(off, n int64) (image.Extent, error) {
	return func(off, n int64) (image.Extent, error) {
		e := image.Extent{Extent: extent.Extent{Off: off, Len: min(n, 10-off%10)}, FileOffset: -1}
		switch at := places[off/10]; at {
		case -1:
		case -2:
			e.Kind = image.Zero
		case -3:
			return e, fault.Corrupt("disk", off, "a block of no kind")
		default:
			e.Kind, e.FileOffset = image.Data, at+off%10
		}
		return e, nil
	}
}

func TestBlocksInARowAreOneRead(t *testing.T) {
	for _, c := range []struct {
		name   string
		places []int64
		off, n int
		reads  int
	}{
		{"one block", []int64{0, 10}, 2, 5, 1},
		{"two in a row", []int64{0, 10}, 5, 10, 1},
		{"three in a row", []int64{20, 30, 40}, 0, 30, 1},
		{"a gap in the file", []int64{0, 20}, 0, 20, 2},
		{"the wrong way around", []int64{10, 0}, 0, 20, 2},
		{"zeros between", []int64{0, -2, 10}, 0, 30, 2},
		{"absent before", []int64{-1, 0, 10}, 5, 25, 1},
	} {
		file := make([]byte, 60)
		for i := range file {
			file[i] = byte(i + 1)
		}
		r := &counted{ReaderAt: bytes.NewReader(file)}
		d := &Disk{Name: "disk", File: r, Bytes: int64(10 * len(c.places)), Map: blocks(c.places...)}
		p := bytes.Repeat([]byte{0xa5}, c.n)
		if n, err := d.ReadAt(p, int64(c.off)); n != c.n || err != nil {
			t.Errorf("%s: %d, %v", c.name, n, err)
		}
		for i, b := range p {
			at := c.off + i
			want := byte(0)
			if place := c.places[at/10]; place >= 0 {
				want = file[place+int64(at%10)]
			}
			if b != want {
				t.Errorf("%s: byte %d is %d, want %d", c.name, at, b, want)
				break
			}
		}
		if r.reads != c.reads {
			t.Errorf("%s: %d reads, want %d", c.name, r.reads, c.reads)
		}
	}
}

// What lies before damage is read, and the damage is told.
func TestDamageBehindGoodBlocks(t *testing.T) {
	d := &Disk{Name: "disk", File: bytes.NewReader(make([]byte, 20)), Bytes: 30, Map: blocks(0, 10, -3)}
	if n, err := d.ReadAt(make([]byte, 30), 0); n != 20 || !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("%d, %v", n, err)
	}
	d = &Disk{Name: "disk", File: bytes.NewReader(make([]byte, 15)), Bytes: 20, Map: blocks(0, 10)}
	if n, err := d.ReadAt(make([]byte, 20), 0); n != 15 || !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a file that became shorter: %d, %v", n, err)
	}
}

// A fixed disk's holes are the file's; without Holes it is all data.
func TestHolesOfAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	f.Truncate(size)
	f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 3<<20)
	f.Close()
	file, err := image.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, _, ok := image.NextData(file, 0, size); !ok {
		t.Skip("this file system does not tell holes from data")
	}
	at := int64(1 << 20) // the disk begins there in the file
	d := &Disk{Name: "disk", File: file, Bytes: size - at, Holes: true, Map: func(off, n int64) (image.Extent, error) {
		n = min(n, 64<<10-off%(64<<10))
		return image.Extent{Extent: extent.Extent{Off: off, Len: n}, Kind: image.Data, FileOffset: at + off}, nil
	}}
	list := func() string {
		var s []string
		for e, err := range d.Extents(t.Context(), extent.Extent{Off: 100, Len: size}) {
			if err != nil {
				t.Fatal(err)
			}
			s = append(s, fmt.Sprintf("%s %v@%d", e.Kind, e.Extent, e.FileOffset))
		}
		return strings.Join(s, "; ")
	}
	want := "zero [100,+2097052)@-1; data [2097152,+1048576)@3145728; zero [3145728,+4194304)@-1"
	if got := list(); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	d.Holes = false
	if got := list(); got != "data [100,+7339932)@1048676" {
		t.Errorf("without Holes: %s", got)
	}
}

func TestRunOfBits(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	file := make([]byte, 3*pageBytes)
	for i := range file {
		file[i] = [4]byte{0, 0xff, 0xff, byte(r.Uint32())}[r.IntN(4)]
		if i/1000%3 == 1 {
			file[i] = 0xff
		}
	}
	pages := NewPages("file", bytes.NewReader(file), int64(len(file)))
	for _, order := range []Order{HighFirst, LowFirst} {
		for range 3000 {
			off := r.Int64N(int64(len(file)) - 2000)
			first := r.Int64N(8000)
			n := 1 + r.Int64N(8000)
			bit := func(i int64) bool { return file[off+i/8]&order.bit(i) != 0 }
			want := int64(1)
			for want < n && bit(first+want) == bit(first) {
				want++
			}
			set, same, err := pages.Run(off, first, n, order)
			if err != nil || set != bit(first) || same != want {
				t.Fatalf("seed %d: Run(%d, %d, %d) = %t, %d, %v; want %t, %d", seed, off, first, n, set, same, err, bit(first), want)
			}
		}
	}
	file[len(file)-1] = 0xff
	pages = NewPages("file", bytes.NewReader(file), int64(len(file)))
	if _, _, err := pages.Run(int64(len(file))-1, 0, 9, HighFirst); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a bitmap that reaches behind the file: %v", err)
	}
	if _, _, err := pages.Run(int64(len(file)), 0, 1, HighFirst); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a bitmap behind the file: %v", err)
	}
}

// However many readers there are and whatever they ask for, they get the
// file's bytes, and few of them are kept.
func TestPagesInParallel(t *testing.T) {
	file := make([]byte, 40<<20+12345)
	for i := 0; i < len(file); i += 512 {
		file[i] = byte(i >> 9 * 7)
	}
	pages := NewPages("file", bytes.NewReader(file), int64(len(file)))
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 0))
			for range 3000 {
				n := 1 + r.IntN(2000)
				off := r.IntN(len(file) - n)
				p := make([]byte, n)
				if err := pages.Read(p, int64(off)); err != nil || !bytes.Equal(p, file[off:off+n]) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
					return
				}
				p, err := pages.Peek(int64(off), 1, int64(n))
				if err != nil || len(p) > n || !bytes.Equal(p, file[off:off+len(p)]) {
					t.Errorf("peek of %d bytes at %d: %v", n, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	kept := 0
	for i := range pages.sets {
		for j := range pages.sets[i].ways {
			if p := pages.sets[i].ways[j].Load(); p != nil {
				kept += len(p.p)
			}
		}
	}
	if kept > 8<<20 {
		t.Errorf("%d bytes are kept", kept)
	}
	for _, off := range []int64{-1, int64(len(file)) - 1, int64(len(file)), 1 << 62} {
		if err := pages.Read(make([]byte, 2), off); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("a read at %d: %v", off, err)
		}
		if _, err := pages.Peek(off, 2, 4); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("a peek at %d: %v", off, err)
		}
	}
}

func TestSectors(t *testing.T) {
	s := NewSectors(10, 2, LowFirst)
	s.Mark(0, 3)
	s.Mark(2, 2)
	s.Mark(9, 1)
	if !bytes.Equal(s.Bits, []byte{0x0f, 0x02}) {
		t.Errorf("% x", s.Bits)
	}
	if s.Mark(4, 5); s.Bits != nil {
		t.Errorf("all marked, yet % x", s.Bits)
	}
	s.Mark(0, 10)
	s = NewSectors(10, 2, HighFirst)
	if s.Mark(0, 9); !bytes.Equal(s.Bits, []byte{0xff, 0x80}) {
		t.Errorf("% x", s.Bits)
	}
}

// named is an image that says who it is.
type named struct {
	image.Image
	info   image.Info
	closed *int
}

func (n named) Info() image.Info { return n.info }
func (n named) Close() error     { *n.closed++; return nil }

func TestParentByNameAndIdentity(t *testing.T) {
	right := image.Info{Identity: "right", SectorBytes: 512, VirtualBytes: 1000, Warnings: []string{"old"}}
	other := func(change func(*image.Info)) image.Info { i := right; change(&i); return i }
	files := map[string]image.Info{
		"right":   right,
		"second":  other(func(i *image.Info) { i.Identity = "second" }),
		"wrong":   other(func(i *image.Info) { i.Identity = "wrong" }),
		"sectors": other(func(i *image.Info) { i.SectorBytes = 4096 }),
		"short":   other(func(i *image.Info) { i.VirtualBytes = 500 }),
	}
	for _, c := range []struct {
		names []string
		want  string // the parent's identity, or part of the error
		warn  int
	}{
		{[]string{"right"}, "right", 1},
		{[]string{"nowhere", "forbidden", "right"}, "right", 1},
		{[]string{"wrong", "right"}, "right", 1},
		{[]string{"wrong", "nowhere"}, `has the ID right, but "wrong" has wrong`, 0},
		{[]string{"nowhere", "wrong"}, `has the ID right, but "wrong" has wrong`, 0},
		{[]string{"second"}, "second", 1},
		{[]string{"sectors"}, "sectors of 512 bytes", 0},
		{[]string{"short"}, "right", 2},
		{[]string{"nowhere"}, "not found", 0},
		{nil, "names no parent", 0},
	} {
		opened, closed := 0, 0
		child := Child{Name: "child", Names: c.names, Identities: []string{"right", "second"}, IdentityName: "ID", Bytes: 1000, SectorBytes: 512}
		p, warnings, err := child.Open(func(name string, _ image.Format) (image.Image, error) {
			if name == "forbidden" {
				return nil, image.ErrNotAllowed
			}
			info, ok := files[name]
			if !ok {
				return nil, fmt.Errorf("%s: %w", name, fault.ErrNotFound)
			}
			opened++
			return named{info: info, closed: &closed}, nil
		})
		got := ""
		if err != nil {
			got = err.Error()
			opened++ // none is left to be closed
		} else {
			got = p.Info().Identity
		}
		if !strings.Contains(got, c.want) || len(warnings) != c.warn {
			t.Errorf("%q: %s, %q; want %s", c.names, got, warnings, c.want)
		}
		if opened != closed+1 {
			t.Errorf("%q: of %d images %d were closed", c.names, opened, closed)
		}
	}
	if _, _, err := (Child{Name: "child", Names: []string{"x"}}).Open(nil); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("without permission: %v", err)
	}
	if _, _, err := (Child{Name: "child", Names: []string{"x"}}).Open(image.OpenParent(func(string, image.Format) (image.Image, error) { return nil, nil })); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a parent that may be anybody: %v", err)
	}
}

// A long chain whose base is missing costs its length, however many names
// each layer has for its parent.
func TestBrokenChainIsTriedOnce(t *testing.T) {
	opens := 0
	var layer func(depth int) image.OpenParent
	layer = func(depth int) image.OpenParent {
		return func(string, image.Format) (image.Image, error) {
			if opens++; depth == 100 {
				return nil, fs.ErrNotExist
			}
			_, _, err := Child{Name: fmt.Sprint(depth), Names: []string{"a", "b", "c"}, Identities: []string{"x"}}.Open(layer(depth + 1))
			return nil, fmt.Errorf("parent: %w", err)
		}
	}
	_, _, err := Child{Name: "top", Names: []string{"a", "b", "c"}, Identities: []string{"x"}}.Open(layer(0))
	if !errors.Is(err, fs.ErrNotExist) || opens > 200 {
		t.Errorf("%d opens: %v", opens, err)
	}
}

func TestOutput(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	create := func(fail error) (*Output, error) {
		return Create(path, image.CreateOptions{}, func(o *Output, _ image.CreateOptions) (*Output, error) { return o, fail })
	}
	o, err := create(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create(nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file that is there: %v", err)
	}
	if err := errors.Join(o.Finish(), o.Close(), o.Close()); err != nil {
		t.Error(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	(&Output{Output: f}).Discard()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("somebody else's file is gone: %v", err)
	}
	os.Remove(path)
	if _, err := create(fault.ErrUnsupported); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("an image that cannot be: %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a discarded file is left")
	}
}
