package vdi

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

const (
	signature   = 0xbeda107f
	signatureAt = 64 // behind a line of text that names the maker
	headerAt    = 72
	headerBytes = 384 // of version 1.0; later ones add a geometry
	sectorBytes = 512

	maxBlockBytes = 256 << 20
	maxBytes      = 1 << 60
)

// Types of image.
const (
	typeDynamic      = 1
	typeFixed        = 2
	typeUndo         = 3
	typeDifferencing = 4
)

// Entries of the block map that are no block's number.
const (
	blockAbsent = 1<<32 - 1
	blockZero   = 1<<32 - 2 // discarded by the guest
)

// A header is what the beginning of the file says.
type header struct {
	creator    string
	version    uint32 // major << 16 | minor
	kind       uint32
	comment    string
	mapAt      int64
	dataAt     int64
	bytes      int64 // of the disk
	blockBytes int64
	extraBytes int64 // before the data of every block
	blocks     int64 // in the map

	id, modified, parent, parentModified uuid
}

type uuid [16]byte

func (u uuid) String() string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(u[:]), le.Uint16(u[4:]), le.Uint16(u[6:]), u[8:10], u[10:])
}

// Probe says whether f begins like a VDI. A raw disk may do so too, if its
// guest wanted that, so a caller who knows the format should not ask.
func Probe(f image.File) bool {
	var p [4]byte
	n, _ := f.ReadAt(p[:], signatureAt)
	return n == len(p) && binary.LittleEndian.Uint32(p[:]) == signature
}

// readHeader reads and checks the header of f.
func readHeader(f image.File) (*header, error) {
	bad := func(off int64, format string, args ...any) (*header, error) {
		return nil, fault.Corrupt(f.Name(), off, format, args...)
	}
	p := make([]byte, headerAt+headerBytes)
	if n, err := f.ReadAt(p, 0); n < len(p) {
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		return bad(int64(n), "the file ends inside a VDI's header")
	}
	le := binary.LittleEndian
	if le.Uint32(p[signatureAt:]) != signature {
		return bad(signatureAt, "no VDI signature")
	}
	h := &header{
		creator:    text(p[:signatureAt]),
		version:    le.Uint32(p[68:]),
		kind:       le.Uint32(p[76:]),
		comment:    text(p[84:340]),
		mapAt:      int64(le.Uint32(p[340:])),
		dataAt:     int64(le.Uint32(p[344:])),
		bytes:      int64(le.Uint64(p[368:])),
		blockBytes: int64(le.Uint32(p[376:])),
		extraBytes: int64(le.Uint32(p[380:])),
		blocks:     int64(le.Uint32(p[384:])),
		id:         uuid(p[392:]), modified: uuid(p[408:]),
		parent: uuid(p[424:]), parentModified: uuid(p[440:]),
	}
	switch {
	case h.version>>16 != 1:
		return nil, fmt.Errorf("%s: VDI version %d.%d: %w", f.Name(), h.version>>16, h.version&0xffff, fault.ErrUnsupported)
	case le.Uint32(p[headerAt:]) < headerBytes:
		return bad(headerAt, "a header of %d bytes", le.Uint32(p[headerAt:]))
	case h.kind == typeUndo:
		return nil, fmt.Errorf("%s: VDI undo image: %w", f.Name(), fault.ErrUnsupported)
	case h.kind != typeDynamic && h.kind != typeFixed && h.kind != typeDifferencing:
		return nil, fmt.Errorf("%s: VDI of type %d: %w", f.Name(), h.kind, fault.ErrUnsupported)
	case h.blockBytes < sectorBytes || h.blockBytes > maxBlockBytes || h.blockBytes&(h.blockBytes-1) != 0:
		return bad(376, "blocks of %d bytes", h.blockBytes)
	case h.extraBytes > maxBlockBytes:
		return bad(380, "%d bytes before every block", h.extraBytes)
	case h.bytes < 0 || h.bytes > maxBytes:
		return bad(368, "virtual size %d", uint64(h.bytes))
	}
	// VirtualBox makes disks of odd sizes out of odd files; the guest sees
	// whole sectors.
	h.bytes = (h.bytes + sectorBytes - 1) / sectorBytes * sectorBytes
	need := (h.bytes + h.blockBytes - 1) / h.blockBytes
	switch {
	case h.blocks < need:
		return bad(384, "a map of %d blocks for a disk of %d bytes that needs %d", h.blocks, h.bytes, need)
	case h.mapAt > f.Bytes()-need*4:
		return bad(340, "the map of %d blocks at %d does not fit into a file of %d bytes", need, h.mapAt, f.Bytes())
	case h.kind == typeDifferencing && h.parent == uuid{}:
		return bad(424, "a differencing image without a parent's UUID")
	}
	return h, nil
}

// text is a string that ends with a zero, if it does, without the ornaments of
// the first line: "<<< Oracle VM VirtualBox Disk Image >>>".
func text(p []byte) string {
	s, _, _ := strings.Cut(string(p), "\x00")
	s = strings.TrimSpace(s)
	s = strings.TrimSuffix(strings.TrimPrefix(s, "<<<"), ">>>")
	return strings.ToValidUTF8(strings.TrimSpace(s), "?")
}
