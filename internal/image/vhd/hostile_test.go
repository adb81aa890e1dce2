package vhd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// seal makes the checksums of both footers and the header right again.
func (m memory) seal() {
	sum := func(p []byte, at int) { binary.BigEndian.PutUint32(p[at:], checksum(p, at)) }
	sum(m[:footerBytes], 64)
	sum(m[len(m)-footerBytes:], 64)
	sum(m[footerBytes:footerBytes+headerBytes], 36)
}

// both sets bytes of the footer and of its copy.
func (m memory) both(at int, p ...byte) {
	copy(m[at:], p)
	copy(m[len(m)-footerBytes+at:], p)
}

func (m memory) put32(off int, v uint32) { binary.BigEndian.PutUint32(m[off:], v) }
func (m memory) put64(off int, v uint64) { binary.BigEndian.PutUint64(m[off:], v) }

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

const atHeader = footerBytes

// file is a small image in memory: of 4 MiB in blocks of 512 KiB, of which
// blocks 0 and 7 are there.
func file(t testing.TB, o image.CreateOptions) memory {
	t.Helper()
	path := filepath.Join(imagetest.MemoryDir(t), "small.vhd")
	o.VirtualBytes = 4 << 20
	if o.Variant != "fixed" {
		o.BlockBytes = 512 << 10
	}
	w, err := Create(path, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 4<<20 - 8192} {
		if _, err := w.WriteAt(bytes.Repeat([]byte{1}, 8192), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// overParent is file as a layer over a made-up parent.
func overParent(t testing.TB) memory {
	return file(t, image.CreateOptions{Parent: "base.vhd", ParentInfo: &image.Info{
		Format: image.VHD, VirtualBytes: 4 << 20, Identity: uuid{1, 2, 3}.String(),
	}})
}

// Compression and descriptors in text are no part of a VHD; its other classes
// of hostile input have tests of their own below.
func TestHostileFiles(t *testing.T) {
	const (
		dynamic = iota
		layered
		fixed
	)
	for _, c := range []struct {
		name  string
		kind  int
		spoil func(m memory)
		want  error // nil where the file is fine after all
	}{
		{"nothing/nothing wrong", dynamic, func(m memory) {}, nil},
		{"nothing/nothing wrong in a layer", layered, func(m memory) {}, nil},
		{"nothing/nothing wrong in a fixed disk", fixed, func(m memory) {}, nil},

		{"sizes/a disk of 2^63-1 bytes", dynamic, func(m memory) { m.both(48, be64(1<<63-1)...) }, fault.ErrCorrupt},
		{"sizes/a disk of 2^63-512 bytes", dynamic, func(m memory) { m.both(48, be64(1<<63-512)...) }, fault.ErrCorrupt},
		{"sizes/a fixed disk of 2^63-512 bytes", fixed, func(m memory) { m.both(48, be64(1<<63-512)...) }, fault.ErrCorrupt},
		{"sizes/a disk of -512 bytes", dynamic, func(m memory) { m.both(48, be64(1<<64-512)...) }, fault.ErrCorrupt},
		{"sizes/a disk of half a sector", dynamic, func(m memory) { m.both(48, be64(256)...) }, fault.ErrCorrupt},
		{"sizes/a disk of 152 TiB", dynamic, func(m memory) { m.both(48, be64(152<<40)...) }, fault.ErrCorrupt},
		{"sizes/a disk of 0 bytes", dynamic, func(m memory) { m.both(48, be64(0)...) }, nil},
		{"sizes/a fixed disk a sector longer than its file", fixed, func(m memory) { m.both(48, be64(4<<20+512)...) }, fault.ErrCorrupt},
		{"structure/type 0", dynamic, func(m memory) { m.both(63, 0) }, fault.ErrUnsupported},
		{"structure/type 5", dynamic, func(m memory) { m.both(63, 5) }, fault.ErrUnsupported},
		{"structure/suspended", dynamic, func(m memory) { m.both(84, 1) }, nil},

		{"structure/header at 2^63", dynamic, func(m memory) { m.both(16, be64(1<<63)...) }, fault.ErrCorrupt},
		{"structure/header behind the end", dynamic, func(m memory) { m.both(16, be64(1<<40)...) }, fault.ErrCorrupt},
		{"structure/header in the footer", dynamic, func(m memory) { m.both(16, be64(0)...) }, fault.ErrCorrupt},
		{"structure/header without its cookie", dynamic, func(m memory) { m[atHeader]++ }, fault.ErrCorrupt},
		{"structure/header of version 2", dynamic, func(m memory) { m[atHeader+25] = 2 }, fault.ErrCorrupt},

		{"tables/2^30+1 table entries", dynamic, func(m memory) { m.put32(atHeader+28, 1<<30+1) }, fault.ErrCorrupt},
		{"tables/2^32-1 table entries", dynamic, func(m memory) { m.put32(atHeader+28, 1<<32-1) }, fault.ErrCorrupt},
		{"tables/one table entry too few", dynamic, func(m memory) { m.put32(atHeader+28, 7) }, fault.ErrCorrupt},
		{"tables/more table entries than blocks", dynamic, func(m memory) { m.put32(atHeader+28, 100) }, nil},
		{"tables/table at 2^63-1", dynamic, func(m memory) { m.put64(atHeader+16, 1<<63-1) }, fault.ErrCorrupt},
		{"tables/table at 2^63", dynamic, func(m memory) { m.put64(atHeader+16, 1<<63) }, fault.ErrCorrupt},
		{"tables/table behind the end", dynamic, func(m memory) { m.put64(atHeader+16, uint64(len(m)-16)) }, fault.ErrCorrupt},
		{"tables/table in the footer's copy", dynamic, func(m memory) { m.put64(atHeader+16, 0) }, fault.ErrCorrupt},
		{"tables/blocks of 0 bytes", dynamic, func(m memory) { m.put32(atHeader+32, 0) }, fault.ErrCorrupt},
		{"tables/blocks of 1 byte", dynamic, func(m memory) { m.put32(atHeader+32, 1) }, fault.ErrCorrupt},
		{"tables/blocks of 3 MiB", dynamic, func(m memory) { m.put32(atHeader+32, 3<<20) }, fault.ErrCorrupt},
		{"tables/blocks of 512 bytes", dynamic, func(m memory) { m.put32(atHeader+32, 512) }, fault.ErrCorrupt},

		{"tables/a block in the footer's copy", dynamic, func(m memory) { m.put32(tableOffset, 0) }, fault.ErrCorrupt},
		{"tables/a block behind the end", dynamic, func(m memory) { m.put32(tableOffset, 1<<32-2) }, fault.ErrCorrupt},
		{"tables/a layer's block behind the end", layered, func(m memory) { m.put32(tableOffset, 1<<32-2) }, fault.ErrCorrupt},
		{"tables/a bitmap that reaches into the footer", layered, func(m memory) { m.put32(tableOffset, uint32(len(m)/512-1)) }, fault.ErrCorrupt},
		{"tables/a block in the table", dynamic, func(m memory) { m.put32(tableOffset, tableOffset/512) }, fault.ErrCorrupt},
		{"tables/a block in the header", dynamic, func(m memory) { m.put32(tableOffset, 1) }, fault.ErrCorrupt},
		{"tables/a layer's bitmap in the table", layered, func(m memory) { m.put32(tableOffset, tableOffset/512) }, fault.ErrCorrupt},
		{"structure/two blocks in one place", dynamic, func(m memory) { copy(m[tableOffset+4:], m[tableOffset:tableOffset+4]) }, nil},

		{"paths/a locator of 4 GiB", layered, func(m memory) { m.put32(atHeader+576+8, 1<<32-1) }, fault.ErrCorrupt},
		{"paths/a locator behind the end", layered, func(m memory) { m.put64(atHeader+576+16, 1<<40) }, fault.ErrCorrupt},
		{"paths/a locator at 2^63", layered, func(m memory) { m.put64(atHeader+576+16, 1<<63) }, fault.ErrCorrupt},
		{"paths/a locator of no known kind", layered, func(m memory) { m[atHeader+576] = 'X' }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var m memory
			switch c.kind {
			case dynamic:
				m = file(t, image.CreateOptions{})
			case layered:
				m = overParent(t)
			case fixed:
				m = file(t, image.CreateOptions{Variant: "fixed"})
			}
			data := slices.Clone(m[:footerBytes+headerBytes])
			c.spoil(m)
			if c.kind == fixed {
				copy(m, data)
				p := m[len(m)-footerBytes:]
				binary.BigEndian.PutUint32(p[64:], checksum(p, 64))
			} else {
				m.seal()
			}
			err := imagetest.Hostile(t, func() (image.Image, error) { return OpenLayer(m) })
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

func TestFilesThatAreNoVHD(t *testing.T) {
	path, _ := imagetest.Sample(t, "qemu-iotests/afl5.img.bz2")
	afl5, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]memory{
		"empty": nil, "511 zeros": make(memory, 511), "a raw disk": make(memory, 1<<20), "afl5": afl5,
		"a cookie alone": append(make(memory, 1024-len(cookie)), cookie...),
	} {
		if err := imagetest.Hostile(t, func() (image.Image, error) { return Open(m, nil) }); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEveryChecksumCounts(t *testing.T) {
	good := file(t, image.CreateOptions{})
	spoilt := func(at ...int) error {
		m := slices.Clone(good)
		for _, i := range at {
			m[i]++
		}
		img, err := OpenLayer(m)
		if err == nil && len(img.Info().Warnings) == 0 {
			err = errors.New("no warning")
		}
		return err
	}
	atEnd := len(good) - footerBytes
	if err := spoilt(atEnd + 300); err != nil {
		t.Errorf("a bad footer and a good copy: %v", err)
	}
	if err := spoilt(300, atEnd+301); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a bad footer and a bad copy: %v", err)
	}
	if err := spoilt(70, atEnd+70); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("an identity that was edited in both, alike: %v", err)
	}
	if err := spoilt(0, atEnd); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("no footer at all: %v", err)
	}
	if err := spoilt(atHeader + 900); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a bad header: %v", err)
	}
	fixed := file(t, image.CreateOptions{Variant: "fixed"})
	fixed[len(fixed)-1]++
	if _, err := OpenLayer(fixed); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a fixed disk's bad footer: %v", err)
	}
}

// Before 2004 some footers lacked their last byte.
func TestFooterOf511Bytes(t *testing.T) {
	for _, variant := range []string{"fixed", "dynamic"} {
		m := file(t, image.CreateOptions{Variant: variant})
		img, err := OpenLayer(m[:len(m)-1])
		if err != nil {
			t.Fatal(err)
		}
		if len(img.Info().Warnings) > 0 {
			t.Errorf("%s: %q", variant, img.Info().Warnings)
		}
		ref, _ := OpenLayer(m)
		imagetest.Reader(t, img, ref)
	}
}

// Whose word on the size counts depends on who wrote the footer.
func TestSizeByCreator(t *testing.T) {
	for _, c := range []struct {
		creator string
		geometry
		want int64
	}{
		{"win ", geometry{10, 4, 17}, 4 << 20},
		{"vbox", geometry{10, 4, 17}, 4 << 20},
		{"qem2", geometry{10, 4, 17}, 4 << 20},
		{"vpc ", geometry{10, 4, 17}, 10 * 4 * 17 * 512},
		{"qemu", geometry{10, 4, 17}, 10 * 4 * 17 * 512},
		{"vpc ", geometry{65535, 16, 255}, 4 << 20},
		{"vpc ", geometry{}, 4 << 20},
	} {
		f := footer{creator: c.creator, currentBytes: 4 << 20, geometry: c.geometry}
		if got := f.virtualBytes(); got != c.want {
			t.Errorf("%q %+v: %d bytes, want %d", c.creator, c.geometry, got, c.want)
		}
	}
}

// A file cut anywhere gives an error, or the right bytes where only its unused
// end is gone; never zeros for what was there.
func TestHostileTruncation(t *testing.T) {
	for _, m := range []memory{file(t, image.CreateOptions{}), overParent(t), file(t, image.CreateOptions{Variant: "fixed"})} {
		ref, err := OpenLayer(m)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, ref.Size())
		ref.ReadAt(want, 0)
		whole := int(ref.dataEnd)
		for at := 0; at < len(m); at += 512 {
			if at > 8192 && at < len(m)-8192 && at%(64<<10) != 0 {
				continue
			}
			for _, n := range []int{at, at + 1, at + 511} {
				img, err := OpenLayer(m[:n])
				if err == nil {
					got := make([]byte, img.Size())
					if _, err = img.ReadAt(got, 0); err == nil && (n < whole || !bytes.Equal(got, want)) {
						t.Errorf("cut at %d of %d: read as if nothing were missing", n, len(m))
					}
				}
				if n < whole && !errors.Is(err, fault.ErrCorrupt) {
					t.Errorf("cut at %d of %d: %v", n, len(m), err)
				}
			}
		}
	}
}

// Some writers let the last block end before its time, with the footer behind
// it.
func TestBlockCutByTheFooter(t *testing.T) {
	m := file(t, image.CreateOptions{})
	want := openMemory(t, slices.Clone(m))
	at := int(binary.BigEndian.Uint32(m[tableOffset:])) * 512
	last := int(binary.BigEndian.Uint32(m[tableOffset+4*7:])) * 512
	// The last block of the file becomes block 0's, whose first 8 KiB count.
	m.put32(tableOffset, uint32(last/512))
	m.put32(tableOffset+4*7, uint32(at/512))
	copy(m[last+512:], m[at+512:at+512+512<<10])
	clear(m[at+512 : at+512+512<<10])
	copy(m[at+512+512<<10-8192:], bytes.Repeat([]byte{1}, 8192))
	end := last + 512 + 8192
	cut := append(slices.Clone(m[:end]), m[len(m)-footerBytes:]...)
	imagetest.Reader(t, openMemory(t, cut), want)
	// Without the footer the same file is damaged.
	img, err := OpenLayer(cut[:end])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.ReadAt(make([]byte, 512<<10), 0); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("a cut block without the footer: %v", err)
	}
}

func openMemory(t testing.TB, m memory) *Image {
	t.Helper()
	img, err := OpenLayer(m)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// In a dynamic disk the bitmaps mean nothing: Windows fills them with ones,
// others do not.
func TestBitmapOfADynamicDisk(t *testing.T) {
	m := file(t, image.CreateOptions{})
	want := openMemory(t, slices.Clone(m))
	at := int(binary.BigEndian.Uint32(m[tableOffset:])) * 512
	clear(m[at : at+512])
	imagetest.Reader(t, openMemory(t, m), want)
}
