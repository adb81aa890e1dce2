package vhd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// open opens the image called top, with its parents from d.
func open(d *imagetest.Dir, top string) (image.Image, error) {
	return d.Open(top, func(f image.File, parent image.OpenParent) (image.Image, error) {
		img, err := Open(f, parent)
		if err != nil {
			return nil, err
		}
		return img, nil
	})
}

// layerOf is a tiny differencing disk of the identity id over a parent that
// it knows by its identity and a locator.
func layerOf(id, parent uuid, code, name string) memory {
	m := slices.Clone(tiny(typeDifferencing))
	m.both(68, id[:]...)
	copy(m[atHeader+40:], parent[:])
	p := []byte(name)
	if strings.HasPrefix(code, "W2") {
		p = nil
		for _, r := range name {
			p = binary.LittleEndian.AppendUint16(p, uint16(r))
		}
	}
	at := binary.BigEndian.Uint64(m[atHeader+576+16:])
	clear(m[at : at+512])
	copy(m[at:], p)
	copy(m[atHeader+576:], code)
	m.put32(atHeader+576+8, uint32(len(p)))
	m.seal()
	return m
}

func TestHostileLoops(t *testing.T) {
	a, b := uuid{1}, uuid{2}
	// Without files that can be compared, as in archives, a loop ends by its depth.
	for name, d := range map[string]*imagetest.Dir{
		"a disk that is its own parent": {Files: map[string][]byte{"a": layerOf(a, a, "W2ru", "a")}},
		"two that are each other's":     {Files: map[string][]byte{"a": layerOf(a, b, "W2ru", "b"), "b": layerOf(b, a, "W2ru", "a")}},
	} {
		err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "a") })
		if !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "more than 200 parents") {
			t.Errorf("%s: %v", name, err)
		}
		if len(d.Asked) > 2*image.MaxDepth {
			t.Errorf("%s: %d files were asked for", name, len(d.Asked))
		}
	}
	for _, depth := range []int{image.MaxDepth, image.MaxDepth + 1} {
		d := &imagetest.Dir{Files: map[string][]byte{}}
		for i := range depth {
			d.Files[fmt.Sprint(i)] = layerOf(uuid{1, byte(i)}, uuid{1, byte(i + 1)}, "W2ru", fmt.Sprint(i+1))
		}
		base := tiny(typeFixed)
		id := uuid{1, byte(depth)}
		copy(base[len(base)-footerBytes+68:], id[:])
		binary.BigEndian.PutUint32(base[len(base)-footerBytes+64:], checksum(base[len(base)-footerBytes:], 64))
		d.Files[fmt.Sprint(depth)] = base
		err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "0") })
		if (err == nil) != (depth <= image.MaxDepth) {
			t.Errorf("a chain of %d parents: %v", depth, err)
		}
	}
}

// Every layer has two names for its parent, of which the first leads to a whole
// chain of the wrong identity: 2^100 chains.
func TestHostileChainsThatMultiply(t *testing.T) {
	d := &imagetest.Dir{Files: map[string][]byte{"x100": tiny(typeFixed), "y100": tiny(typeFixed)}}
	for i := range 100 {
		next := uuid{1, byte(i + 1)}
		if i == 99 {
			next = uuid{} // tiny's
		}
		for _, side := range []string{"x", "y"} {
			id := uuid{1, byte(i)}
			if side == "x" {
				id[0] = 2
			}
			m := layerOf(id, next, "W2ru", fmt.Sprintf("x%d", i+1))
			for j, r := range fmt.Sprintf("y%d", i+1) {
				m[atHeader+65+2*j] = byte(r)
			}
			m.seal()
			d.Files[fmt.Sprint(side, i)] = m
		}
	}
	err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "y0") })
	if !errors.Is(err, fault.ErrCorrupt) || len(d.Asked) > 3000 {
		t.Errorf("%d files were asked for: %v", len(d.Asked), err)
	}
}

// Whatever a locator says goes to the resolver, and nowhere else.
func TestHostilePaths(t *testing.T) {
	for _, name := range []string{
		"/etc/passwd", "../../etc/passwd", `..\..\etc\passwd`, `\\host\share\a.vhd`, `\\?\C:\a.vhd`, `C:\a.vhd`, "C:a.vhd",
		"a.vhd:stream", "/dev/sda", "nbd://host/disk", `json:{"driver":"file"}`, "a\x00b", "\ufeffa", strings.Repeat("../", 60) + "x",
	} {
		for _, code := range []string{"W2ru", "W2ku", "Wi2r", "Wi2k", "MACX"} {
			d := &imagetest.Dir{Files: map[string][]byte{"top": layerOf(uuid{1}, uuid{2}, code, name)}}
			err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "top") })
			if !errors.Is(err, image.ErrNotAllowed) && !errors.Is(err, fault.ErrCorrupt) {
				t.Errorf("%s %q: %v", code, name, err)
			}
			for _, asked := range d.Asked {
				if strings.ContainsRune(asked, 0) {
					t.Errorf("%s %q: asked for %q", code, name, asked)
				}
			}
		}
	}
	m := tiny(typeDifferencing) // no locator that counts, and the header's name
	copy(m[atHeader+576:], "none")
	for i, r := range "C:\\vm\\base.vhd" {
		m[atHeader+64+2*i], m[atHeader+65+2*i] = 0, byte(r)
	}
	m.seal()
	d := &imagetest.Dir{Files: map[string][]byte{"top": m, "base.vhd": tiny(typeFixed)}}
	if _, err := open(d, "top"); err != nil || !slices.Equal(d.Asked, []string{"base.vhd"}) {
		t.Errorf("a name in the header alone: %v, asked for %q", err, d.Asked)
	}
}

// A guest can write the head of any format into a fixed disk, and a VHD's
// footer to the end of a raw one. What the caller says is what counts, so the
// head is data here.
func TestHostileConfusion(t *testing.T) {
	m := tiny(typeFixed)
	copy(m, "QFI\xfb\x00\x00\x00\x03")
	img := openMemory(t, m)
	p := make([]byte, 8)
	if _, err := img.ReadAt(p, 0); err != nil || !bytes.Equal(p, m[:8]) || img.Size() != 3072 {
		t.Errorf("% x, %v", p, err)
	}
	// A fixed disk that holds a dynamic one.
	m = append(slices.Clone(tiny(typeDynamic)), make([]byte, 512)...)
	f := footer{dataOffset: -1, creator: "win ", currentBytes: int64(len(m)), kind: typeFixed}
	if img := openMemory(t, append(m, f.encode()...)); img.Info().Variant != "fixed" || img.Size() != int64(len(m)) {
		t.Errorf("%+v", img.Info())
	}
}

// The parent's warnings are the chain's.
func TestWarningsOfAParent(t *testing.T) {
	base := slices.Clone(tiny(typeDynamic))
	id := uuid{2}
	base.both(68, id[:]...)
	base.both(84, 1)
	base.seal()
	d := &imagetest.Dir{Files: map[string][]byte{"top": layerOf(uuid{1}, id, "W2ru", "base"), "base": base}}
	img, err := open(d, "top")
	if err != nil {
		t.Fatal(err)
	}
	if w := strings.Join(img.Info().Warnings, "\n"); !strings.Contains(w, `parent "base": the disk belongs to a suspended`) {
		t.Errorf("warnings %q", w)
	}
}

// Which depth answers is told through the whole chain, and a layer alone says
// only what it holds.
func TestDepthOfExtents(t *testing.T) {
	a, b, c := uuid{1}, uuid{2}, uuid{3}
	base := slices.Clone(tiny(typeFixed))
	copy(base[len(base)-footerBytes+68:], c[:])
	binary.BigEndian.PutUint32(base[len(base)-footerBytes+64:], checksum(base[len(base)-footerBytes:], 64))
	top := layerOf(a, b, "W2ru", "mid")
	top.put32(tableOffset, absent) // the first block is further down
	top.seal()
	d := &imagetest.Dir{Files: map[string][]byte{"top": top, "mid": layerOf(b, c, "W2ru", "base"), "base": base}}
	img, err := open(d, "top")
	if err != nil {
		t.Fatal(err)
	}
	// tiny has blocks of two sectors: 11, absent, 01.
	want := "data 1 [0,+1024) data 2 [1024,+1536) data 0 [2560,+512) "
	if got := extents(t, img); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := extents(t, openMemory(t, top)), "absent 0 [0,+2560) data 0 [2560,+512) "; got != want {
		t.Errorf("the layer alone: %s, want %s", got, want)
	}
}

func extents(t *testing.T, img image.Image) string {
	t.Helper()
	var b strings.Builder
	for e, err := range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %d %v ", e.Kind, e.Depth, e.Extent)
	}
	return b.String()
}
