package host

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"strings"
	"unicode/utf16"
)

const mib = 1 << 20

// States of blocks in a VHDX's allocation table.
const (
	blockFull    = 6
	blockPartial = 7
)

// A live is a VHDX that a running VM writes to. It changes blocks in place, as
// the host does: allocates them, marks the sectors of a differencing disk, and
// gives the file a new identity of its data. It does not write the log: a
// simulated host does not lose power. Not safe for concurrent use.
type live struct {
	f            *os.File
	end          int64 // of the file
	block        int64 // bytes
	sector       int64
	disk         int64 // bytes
	ratio        int64
	differencing bool
	fixed        bool
	table        int64 // where the allocation table is
	entries      []uint64
	size         int64 // where the disk's size is told
	locator      int64 // where the parent locator is, and its room
	locatorRoom  int64
	locatorEntry int64 // where the metadata table tells of it
	dirty        bool  // written since the data's identity was last new
}

// guid is a GUID as files hold it: its first three numbers little-endian.
func guid(s string) (g [16]byte) {
	p, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(p) != len(g) {
		panic("no GUID: " + s)
	}
	copy(g[:], p)
	slices.Reverse(g[0:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return g
}

var (
	regionTable      = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
	regionMetadata   = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
	itemParameters   = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
	itemSize         = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
	itemSector       = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
	itemLocator      = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
	locatorOfWindows = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")
)

func openLive(path string) (*live, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	l := &live{f: f}
	if err := l.read(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

func (l *live) read() error {
	at := func(off int64, n int) []byte {
		p := make([]byte, n)
		if _, err := l.f.ReadAt(p, off); err != nil {
			return make([]byte, n)
		}
		return p
	}
	info, err := l.f.Stat()
	if err != nil {
		return err
	}
	l.end = info.Size()
	regions := at(192<<10, 64<<10)
	var metadata, tableBytes int64
	for i := range min(int(binary.LittleEndian.Uint32(regions[8:])), 2047) {
		e := regions[16+32*i:]
		off, n := int64(binary.LittleEndian.Uint64(e[16:])), int64(binary.LittleEndian.Uint32(e[24:]))
		switch [16]byte(e[:16]) {
		case regionTable:
			l.table, tableBytes = off, n
		case regionMetadata:
			metadata = off
		}
	}
	if metadata == 0 || l.table == 0 || tableBytes > 1<<30 {
		return errors.New("no VHDX")
	}
	items := at(metadata, 64<<10)
	for i := range min(int(binary.LittleEndian.Uint16(items[10:])), 2047) {
		e := items[32+32*i:]
		off, n := metadata+int64(binary.LittleEndian.Uint32(e[16:])), int64(binary.LittleEndian.Uint32(e[20:]))
		switch [16]byte(e[:16]) {
		case itemParameters:
			p := at(off, 8)
			l.block = int64(binary.LittleEndian.Uint32(p))
			l.fixed, l.differencing = p[4]&1 != 0, p[4]&2 != 0
		case itemSize:
			l.size = off
			l.disk = int64(binary.LittleEndian.Uint64(at(off, 8)))
		case itemSector:
			l.sector = int64(binary.LittleEndian.Uint32(at(off, 4)))
		case itemLocator:
			l.locator, l.locatorRoom, l.locatorEntry = off, n, metadata+32+32*int64(i)
		}
	}
	if l.block < mib || l.sector < 512 || l.disk <= 0 {
		return errors.New("a VHDX without its metadata")
	}
	l.ratio = (1 << 23) * l.sector / l.block
	raw := at(l.table, int(tableBytes))
	for i := 0; i+8 <= len(raw); i += 8 {
		l.entries = append(l.entries, binary.LittleEndian.Uint64(raw[i:]))
	}
	return nil
}

// WriteAt writes whole sectors.
func (l *live) WriteAt(p []byte, off int64) error {
	if off%l.sector != 0 || int64(len(p))%l.sector != 0 || off < 0 || off+int64(len(p)) > l.disk {
		return fmt.Errorf("a write of %d bytes at %d", len(p), off)
	}
	l.dirty = true
	for len(p) > 0 {
		n := min(int64(len(p)), l.block-off%l.block)
		if err := l.writeBlock(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (l *live) writeBlock(p []byte, off int64) error {
	number := off / l.block
	index := number + number/l.ratio
	entry := l.entries[index]
	state := entry & 7
	if state != blockFull && state != blockPartial {
		state = blockFull
		if l.differencing {
			state = blockPartial
		}
		place, err := l.grow(l.block)
		if err != nil {
			return err
		}
		entry = uint64(place) | state
		if err := l.setEntry(index, entry); err != nil {
			return err
		}
	}
	if _, err := l.f.WriteAt(p, int64(entry&^(mib-1))+off%l.block); err != nil {
		return err
	}
	if state == blockPartial {
		return l.mark(number, off%l.block/l.sector, int64(len(p))/l.sector)
	}
	return nil
}

// mark sets the bits of n sectors of a block.
func (l *live) mark(number, first, n int64) error {
	index := number/l.ratio*(l.ratio+1) + l.ratio
	if l.entries[index]&7 != blockFull {
		place, err := l.grow(mib)
		if err != nil {
			return err
		}
		if err := l.setEntry(index, uint64(place)|blockFull); err != nil {
			return err
		}
	}
	bit := number%l.ratio*(l.block/l.sector) + first
	from, to := bit/8, (bit+n+7)/8
	bits := make([]byte, to-from)
	place := int64(l.entries[index] &^ (mib - 1))
	if _, err := l.f.ReadAt(bits, place+from); err != nil {
		return err
	}
	for i := bit; i < bit+n; i++ {
		bits[i/8-from] |= 1 << (i % 8)
	}
	_, err := l.f.WriteAt(bits, place+from)
	return err
}

// grow gives n further bytes of zeros at the file's end.
func (l *live) grow(n int64) (int64, error) {
	place := (l.end + mib - 1) &^ (mib - 1)
	l.end = place + n
	return place, l.f.Truncate(l.end)
}

func (l *live) setEntry(index int64, e uint64) error {
	l.entries[index] = e
	_, err := l.f.WriteAt(binary.LittleEndian.AppendUint64(nil, e), l.table+8*index)
	return err
}

// seal gives the data a new identity if it was written since the last one:
// children know their parent by it. It gives the identity.
func (l *live) seal() (data [16]byte, err error) {
	var newest []byte
	for _, at := range []int64{64 << 10, 128 << 10} {
		p := make([]byte, 4096)
		if _, err := l.f.ReadAt(p, at); err != nil {
			return data, err
		}
		if newest == nil || binary.LittleEndian.Uint64(p[8:]) > binary.LittleEndian.Uint64(newest[8:]) {
			newest = p
		}
	}
	if l.dirty {
		rand.Read(newest[16:48]) // of the file and of the data
		number := binary.LittleEndian.Uint64(newest[8:])
		for i, at := range []int64{64 << 10, 128 << 10} {
			binary.LittleEndian.PutUint64(newest[8:], number+1+uint64(i))
			binary.LittleEndian.PutUint32(newest[4:], 0)
			binary.LittleEndian.PutUint32(newest[4:], crc32.Checksum(newest, crc32.MakeTable(crc32.Castagnoli)))
			if _, err := l.f.WriteAt(newest, at); err != nil {
				return data, err
			}
		}
		l.dirty = false
	}
	return [16]byte(newest[32:48]), nil
}

// relink makes the file a child of the parent of that path and identity.
func (l *live) relink(parent string, data [16]byte) error {
	relative := `.\` + parent[strings.LastIndexByte(parent, '\\')+1:]
	text := fmt.Sprintf("{%08x-%04x-%04x-%x-%x}", binary.LittleEndian.Uint32(data[:]), binary.LittleEndian.Uint16(data[4:]), binary.LittleEndian.Uint16(data[6:]), data[8:10], data[10:])
	pairs := [][2]string{{"parent_linkage", text}, {"relative_path", relative}, {"absolute_win32_path", `\\?\` + parent}}
	p := make([]byte, 20+12*len(pairs))
	copy(p, locatorOfWindows[:])
	binary.LittleEndian.PutUint16(p[18:], uint16(len(pairs)))
	for i, pair := range pairs {
		e := 20 + 12*i
		for j, s := range pair {
			start := len(p)
			for _, u := range utf16.Encode([]rune(s)) {
				p = binary.LittleEndian.AppendUint16(p, u)
			}
			binary.LittleEndian.PutUint32(p[e+4*j:], uint32(start))
			binary.LittleEndian.PutUint16(p[e+8+2*j:], uint16(len(p)-start))
		}
	}
	if _, err := l.f.WriteAt(p, l.locator); err != nil {
		return err
	}
	_, err := l.f.WriteAt(binary.LittleEndian.AppendUint32(nil, uint32(len(p))), l.locatorEntry+20)
	return err
}

// resize makes the disk larger, within what the allocation table can hold.
func (l *live) resize(bytes int64) error {
	blocks := (bytes + l.block - 1) / l.block
	if bytes < l.disk || bytes%l.sector != 0 || l.differencing || blocks+(blocks-1)/l.ratio > int64(len(l.entries)) {
		return fmt.Errorf("the disk cannot have %d bytes", bytes)
	}
	if _, err := l.f.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(bytes)), l.size); err != nil {
		return err
	}
	had := (l.disk + l.block - 1) / l.block
	l.disk, l.dirty = bytes, true
	for number := had; l.fixed && number < blocks; number++ {
		place, err := l.grow(l.block)
		if err != nil {
			return err
		}
		if err := l.setEntry(number+number/l.ratio, uint64(place)|blockFull); err != nil {
			return err
		}
	}
	return nil
}

func (l *live) diskBytes() int64  { return l.disk }
func (l *live) sectorSize() int64 { return l.sector }
func (l *live) close() error      { return l.f.Close() }
