package fake

import (
	"bytes"
	"fmt"
	"maps"

	"github.com/backstay/backstay/internal/extent"
)

// pageBytes is the grain of a disk's memory and of change tracking.
const pageBytes = 64 << 10

// content is what a disk holds. Pages never change once they are in it, so a
// snapshot is a copy of the map; a page that is missing reads as zeros.
type content struct {
	size  int64
	pages map[int64][]byte
}

func newContent(size int64) *content { return &content{size: size, pages: map[int64][]byte{}} }

func (c *content) snapshot() *content { return &content{size: c.size, pages: maps.Clone(c.pages)} }

func (c *content) write(off int64, data []byte) error {
	if off < 0 || off+int64(len(data)) > c.size {
		return fmt.Errorf("write of %d bytes at %d of a disk of %d", len(data), off, c.size)
	}
	for len(data) > 0 {
		i, in := off/pageBytes, off%pageBytes
		page := make([]byte, pageBytes)
		copy(page, c.pages[i])
		n := copy(page[in:], data)
		c.pages[i] = page
		off, data = off+int64(n), data[n:]
	}
	return nil
}

// discard makes zeros of whatever e holds.
func (c *content) discard(e extent.Extent) {
	for i := e.Off / pageBytes; i*pageBytes < e.End(); i++ {
		page := extent.Extent{Off: i * pageBytes, Len: pageBytes}
		cut := page.Intersect(e)
		if cut == page || c.pages[i] == nil {
			delete(c.pages, i)
			continue
		}
		kept := bytes.Clone(c.pages[i])
		clear(kept[cut.Off-page.Off : cut.End()-page.Off])
		c.pages[i] = kept
	}
}

func (c *content) resize(size int64) {
	if size < c.size {
		c.discard(extent.Extent{Off: size, Len: c.size - size})
	}
	c.size = size
}

// read fills p from off, which with it lies inside the disk.
func (c *content) read(p []byte, off int64) {
	for len(p) > 0 {
		i, in := off/pageBytes, off%pageBytes
		n := min(int64(len(p)), pageBytes-in)
		if page := c.pages[i]; page != nil {
			copy(p[:n], page[in:])
		} else {
			clear(p[:n])
		}
		off, p = off+n, p[n:]
	}
}

func (c *content) data(within extent.Extent) extent.Set {
	var set extent.Set
	for i := range c.pages {
		set.Add(extent.Extent{Off: i * pageBytes, Len: pageBytes}.Intersect(within.Intersect(extent.Extent{Len: c.size})))
	}
	return set
}
