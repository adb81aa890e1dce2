package layer

// Sectors is which sectors of a block a layer holds, while the layer is
// written. It is not safe for concurrent use.
type Sectors struct {
	// Bits is the block's bitmap, nil once all sectors are there.
	Bits  []byte
	left  int64 // sectors that are not there
	order Order
}

// NewSectors is for a block of which the disk has n sectors, with a bitmap of
// the given length. None is there.
func NewSectors(n int64, bitmap int64, order Order) *Sectors {
	return &Sectors{Bits: make([]byte, bitmap), left: n, order: order}
}

// Mark says that n sectors from first on are there.
func (s *Sectors) Mark(first, n int64) {
	if s.Bits == nil {
		return
	}
	for i := first; i < first+n; i++ {
		if bit := s.order.bit(i); s.Bits[i/8]&bit == 0 {
			s.Bits[i/8] |= bit
			s.left--
		}
	}
	if s.left == 0 {
		s.Bits = nil
	}
}
