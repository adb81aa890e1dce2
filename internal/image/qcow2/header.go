package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// Feature bits of the header.
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4

	compatLazyRefcounts = 1 << 0

	autoclearBitmaps = 1 << 0
	autoclearRawData = 1 << 1

	incompatKnown  = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2
	compatKnown    = compatLazyRefcounts
	autoclearKnown = autoclearBitmaps | autoclearRawData
)

// Types of header extensions.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

// Values of the header's compression type.
const (
	compressZlib = 0
	compressZstd = 1
)

// Limits, the same as QEMU's.
const (
	magic          = "QFI\xfb"
	minClusterBits = 9
	maxClusterBits = 21
	maxL1Bytes     = 32 << 20
	maxNameBytes   = 1023
	headerBytesV2  = 72
	headerBytesV3  = 104
)

// A header is what the first cluster says.
type header struct {
	version        uint32
	clusterBits    uint32
	size           int64
	l1Offset       int64
	l1Entries      uint32
	refcountOffset int64
	refcountBits   int
	snapshotCount  uint32
	snapshotOffset int64

	incompatible, compatible, autoclear uint64
	compression                         uint8

	backing, backingFormat, dataFile string
	bitmaps                          *bitmapsExt
	names                            featureNames
	unknownExtensions                []uint32
}

func (h *header) clusterBytes() int64 { return 1 << h.clusterBits }

func (h *header) extendedL2() bool { return h.incompatible&incompatExtendedL2 != 0 }

// entryBytes is the length of an L2 entry.
func (h *header) entryBytes() int64 {
	if h.extendedL2() {
		return 16
	}
	return 8
}

// clustersPerL2 is how many clusters an L2 table maps.
func (h *header) clustersPerL2() int64 { return h.clusterBytes() / h.entryBytes() }

// readHeader reads and checks the first cluster of f.
func readHeader(f image.File) (*header, error) {
	bad := func(off int64, format string, args ...any) error {
		return fault.Corrupt(f.Name(), off, format, args...)
	}
	// The header with its extensions and the backing file's name lies in the
	// first cluster, of which it says how long it is.
	p, err := readStart(f, 1<<minClusterBits)
	if err != nil {
		return nil, err
	}
	if len(p) < headerBytesV2 || string(p[:4]) != magic {
		return nil, bad(0, "no qcow2 header")
	}
	be := binary.BigEndian
	h := &header{
		version:        be.Uint32(p[4:]),
		clusterBits:    be.Uint32(p[20:]),
		size:           int64(be.Uint64(p[24:])),
		l1Entries:      be.Uint32(p[36:]),
		l1Offset:       int64(be.Uint64(p[40:])),
		refcountOffset: int64(be.Uint64(p[48:])),
		refcountBits:   16,
		snapshotCount:  be.Uint32(p[60:]),
		snapshotOffset: int64(be.Uint64(p[64:])),
	}
	if h.version != 2 && h.version != 3 {
		return nil, fmt.Errorf("%s: qcow2 version %d: %w", f.Name(), h.version, fault.ErrUnsupported)
	}
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return nil, bad(20, "clusters of 2^%d bytes", h.clusterBits)
	}
	if h.size < 0 {
		return nil, bad(24, "virtual size %d", uint64(h.size))
	}
	if p, err = readStart(f, h.clusterBytes()); err != nil {
		return nil, err
	}
	if len(p) < headerBytesV2 {
		return nil, bad(0, "the file shrank while it was read")
	}
	length := uint32(headerBytesV2)
	if h.version == 3 {
		if length, err = h.readVersion3(f.Name(), p); err != nil {
			return nil, err
		}
	}
	if crypt := be.Uint32(p[32:]); crypt != 0 {
		return nil, fmt.Errorf("%s: qcow2 encrypted with %s: %w", f.Name(), cryptName(crypt), fault.ErrUnsupported)
	}
	extensionsEnd := len(p)
	if off, n := be.Uint64(p[8:]), be.Uint32(p[16:]); off != 0 && n != 0 {
		if n > maxNameBytes || off < uint64(length) || off > uint64(len(p)) || uint64(n) > uint64(len(p))-off {
			return nil, bad(8, "backing file name of %d bytes at %d", n, off)
		}
		h.backing = string(p[off:][:n])
		extensionsEnd = int(off)
	}
	err = h.readExtensions(f.Name(), p[:extensionsEnd], int(length))
	// An extension may say what the features are called that we do not know;
	// what else it says may mean anything.
	if x := h.incompatible &^ incompatKnown; x != 0 {
		return nil, fmt.Errorf("%s: qcow2 with %s: %w", f.Name(), h.names.list(featureIncompatible, x), fault.ErrUnsupported)
	}
	return h, err
}

// readStart gives the first n bytes of f, or as many as it has.
func readStart(f image.File, n int64) ([]byte, error) {
	p := make([]byte, min(n, max(f.Bytes(), 0)))
	got, err := f.ReadAt(p, 0)
	if got < len(p) && err != io.EOF {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return p[:got], nil
}

// cryptName is what people call an encryption method.
func cryptName(method uint32) string {
	switch method {
	case 1:
		return "AES"
	case 2:
		return "LUKS"
	}
	return fmt.Sprintf("method %d", method)
}

// readVersion3 reads what version 3 has more than 2, and gives the header's
// length.
func (h *header) readVersion3(name string, p []byte) (uint32, error) {
	be := binary.BigEndian
	if len(p) < headerBytesV3 {
		return 0, fault.Corrupt(name, int64(len(p)), "the file ends inside its header")
	}
	h.incompatible, h.compatible, h.autoclear = be.Uint64(p[72:]), be.Uint64(p[80:]), be.Uint64(p[88:])
	order, length := be.Uint32(p[96:]), be.Uint32(p[100:])
	if length < headerBytesV3 || length%8 != 0 || int64(length) > int64(len(p)) {
		return 0, fault.Corrupt(name, 100, "header length %d", length)
	}
	if h.incompatible&^incompatKnown != 0 {
		return length, nil // the other fields need not mean what we know
	}
	if order > 6 {
		return 0, fault.Corrupt(name, 96, "refcount order %d", order)
	}
	h.refcountBits = 1 << order
	if length > headerBytesV3 {
		h.compression = p[104]
	}
	if h.compression > compressZstd {
		return 0, fmt.Errorf("%s: qcow2 compression type %d: %w", name, h.compression, fault.ErrUnsupported)
	}
	if (h.compression != compressZlib) != (h.incompatible&incompatCompression != 0) {
		return 0, fault.Corrupt(name, 104, "compression type %d disagrees with the feature bits", h.compression)
	}
	if h.extendedL2() && h.clusterBits < 14 {
		return 0, fault.Corrupt(name, 20, "extended L2 entries with clusters of 2^%d bytes", h.clusterBits)
	}
	return length, nil
}

// readExtensions reads what lies between off and the end of p.
func (h *header) readExtensions(name string, p []byte, off int) error {
	be := binary.BigEndian
	for off+8 <= len(p) {
		kind, n := be.Uint32(p[off:]), int64(be.Uint32(p[off+4:]))
		if kind == extEnd {
			break
		}
		at := int64(off)
		off += 8
		if n > int64(len(p)-off) {
			return fault.Corrupt(name, at, "header extension %#x of %d bytes", kind, n)
		}
		data := p[off:][:n]
		off += int(n+7) &^ 7
		switch kind {
		case extBackingFormat:
			h.backingFormat = string(data)
		case extDataFile:
			h.dataFile = string(data)
		case extBitmaps:
			ext, err := parseBitmapsExt(data)
			if err != nil {
				return &fault.CorruptError{Object: name, Offset: at, Err: err}
			}
			h.bitmaps = ext
		case extEncryption:
			return fmt.Errorf("%s: encrypted qcow2: %w", name, fault.ErrUnsupported)
		case extFeatureNames:
			h.names = parseFeatureNames(data)
		default:
			if len(h.unknownExtensions) < 16 {
				h.unknownExtensions = append(h.unknownExtensions, kind)
			}
		}
	}
	return nil
}

// plainName says whether a name in a header is that of a file. QEMU also
// takes URLs and JSON there, which can make it open anything.
func plainName(name string) error {
	head, _, _ := strings.Cut(name, "/")
	switch {
	case name == "":
		return fmt.Errorf("without a name: %w", image.ErrNotAllowed)
	case len(name) > maxNameBytes:
		return fmt.Errorf("with a name of %d bytes: %w", len(name), image.ErrNotAllowed)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("%q has a NUL in its name: %w", name, image.ErrNotAllowed)
	case strings.Contains(head, ":"):
		return fmt.Errorf("%q is not a file: %w", name, image.ErrNotAllowed)
	}
	return nil
}

// parentFormat translates QEMU's name of a format.
func parentFormat(name string) (image.Format, error) {
	switch name {
	case "":
		return "", nil
	case "raw", "file", "host_device":
		return image.Raw, nil
	case "qcow2":
		return image.Qcow2, nil
	case "vpc":
		return image.VHD, nil
	case "vhdx":
		return image.VHDX, nil
	case "vmdk":
		return image.VMDK, nil
	case "vdi":
		return image.VDI, nil
	}
	return "", fmt.Errorf("backing file of format %q: %w", name, fault.ErrUnsupported)
}
