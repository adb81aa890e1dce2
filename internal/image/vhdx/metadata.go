package vhdx

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image/internal/layer"
)

const (
	metadataTableBytes = 64 << 10
	maxItems           = 2047
	maxItemBytes       = 1 << 20

	minBlock, maxBlock = 1 << 20, 256 << 20

	// MaxBytes is the largest virtual disk that the format allows.
	MaxBytes = 64 << 40
)

// Flags of a metadata item.
const (
	itemUser     = 1
	itemDisk     = 2 // describes the virtual disk, not the file
	itemRequired = 4
)

// Flags of the file parameters.
const (
	leaveAllocated = 1 // a fixed disk
	hasParent      = 2
)

var (
	itemFileParameters = mustGUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
	itemDiskBytes      = mustGUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
	itemDiskID         = mustGUID("beca12ab-b2e6-4523-93ef-c309e000c746")
	itemLogicalSector  = mustGUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
	itemPhysicalSector = mustGUID("cda348c7-445d-4471-9cc9-e9885251c556")
	itemParentLocator  = mustGUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

	locatorVHDX = mustGUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
)

// metadata is what the metadata region says of the disk.
type metadata struct {
	blockBytes     int64
	fixed          bool
	differencing   bool
	diskBytes      int64
	diskID         guid
	logicalSector  int64
	physicalSector int64
	locator        map[string]string // of a differencing disk
}

// An item is one entry of the metadata table.
type item struct {
	id    guid
	off   int64 // in the region
	bytes int64
	flags uint32
}

func readMetadata(r io.ReaderAt, name string, reg region) (m metadata, err error) {
	bad := func(format string, args ...any) (metadata, error) {
		return m, fault.Corrupt(name, reg.off, "metadata: "+format, args...)
	}
	items, err := readItems(r, name, reg)
	if err != nil {
		return m, err
	}
	values := map[guid][]byte{}
	for _, it := range items {
		want := int64(-1)
		switch it.id {
		case itemFileParameters, itemDiskBytes:
			want = 8
		case itemLogicalSector, itemPhysicalSector:
			want = 4
		case itemDiskID:
			want = 16
		case itemParentLocator:
		default:
			if it.flags&itemRequired != 0 {
				return m, fmt.Errorf("%s: required metadata item %s: %w", name, it.id, fault.ErrUnsupported)
			}
			continue
		}
		if it.flags&itemUser != 0 {
			continue // a user's item may bear any GUID
		}
		if want >= 0 && it.bytes != want {
			return bad("item %s has %d bytes, not %d", it.id, it.bytes, want)
		}
		p := make([]byte, it.bytes)
		if err := layer.ReadFull(r, name, p, reg.off+it.off); err != nil {
			return m, err
		}
		values[it.id] = p
	}
	for _, id := range []guid{itemFileParameters, itemDiskBytes, itemDiskID, itemLogicalSector, itemPhysicalSector} {
		if values[id] == nil {
			return bad("item %s is missing", id)
		}
	}
	flags := binary.LittleEndian.Uint32(values[itemFileParameters][4:])
	m = metadata{
		blockBytes:     int64(binary.LittleEndian.Uint32(values[itemFileParameters])),
		fixed:          flags&leaveAllocated != 0,
		differencing:   flags&hasParent != 0,
		diskBytes:      int64(binary.LittleEndian.Uint64(values[itemDiskBytes])),
		diskID:         guid(values[itemDiskID]),
		logicalSector:  int64(binary.LittleEndian.Uint32(values[itemLogicalSector])),
		physicalSector: int64(binary.LittleEndian.Uint32(values[itemPhysicalSector])),
	}
	switch {
	case m.blockBytes < minBlock || m.blockBytes > maxBlock || bits.OnesCount64(uint64(m.blockBytes)) != 1:
		return bad("blocks of %d bytes", m.blockBytes)
	case m.logicalSector != 512 && m.logicalSector != 4096:
		return bad("logical sectors of %d bytes", m.logicalSector)
	case m.physicalSector != 512 && m.physicalSector != 4096:
		return bad("physical sectors of %d bytes", m.physicalSector)
	case m.diskBytes < 0 || m.diskBytes > MaxBytes || m.diskBytes%m.logicalSector != 0:
		return bad("a disk of %d bytes in sectors of %d", m.diskBytes, m.logicalSector)
	case m.differencing != (values[itemParentLocator] != nil):
		return bad("a parent locator (%t) does not go with a differencing disk (%t)", values[itemParentLocator] != nil, m.differencing)
	}
	if m.differencing {
		m.locator, err = parseLocator(name, reg.off, values[itemParentLocator])
	}
	return m, err
}

// readItems reads the metadata table: every item lies in the region, behind
// the table, and none overlaps another.
func readItems(r io.ReaderAt, name string, reg region) ([]item, error) {
	p := make([]byte, metadataTableBytes)
	if err := layer.ReadFull(r, name, p, reg.off); err != nil {
		return nil, err
	}
	bad := func(format string, args ...any) ([]item, error) {
		return nil, fault.Corrupt(name, reg.off, "metadata table: "+format, args...)
	}
	n := int(binary.LittleEndian.Uint16(p[10:]))
	if string(p[:8]) != "metadata" || n > maxItems {
		return bad("signature %q, %d items", p[:8], n)
	}
	var items []item
	type key struct {
		id   guid
		user bool
	}
	seen := map[key]bool{}
	for i := range n {
		e := p[32+32*i:]
		it := item{
			id:    guid(e[:16]),
			off:   int64(binary.LittleEndian.Uint32(e[16:])),
			bytes: int64(binary.LittleEndian.Uint32(e[20:])),
			flags: binary.LittleEndian.Uint32(e[24:]),
		}
		k := key{it.id, it.flags&itemUser != 0}
		switch {
		case seen[k]:
			return bad("item %s is there twice", it.id)
		case it.bytes > maxItemBytes || it.bytes > 0 && (it.off < metadataTableBytes || it.off+it.bytes > reg.bytes):
			return bad("item %s of %d bytes at %d in a region of %d", it.id, it.bytes, it.off, reg.bytes)
		}
		seen[k] = true
		items = append(items, it)
	}
	slices.SortFunc(items, func(a, b item) int { return int(a.off - b.off) })
	var end int64
	for _, it := range items {
		if it.bytes > 0 && it.off < end {
			return bad("item %s at %d overlaps another", it.id, it.off)
		}
		end = max(end, it.off+it.bytes)
	}
	return items, nil
}

// parseLocator reads the pairs of names and values by which a differencing
// disk knows its parent.
func parseLocator(name string, at int64, p []byte) (map[string]string, error) {
	bad := func(format string, args ...any) (map[string]string, error) {
		return nil, fault.Corrupt(name, at, "parent locator: "+format, args...)
	}
	if len(p) < 20 {
		return bad("%d bytes", len(p))
	}
	if id := guid(p[:16]); id != locatorVHDX {
		return nil, fmt.Errorf("%s: parent locator of type %s: %w", name, id, fault.ErrUnsupported)
	}
	n := int(binary.LittleEndian.Uint16(p[18:]))
	if 20+12*n > len(p) {
		return bad("%d pairs in %d bytes", n, len(p))
	}
	pairs := make(map[string]string)
	total := 0
	text := func(off uint32, bytes uint16) (string, bool) {
		end := int64(off) + int64(bytes)
		if bytes%2 != 0 || end > int64(len(p)) {
			return "", false
		}
		total += int(bytes) // many pairs may name the same bytes
		return utf16Text(p[off:end]), total <= maxItemBytes
	}
	for i := range n {
		e := p[20+12*i:]
		k, ok1 := text(binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint16(e[8:]))
		v, ok2 := text(binary.LittleEndian.Uint32(e[4:]), binary.LittleEndian.Uint16(e[10:]))
		if !ok1 || !ok2 || k == "" {
			return bad("pair %d lies outside", i)
		}
		if _, twice := pairs[k]; twice {
			return bad("%q is there twice", k)
		}
		pairs[k] = v
	}
	return pairs, nil
}

// linkages are the DataWriteGuids that the parent may have.
func (m metadata) linkages() []string {
	var list []string
	for _, key := range []string{"parent_linkage", "parent_linkage2"} {
		g, ok := parseGUID(strings.ToLower(strings.Trim(m.locator[key], "{}")))
		if ok && g != (guid{}) { // Windows writes a zero parent_linkage2
			list = append(list, g.String())
		}
	}
	return list
}

// parentNames is what the locator calls the parent, the likeliest first. A
// relative name has slashes between its parts, whatever it had.
func (m metadata) parentNames() []string {
	var names []string
	add := func(name string) {
		if name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	relative, volume, absolute := m.locator["relative_path"], m.locator["volume_path"], m.locator["absolute_win32_path"]
	add(strings.TrimPrefix(strings.ReplaceAll(relative, `\`, "/"), "./"))
	add(volume)
	add(absolute)
	for _, name := range []string{relative, volume, absolute} {
		add(name[strings.LastIndexAny(name, `/\`)+1:])
	}
	return names
}
