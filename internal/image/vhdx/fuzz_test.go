package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"path/filepath"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
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

// Whatever the bytes say, opening, walking and reading neither panic nor loop,
// and agree with each other.
func FuzzOpen(f *testing.F) {
	clean := file(f, image.CreateOptions{})
	dirty := slices.Clone(clean)
	at := blockOf(dirty, 0)
	n := dirty.log(logEntry{0, 0, 7, int64(len(dirty)), int64(len(dirty)), []logChange{{off: at, page: page(9)}}})
	dirty.log(logEntry{n, 0, 8, int64(len(dirty)), int64(len(dirty)) + mib, []logChange{{off: at + 4096, bytes: 8192}, {off: at, page: page(8)}}})
	dirty.dirty()
	base := []memory{clean, overParent(f), dirty, file(f, image.CreateOptions{SectorBytes: 4096})}
	work := make([]memory, len(base))
	for i := range base {
		work[i] = slices.Clone(base[i])
		f.Add(uint8(i), true, []byte{4, 0, 10, 1, 5, 0})
		f.Add(uint8(i), false, []byte{5, 0, 0, 3, 0, 0, 0, 1})
		f.Add(uint8(i), true, []byte{7, 0, 8, 7, 3, 0, 0x50, 0, 0, 0, 0, 0})
		f.Add(uint8(i), true, []byte{9, 0, 8, 3, 0, 0x10, 0, 0, 9, 0, 64, 3, 'z', 'e', 'r', 'o'})
		f.Add(uint8(i), true, []byte{6, 0, 20, 7, 0, 0, 0, 40, 0, 0, 0, 40})
	}
	f.Fuzz(func(t *testing.T, kind uint8, seal bool, records []byte) {
		m := work[int(kind)%len(base)]
		defer copy(m[:tableOffset+mib], base[int(kind)%len(base)])
		m.change(records)
		if seal {
			m.seal()
			m.sealLog()
		}
		parent := func(string, image.Format) (image.Image, error) { return OpenLayer(clean) }
		img, err := Open(m, parent)
		if err != nil {
			if img, err = OpenLayer(m); err != nil {
				return
			}
		}
		img.Info()
		n := 0
		for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
			if err != nil || n == 100 {
				break
			}
			n++
			buf := bytes.Repeat([]byte{0xa5}, int(min(e.Len, 4096)))
			if got, err := img.ReadAt(buf, e.Off); err != nil && err != io.EOF || got != len(buf) {
				t.Fatalf("%+v cannot be read: %d, %v", e, got, err)
			}
			if e.Kind != image.Data && len(bytes.Trim(buf, "\x00")) > 0 {
				t.Fatalf("%+v is not zero", e)
			}
		}
	})
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
			base := filepath.Join(t.TempDir(), "base.vhdx")
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
		path := filepath.Join(t.TempDir(), "disk.vhdx")
		w, err := Create(path, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		for ; len(ops) >= 4; ops = ops[4:] {
			off := int64(ops[0])<<14 | int64(ops[1])<<7
			n := int64(ops[2])<<12 | int64(ops[3])
			if u := w.Unit(); u > 1 {
				off, n = off/u*u, n/u*u
			}
			off = min(off, o.VirtualBytes)
			n = min(n, o.VirtualBytes-off)
			p := bytes.Repeat([]byte{ops[3] & 3}, int(n))
			copy(want[off:], p)
			if m, err := w.WriteAt(p, off); m != len(p) || err != nil {
				t.Fatalf("WriteAt(%d, %d) = %d, %v", n, off, m, err)
			}
			if len(p) > 0 && p[0] == 0 { // zeros over data are not promised
				return
			}
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		file, err := image.OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		img, err := Open(file, parent)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		got := make([]byte, len(want))
		if _, err := img.ReadAt(got, 0); err != nil && len(got) > 0 {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("another content")
		}
	})
}
