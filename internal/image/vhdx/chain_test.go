package vhdx

import (
	"encoding/binary"
	"errors"
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

// identify gives m the DataWriteGuid id.
func (m memory) identify(id guid) memory {
	copy(m[header1+32:], id[:])
	copy(m[header2+32:], id[:])
	m.seal()
	return m
}

// locate makes m name its parent by these pairs.
func (m memory) locate(pairs ...string) memory {
	p := append([]byte(nil), locatorVHDX[:]...)
	p = binary.LittleEndian.AppendUint16(p, 0)
	p = binary.LittleEndian.AppendUint16(p, uint16(len(pairs)/2))
	var texts []byte
	at := 20 + 6*len(pairs)
	for i := 0; i < len(pairs); i += 2 {
		k, v := utf16Bytes(pairs[i]), utf16Bytes(pairs[i+1])
		p = binary.LittleEndian.AppendUint32(p, uint32(at+len(texts)))
		p = binary.LittleEndian.AppendUint32(p, uint32(at+len(texts)+len(k)))
		p = binary.LittleEndian.AppendUint16(p, uint16(len(k)))
		p = binary.LittleEndian.AppendUint16(p, uint16(len(v)))
		texts = append(append(texts, k...), v...)
	}
	p = append(p, texts...)
	copy(m[atLocator:], p)
	m.put32(itemEntry+5*32+20, uint32(len(p)))
	return m
}

func link(id guid) string { return "{" + strings.ToUpper(id.String()) + "}" }

func TestHostileLoops(t *testing.T) {
	own := guid{1}
	d := &imagetest.Dir{Files: map[string][]byte{"a": overParent(t).identify(own).locate(
		"parent_linkage", link(own), "relative_path", `.\a`, "volume_path", `\\?\Volume{1}\a`, "absolute_win32_path", `C:\a`)}}
	for name, d := range map[string]*imagetest.Dir{
		"a disk that is its own parent": d,
		"two that are each other's": {Files: map[string][]byte{
			"a": overParent(t).identify(own).locate("parent_linkage", link(own), "relative_path", `.\b`, "absolute_win32_path", `C:\b`),
			"b": d.Files["a"],
		}},
	} {
		err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "a") })
		if !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "more than 200 parents") || len(err.Error()) > 1000 {
			t.Errorf("%s: %v", name, err)
		}
		if len(d.Asked) > 2*image.MaxDepth {
			t.Errorf("%s: %d files were asked for", name, len(d.Asked))
		}
	}
}

// Whatever a locator says goes to the resolver, and nowhere else.
func TestHostilePaths(t *testing.T) {
	for _, name := range []string{
		"/etc/passwd", "../../etc/passwd", `..\..\etc\passwd`, `\\host\share\a.vhdx`, `\\?\C:\a.vhdx`, `C:\a.vhdx`, "C:a.vhdx",
		"a.vhdx:stream", "/dev/sda", "nbd://host/disk", `json:{"driver":"file"}`, "a\x00b", "\ufeffa", strings.Repeat("../", 1000) + "x",
	} {
		for _, key := range []string{"relative_path", "volume_path", "absolute_win32_path"} {
			d := &imagetest.Dir{Files: map[string][]byte{"top": overParent(t).locate("parent_linkage", link(guid{1}), key, name)}}
			err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "top") })
			if !errors.Is(err, image.ErrNotAllowed) {
				t.Errorf("%s %q: %v", key, name, err)
			}
			for _, asked := range d.Asked {
				if strings.ContainsRune(asked, 0) {
					t.Errorf("%s %q: asked for %q", key, name, asked)
				}
			}
		}
	}
}

// Texts that are none, and tables of them that name the same bytes.
func TestHostileText(t *testing.T) {
	for name, spoil := range map[string]func(m memory){
		"half of a surrogate pair": func(m memory) { copy(m.locate("parent_linkage", "{}", "x", "yy")[atLocator+20+24:], "p\xd8") },
		"no identity":              func(m memory) { m.locate("relative_path", `.\a`) },
		"an identity of no form":   func(m memory) { m.locate("parent_linkage", "{1}", "relative_path", `.\a`) },
		"a zero identity":          func(m memory) { m.locate("parent_linkage", link(guid{}), "relative_path", `.\a`) },
		"no name":                  func(m memory) { m.locate("parent_linkage", link(guid{1})) },
		"an empty key":             func(m memory) { m.locate("parent_linkage", link(guid{1}), "", `.\a`) },
		"60000 pairs of 64 KiB each": func(m memory) {
			const n = 60000
			m.put32(itemEntry+5*32+20, maxItemBytes-metadataTableBytes-40)
			binary.LittleEndian.PutUint16(m[atLocator+18:], n)
			for i := range int64(n) {
				e := atLocator + 20 + 12*i
				m.put32(e, uint32(i*2))
				m.put32(e+4, 0)
				m.put32(e+8, 0xfffe0000|40)
			}
		},
	} {
		m := overParent(t)
		spoil(m)
		d := &imagetest.Dir{Files: map[string][]byte{"top": m}}
		err := imagetest.Hostile(t, func() (image.Image, error) { return open(d, "top") })
		if !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The creator is a stranger's text too.
func TestHostileConfusion(t *testing.T) {
	m := file(t, image.CreateOptions{})
	for i := 8; i < 520; i++ {
		m[i] = 0xd8
	}
	if img := openMemory(t, m); len(img.Info().Creator) > 3*256 {
		t.Errorf("creator %q", img.Info().Creator)
	}
	// A VHD's footer at the end is no part of a VHDX, which says what it is at
	// its start.
	m = append(file(t, image.CreateOptions{}), "conectix"...)
	if _, err := OpenLayer(m); err != nil {
		t.Error(err)
	}
	// A VHD set looks like a VHDX without a disk.
	m = file(t, image.CreateOptions{})
	m.put32(regions1+8, 1)
	m.put32(regions2+8, 1)
	m.seal()
	if _, err := OpenLayer(imagetest.Bytes("disk.VHDS", m)); !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), ".avhdx") {
		t.Errorf("a VHD set: %v", err)
	}
}

// Windows names a parent by several paths of which any may be right, and knows
// it by either of two identities.
func TestParentByAnyNameAndLinkage(t *testing.T) {
	id := guid{7}
	base := file(t, image.CreateOptions{}).identify(id)
	for _, pairs := range [][]string{
		{"parent_linkage", link(id), "relative_path", `.\base.vhdx`},
		{"parent_linkage", link(id), "parent_linkage2", link(guid{}), "relative_path", `..\x\nowhere.vhdx`, "absolute_win32_path", `\\?\C:\vm\base.vhdx`},
		{"parent_linkage", link(guid{9}), "parent_linkage2", strings.ToLower(link(id)), "volume_path", `\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\vm\base.vhdx`},
	} {
		d := &imagetest.Dir{Files: map[string][]byte{"top": overParent(t).locate(pairs...), "base.vhdx": base}}
		img, err := open(d, "top")
		if err != nil {
			t.Errorf("%q: %v", pairs, err)
			continue
		}
		for e, err := range img.Extents(t.Context(), extent.Extent{Off: 1 << 20, Len: 512}) {
			if err != nil || e.Depth != 1 {
				t.Errorf("%q: %+v, %v", pairs, e, err)
			}
		}
	}
	d := &imagetest.Dir{Files: map[string][]byte{"top": overParent(t).locate("parent_linkage", link(guid{9}), "relative_path", `.\base.vhdx`), "base.vhdx": base}}
	_, err := open(d, "top")
	if !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), id.String()) || !strings.Contains(err.Error(), guid{9}.String()) || !strings.Contains(err.Error(), "base.vhdx") {
		t.Errorf("a wrong parent: %v", err)
	}
}

// A state and what is under it: in a disk without a parent, and in a layer.
func TestBlockStates(t *testing.T) {
	for _, c := range []struct {
		state       uint64
		alone, over image.Kind
	}{
		{stateNotPresent, image.Absent, image.Absent},
		{stateUndefined, image.Zero, image.Zero},
		{stateZero, image.Zero, image.Zero},
		{stateUnmapped, image.Zero, image.Zero},
		{stateUnmapped | 4<<20, image.Zero, image.Zero}, // where it was
		{stateZero | 1<<60, image.Zero, image.Zero},
	} {
		for _, layer := range []bool{false, true} {
			m, want := file(t, image.CreateOptions{}), c.alone
			if layer {
				m, want = overParent(t), c.over
			}
			m.put64(tableOffset, c.state)
			img := openMemory(t, m)
			p := slices.Repeat([]byte{0xa5}, 4096)
			if _, err := img.ReadAt(p, 0); err != nil || slices.Max(p) != 0 {
				t.Errorf("state %#x: %v, % x…", c.state, err, p[:8])
			}
			for e, err := range img.Extents(t.Context(), extent.Extent{Len: 2 << 20}) {
				if err != nil || e.Kind != want || e.Len != 2<<20 {
					t.Errorf("state %#x, over a parent %t: %+v, %v", c.state, layer, e, err)
				}
			}
		}
	}
}
