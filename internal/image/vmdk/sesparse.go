package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// openSESparse makes a layer of a seSparse extent, what ESXi 5.5 and later
// write for snapshots on VMFS6 ("-sesparse.vmdk"). VMware never described it;
// what is known comes from reading such files. All positions are in sectors.
func openSESparse(f image.File) (*sparse, error) {
	b := make([]byte, 2*sector) // the constant header, and the volatile one
	if err := readFull(f, b, 0); err != nil {
		return nil, err
	}
	at := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	version, capacity, grain, table, flags := at(1), at(2), at(3), at(4), at(5)
	gd, gdSize := at(16), at(17)
	tables, tablesSize, grains := at(18), at(19), at(24)
	no := func(what string, v uint64) (*sparse, error) {
		return nil, fmt.Errorf("%s: seSparse extent with %s %#x: %w", f.Name(), what, v, fault.ErrUnsupported)
	}
	switch {
	case version != 0x2_0000_0001:
		return no("version", version)
	case grain != 8:
		return no("a grain size in sectors of", grain)
	case table != 64:
		return no("a grain table size in sectors of", table)
	case flags != 0:
		return no("flags", flags)
	case at(10) != 1:
		return no("its volatile header at sector", at(10))
	}
	const volatile = sector / 8
	if m := at(volatile); m != 0xcafecafe {
		return nil, fault.Corrupt(f.Name(), sector, "the volatile header begins with %#x", m)
	}
	if at(volatile+3) != 0 {
		return nil, fmt.Errorf("%s: its journal was not replayed (the host or the copy was interrupted): %w", f.Name(), fault.ErrUnsupported)
	}
	for _, v := range []uint64{capacity, gd, gdSize, tables, tablesSize, grains} {
		if v > maxBytes/sector {
			return nil, fault.Corrupt(f.Name(), 0, "seSparse header: a position of %d sectors", v)
		}
	}
	s := &sparse{
		file: f, object: f.Name(), capacity: int64(capacity) * sector, grain: 8 * sector,
		perTable: 64 * sector / 8, entry: 8,
		directory: &directory{base: int64(gd) * sector},
	}
	if need := s.tableCount() * 8; need > int64(gdSize)*sector {
		return nil, fault.Corrupt(f.Name(), 0, "a grain directory of %d sectors for a disk that needs %d bytes", gdSize, need)
	}
	if err := s.checkDirectory(); err != nil {
		return nil, err
	}
	s.tableAt = func(entry uint64) (int64, error) {
		switch {
		case entry == 0:
			return 0, nil
		case entry>>32 != 0x1000_0000:
			return 0, fault.Corrupt(s.object, -1, "grain directory entry %#x", entry)
		}
		sectors := entry & 0xffff_ffff * 64
		if sectors >= tablesSize {
			return 0, fault.Corrupt(s.object, -1, "grain directory entry %#x lies behind the grain tables", entry)
		}
		return int64(tables+sectors) * sector, nil
	}
	s.grainAt = func(entry uint64) (image.Kind, int64, error) {
		switch entry >> 60 {
		case 0:
			if entry == 0 {
				return image.Absent, 0, nil
			}
		case 1, 2: // unmapped by the guest; zeroed
			return image.Zero, 0, nil
		case 3:
			// The low 12 bits of the grain's number are above its high 48.
			n := entry<<4>>52 | entry&0xffff_ffff_ffff<<12
			if n <= maxBytes/uint64(s.grain) {
				return image.Data, int64(grains)*sector + int64(n)*s.grain, nil
			}
		}
		return 0, 0, fault.Corrupt(s.object, -1, "grain table entry %#x", entry)
	}
	return s, nil
}
