package vdi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

const block = 1 << 20

// A spec says what made makes: by default a dynamic disk of blocks of 1 MiB.
type spec struct {
	kind             uint32
	bytes            int64
	extra            uint32   // bytes before every block
	entries          []uint32 // of the map
	id, parent       byte     // UUIDs, one byte of them
	modified, linked byte
}

// made is a VDI as VirtualBox lays it out. Block number i of the file holds
// bytes of value i+1.
func made(s spec) []byte {
	const mapAt, dataAt = 1 << 10, 2 << 10
	le := binary.LittleEndian
	p := make([]byte, dataAt)
	copy(p, "<<< Oracle VM VirtualBox Disk Image >>>\n")
	le.PutUint32(p[64:], signature)
	le.PutUint32(p[68:], 1<<16|1)
	le.PutUint32(p[72:], 400)
	le.PutUint32(p[76:], s.kind)
	copy(p[84:], "made for a test")
	le.PutUint32(p[340:], mapAt)
	le.PutUint32(p[344:], dataAt)
	le.PutUint32(p[360:], 512)
	le.PutUint64(p[368:], uint64(s.bytes))
	le.PutUint32(p[376:], block)
	le.PutUint32(p[380:], s.extra)
	le.PutUint32(p[384:], uint32(len(s.entries)))
	p[392], p[408], p[424], p[440] = s.id, s.modified, s.parent, s.linked
	last := -1
	for i, e := range s.entries {
		le.PutUint32(p[mapAt+4*i:], e)
		if e < blockZero {
			last = max(last, int(e))
		}
	}
	for i := range last + 1 {
		p = append(p, bytes.Repeat([]byte{0xee}, int(s.extra))...)
		p = append(p, bytes.Repeat([]byte{byte(i + 1)}, block)...)
	}
	return p
}

// content is what a disk of these bytes per block reads as.
func content(size int64, blocks ...byte) *bytes.Reader {
	var p []byte
	for _, b := range blocks {
		p = append(p, bytes.Repeat([]byte{b}, block)...)
	}
	return bytes.NewReader(p[:size])
}

func asImage(img *Image, err error) (image.Image, error) {
	if err != nil {
		return nil, err
	}
	return img, nil
}

func mustOpen(t *testing.T, p []byte, parent image.OpenParent) *Image {
	t.Helper()
	img, err := Open(imagetest.Bytes("made.vdi", p), parent)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestLayouts(t *testing.T) {
	const size = 5*block - 512
	for _, c := range []struct {
		name string
		spec spec
		want []byte
	}{
		{"dynamic, out of order", spec{kind: typeDynamic, bytes: size, entries: []uint32{2, blockAbsent, 0, 1, blockZero}}, []byte{3, 0, 1, 2, 0}},
		{"neighbours", spec{kind: typeDynamic, bytes: size, entries: []uint32{1, 2, 3, 0, blockAbsent}}, []byte{2, 3, 4, 1, 0}},
		{"with room before every block", spec{kind: typeDynamic, bytes: size, extra: 512, entries: []uint32{1, 2, blockZero, blockZero, 0}}, []byte{2, 3, 0, 0, 1}},
		{"fixed", spec{kind: typeFixed, bytes: size, entries: []uint32{0, 1, 2, 3, 4}}, []byte{1, 2, 3, 4, 5}},
		{"a map longer than the disk, one block at all places", spec{kind: typeDynamic, bytes: size, entries: []uint32{0, 0, 0, 0, 0, blockAbsent}}, []byte{1, 1, 1, 1, 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := mustOpen(t, made(c.spec), nil)
			imagetest.Reader(t, img, content(size, c.want...))
			if info := img.Info(); info.Creator != "Oracle VM VirtualBox Disk Image" || info.FormatDetails["comment"] != "made for a test" {
				t.Errorf("%+v", info)
			}
		})
	}
}

// VirtualBox makes disks whose size is no multiple of a sector; QEMU shows
// them rounded up.
func TestOddSizeIsRoundedUp(t *testing.T) {
	img := mustOpen(t, made(spec{kind: typeDynamic, bytes: block + 1, entries: []uint32{0, blockAbsent}}), nil)
	if img.Size() != block+512 {
		t.Errorf("%d bytes", img.Size())
	}
	imagetest.Reader(t, img, content(block+512, 1, 0))
}

func TestWhatQemuWrites(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	disk := imagetest.NewDisk(1, 9<<20+1536)
	source := disk.Save(t)
	for _, options := range []string{"static=off", "static=on"} {
		path := filepath.Join(t.TempDir(), "disk.vdi")
		imagetest.Qemu(t, "convert", "-f", "raw", "-O", "vdi", "-o", options, source, path)
		f, err := image.OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		img, err := Open(f, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		if !Probe(f) {
			t.Error("its own format is not recognised")
		}
		imagetest.Reader(t, img, disk)
	}
}

// parentOf gives p as the parent, whatever the name.
func parentOf(p []byte) image.OpenParent {
	return func(name string, format image.Format) (image.Image, error) {
		return asImage(OpenLayer(imagetest.Bytes(name, p)))
	}
}

func TestDifferencing(t *testing.T) {
	base := made(spec{kind: typeDynamic, bytes: 4 * block, id: 7, modified: 8, entries: []uint32{0, 1, 2, blockAbsent}})
	child := spec{kind: typeDifferencing, bytes: 4 * block, id: 9, parent: 7, linked: 8, entries: []uint32{blockAbsent, blockZero, 0, blockAbsent}}
	img := mustOpen(t, made(child), parentOf(base))
	imagetest.Reader(t, img, content(4*block, 1, 0, 1, 0))
	var kinds []string
	for e, err := range img.Extents(context.Background(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, e.Kind.String())
		if want := map[int64]int{0: 1, 1: 0, 2: 0, 3: 1}[e.Off/block]; e.Depth != want {
			t.Errorf("%+v at depth %d, want %d", e, e.Depth, want)
		}
	}
	if got := strings.Join(kinds, " "); got != "data zero data absent" {
		t.Errorf("extents: %s", got)
	}

	if _, err := Open(imagetest.Bytes("child", made(child)), nil); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("without a parent: %v", err)
	}
	only, err := OpenLayer(imagetest.Bytes("child", made(child)))
	if err != nil {
		t.Fatal(err)
	}
	imagetest.Reader(t, only, content(4*block, 0, 0, 1, 0))

	stale := child
	stale.linked = 1
	if _, err := Open(imagetest.Bytes("child", made(stale)), parentOf(base)); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a parent that was written to since: %v", err)
	}
	other := child
	other.parent = 1
	if _, err := Open(imagetest.Bytes("child", made(other)), parentOf(base)); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a parent with another UUID: %v", err)
	}
}

func TestHostile(t *testing.T) {
	good := made(spec{kind: typeDynamic, bytes: 3 * block, entries: []uint32{0, blockAbsent, 1}})
	put32 := func(off int, x uint32) func(p []byte) []byte {
		return func(p []byte) []byte { binary.LittleEndian.PutUint32(p[off:], x); return p }
	}
	put64 := func(off int, x uint64) func(p []byte) []byte {
		return func(p []byte) []byte { binary.LittleEndian.PutUint64(p[off:], x); return p }
	}
	for _, c := range []struct {
		name   string
		change func(p []byte) []byte
		want   error // nil where the image is odd and good
	}{
		{"unchanged", func(p []byte) []byte { return p }, nil},
		{"empty file", func(p []byte) []byte { return nil }, fault.ErrCorrupt},
		{"ends inside its header", func(p []byte) []byte { return p[:455] }, fault.ErrCorrupt},
		{"ends inside its map", func(p []byte) []byte { return p[:1<<10+11] }, fault.ErrCorrupt},
		{"ends before its blocks", func(p []byte) []byte { return p[:2<<10] }, fault.ErrCorrupt},
		{"ends inside a block", func(p []byte) []byte { return p[:len(p)-1] }, fault.ErrCorrupt},

		{"virtual size 0", put64(368, 0), nil},
		{"virtual size 2^63-1", put64(368, 1<<63-1), fault.ErrCorrupt},
		{"virtual size 2^64-1", put64(368, 1<<64-1), fault.ErrCorrupt},
		{"516 bytes that claim 152 TiB", func(p []byte) []byte { return put64(368, 152<<40)(p)[:516] }, fault.ErrCorrupt},
		{"152 TiB with a map that the file cannot hold", func(p []byte) []byte { return put32(384, 1<<32-1)(put64(368, 152<<40)(p)) }, fault.ErrCorrupt},
		{"blocks of no bytes", put32(376, 0), fault.ErrCorrupt},
		{"blocks of 2^31 bytes", put32(376, 1<<31), fault.ErrCorrupt},
		{"blocks of odd bytes", put32(376, block+512), fault.ErrCorrupt},
		{"2^32-1 bytes before every block", put32(380, 1<<32-1), fault.ErrCorrupt},
		{"a map too short", put32(384, 2), fault.ErrCorrupt},
		{"a map behind the end", put32(340, 1<<32-1), fault.ErrCorrupt},
		{"a map in the header", put32(340, 0), fault.ErrCorrupt},
		{"blocks behind the end", put32(344, 1<<32-1), fault.ErrCorrupt},
		{"blocks that are the map", put32(344, 1<<10), nil},
		{"a block behind the end", put32(1<<10, 1<<32-3), fault.ErrCorrupt},
		{"two blocks at one place", put32(1<<10, 1), nil},

		{"version 0.1", put32(68, 1), fault.ErrUnsupported},
		{"version 2.0", put32(68, 2<<16), fault.ErrUnsupported},
		{"no signature", put32(64, 0), fault.ErrCorrupt},
		{"a header of no bytes", put32(72, 0), fault.ErrCorrupt},
		{"an undo image", put32(76, typeUndo), fault.ErrUnsupported},
		{"an unknown type", put32(76, 99), fault.ErrUnsupported},
		{"differencing without a parent", put32(76, typeDifferencing), fault.ErrCorrupt},
		{"differencing, and nothing is allowed", func(p []byte) []byte { return put32(424, 1)(put32(76, typeDifferencing)(p)) }, image.ErrNotAllowed},
		{"a parent of a dynamic image", put32(424, 1), nil},
		{"text that never ends", func(p []byte) []byte {
			copy(p, bytes.Repeat([]byte{0xff}, 64))
			copy(p[84:], bytes.Repeat([]byte{0xff}, 256))
			return p
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := c.change(bytes.Clone(good))
			err := imagetest.Hostile(t, func() (image.Image, error) {
				return asImage(Open(imagetest.Bytes("hostile", p), nil))
			})
			switch {
			case c.want == nil && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != nil && !errors.Is(err, c.want):
				t.Errorf("error %v, want %v", err, c.want)
			case err != nil:
				t.Log(err)
			}
		})
	}
}

// FuzzOpen: whatever the bytes say, opening, walking and reading neither panic
// nor loop, and agree with each other.
func FuzzOpen(f *testing.F) {
	small := func(s spec) []byte {
		p := made(s)
		binary.LittleEndian.PutUint32(p[376:], 512)
		binary.LittleEndian.PutUint64(p[368:], uint64(len(s.entries))*512)
		return p[:2<<10+8<<10]
	}
	f.Add(small(spec{kind: typeDynamic, entries: []uint32{2, blockAbsent, 0, 1, blockZero}}))
	f.Add(small(spec{kind: typeFixed, entries: []uint32{0, 1, 2, 3}}))
	f.Add(small(spec{kind: typeDifferencing, parent: 1, extra: 512, entries: []uint32{0, blockAbsent, 1}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		var img *Image
		imagetest.Hostile(t, func() (image.Image, error) {
			var err error
			img, err = OpenLayer(imagetest.Bytes("fuzz", p))
			return asImage(img, err)
		})
		if img == nil {
			return
		}
		imagetest.Agree(t, img)
	})
}
