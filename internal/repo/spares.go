package repo

import (
	"bytes"
	"sync"
)

// spares are memory that was used and is used again: reading one chunk of 512
// KiB takes less time than to clear that much. It is safe for concurrent use.
type spares struct{ pool sync.Pool }

// poison makes spares overwrite what they take back, so that tests see who has
// a part of it yet.
var poison bool

// get gives n bytes with anything in them.
func (s *spares) get(n int) []byte {
	if b, ok := s.pool.Get().(*[]byte); ok && cap(*b) >= n {
		return (*b)[:n]
	}
	return make([]byte, n)
}

// put takes back what nobody has a part of any more; it may be nil.
func (s *spares) put(b []byte) {
	if b == nil {
		return
	}
	if poison {
		copy(b[:cap(b)], bytes.Repeat([]byte{0xdb}, cap(b)))
	}
	s.pool.Put(&b)
}
