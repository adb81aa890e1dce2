package vhdx

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// places is where a fuzzer's changes go: a VHDX is at least 4 MiB long, and
// nearly all of it is nothing to a parser.
var places = []int64{
	header1, header2, regions1, regions2, metadataOffset, atParameters, atLocator,
	tableOffset, tableOffset + 8*2048, logOffset, logOffset + 4096, logOffset + 2*4096, 0,
}

// change applies a fuzzer's records of place, offset, length and bytes.
func (m memory) change(records []byte) {
	for len(records) >= 4 {
		at := places[int(records[0])%len(places)] + int64(binary.BigEndian.Uint16(records[1:]))%4096
		n := min(int(records[3])%32+1, len(records)-4)
		copy(m[at:], records[4:4+n])
		records = records[4+n:]
	}
}

// sealLog makes the checksums of the first log entries right again.
func (m memory) sealLog() {
	for at := int64(logOffset); at < logOffset+8*logSector; at += logSector {
		n := int64(binary.LittleEndian.Uint32(m[at+8:]))
		if string(m[at:at+4]) == "loge" && n >= logSector && at+n <= metadataOffset {
			m.put32(at+4, checksum(m[at:at+n]))
		}
	}
}

// A patched file is a sample whose first MiB, all but the blocks, are in memory.
type patched struct {
	head memory
	rest image.File
}

func (f patched) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.rest.ReadAt(p, off)
	if off < int64(len(f.head)) {
		copy(p[:n], f.head[off:])
	}
	return n, err
}
func (f patched) Bytes() int64 { return f.rest.Bytes() }
func (f patched) Name() string { return "patched" }
func (f patched) Close() error { return nil }

// survive opens, walks and reads a file, which must neither panic nor loop,
// and whose reads and extents must agree.
func survive(t *testing.T, f image.File, parent image.OpenParent) {
	img, err := Open(f, parent)
	if err != nil {
		if img, err = OpenLayer(f); err != nil {
			return
		}
	}
	img.Info()
	imagetest.Agree(t, img)
}

// A seed is an image that a fuzzer changes, and puts right again.
type seed struct {
	file image.File
	head memory // of file, what the fuzzer changes
	good memory // head as it was
}

func newSeed(f image.File, head memory) seed {
	return seed{f, head, slices.Clone(head)}
}

// restore undoes what change, seal and sealLog did.
func (s seed) restore() {
	for _, at := range places {
		n := min(at+12<<10, int64(len(s.head)))
		copy(s.head[at:n], s.good[at:n])
	}
	copy(s.head[logOffset:metadataOffset], s.good[logOffset:metadataOffset])
}

// seeds are images of our own of every kind and, where they are, samples.
func seeds(f *testing.F) (list []seed, parent image.OpenParent) {
	clean := file(f, image.CreateOptions{})
	dirty := slices.Clone(clean)
	at := blockOf(dirty, 0)
	n := dirty.log(logEntry{0, 0, 7, int64(len(dirty)), int64(len(dirty)), []logChange{{off: at, page: page(9)}}})
	dirty.log(logEntry{n, 0, 8, int64(len(dirty)), int64(len(dirty)) + mib, []logChange{{off: at + 4096, bytes: 8192}, {off: at, page: page(8)}}})
	dirty.dirty()
	for _, m := range []memory{slices.Clone(clean), overParent(f), dirty, file(f, image.CreateOptions{SectorBytes: 4096})} {
		list = append(list, newSeed(m, m))
	}
	if dir := os.Getenv("BACKSTAY_SAMPLES"); dir != "" && dir != "none" {
		for _, name := range []string{"dfvfs/fat-differential.vhdx.gz", "discutils/vhdx-log-replay.vhdx.gz", "dfvfs/ext2.vhdx.gz"} {
			path, _ := imagetest.Sample(f, name)
			rest, err := image.OpenFile(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Cleanup(func() { rest.Close() })
			head := make(memory, 4*mib)
			if _, err := rest.ReadAt(head, 0); err != nil {
				f.Fatal(err)
			}
			list = append(list, newSeed(patched{head, rest}, head))
		}
	}
	return list, func(string, image.Format) (image.Image, error) { return OpenLayer(clean) }
}

// Whatever the bytes say, opening, walking and reading neither panic nor loop,
// and agree with each other.
func FuzzOpen(f *testing.F) {
	base, parent := seeds(f)
	for i := range base {
		f.Add(uint8(i), true, []byte{4, 0, 10, 1, 5, 0})
		f.Add(uint8(i), false, []byte{5, 0, 0, 3, 0, 0, 0, 1})
		f.Add(uint8(i), true, []byte{7, 0, 8, 7, 3, 0, 0x50, 0, 0, 0, 0, 0})
		f.Add(uint8(i), true, []byte{9, 0, 8, 3, 0, 0x10, 0, 0, 9, 0, 64, 3, 'z', 'e', 'r', 'o'})
		f.Add(uint8(i), true, []byte{6, 0, 20, 7, 0, 0, 0, 40, 0, 0, 0, 40})
	}
	f.Fuzz(func(t *testing.T, kind uint8, seal bool, records []byte) {
		s := base[int(kind)%len(base)]
		defer s.restore()
		s.head.change(records)
		if seal {
			s.head.seal()
			s.head.sealLog()
		}
		survive(t, s.file, parent)
	})
}

// A part is a place of a small image whose bytes are a fuzzer's.
type part struct{ at, most int64 }

// fuzzParts is a fuzz target that puts bytes at one of parts, in an image that
// is a layer over a parent if the fuzzer wants.
func fuzzParts(f *testing.F, prepare func(m memory), parts ...part) {
	clean := file(f, image.CreateOptions{})
	parent := func(string, image.Format) (image.Image, error) { return OpenLayer(clean) }
	base := [2]seed{}
	for i, m := range []memory{slices.Clone(clean), overParent(f)} {
		base[i] = newSeed(m, m)
		for j, p := range parts {
			n := min(p.most, 256)
			if p.at == logOffset {
				n = 3 * logSector
				end := int64(len(m))
				next := m.log(logEntry{0, 0, 7, end, end, []logChange{{off: blockOf(m, 0), page: page(9)}}})
				m.log(logEntry{next, 0, 8, end, end, []logChange{{off: tableOffset + 4096, bytes: 4096}}})
			}
			f.Add(uint8(j), i == 1, true, bytes.Clone(m[p.at:p.at+n]))
		}
		copy(m, base[i].good)
	}
	f.Fuzz(func(t *testing.T, which uint8, layered, seal bool, bytes []byte) {
		s, p := base[0], parts[int(which)%len(parts)]
		if layered {
			s = base[1]
		}
		defer copy(s.head, s.good[:regions1])
		defer copy(s.head[p.at:p.at+p.most], s.good[p.at:])
		copy(s.head[p.at:p.at+p.most], bytes)
		if prepare != nil {
			prepare(s.head)
		}
		if seal {
			s.head.sealLog()
		}
		survive(t, s.file, parent)
	})
}

// FuzzLog makes the log's sectors of bytes.
func FuzzLog(f *testing.F) { fuzzParts(f, memory.dirty, part{logOffset, 8 * logSector}) }

// FuzzTables makes the metadata's items, the table that names them or the block
// allocation table of bytes.
func FuzzTables(f *testing.F) {
	fuzzParts(f, nil, part{atParameters, 2048}, part{metadataOffset, 2048}, part{tableOffset, 256})
}

// What was written is read, whatever the order, lengths and places.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint32(2<<20+512), uint8(0), []byte{1, 0, 0, 1, 2, 200, 3, 255})
	f.Add(uint32(5000), uint8(1), []byte{9, 0, 0, 9})
	f.Add(uint32(3<<20), uint8(2), []byte{0, 10, 0, 90, 7, 30, 1, 10})
	f.Add(uint32(3<<20), uint8(6), []byte{0, 10, 9, 0, 7, 30, 200, 0})
	f.Fuzz(func(t *testing.T, size uint32, kind uint8, ops []byte) {
		size %= 3 << 20
		o := image.CreateOptions{VirtualBytes: int64(size), BlockBytes: mib, SectorBytes: 512}
		if kind&4 != 0 {
			o.SectorBytes = 4096
		}
		unit := int64(o.SectorBytes)
		want := make([]byte, (int64(size)+unit-1)/unit*unit)
		var parent image.OpenParent
		switch kind % 3 {
		case 1:
			o.Variant = "fixed"
		case 2:
			for i := range want {
				want[i] = byte(i>>9) | 1
			}
			base := filepath.Join(imagetest.MemoryDir(t), "base.vhdx")
			o.VirtualBytes = int64(len(want))
			w, err := Create(base, o)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			img, err := openPath(base)
			if err != nil {
				t.Fatal(err)
			}
			info := img.Info()
			o.Parent, o.ParentInfo = "base.vhdx", &info
			parent = func(string, image.Format) (image.Image, error) { return img, nil }
		}
		path := filepath.Join(imagetest.MemoryDir(t), "disk.vhdx")
		w, err := Create(path, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		imagetest.Play(t, w, o.VirtualBytes, want, ops, 1, func() (image.Image, error) {
			f, err := image.OpenFile(path)
			if err != nil {
				return nil, err
			}
			return Open(f, parent)
		})
	})
}
