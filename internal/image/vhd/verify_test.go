package vhd_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhd"
)

// What Windows and Azure want of a file, looked at by code that shares nothing
// with the writer.
func TestStructureAsWindowsWantsIt(t *testing.T) {
	base := image.Info{Format: image.VHD, VirtualBytes: 9<<20 + 512, SectorBytes: 512, Identity: "00112233-4455-6677-8899-aabbccddeeff"}
	for _, o := range []image.CreateOptions{
		{VirtualBytes: 512},
		{VirtualBytes: 9<<20 + 1},
		{VirtualBytes: 300 << 20, BlockBytes: 512 << 10},
		{VirtualBytes: 300 << 20, BlockBytes: 16 << 20},
		{VirtualBytes: 127 << 30},
		{VirtualBytes: vhd.MaxBytes},
		{VirtualBytes: 30 << 20, Variant: "fixed"},
		{VirtualBytes: 30<<20 + 512, Variant: "fixed"},
		{VirtualBytes: base.VirtualBytes, Parent: "base.vhd", ParentInfo: &base},
		{VirtualBytes: base.VirtualBytes, Parent: `C:\vm\base.vhd`, ParentInfo: &base},
		{VirtualBytes: base.VirtualBytes, Parent: `../vm/` + strings.Repeat("ü", 300) + `.vhd`, ParentInfo: &base},
	} {
		t.Run(fmt.Sprintf("%d %s %d %.20s", o.VirtualBytes, o.Variant, o.BlockBytes, o.Parent), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vhd")
			w, err := vhd.Create(path, o)
			if err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{0, o.VirtualBytes / 2 / 512 * 512, (o.VirtualBytes - 512) / 512 * 512} {
				if _, err := w.WriteAt(bytes.Repeat([]byte{1}, 512), off); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			warned := strings.Join(w.Warnings(), "\n")
			if want := o.Variant == "fixed" && o.VirtualBytes%(1<<20) != 0; want != strings.Contains(warned, "Azure") {
				t.Errorf("warnings %q", warned)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			verify(t, f, o)
		})
	}
}

func read(t *testing.T, f *os.File, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatalf("%d bytes at %d: %v", n, off, err)
	}
	return p
}

// sum is right if the four bytes at at are the complement of the others' sum.
func sum(t *testing.T, what string, p []byte, at int) {
	t.Helper()
	var s uint32
	for i, b := range p {
		if i < at || i > at+3 {
			s += uint32(b)
		}
	}
	if got := be.Uint32(p[at:]); got != ^s {
		t.Errorf("%s: checksum %#x, want %#x", what, got, ^s)
	}
}

var be = binary.BigEndian

func verify(t *testing.T, f *os.File, o image.CreateOptions) {
	info, _ := f.Stat()
	length := info.Size()
	size := (o.VirtualBytes + 511) / 512 * 512
	p := read(t, f, length-512, 512)
	if string(p[:8]) != "conectix" || be.Uint32(p[8:])&2 == 0 || be.Uint32(p[12:]) != 0x10000 {
		t.Fatalf("footer % x", p[:16])
	}
	sum(t, "footer", p, 64)
	if a, b := int64(be.Uint64(p[40:])), int64(be.Uint64(p[48:])); a != size || b != size {
		t.Errorf("sizes %d and %d, want %d", a, b, size)
	}
	if bytes.Equal(p[68:84], make([]byte, 16)) || !bytes.Equal(p[85:], make([]byte, 512-85)) || p[84] != 0 {
		t.Errorf("identity and behind: % x", p[68:100])
	}
	// A geometry holds as much of the disk as it can, and nothing behind it.
	c, h, s := int64(be.Uint16(p[56:])), int64(p[58]), int64(p[59])
	if n := c * h * s * 512; n > size || size <= 65535*16*255*512 && size-n >= h*s*512 || size > 65535*16*255*512 && n != 65535*16*255*512 {
		t.Errorf("%d/%d/%d, which is %d bytes of %d", c, h, s, n, size)
	}
	kind := be.Uint32(p[60:])
	if o.Variant == "fixed" {
		if kind != 2 || length != size+512 || be.Uint64(p[16:]) != 1<<64-1 {
			t.Errorf("type %d, %d bytes, data at %#x", kind, length, be.Uint64(p[16:]))
		}
		return
	}
	if !bytes.Equal(p, read(t, f, 0, 512)) {
		t.Error("the copy of the footer differs from it")
	}
	if want := map[bool]uint32{false: 3, true: 4}[o.Parent != ""]; kind != want || be.Uint64(p[16:]) != 512 {
		t.Errorf("type %d, want %d; header at %d", kind, want, be.Uint64(p[16:]))
	}
	q := read(t, f, 512, 1024)
	if string(q[:8]) != "cxsparse" || be.Uint64(q[8:]) != 1<<64-1 || be.Uint32(q[24:]) != 0x10000 {
		t.Fatalf("header % x", q[:36])
	}
	sum(t, "header", q, 36)
	bat, entries, block := int64(be.Uint64(q[16:])), int64(be.Uint32(q[28:])), int64(be.Uint32(q[32:]))
	if bat%512 != 0 || entries != (size+block-1)/block || o.BlockBytes != 0 && block != o.BlockBytes {
		t.Errorf("a table of %d entries at %d for blocks of %d", entries, bat, block)
	}
	first := bat + (4*entries+511)/512*512
	first = locators(t, f, q, first, o)
	table := read(t, f, bat, (4*entries+511)/512*512)
	bitmap := max(block/512/8, 512)
	end := first
	var here int
	seen := map[int64]bool{}
	for i := int64(0); i < int64(len(table)); i += 4 {
		e := be.Uint32(table[i:])
		if e == 1<<32-1 {
			continue
		}
		at := int64(e) * 512
		if i/4 >= entries || at < first || (at+bitmap)%4096 != 0 || at+bitmap+block > length-512 || seen[at] {
			t.Errorf("block %d lies at %d of %d", i/4, at, length)
		}
		seen[at] = true
		here++
		end = max(end, at+bitmap+block)
		if bits := read(t, f, at, bitmap); o.Parent == "" && bytes.Count(bits, []byte{0xff}) != len(bits) {
			t.Errorf("block %d of a dynamic disk has the bitmap % x…", i/4, bits[:8])
		} else if o.Parent != "" && bytes.Count(bits, []byte{0}) == len(bits) {
			t.Errorf("block %d holds nothing", i/4)
		}
	}
	if here == 0 || end != length-512 {
		t.Errorf("%d blocks, the last of which ends at %d of %d", here, end, length)
	}
}

// locators checks the parent's names, and gives where they end.
func locators(t *testing.T, f *os.File, q []byte, end int64, o image.CreateOptions) int64 {
	if o.Parent == "" {
		if !bytes.Equal(q[40:], make([]byte, 1024-40)) {
			t.Error("a parent in a disk that has none")
		}
		return end
	}
	if got := fmt.Sprintf("%x-%x-%x-%x-%x", q[40:44], q[44:46], q[46:48], q[48:50], q[50:56]); got != o.ParentInfo.Identity {
		t.Errorf("parent %s", got)
	}
	decode := func(p []byte, order binary.ByteOrder) string {
		var u []uint16
		for ; len(p) > 1; p = p[2:] {
			u = append(u, order.Uint16(p))
		}
		return strings.TrimRight(string(utf16.Decode(u)), "\x00")
	}
	name := strings.ReplaceAll(o.Parent, "/", `\`)
	base := name[strings.LastIndex(name, `\`)+1:]
	if got := decode(q[64:576], be); got == "" || !strings.HasPrefix(base, got) || len(base) < 250 && got != base {
		t.Errorf("the header calls the parent %q", got)
	}
	code, want := "W2ru", name
	if strings.HasPrefix(name, "C:") {
		code = "W2ku"
	} else if !strings.HasPrefix(name, ".") {
		want = `.\` + name
	}
	e := q[576:600]
	space, n, at := int64(be.Uint32(e[4:])), int64(be.Uint32(e[8:])), int64(be.Uint64(e[16:]))
	if string(e[:4]) != code || at != end || n > space || space%512 != 0 || be.Uint32(e[12:]) != 0 {
		t.Fatalf("locator %q of %d bytes in %d at %d", e[:4], n, space, at)
	}
	if got := decode(read(t, f, at, n), binary.LittleEndian); got != want {
		t.Errorf("locator %q, want %q", got, want)
	}
	if !bytes.Equal(q[600:], make([]byte, 1024-600)) {
		t.Error("more locators than one")
	}
	return at + space
}
