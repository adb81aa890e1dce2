package vhd

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// tiny is a disk of six sectors in blocks of two.
func tiny(kind uint32) memory {
	f := footer{features: 2, dataOffset: footerBytes, creator: "win ", originalBytes: 3072, currentBytes: 3072, geometry: newGeometry(3072), kind: kind}
	if kind == typeFixed {
		return append(bytes.Repeat([]byte{7}, 3072), f.encode()...)
	}
	h := header{tableOffset: tableOffset, entries: 3, blockBytes: 1024}
	table := bytes.Repeat([]byte{0xff}, 512)
	at := uint32(tableOffset/512 + 1)
	var blocks []byte
	if kind == typeDifferencing {
		name := []byte("p\x00")
		h.locators[0] = locator{code: "W2ru", bytes: 2, off: int64(at) * 512}
		blocks = append(name, make([]byte, 510)...)
		at++
	}
	for i, bits := range []byte{0xc0, 0x40} {
		binary.BigEndian.PutUint32(table[8*i:], at)
		at += 3
		blocks = append(blocks, append([]byte{bits}, make([]byte, 511)...)...)
		blocks = append(blocks, bytes.Repeat([]byte{byte(i + 1)}, 1024)...)
	}
	m := append(f.encode(), h.encode()...)
	return append(append(append(m, table...), blocks...), f.encode()...)
}

// Whatever the bytes say, opening, walking and reading neither panic nor loop,
// and agree with each other.
func FuzzOpen(f *testing.F) {
	for _, kind := range []uint32{typeFixed, typeDynamic, typeDifferencing} {
		f.Add([]byte(tiny(kind)), true)
	}
	if dir := os.Getenv("BACKSTAY_SAMPLES"); dir != "" && dir != "none" {
		for _, name := range []string{
			"qemu-iotests/afl5.img.bz2", "qemu-iotests/hyperv2012r2-dynamic.vhd.bz2", "qemu-iotests/d2v-zerofilled.vhd.bz2",
			"dfvfs/fat-differential.vhd.gz", "dfvfs/ext2.vhd.gz",
		} {
			path, _ := imagetest.Sample(f, name)
			p, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			// Blocks are nothing to a parser, and a fuzzer is slow with long input.
			if head := 20 << 10; len(p) > head {
				p = append(p[:head:head], p[len(p)-footerBytes:]...)
			}
			f.Add(p, true)
		}
	}
	f.Fuzz(func(t *testing.T, p []byte, seal bool) {
		m := memory(bytes.Clone(p))
		if seal && len(m) >= footerBytes+headerBytes {
			m.seal()
		}
		parent := func(string, image.Format) (image.Image, error) { return openMemory(t, tiny(typeFixed)), nil }
		img, err := Open(m, parent)
		if err != nil {
			if img, err = OpenLayer(m); err != nil {
				return
			}
		}
		img.Info()
		imagetest.Agree(t, img)
	})
}

// What was written is read, whatever the order, lengths and places.
func FuzzRoundTrip(f *testing.F) {
	f.Add(uint32(1<<20+512), uint8(0), []byte{1, 0, 0, 1, 2, 200, 3, 255})
	f.Add(uint32(5000), uint8(1), []byte{9, 0, 0, 9})
	f.Add(uint32(1<<20), uint8(2), []byte{0, 10, 0, 90, 7, 30, 1, 10})
	f.Fuzz(func(t *testing.T, size uint32, kind uint8, ops []byte) {
		size %= 2 << 20
		o := image.CreateOptions{VirtualBytes: int64(size), BlockBytes: 512 << 10}
		want := make([]byte, (int64(size)+511)/512*512)
		var parent image.OpenParent
		switch kind % 3 {
		case 1:
			o = image.CreateOptions{VirtualBytes: int64(size), Variant: "fixed"}
		case 2:
			base := footer{dataOffset: -1, creator: "win ", currentBytes: int64(len(want)), kind: typeFixed}
			for i := range want {
				want[i] = byte(i>>9) | 1
			}
			m := memory(append(bytes.Clone(want), base.encode()...))
			info := openMemory(t, m).Info()
			o.VirtualBytes = int64(len(want))
			o.Parent, o.ParentInfo = "base.vhd", &info
			parent = func(string, image.Format) (image.Image, error) { return openMemory(t, m), nil }
		}
		path := filepath.Join(imagetest.MemoryDir(t), "disk.vhd")
		w, err := Create(path, o)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		imagetest.Play(t, w, o.VirtualBytes, want, ops, 0, func() (image.Image, error) {
			f, err := image.OpenFile(path)
			if err != nil {
				return nil, err
			}
			return Open(f, parent)
		})
	})
}
