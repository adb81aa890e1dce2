package vmdk

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"strings"
)

// newDescriptor writes the descriptor of a new disk of capacity bytes with one
// extent, given as its line without the access and the size.
func newDescriptor(variant string, capacity int64, access, extent string) string {
	var id [16]byte
	cid := uint32(noParent)
	for cid >= noParent-1 { // both mean something else
		rand.Read(id[:])
		cid = binary.BigEndian.Uint32(id[12:])
	}
	cylinders, heads, sectors := geometry(capacity)
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

# Extent description
%s %d %s

# The Disk Data Base
#DDB

`, cid, uint32(noParent), variant, access, capacity/sector, extent)
	for _, kv := range [][2]string{
		{"adapterType", "lsilogic"},
		{"encoding", "UTF-8"},
		{"geometry.cylinders", fmt.Sprint(cylinders)},
		{"geometry.heads", fmt.Sprint(heads)},
		{"geometry.sectors", fmt.Sprint(sectors)},
		{"longContentID", fmt.Sprintf("%x", id)},
		{"uuid", fmt.Sprintf("% x-% x", uuid[:8], uuid[8:])},
		{"virtualHWVersion", "10"},
	} {
		fmt.Fprintf(&b, "ddb.%s = \"%s\"\n", kv[0], kv[1])
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
