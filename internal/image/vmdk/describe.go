package vmdk

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"strings"
)

// A description is what the descriptor of a new disk says.
type description struct {
	variant  string
	capacity int64 // bytes
	parent   parentLink
	extents  []string // lines
	thin     bool     // ESXi's word for a flat file with holes
}

// extentDescription is a line of the extent list.
func extentDescription(access string, bytes int64, kind, name string) string {
	line := fmt.Sprintf(`%s %d %s "%s"`, access, bytes/sector, kind, name)
	if kind == "FLAT" {
		line += " 0"
	}
	return line
}

// text makes a CID and a UUID for the disk and writes the descriptor.
func (d description) text() string {
	var id [16]byte
	cid := uint32(noParent)
	for cid >= noParent-1 { // both mean something else
		rand.Read(id[:])
		cid = binary.BigEndian.Uint32(id[12:])
	}
	cylinders, heads, sectors := geometry(d.capacity)
	var uuid [16]byte
	rand.Read(uuid[:])
	// VMware's own begin so; the rest tells one disk from another.
	copy(uuid[:], "\x60\x00\xc2\x90")
	var b strings.Builder
	// VirtualBox takes no indentation, and VMware wants the ddb lines last.
	fmt.Fprintf(&b, `# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=%08x
parentCID=%08x
createType="%s"
`, cid, d.parent.cid, d.variant)
	if d.parent.cid != noParent {
		fmt.Fprintf(&b, "parentFileNameHint=\"%s\"\n", d.parent.hint)
	}
	b.WriteString("\n# Extent description\n")
	for _, line := range d.extents {
		b.WriteString(line + "\n")
	}
	b.WriteString("\n# The Disk Data Base\n#DDB\n\n")
	for _, kv := range [][2]string{
		{"adapterType", "lsilogic"},
		{"encoding", "UTF-8"},
		{"geometry.cylinders", fmt.Sprint(cylinders)},
		{"geometry.heads", fmt.Sprint(heads)},
		{"geometry.sectors", fmt.Sprint(sectors)},
		{"longContentID", fmt.Sprintf("%x", id)},
		{"thinProvisioned", "1"},
		{"uuid", fmt.Sprintf("% x-% x", uuid[:8], uuid[8:])},
		{"virtualHWVersion", "10"},
	} {
		if kv[0] != "thinProvisioned" || d.thin {
			fmt.Fprintf(&b, "ddb.%s = \"%s\"\n", kv[0], kv[1])
		}
	}
	return b.String()
}

// geometry is what the BIOS of a virtual LSI Logic adapter makes of a disk of
// so many bytes.
func geometry(bytes int64) (cylinders, heads, sectors int64) {
	switch {
	case bytes < 1<<30:
		heads, sectors = 64, 32
	case bytes < 2<<30:
		heads, sectors = 128, 32
	default:
		heads, sectors = 255, 63
	}
	return max(1, bytes/sector/(heads*sectors)), heads, sectors
}
