package vmdk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/backstay/backstay/internal/fault"
)

const markerBytes = 12 // of a grain: its first sector (u64), its length (u32)

// A packed reads the compressed grains of an extent.
type packed struct {
	markers bool
	grain   int64
	grains  *cache    // unpacked ones that were not wanted whole, by offset in the extent
	tools   sync.Pool // *unpacker
}

// An unpacker is what one goroutine needs to unpack a grain.
type unpacker struct {
	in   []byte
	src  bytes.Reader
	zlib io.ReadCloser
}

func newPacked(markers bool, grain int64) *packed {
	return &packed{
		markers: markers, grain: grain, grains: newCache(max(grainCacheBytes, 2*grain)),
		tools: sync.Pool{New: func() any { return new(unpacker) }},
	}
}

// limit is how long a compressed grain may be. Those that do not compress come
// out a little longer than they were.
func (pk *packed) limit() int64 { return 2*pk.grain + 4096 }

// read fills p with the bytes at off of the extent, which lie in the grain
// that is stored at where.
func (pk *packed) read(s *sparse, p []byte, off, where int64) error {
	start := off / pk.grain * pk.grain
	whole := min(pk.grain, s.capacity-start)
	if off == start && int64(len(p)) == whole {
		return pk.unpack(s, p, start, where)
	}
	data, err := pk.grains.get(start, func() ([]byte, error) {
		data := make([]byte, whole)
		return data, pk.unpack(s, data, start, where)
	})
	if err != nil {
		return err
	}
	copy(p, data[off-start:])
	return nil
}

// unpack fills p with the grain that begins at start, as far as the disk has
// it.
func (pk *packed) unpack(s *sparse, p []byte, start, where int64) error {
	u := pk.tools.Get().(*unpacker)
	defer pk.tools.Put(u)
	in, err := u.load(pk, s, start, where)
	if err != nil {
		return err
	}
	bad := func(err error) error {
		return fault.Corrupt(s.object, where, "the compressed grain for byte %d of the disk: %w", start, err)
	}
	u.src.Reset(in)
	if u.zlib == nil {
		u.zlib, err = zlib.NewReader(&u.src)
	} else {
		err = u.zlib.(zlib.Resetter).Reset(&u.src, nil)
	}
	if err != nil {
		return bad(err)
	}
	if n, err := io.ReadFull(u.zlib, p); err != nil {
		return bad(fmt.Errorf("it ends after %d of %d bytes: %w", n, len(p), err))
	}
	// Reading to the end checks the checksum. The last grain of a disk may
	// hold more than the disk, but never more than a grain.
	var rest [4096]byte
	for left := pk.grain - int64(len(p)); ; {
		n, err := u.zlib.Read(rest[:])
		if left -= int64(n); left < 0 {
			return bad(fmt.Errorf("it holds more than a grain"))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return bad(err)
		}
	}
}

// load reads the compressed bytes of the grain at where. They stay valid until
// u is used again.
func (u *unpacker) load(pk *packed, s *sparse, start, where int64) ([]byte, error) {
	room := s.file.Bytes() - where
	if room < markerBytes {
		return nil, fault.Corrupt(s.object, where, "the grain for byte %d of the disk lies behind the end of the file", start)
	}
	if !pk.markers {
		in := u.buffer(min(room, pk.limit()))
		return in, readFull(s.file, in, where)
	}
	// Most grains shrink: one read for marker and data nearly always does.
	first := u.buffer(min(room, pk.grain/2+markerBytes))
	if err := readFull(s.file, first, where); err != nil {
		return nil, err
	}
	lba, size := binary.LittleEndian.Uint64(first), int64(binary.LittleEndian.Uint32(first[8:]))
	switch {
	case lba != uint64(start/sector):
		return nil, fault.Corrupt(s.object, where, "the grain for sector %d says that it is for sector %d", start/sector, lba)
	case size == 0 || size > pk.limit():
		return nil, fault.Corrupt(s.object, where, "a compressed grain of %d bytes", size)
	case size > room-markerBytes:
		return nil, fault.Corrupt(s.object, where, "a compressed grain of %d bytes, and the file ends after %d", size, room-markerBytes)
	case size <= int64(len(first))-markerBytes:
		return first[markerBytes : markerBytes+size], nil
	}
	have := len(first)
	all := u.buffer(markerBytes + size) // keeps what first holds
	return all[markerBytes:], readFull(s.file, all[have:], where+int64(have))
}

// buffer gives n bytes that begin with what was in the last buffer.
func (u *unpacker) buffer(n int64) []byte {
	if int64(cap(u.in)) < n {
		in := make([]byte, n)
		copy(in, u.in)
		u.in = in
	}
	u.in = u.in[:n]
	return u.in
}
