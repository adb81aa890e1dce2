package vhd

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"net/url"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

const (
	headerBytes  = 1024
	headerCookie = "cxsparse"
	locators     = 8
	maxLocator   = 64 << 10 // bytes of one parent's name; the longest Windows path is half of it
)

// A header says where a dynamic or differencing disk keeps its blocks.
type header struct {
	tableOffset int64
	entries     int64 // of the block allocation table
	blockBytes  int64
	parent      uuid
	parentName  string
	locators    [locators]locator
}

// A locator is one way to find the parent.
type locator struct {
	code  string // 4 bytes: how the name is written
	space uint32 // bytes, or sectors by some writers: never used
	bytes uint32
	off   int64
}

// readHeader reads the dynamic header at off.
func readHeader(file image.File, off int64) (h header, err error) {
	var p [headerBytes]byte
	if err := layer.ReadFull(file, file.Name(), p[:], off); err != nil {
		return h, err
	}
	bad := func(format string, args ...any) (header, error) {
		return h, fault.Corrupt(file.Name(), off, "dynamic header: "+format, args...)
	}
	if !bytes.HasPrefix(p[:], []byte(headerCookie)) {
		return bad("no %q", headerCookie)
	}
	if checksum(p[:], 36) != binary.BigEndian.Uint32(p[36:]) {
		return bad("wrong checksum")
	}
	h = header{
		tableOffset: int64(binary.BigEndian.Uint64(p[16:])),
		entries:     int64(binary.BigEndian.Uint32(p[28:])),
		blockBytes:  int64(binary.BigEndian.Uint32(p[32:])),
		parent:      uuid(p[40:56]),
		parentName:  utf16Text(p[64:576], binary.BigEndian),
	}
	if v := binary.BigEndian.Uint32(p[24:]); v>>16 != 1 {
		return bad("version %d.%d", v>>16, v&0xffff)
	}
	if h.blockBytes < sectorBytes || bits.OnesCount64(uint64(h.blockBytes)) != 1 {
		return bad("blocks of %d bytes", h.blockBytes)
	}
	if h.tableOffset < footerBytes || h.tableOffset > file.Bytes()-4*h.entries {
		return bad("a table of %d entries at %d in a file of %d bytes", h.entries, h.tableOffset, file.Bytes())
	}
	for i := range h.locators {
		e := p[576+24*i:]
		h.locators[i] = locator{
			code:  string(e[:4]),
			space: binary.BigEndian.Uint32(e[4:]),
			bytes: binary.BigEndian.Uint32(e[8:]),
			off:   int64(binary.BigEndian.Uint64(e[16:])),
		}
	}
	return h, nil
}

func (h header) encode() []byte {
	p := make([]byte, headerBytes)
	copy(p, headerCookie)
	binary.BigEndian.PutUint64(p[8:], 1<<64-1)
	binary.BigEndian.PutUint64(p[16:], uint64(h.tableOffset))
	binary.BigEndian.PutUint32(p[24:], version1)
	binary.BigEndian.PutUint32(p[28:], uint32(h.entries))
	binary.BigEndian.PutUint32(p[32:], uint32(h.blockBytes))
	copy(p[40:56], h.parent[:])
	for i, unit := range utf16.Encode([]rune(h.parentName)) {
		if i == 255 { // the last of the 256 stays zero
			break
		}
		binary.BigEndian.PutUint16(p[64+2*i:], unit)
	}
	for i, l := range h.locators {
		e := p[576+24*i:]
		copy(e[:4], l.code)
		binary.BigEndian.PutUint32(e[4:], l.space)
		binary.BigEndian.PutUint32(e[8:], l.bytes)
		binary.BigEndian.PutUint64(e[16:], uint64(l.off))
	}
	binary.BigEndian.PutUint32(p[36:], checksum(p, 36))
	return p
}

// parentNames is what the header calls the parent, the likeliest first:
// relative names, then absolute ones, then bare file names. A relative name
// has slashes between its parts, whatever it had.
func (h header) parentNames(file image.File) ([]string, error) {
	var relative, absolute []string
	for _, l := range h.locators {
		if l.code == "\x00\x00\x00\x00" || l.bytes == 0 {
			continue
		}
		if l.bytes > maxLocator {
			return nil, fault.Corrupt(file.Name(), l.off, "a parent locator of %d bytes", l.bytes)
		}
		p := make([]byte, l.bytes)
		if err := layer.ReadFull(file, file.Name(), p, l.off); err != nil {
			return nil, err
		}
		switch l.code {
		case "W2ru":
			relative = append(relative, locatorText(p))
		case "W2ku":
			absolute = append(absolute, locatorText(p))
		case "Wi2r":
			relative = append(relative, text(p))
		case "Wi2k":
			absolute = append(absolute, text(p))
		case "MACX": // a file: URL; XenServer writes file://./name for a relative one
			u, err := url.PathUnescape(strings.TrimPrefix(text(p), "file://"))
			if err != nil {
				continue
			}
			if strings.HasPrefix(u, "/") {
				absolute = append(absolute, u)
			} else {
				relative = append(relative, u)
			}
		}
	}
	var names []string
	add := func(name string) {
		if name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, name := range relative {
		add(strings.TrimPrefix(strings.ReplaceAll(name, `\`, "/"), "./"))
	}
	for _, name := range absolute {
		add(name)
	}
	for _, name := range append(append(relative, absolute...), h.parentName) {
		add(name[strings.LastIndexAny(name, `/\`)+1:])
	}
	return names, nil
}

// locatorText decodes a name that is little-endian, other than the header's,
// or of writers that mixed that up big-endian, and may begin with a byte order
// mark. Names begin with a letter, a dot or a slash, so their first unit tells.
func locatorText(p []byte) string {
	if bytes.HasPrefix(p, []byte{0xff, 0xfe}) || bytes.HasPrefix(p, []byte{0xfe, 0xff}) {
		if p[0] == 0xfe {
			return utf16Text(p[2:], binary.BigEndian)
		}
		p = p[2:]
	}
	if len(p) >= 2 && p[0] == 0 && p[1] != 0 {
		return utf16Text(p, binary.BigEndian)
	}
	return utf16Text(p, binary.LittleEndian)
}

// text cuts p at its first zero byte.
func text(p []byte) string {
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return strings.ToValidUTF8(string(p), "\uFFFD")
}

// utf16Text decodes p up to its first zero; an odd byte at the end is dropped.
func utf16Text(p []byte, order binary.ByteOrder) string {
	var units []uint16
	for ; len(p) >= 2; p = p[2:] {
		u := order.Uint16(p)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}
