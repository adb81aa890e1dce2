package index

import (
	"errors"
	"math/bits"

	"github.com/FastFilter/xorfilter"
)

// maxFilterSegment is the longest segment of a filter that a reader takes.
const maxFilterSegment = 1 << 18

// hash64 is what filters know of a key. Ids are uniformly random already.
func (k *Key) hash64() uint64 { return le.Uint64(k[8:]) }

// A filterShape says how a binary fuse filter is laid out.
type filterShape struct {
	seed   uint64
	length uint32 // of a segment, a power of two
	count  uint32 // segments in which a key's first place may be
}

// bytes is how many fingerprints there are; call it only on a checked shape.
func (f filterShape) bytes() int64 { return (int64(f.count) + 2) * int64(f.length) }

// check refuses shapes whose places would lie outside the fingerprints.
func (f filterShape) check() error {
	if f.length == 0 || f.length > maxFilterSegment || bits.OnesCount32(f.length) != 1 || f.count == 0 ||
		int64(f.count)*int64(f.length) > 1<<31 {
		return errors.New("a filter cannot have that shape")
	}
	return nil
}

// open gives the filter over fingerprints, of which there must be f.bytes().
func (f filterShape) open(fingerprints []byte) *xorfilter.BinaryFuse[uint8] {
	return &xorfilter.BinaryFuse[uint8]{
		Seed: f.seed, SegmentLength: f.length, SegmentLengthMask: f.length - 1,
		SegmentCount: f.count, SegmentCountLength: f.count * f.length, Fingerprints: fingerprints,
	}
}
