package layer

import (
	"errors"
	"io"
	"sync"

	"github.com/backstay/backstay/internal/fault"
)

const (
	pageBytes = 64 << 10
	keepPages = 128 // 8 MiB: the table of a 2 TiB disk with 2 MiB blocks
)

// Pages reads pieces of a file's tables and keeps the last pages that it
// needed, so that a table's length costs nothing until somebody walks it. It
// is safe for concurrent use.
type Pages struct {
	name string
	src  io.ReaderAt
	end  int64

	mu    sync.Mutex
	pages map[int64][]byte
	queue []int64 // page numbers in pages, oldest first from next
	next  int
}

// NewPages reads from src, whose length is end bytes. name is for messages.
func NewPages(name string, src io.ReaderAt, end int64) *Pages {
	return &Pages{name: name, src: src, end: end, pages: make(map[int64][]byte)}
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
	c.mu.Lock()
	page := c.pages[n]
	c.mu.Unlock()
	if page != nil {
		return page, nil
	}
	// Read without the lock: two readers may load one page twice, which costs
	// less than all of them waiting for one slow read.
	start := n * pageBytes
	page = make([]byte, min(pageBytes, c.end-start))
	if got, err := c.src.ReadAt(page, start); got < len(page) {
		if err == nil || errors.Is(err, io.EOF) {
			err = fault.Corrupt(c.name, start+int64(got), "the file became shorter")
		}
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pages[n] == nil {
		if len(c.queue) < keepPages {
			c.queue = append(c.queue, n)
		} else {
			delete(c.pages, c.queue[c.next])
			c.queue[c.next] = n
			c.next = (c.next + 1) % keepPages
		}
		c.pages[n] = page
	}
	return page, nil
}
