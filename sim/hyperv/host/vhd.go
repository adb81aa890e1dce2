package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode/utf16"
)

// What a VHD's footer and header say where.
const (
	vhdSector     = 512
	vhdHeader     = 1024 // bytes
	vhdFixed      = 2
	vhdDiffers    = 4
	vhdAbsent     = 1<<32 - 1
	vhdParent     = 40  // of the header: the parent's UUID
	vhdParentName = 64  // 512 bytes
	vhdLocator    = 576 // the first one
)

// A liveVHD is a VHD that a running VM writes to, in place: it allocates blocks
// at the end, before the footer, and marks the sectors of a differencing disk.
// Not safe for concurrent use.
type liveVHD struct {
	f      *os.File
	footer []byte
	end    int64 // where the footer is
	bytes  int64 // of the disk
	kind   uint32
	header int64 // where the header is; not of a fixed disk
	table  int64
	block  int64
	bitmap int64 // bytes before each block's data
}

func openLiveVHD(path string) (*liveVHD, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	l := &liveVHD{f: f}
	if err := l.read(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

func (l *liveVHD) read() error {
	info, err := l.f.Stat()
	if err != nil {
		return err
	}
	l.end = info.Size() - vhdSector
	l.footer = make([]byte, vhdSector)
	if _, err := l.f.ReadAt(l.footer, l.end); err != nil || string(l.footer[:8]) != "conectix" {
		return errors.New("no VHD")
	}
	l.bytes, l.kind = int64(binary.BigEndian.Uint64(l.footer[48:])), binary.BigEndian.Uint32(l.footer[60:])
	if l.bytes <= 0 || l.bytes > 1<<41 || l.kind == vhdFixed && l.bytes > l.end {
		return errors.New("a VHD of no size")
	}
	if l.kind == vhdFixed {
		return nil
	}
	l.header = int64(binary.BigEndian.Uint64(l.footer[16:]))
	p := make([]byte, vhdHeader)
	if _, err := l.f.ReadAt(p, l.header); err != nil || string(p[:8]) != "cxsparse" {
		return errors.New("a VHD without its header")
	}
	l.table, l.block = int64(binary.BigEndian.Uint64(p[16:])), int64(binary.BigEndian.Uint32(p[32:]))
	if l.block < 8*vhdSector || l.block%vhdSector != 0 || (l.bytes+l.block-1)/l.block > int64(binary.BigEndian.Uint32(p[28:])) {
		return errors.New("a VHD whose table is too short")
	}
	l.bitmap = (l.block/vhdSector/8 + vhdSector - 1) / vhdSector * vhdSector
	return nil
}

func (l *liveVHD) diskBytes() int64  { return l.bytes }
func (l *liveVHD) sectorSize() int64 { return vhdSector }
func (l *liveVHD) close() error      { return l.f.Close() }

// WriteAt writes whole sectors.
func (l *liveVHD) WriteAt(p []byte, off int64) error {
	if off%vhdSector != 0 || len(p)%vhdSector != 0 || off < 0 || off+int64(len(p)) > l.bytes {
		return fmt.Errorf("a write of %d bytes at %d", len(p), off)
	}
	if l.kind == vhdFixed {
		_, err := l.f.WriteAt(p, off)
		return err
	}
	for len(p) > 0 {
		n := min(int64(len(p)), l.block-off%l.block)
		if err := l.writeBlock(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (l *liveVHD) writeBlock(p []byte, off int64) error {
	entry := l.table + off/l.block*4
	var e [4]byte
	if _, err := l.f.ReadAt(e[:], entry); err != nil {
		return err
	}
	at := int64(binary.BigEndian.Uint32(e[:])) * vhdSector
	if at == vhdAbsent*vhdSector {
		var err error
		if at, err = l.grow(); err != nil {
			return err
		}
		binary.BigEndian.PutUint32(e[:], uint32(at/vhdSector))
		if _, err := l.f.WriteAt(e[:], entry); err != nil {
			return err
		}
	}
	if _, err := l.f.WriteAt(p, at+l.bitmap+off%l.block); err != nil {
		return err
	}
	first, n := off%l.block/vhdSector, int64(len(p))/vhdSector
	bits := make([]byte, (first+n+7)/8-first/8)
	if _, err := l.f.ReadAt(bits, at+first/8); err != nil {
		return err
	}
	for i := first; i < first+n; i++ {
		bits[i/8-first/8] |= 0x80 >> (i % 8)
	}
	_, err := l.f.WriteAt(bits, at+first/8)
	return err
}

// grow puts a block of zeros where the footer was, and the footer behind it. Of
// a dynamic disk all its sectors are there; of a differencing one none yet.
func (l *liveVHD) grow() (int64, error) {
	at := l.end
	l.end += l.bitmap + l.block
	if _, err := l.f.WriteAt(l.footer, l.end); err != nil {
		return 0, err
	}
	bits := make([]byte, l.bitmap)
	if l.kind != vhdDiffers {
		for i := range bits {
			bits[i] = 0xff
		}
	}
	_, err := l.f.WriteAt(bits, at)
	return at, err
}

// seal gives the identity that children know the disk by, which stays.
func (l *liveVHD) seal() (data [16]byte, err error) { return [16]byte(l.footer[68:84]), nil }

// relink makes the file a child of the parent of that path, beside it, and
// identity.
func (l *liveVHD) relink(parent string, data [16]byte) error {
	p := make([]byte, vhdHeader)
	if _, err := l.f.ReadAt(p, l.header); err != nil {
		return err
	}
	base := parent[strings.LastIndexByte(parent, '\\')+1:]
	var name, relative []byte
	for _, u := range utf16.Encode([]rune(base)) {
		name = binary.BigEndian.AppendUint16(name, u)
	}
	for _, u := range utf16.Encode([]rune(`.\` + base)) {
		relative = binary.LittleEndian.AppendUint16(relative, u)
	}
	room, place := binary.BigEndian.Uint32(p[vhdLocator+4:]), int64(binary.BigEndian.Uint64(p[vhdLocator+16:]))
	if len(name) > 512 || len(relative) > int(room) {
		return fmt.Errorf("no room for the parent's name %q", base)
	}
	copy(p[vhdParent:], data[:])
	clear(p[vhdParentName : vhdParentName+512])
	copy(p[vhdParentName:], name)
	copy(p[vhdLocator:], "W2ru")
	binary.BigEndian.PutUint32(p[vhdLocator+8:], uint32(len(relative)))
	clear(p[36:40])
	sum := uint32(0)
	for _, b := range p {
		sum += uint32(b)
	}
	binary.BigEndian.PutUint32(p[36:], ^sum)
	if _, err := l.f.WriteAt(p, l.header); err != nil {
		return err
	}
	_, err := l.f.WriteAt(relative, place)
	return err
}

func (l *liveVHD) resize(int64) error { return errors.New("a simulated host makes no VHD larger") }
