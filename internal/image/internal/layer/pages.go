package layer

import (
	"encoding/binary"
	"errors"
	"io"
	"sync/atomic"

	"github.com/backstay/backstay/internal/fault"
)

const (
	pageBytes  = 64 << 10
	pageSets   = 32
	pagesInSet = 4
	// So the pages that are kept are 8 MiB: the table of a VHDX of 2 TiB with
	// blocks of 2 MiB.
)

// Pages reads pieces of a file's tables and keeps the last pages that it
// needed, so that a table's length costs nothing until somebody walks it. It
// is safe for concurrent use, and finding a page that is kept takes no lock:
// all readers of an image come by here.
type Pages struct {
	name string
	src  io.ReaderAt
	end  int64
	sets [pageSets]pageSet
}

// A page belongs into one set, in which the oldest makes room for the newest.
type pageSet struct {
	ways [pagesInSet]atomic.Pointer[page]
	turn atomic.Uint32
}

type page struct {
	number int64
	p      []byte // shorter than pageBytes only at the file's end
}

// NewPages reads from src, whose length is end bytes. name is for messages.
func NewPages(name string, src io.ReaderAt, end int64) *Pages {
	return &Pages{name: name, src: src, end: end}
}

// Read fills p from off. A range that the file does not hold is damage.
func (c *Pages) Read(p []byte, off int64) error {
	if off < 0 || off > c.end-int64(len(p)) {
		return fault.Corrupt(c.name, off, "%d bytes of a table lie outside the file of %d bytes", len(p), c.end)
	}
	for len(p) > 0 {
		page, err := c.page(off / pageBytes)
		if err != nil {
			return err
		}
		n := copy(p, page[off%pageBytes:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Peek gives from n to most bytes at off, as many as are at hand; the caller
// must not change them. A range that the file does not hold is damage.
func (c *Pages) Peek(off int64, n, most int64) ([]byte, error) {
	if within := off % pageBytes; off < 0 || within+n > pageBytes || off > c.end-n {
		p := make([]byte, n)
		return p, c.Read(p, off)
	}
	page, err := c.page(off / pageBytes)
	if err != nil {
		return nil, err
	}
	page = page[off%pageBytes:]
	return page[:min(int64(len(page)), most)], nil
}

func (c *Pages) page(n int64) ([]byte, error) {
	// A table and the bitmaps that it names lie whole MiB apart: spread them.
	set := &c.sets[uint64(n)*0x9e3779b97f4a7c15>>32%pageSets]
	for i := range set.ways {
		if q := set.ways[i].Load(); q != nil && q.number == n {
			return q.p, nil
		}
	}
	// Two readers may load one page at a time, which costs less than all of
	// them waiting for one slow read.
	start := n * pageBytes
	p := make([]byte, min(pageBytes, c.end-start))
	if err := ReadFull(c.src, c.name, p, start); err != nil {
		return nil, err
	}
	set.ways[set.turn.Add(1)%pagesInSet].Store(&page{n, p})
	return p, nil
}

// An Order says which bit of a bitmap's byte comes first.
type Order bool

// The orders: VHD's and VHDX's.
const (
	HighFirst Order = false
	LowFirst  Order = true
)

// bit is the mask of bit i.
func (o Order) bit(i int64) byte {
	if o == LowFirst {
		return 1 << (i % 8)
	}
	return 0x80 >> (i % 8)
}

// Run says whether bit first of the bitmap at off is set, and of how many of n
// bits from there on, at least one, that is so.
func (c *Pages) Run(off, first, n int64, order Order) (set bool, same int64, err error) {
	var p []byte
	var at int64 // the bit that p begins with
	for i := first; i < first+n; {
		if done := (i - at) / 8; done >= int64(len(p)) {
			at = i / 8 * 8
			if p, err = c.Peek(off+at/8, 1, (first+n-1-at)/8+1); err != nil {
				return false, 0, err
			}
		}
		q := p[(i-at)/8:]
		if i == first {
			set = q[0]&order.bit(i) != 0
		} else if i%64 == 0 && len(q) >= 8 && first+n-i >= 64 && binary.LittleEndian.Uint64(q) == all(set) {
			i += 64
			continue
		} else if (q[0]&order.bit(i) != 0) != set {
			return set, i - first, nil
		}
		i++
	}
	return set, n, nil
}

// all is 64 equal bits.
func all(set bool) uint64 {
	if set {
		return 1<<64 - 1
	}
	return 0
}

// ReadFull fills p from off, or says why it cannot: a file that ends before is
// damaged.
func ReadFull(r io.ReaderAt, name string, p []byte, off int64) error {
	if off < 0 {
		return fault.Corrupt(name, off, "%d bytes at a negative offset", len(p))
	}
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fault.Corrupt(name, off+int64(n), "the file ends where %d bytes should lie at %d", len(p), off)
	}
	return err
}
