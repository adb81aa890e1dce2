package vhdx_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf16"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
)

// What Windows wants of a file, looked at by code that shares nothing with the
// writer: every byte of a written image has a meaning here or must be zero.
func TestStructureAsWindowsWantsIt(t *testing.T) {
	base := image.Info{
		Format: image.VHDX, VirtualBytes: 9<<30 + 4096, SectorBytes: 512,
		Identity:      "00112233-4455-6677-8899-aabbccddeeff",
		FormatDetails: map[string]string{"disk identity": "11112222-3333-4444-5555-666677778888"},
	}
	base4K := base
	base4K.SectorBytes = 4096
	for _, o := range []image.CreateOptions{
		{VirtualBytes: 0},
		{VirtualBytes: 512},
		{VirtualBytes: 5<<30 + 512},
		{VirtualBytes: 5<<30 + 512, BlockBytes: 1 << 20},
		{VirtualBytes: 20 << 30, BlockBytes: 256 << 20},
		{VirtualBytes: 30<<20 + 512, Variant: "fixed"},
		{VirtualBytes: 30 << 20, Variant: "fixed", BlockBytes: 8 << 20},
		{VirtualBytes: 40<<30 + 1, SectorBytes: 4096},
		{VirtualBytes: 64 << 40, BlockBytes: 32 << 20},
		{VirtualBytes: base.VirtualBytes, Parent: `..\vm\base.vhdx`, ParentInfo: &base},
		{VirtualBytes: base.VirtualBytes, Parent: "base.vhdx", ParentInfo: &base, BlockBytes: 1 << 20},
		{VirtualBytes: base.VirtualBytes, Parent: `C:\vm\base.vhdx`, ParentInfo: &base4K},
		{VirtualBytes: base.VirtualBytes, Parent: `\\host\share\base.vhdx`, ParentInfo: &base},
	} {
		t.Run(fmt.Sprintf("%d %s %d %d %s", o.VirtualBytes, o.Variant, o.BlockBytes, o.SectorBytes, o.Parent), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vhdx")
			w, err := vhdx.Create(path, o)
			if err != nil {
				t.Fatal(err)
			}
			unit := w.Unit()
			for _, off := range []int64{0, o.VirtualBytes / 2, o.VirtualBytes - 4096} {
				if off = off / unit * unit; off < 0 || off+4096 > o.VirtualBytes {
					continue
				}
				if off == 0 && o.Parent != "" { // a whole block, so that not all are partial
					if _, err := w.WriteAt(bytes.Repeat([]byte{1}, 2<<20), 0); err != nil {
						t.Fatal(err)
					}
					continue
				}
				if _, err := w.WriteAt(bytes.Repeat([]byte{1}, 4096), off); err != nil {
					t.Fatal(err)
				}
			}
			if o.Parent != "" { // zeros that hide the parent
				for off := int64(4 << 20); off < 6<<20; off += 1 << 20 {
					if _, err := w.WriteAt(make([]byte, 1<<20), off); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			v := verifier{t: t}
			v.verify(path, o)
		})
	}
}

// A verifier reads a VHDX by the specification's words.
type verifier struct {
	t      *testing.T
	f      *os.File
	length int64
}

var le = binary.LittleEndian

func (v *verifier) bytes(off, n int64) []byte {
	v.t.Helper()
	p := make([]byte, n)
	if _, err := v.f.ReadAt(p, off); err != nil {
		v.t.Fatalf("%d bytes at %d: %v", n, off, err)
	}
	return p
}

func (v *verifier) zeros(what string, off, n int64) {
	v.t.Helper()
	for ; n > 0; off, n = off+1<<20, n-1<<20 {
		p := v.bytes(off, min(n, 1<<20))
		if i := bytes.IndexFunc(p, func(r rune) bool { return r != 0 }); i >= 0 {
			v.t.Errorf("%s: byte %d is %#x, and reserved", what, off+int64(i), p[i])
			return
		}
	}
}

// sealed is a structure whose checksum, at byte 4, must be right.
func (v *verifier) sealed(what, signature string, off, n int64) []byte {
	v.t.Helper()
	p := v.bytes(off, n)
	if string(p[:4]) != signature {
		v.t.Fatalf("%s: signature %q", what, p[:4])
	}
	want := le.Uint32(p[4:])
	q := bytes.Clone(p)
	copy(q[4:8], "\x00\x00\x00\x00")
	if got := crc32.Checksum(q, crc32.MakeTable(crc32.Castagnoli)); got != want {
		v.t.Fatalf("%s: checksum %#x, want %#x", what, want, got)
	}
	return p
}

func guidText(p []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(p), le.Uint16(p[4:]), le.Uint16(p[6:]), p[8:10], p[10:16])
}

func text(p []byte) string {
	u := make([]uint16, len(p)/2)
	for i := range u {
		u[i] = le.Uint16(p[2*i:])
	}
	return string(utf16.Decode(u))
}

func (v *verifier) verify(path string, o image.CreateOptions) {
	t := v.t
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, _ := f.Stat()
	v.f, v.length = f, info.Size()
	if v.length%(1<<20) != 0 {
		t.Errorf("a file of %d bytes, no whole MiB", v.length)
	}
	if p := v.bytes(0, 8); string(p) != "vhdxfile" {
		t.Fatalf("signature %q", p)
	}
	v.zeros("behind the creator", 520, 64<<10-520)

	// Headers: both good, with different numbers, no log to replay.
	var sequence [2]uint64
	var logAt, logBytes int64
	for i, off := range []int64{64 << 10, 128 << 10} {
		p := v.sealed("header", "head", off, 4096)
		sequence[i] = le.Uint64(p[8:])
		if bytes.Equal(p[16:32], make([]byte, 16)) || bytes.Equal(p[32:48], make([]byte, 16)) {
			t.Error("a write GUID is zero")
		}
		if !bytes.Equal(p[48:64], make([]byte, 16)) || le.Uint16(p[64:]) != 0 || le.Uint16(p[66:]) != 1 {
			t.Errorf("log GUID % x, versions %d and %d", p[48:64], le.Uint16(p[64:]), le.Uint16(p[66:]))
		}
		logBytes, logAt = int64(le.Uint32(p[68:])), int64(le.Uint64(p[72:]))
		v.zeros("behind the header", off+80, 64<<10-80)
	}
	if sequence[0] == sequence[1] {
		t.Errorf("both headers have the sequence number %d", sequence[0])
	}
	if logBytes < 1<<20 || logBytes%(1<<20) != 0 || logAt < 1<<20 || logAt%(1<<20) != 0 {
		t.Errorf("a log of %d bytes at %d", logBytes, logAt)
	}
	v.zeros("log", logAt, logBytes)

	// Region tables: the same twice, both regions required.
	regions := v.sealed("regions", "regi", 192<<10, 64<<10)
	if !bytes.Equal(regions, v.sealed("regions", "regi", 256<<10, 64<<10)) {
		t.Error("the region tables differ")
	}
	if n := le.Uint32(regions[8:]); n != 2 {
		t.Fatalf("%d regions", n)
	}
	v.zeros("behind the regions", 320<<10, 1<<20-320<<10)
	v.zeros("region table", 192<<10+16+64, 64<<10-16-64)
	used := [][2]int64{{0, 1 << 20}, {logAt, logAt + logBytes}}
	take := func(what string, off, n int64) {
		t.Helper()
		if off%(1<<20) != 0 || off < 1<<20 || off+n > v.length {
			t.Errorf("%s of %d bytes at %d in a file of %d", what, n, off, v.length)
		}
		for _, u := range used {
			if off < u[1] && u[0] < off+n {
				t.Errorf("%s at %d overlaps [%d, %d)", what, off, u[0], u[1])
			}
		}
		used = append(used, [2]int64{off, off + n})
	}
	at := map[string][2]int64{}
	for i := range 2 {
		e := regions[16+32*i:][:32]
		if le.Uint32(e[28:]) != 1 {
			t.Errorf("region %s is not required", guidText(e))
		}
		off, n := int64(le.Uint64(e[16:])), int64(le.Uint32(e[24:]))
		take("region", off, n)
		at[guidText(e)] = [2]int64{off, n}
	}
	bat, ok1 := at["2dc27766-f623-4200-9d64-115e9bfd4a08"]
	meta, ok2 := at["8b7ca206-4790-4b9a-b8fe-575f050f886e"]
	if !ok1 || !ok2 {
		t.Fatalf("regions %v", at)
	}
	m := v.metadata(meta[0], meta[1], o)
	v.table(bat[0], bat[1], m, o, take)
}

// What the metadata says.
type disk struct {
	block, size, sector int64
	differencing        bool
}

func (v *verifier) metadata(off, n int64, o image.CreateOptions) disk {
	t := v.t
	p := v.bytes(off, n)
	if string(p[:8]) != "metadata" {
		t.Fatalf("metadata signature %q", p[:8])
	}
	items := map[string][]byte{}
	count := int(le.Uint16(p[10:]))
	next := int64(64 << 10)
	for i := range count {
		e := p[32+32*i:][:32]
		id, at, n, flags := guidText(e), int64(le.Uint32(e[16:])), int64(le.Uint32(e[20:])), le.Uint32(e[24:])
		if at < next || at+n > int64(len(p)) || le.Uint32(e[28:]) != 0 {
			t.Errorf("item %s of %d bytes at %d", id, n, at)
		}
		next = at + n
		items[id] = p[at : at+n]
		want := uint32(6)
		if id == "caa16737-fa36-4d43-b3b6-33f0aa44e76b" || id == "a8d35f2d-b30b-454d-abf7-d3d84834ab0c" {
			want = 4 // they are the file's, not the disk's
		}
		if flags != want {
			t.Errorf("item %s has the flags %d, want %d", id, flags, want)
		}
	}
	v.zeros("metadata table", off+32+32*int64(count), 64<<10-32-32*int64(count))
	v.zeros("behind the items", off+next, n-next)
	parameters := items["caa16737-fa36-4d43-b3b6-33f0aa44e76b"]
	d := disk{
		block:  int64(le.Uint32(parameters)),
		size:   int64(le.Uint64(items["2fa54224-cd1b-4876-b211-5dbed83bf4b8"])),
		sector: int64(le.Uint32(items["8141bf1d-a96f-4709-ba47-f233a8faab5f"])),
	}
	if s := le.Uint32(items["cda348c7-445d-4471-9cc9-e9885251c556"]); s != 4096 {
		t.Errorf("physical sectors of %d bytes", s)
	}
	flags := le.Uint32(parameters[4:])
	d.differencing = flags&2 != 0
	if want := map[bool]uint32{true: 1}[o.Variant == "fixed"] | map[bool]uint32{true: 2}[o.Parent != ""]; flags != want {
		t.Errorf("file parameters %d, want %d", flags, want)
	}
	if d.size%d.sector != 0 || d.size < o.VirtualBytes || d.size-o.VirtualBytes >= d.sector || o.BlockBytes != 0 && d.block != o.BlockBytes {
		t.Errorf("%+v", d)
	}
	locator := items["a8d35f2d-b30b-454d-abf7-d3d84834ab0c"]
	if d.differencing != (locator != nil) {
		t.Fatalf("a locator of %d bytes", len(locator))
	}
	if d.differencing {
		v.locator(locator, items["beca12ab-b2e6-4523-93ef-c309e000c746"], o)
	}
	return d
}

func (v *verifier) locator(p, diskID []byte, o image.CreateOptions) {
	t := v.t
	if guidText(p) != "b04aefb7-d19e-4a81-b789-25b8e9445913" || le.Uint16(p[16:]) != 0 {
		t.Errorf("locator % x", p[:20])
	}
	pairs := map[string]string{}
	for i := range int(le.Uint16(p[18:])) {
		e := p[20+12*i:]
		k, val := le.Uint32(e), le.Uint32(e[4:])
		pairs[text(p[k:k+uint32(le.Uint16(e[8:]))])] = text(p[val : val+uint32(le.Uint16(e[10:]))])
	}
	want := map[string]map[string]string{
		`..\vm\base.vhdx`:        {"relative_path": `..\vm\base.vhdx`, "absolute_win32_path": `\\?\C:\vm\base.vhdx`},
		"base.vhdx":              {"relative_path": `.\base.vhdx`, "absolute_win32_path": `\\?\C:\base.vhdx`},
		`C:\vm\base.vhdx`:        {"absolute_win32_path": `\\?\C:\vm\base.vhdx`},
		`\\host\share\base.vhdx`: {"absolute_win32_path": `\\?\UNC\host\share\base.vhdx`},
	}[o.Parent]
	want["parent_linkage"] = "{" + o.ParentInfo.Identity + "}"
	if !maps.Equal(pairs, want) {
		t.Errorf("locator %q, want %q", pairs, want)
	}
	if guidText(diskID) != o.ParentInfo.FormatDetails["disk identity"] {
		t.Errorf("the disk's identity is %s, its parent's %s", guidText(diskID), o.ParentInfo.FormatDetails["disk identity"])
	}
}

func (v *verifier) table(off, n int64, d disk, o image.CreateOptions, take func(string, int64, int64)) {
	t := v.t
	ratio := (int64(1) << 23) * d.sector / d.block
	blocks := (d.size + d.block - 1) / d.block
	entries := blocks
	if d.differencing {
		entries += (blocks + ratio - 1) / ratio
		if r := blocks % ratio; r != 0 {
			entries += ratio - r // the bitmap comes behind a whole chunk
		}
	} else if blocks > 0 {
		entries += (blocks - 1) / ratio
	}
	if 8*entries > n {
		t.Fatalf("a table of %d bytes for %d entries", n, entries)
	}
	v.zeros("behind the table", off+8*entries, n-8*entries)
	p := v.bytes(off, 8*entries)
	states := map[uint64]int{}
	partial := map[int64][]int64{} // blocks by chunk
	bitmaps := map[int64]int64{}
	for i := range entries {
		e := le.Uint64(p[8*i:])
		state, place := e&7, int64(e>>20)<<20
		chunk, within := i/(ratio+1), i%(ratio+1)
		if e&0xffff8 != 0 {
			t.Fatalf("entry %d is %#x: reserved bits", i, e)
		}
		if within == ratio {
			switch {
			case state == 6 && d.differencing:
				take("bitmap", place, 1<<20)
				bitmaps[chunk] = place
			case e != 0:
				t.Errorf("entry %d of a bitmap is %#x", i, e)
			}
			continue
		}
		block := chunk*ratio + within
		states[state]++
		switch {
		case block >= blocks && e != 0:
			t.Errorf("entry %d, behind the disk, is %#x", i, e)
		case state == 6, state == 7 && d.differencing:
			take(fmt.Sprintf("block %d", block), place, d.block)
			if state == 7 {
				partial[chunk] = append(partial[chunk], block)
			}
		case place != 0 || state != 0 && state != 2:
			t.Errorf("entry %d is %#x", i, e)
		}
	}
	for chunk, list := range partial {
		at, ok := bitmaps[chunk]
		if !ok {
			t.Errorf("chunk %d has partial blocks and no bitmap", chunk)
			continue
		}
		per := d.block / d.sector / 8
		for _, block := range list {
			bits := v.bytes(at+block%ratio*per, per)
			if set := bytes.IndexFunc(bits, func(r rune) bool { return r != 0 }); set < 0 {
				t.Errorf("block %d is partial and holds nothing", block)
			}
		}
	}
	switch {
	case o.Variant == "fixed" && int64(states[6]) != blocks:
		t.Errorf("a fixed disk of %d blocks has states %v", blocks, states)
	case d.differencing && d.block <= 2<<20 && (states[2] == 0 || states[6] == 0 || states[7] == 0):
		t.Errorf("a layer with whole, zero and partial blocks has the states %v", states)
	}
}

// Nobody may take a half-written file for an image, whenever the power went:
// what makes it one is written last.
func TestUnfinishedIsNoVHDX(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.vhdx")
	w, err := vhdx.Create(path, image.CreateOptions{VirtualBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Error(err)
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(p, []byte("vhdxfile")) || bytes.Contains(p, []byte("head")) {
		t.Error("it has a header")
	}
}
