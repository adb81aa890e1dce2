package vhdx

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// memory is a file in memory.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Bytes() int64                            { return int64(len(m)) }
func (m memory) Name() string                            { return "memory" }
func (m memory) Close() error                            { return nil }

func (m memory) put32(off int64, v uint32) { binary.LittleEndian.PutUint32(m[off:], v) }
func (m memory) put64(off int64, v uint64) { binary.LittleEndian.PutUint64(m[off:], v) }

// seal makes the checksums of headers and region tables right again.
func (m memory) seal() {
	for _, off := range []int64{header1, header2} {
		m.put32(off+4, checksum(m[off:off+headerBytes]))
	}
	for _, off := range []int64{regions1, regions2} {
		m.put32(off+4, checksum(m[off:off+regionBytes]))
	}
}

// region sets one entry of both region tables: 0 is the block table, 1 the
// metadata.
func (m memory) region(i, off int64, bytes uint32) {
	for _, t := range []int64{regions1, regions2} {
		m.put64(t+16+32*i+16, uint64(off))
		m.put32(t+16+32*i+24, bytes)
	}
}

// addRegion appends an entry to both region tables.
func (m memory) addRegion(id guid, off int64, required uint32) {
	for _, t := range []int64{regions1, regions2} {
		n := int64(binary.LittleEndian.Uint32(m[t+8:]))
		m.put32(t+8, uint32(n+1))
		e := t + 16 + 32*n
		copy(m[e:], id[:])
		m.put64(e+16, uint64(off))
		m.put32(e+24, mib)
		m.put32(e+28, required)
	}
}

// addItem appends an item of 8 bytes at off to the metadata table.
func (m memory) addItem(id guid, off int64, flags uint32) {
	n := int64(binary.LittleEndian.Uint16(m[metadataOffset+10:]))
	binary.LittleEndian.PutUint16(m[metadataOffset+10:], uint16(n+1))
	e := metadataOffset + 32 + 32*n
	copy(m[e:], id[:])
	m.put32(e+16, uint32(off))
	m.put32(e+20, 8)
	m.put32(e+24, flags)
}

// Where our own writer puts what hostile files change.
const (
	atParameters = metadataOffset + metadataTableBytes
	atDiskBytes  = atParameters + 8
	atLogical    = atParameters + 16
	atPhysical   = atParameters + 20
	atLocator    = atParameters + 40
	itemEntry    = metadataOffset + 32
)

// file is a small image in memory: dynamic, of 8 MiB, blocks 0 and 3 there.
func file(t testing.TB, o image.CreateOptions) memory {
	t.Helper()
	path := filepath.Join(imagetest.MemoryDir(t), "small.vhdx")
	o.VirtualBytes = 8 << 20
	w, err := Create(path, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 6 << 20} {
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
	return file(t, image.CreateOptions{Parent: "base.vhdx", ParentInfo: &image.Info{
		Format: image.VHDX, VirtualBytes: 8 << 20, SectorBytes: 512, Identity: newGUID().String(),
	}})
}

// Compression and descriptors in text are no part of a VHDX; its other classes
// of hostile input have tests of their own, the log's in log_test.go.
func TestHostileFiles(t *testing.T) {
	unknown := newGUID()
	for _, c := range []struct {
		name  string
		layer bool // start from a differencing disk
		spoil func(m memory) memory
		want  error // nil where the file is fine after all
	}{
		{name: "nothing/nothing wrong", spoil: func(m memory) memory { return m }},
		{name: "nothing/nothing wrong in a layer", layer: true, spoil: func(m memory) memory { return m }},
		{"truncation/empty file", false, func(m memory) memory { return nil }, fault.ErrCorrupt},
		{"truncation/signature alone", false, func(m memory) memory { return m[:8] }, fault.ErrCorrupt},
		{"truncation/another signature", false, func(m memory) memory { m[0] = 'V'; return m }, fault.ErrCorrupt},

		{"sizes/a disk of 2^63-1 bytes", false, func(m memory) memory { m.put64(atDiskBytes, 1<<63-1); return m }, fault.ErrCorrupt},
		{"sizes/a disk of -512 bytes", false, func(m memory) memory { m.put64(atDiskBytes, 1<<64-512); return m }, fault.ErrCorrupt},
		{"sizes/a disk of half a sector", false, func(m memory) memory { m.put64(atDiskBytes, 256); return m }, fault.ErrCorrupt},
		{"sizes/a disk over 64 TiB", false, func(m memory) memory { m.put64(atDiskBytes, 64<<40+512); return m }, fault.ErrCorrupt},
		{"sizes/a disk of 64 TiB with a table for less", false, func(m memory) memory { m.put64(atDiskBytes, 64<<40); return m }, fault.ErrCorrupt},
		{"sizes/a layer of 64 TiB with a table for less", true, func(m memory) memory { m.put64(atDiskBytes, 64<<40); return m }, fault.ErrCorrupt},
		{"sizes/a disk of 0 bytes", false, func(m memory) memory { m.put64(atDiskBytes, 0); return m }, nil},

		{"sizes/blocks of 0 bytes", false, func(m memory) memory { m.put32(atParameters, 0); return m }, fault.ErrCorrupt},
		{"sizes/blocks of 512 KiB", false, func(m memory) memory { m.put32(atParameters, 512<<10); return m }, fault.ErrCorrupt},
		{"sizes/blocks of 3 MiB", false, func(m memory) memory { m.put32(atParameters, 3<<20); return m }, fault.ErrCorrupt},
		{"sizes/blocks of 2 GiB", false, func(m memory) memory { m.put32(atParameters, 1<<31); return m }, fault.ErrCorrupt},
		{"sizes/sectors of 0 bytes", false, func(m memory) memory { m.put32(atLogical, 0); return m }, fault.ErrCorrupt},
		{"sizes/sectors of 2^31 bytes", false, func(m memory) memory { m.put32(atLogical, 1<<31); return m }, fault.ErrCorrupt},
		{"sizes/physical sectors of 0 bytes", false, func(m memory) memory { m.put32(atPhysical, 0); return m }, fault.ErrCorrupt},

		{"tables/block table behind the end", false, func(m memory) memory { m.region(0, 1<<40, mib); return m }, fault.ErrCorrupt},
		{"tables/block table at 2^63", false, func(m memory) memory { m.region(0, -1<<63, mib); return m }, fault.ErrCorrupt},
		{"tables/block table off a MiB", false, func(m memory) memory { m.region(0, tableOffset+4096, mib); return m }, fault.ErrCorrupt},
		{"tables/block table in the headers", false, func(m memory) memory { m.region(0, 0, mib); return m }, fault.ErrCorrupt},
		{"tables/block table in the metadata", false, func(m memory) memory { m.region(0, metadataOffset, mib); return m }, fault.ErrCorrupt},
		{"tables/block table in the log", false, func(m memory) memory { m.region(0, logOffset, mib); return m }, fault.ErrCorrupt},
		{"tables/block table of 4 GiB", false, func(m memory) memory { m.region(0, tableOffset, 0xfff00000); return m }, fault.ErrCorrupt},
		{"tables/block table of 0 bytes", false, func(m memory) memory { m.region(0, tableOffset, 0); return m }, fault.ErrCorrupt},
		{"structure/two block tables", false, func(m memory) memory { m.addRegion(regionTable, 4<<20, 1); return m }, fault.ErrCorrupt},
		{"structure/unknown region", false, func(m memory) memory { m = grow(m); m.addRegion(unknown, 8<<20, 0); return m }, nil},
		{"structure/unknown required region", false, func(m memory) memory { m = grow(m); m.addRegion(unknown, 8<<20, 1); return m }, fault.ErrUnsupported},
		{"structure/block in an unknown region", false, func(m memory) memory { m.addRegion(unknown, 4<<20, 0); return m }, fault.ErrCorrupt},
		{"tables/2048 regions", false, func(m memory) memory { m.put32(regions1+8, 2048); m.put32(regions2+8, 2048); return m }, fault.ErrCorrupt},
		{"tables/2^32-1 regions", false, func(m memory) memory { m.put32(regions1+8, 1<<32-1); m.put32(regions2+8, 1<<32-1); return m }, fault.ErrCorrupt},
		{"tables/no regions", false, func(m memory) memory { m.put32(regions1+8, 0); m.put32(regions2+8, 0); return m }, fault.ErrCorrupt},

		{"tables/65535 metadata items", false, func(m memory) memory { m[metadataOffset+10], m[metadataOffset+11] = 255, 255; return m }, fault.ErrCorrupt},
		{"tables/no metadata items", false, func(m memory) memory { m[metadataOffset+10] = 0; return m }, fault.ErrCorrupt},
		{"structure/metadata without its signature", false, func(m memory) memory { m[metadataOffset] = 0; return m }, fault.ErrCorrupt},
		{"structure/item behind the region", false, func(m memory) memory { m.put32(itemEntry+16, mib-4); return m }, fault.ErrCorrupt},
		{"structure/item of 4 GiB", false, func(m memory) memory { m.put32(itemEntry+20, 1<<32-1); return m }, fault.ErrCorrupt},
		{"structure/item in the table", false, func(m memory) memory { m.put32(itemEntry+16, 32); return m }, fault.ErrCorrupt},
		{"structure/items that overlap", false, func(m memory) memory { m.put32(itemEntry+16, metadataTableBytes+4); return m }, fault.ErrCorrupt},
		{"structure/item of the wrong length", false, func(m memory) memory { m.put32(itemEntry+20, 4); return m }, fault.ErrCorrupt},
		{"structure/item twice", false, func(m memory) memory { m.addItem(itemDiskBytes, metadataTableBytes+100, 6); return m }, fault.ErrCorrupt},
		{"structure/unknown item", false, func(m memory) memory { m.addItem(unknown, metadataTableBytes+100, 0); return m }, nil},
		{"structure/a user's item of a known name", false, func(m memory) memory { m.addItem(itemDiskBytes, metadataTableBytes+100, 1); return m }, nil},
		{"structure/unknown required item", false, func(m memory) memory { m.addItem(unknown, metadataTableBytes+100, itemRequired); return m }, fault.ErrUnsupported},

		{"paths/a parent without a locator", false, func(m memory) memory { m[atParameters+4] |= hasParent; return m }, fault.ErrCorrupt},
		{"paths/a locator without a parent", true, func(m memory) memory { m[atParameters+4] &^= hasParent; return m }, fault.ErrCorrupt},
		{"paths/a locator of another type", true, func(m memory) memory { m[atLocator]++; return m }, fault.ErrUnsupported},
		{"paths/a locator of 65535 pairs", true, func(m memory) memory { m[atLocator+18], m[atLocator+19] = 255, 255; return m }, fault.ErrCorrupt},
		{"paths/a locator's key behind it", true, func(m memory) memory { m.put32(atLocator+20, 1<<32-1); return m }, fault.ErrCorrupt},
		{"paths/a locator's key of odd length", true, func(m memory) memory { m[atLocator+28]--; return m }, fault.ErrCorrupt},
		{"paths/a locator's key twice", true, func(m memory) memory { copy(m[atLocator+32:atLocator+44], m[atLocator+20:]); return m }, fault.ErrCorrupt},

		{"structure/a block in state 4", false, func(m memory) memory { m[tableOffset] = 4; return m }, fault.ErrCorrupt},
		{"structure/a block in state 5", false, func(m memory) memory { m[tableOffset] = 5; return m }, fault.ErrCorrupt},
		{"structure/a partial block without a parent", false, func(m memory) memory { m[tableOffset] = 7; return m }, fault.ErrCorrupt},
		{"structure/a partial block without a bitmap", true, func(m memory) memory { m.put64(tableOffset+8*2048, 0); return m }, fault.ErrCorrupt},
		{"tables/a bitmap in the headers", true, func(m memory) memory { m.put64(tableOffset+8*2048, 6); return m }, fault.ErrCorrupt},
		{"tables/a bitmap behind the end", true, func(m memory) memory { m.put64(tableOffset+8*2048, 1<<40|6); return m }, fault.ErrCorrupt},
		{"tables/a block in the headers", false, func(m memory) memory { m.put64(tableOffset, 6); return m }, fault.ErrCorrupt},
		{"tables/a block in the table", false, func(m memory) memory { m.put64(tableOffset, tableOffset|6); return m }, fault.ErrCorrupt},
		{"tables/a block behind the end", false, func(m memory) memory { m.put64(tableOffset, 1<<40|6); return m }, fault.ErrCorrupt},
		{"tables/a block at 2^64", false, func(m memory) memory { m.put64(tableOffset, 1<<64-1<<20|6); return m }, fault.ErrCorrupt},
		{"tables/a block across the end", false, func(m memory) memory { return m[:len(m)-mib] }, fault.ErrCorrupt},
		{"tables/a block whose end overflows", false, func(m memory) memory {
			m.put32(atParameters, maxBlock)
			m.put64(atDiskBytes, maxBlock)
			m.put64(tableOffset, 1<<63-mib|6)
			return m
		}, fault.ErrCorrupt},
		{"structure/two blocks in one place", false, func(m memory) memory { copy(m[tableOffset+8:], m[tableOffset:tableOffset+8]); return m }, nil},

		{"structure/two headers of one number", false, func(m memory) memory { m[header1+8] = m[header2+8]; m[header1+16]++; return m }, fault.ErrCorrupt},
		{"structure/twin headers", false, func(m memory) memory { copy(m[header1:header1+headerBytes], m[header2:]); return m }, nil},
		{"structure/version 2", false, func(m memory) memory { m[header1+66], m[header2+66] = 2, 2; return m }, fault.ErrUnsupported},
		{"structure/log version 1", false, func(m memory) memory { m[header1+64], m[header2+64] = 1, 1; return m }, fault.ErrUnsupported},
		{"structure/log off a MiB", false, func(m memory) memory { m[header2+72] = 1; return m }, fault.ErrCorrupt},
		{"structure/log in the headers", false, func(m memory) memory { m.put64(header2+72, 0); return m }, fault.ErrCorrupt},
		{"structure/dirty log behind the end", false, func(m memory) memory { m[header2+48] = 1; m.put64(header2+72, 1<<40); return m }, fault.ErrCorrupt},
		{"structure/dirty log of 0 bytes", false, func(m memory) memory { m[header2+48] = 1; m.put32(header2+68, 0); return m }, fault.ErrCorrupt},
		{"structure/dirty log of 4 GiB", false, func(m memory) memory { m[header2+48] = 1; m.put32(header2+68, 0xfff00000); return m }, fault.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := file(t, image.CreateOptions{})
			if c.layer {
				m = overParent(t)
			}
			m = c.spoil(m)
			if len(m) >= mib {
				m.seal()
			}
			err := imagetest.Hostile(t, func() (image.Image, error) { return OpenLayer(m) })
			if err == nil && c.want == nil {
				img, _ := OpenLayer(m)
				for range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
				}
			}
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// grow makes room for a region behind everything else.
func grow(m memory) memory { return append(m, make([]byte, mib)...) }

// Checksums protect headers and region tables, and one of each may be bad.
func TestOneBadCopyIsNoDamage(t *testing.T) {
	good := file(t, image.CreateOptions{})
	for _, bad := range [][]int64{{header1}, {header2}, {regions1}, {regions2}, {header1, regions1}, {header2, regions2}} {
		m := slices.Clone(good)
		for _, off := range bad {
			m[off+40]++
		}
		img, err := OpenLayer(m)
		if err != nil {
			t.Errorf("bad copies at %v: %v", bad, err)
			continue
		}
		if err := sameContent(img, good); err != nil {
			t.Errorf("bad copies at %v: %v", bad, err)
		}
	}
	for _, bad := range [][]int64{{header1, header2}, {regions1, regions2}} {
		m := slices.Clone(good)
		for _, off := range bad {
			m[off+40]++
		}
		if _, err := OpenLayer(m); !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("bad copies at %v: %v", bad, err)
		}
	}
}

func sameContent(img image.Image, m memory) error {
	ref, err := OpenLayer(m)
	if err != nil {
		return err
	}
	p, q := make([]byte, ref.Size()), make([]byte, ref.Size())
	if _, err := img.ReadAt(p, 0); err != nil {
		return err
	}
	if _, err := ref.ReadAt(q, 0); err != nil {
		return err
	}
	if !bytes.Equal(p, q) {
		return errors.New("other content")
	}
	return nil
}

// A file cut anywhere gives an error or, where only its unused end is gone,
// the right bytes; never zeros for what was there.
func TestHostileTruncation(t *testing.T) {
	good := file(t, image.CreateOptions{})
	for _, m := range []memory{good, overParent(t)} {
		cuts := []int{0, 7, 8, 519, 520, len(m) - 1}
		for at := 64 << 10; at < len(m); at += 64 << 10 {
			cuts = append(cuts, at-1, at, at+1, at+4096)
		}
		for _, n := range cuts {
			img, err := OpenLayer(m[:n])
			if err == nil {
				err = sameContent(img, m)
			}
			if !errors.Is(err, fault.ErrCorrupt) {
				t.Errorf("cut at %d of %d: %v", n, len(m), err)
			}
		}
	}
}

// disk2vhd ends a file with its data, and shows itself by twin headers.
func TestTwinHeadersMayEndInABlock(t *testing.T) {
	m := file(t, image.CreateOptions{})
	copy(m[header1:header1+headerBytes], m[header2:])
	cut := m[:len(m)-mib-12345]
	img, err := OpenLayer(cut)
	if err != nil {
		t.Fatal(err)
	}
	imagetest.Reader(t, img, openMemory(t, m))
}

func openMemory(t testing.TB, m memory) image.Image {
	t.Helper()
	img, err := OpenLayer(m)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// An empty disk of 64 TiB is opened and walked by its metadata alone.
func TestEmpty64TiB(t *testing.T) {
	path := filepath.Join(t.TempDir(), "empty.vhdx")
	w, err := Create(path, image.CreateOptions{VirtualBytes: MaxBytes, BlockBytes: 32 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	err = imagetest.Hostile(t, func() (image.Image, error) { return openPath(path) })
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	img, err := openPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	for e, err := range img.Extents(t.Context(), extent.Extent{Len: MaxBytes}) {
		if err != nil || e.Kind != image.Absent || e.Len != MaxBytes {
			t.Fatal(e, err)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
		t.Errorf("walking it allocates %d MiB", n>>20)
	}
	if n := after.HeapInuse - min(before.HeapInuse, after.HeapInuse); n > 32<<20 {
		t.Errorf("walking it holds %d MiB", n>>20)
	}
}
