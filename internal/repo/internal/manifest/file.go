package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// An entry is one line of the table.
type entry struct {
	page int64
	off  int64
	n    int64
	sum  [32]byte
}

// A File is one manifest, open for reading. It is safe for concurrent use as
// far as its reader is.
type File struct {
	Header
	r     io.ReaderAt
	raw   []byte // the header
	table []entry
	mu    sync.Mutex
	coder *coder
}

// Open reads header and table of the manifest id, size bytes long, and checks
// them against the id. Meta may be nil; then only Needs and Scrub work. Errors
// of r come back as they are, everything else is evidence of damage.
func Open(r io.ReaderAt, size int64, id ID, repo [16]byte, meta *seal.Key) (*File, error) {
	if size < headerBytes+footerBytes {
		return nil, fmt.Errorf("%d bytes are too few for a manifest", size)
	}
	f := &File{r: r, raw: make([]byte, headerBytes)}
	if err := readFull(r, f.raw, 0); err != nil {
		return nil, err
	}
	var err error
	if f.Header, err = parseHeader(f.raw); err != nil {
		return nil, err
	}
	if f.Repo != repo {
		return nil, fmt.Errorf("it belongs to repository %x", f.Repo)
	}
	n, err := readFooter(r, size)
	if err != nil {
		return nil, err
	}
	if n > f.Pages() || n > (size-headerBytes-footerBytes)/entryBytes {
		return nil, fmt.Errorf("%d table entries do not fit", n)
	}
	b := make([]byte, n*entryBytes)
	if err := readFull(r, b, size-footerBytes-int64(len(b))); err != nil {
		return nil, err
	}
	if ID(seal.Hash(f.raw, b)) != id {
		return nil, errors.New("header and table do not match the name")
	}
	if f.table, err = parseTable(b, f.Pages(), size-footerBytes-int64(len(b))); err != nil {
		return nil, err
	}
	if meta != nil {
		f.coder = newCoder(f.raw, f.Salt, meta)
	}
	return f, nil
}

func readFooter(r io.ReaderAt, size int64) (entries int64, err error) {
	var b [footerBytes]byte
	if err := readFull(r, b[:], size-footerBytes); err != nil {
		return 0, err
	}
	if !bytes.Equal(b[:8], footerMagic) || crc32.Checksum(b[:28], castagnoli) != le.Uint32(b[28:]) {
		return 0, errors.New("footer is damaged")
	}
	if [12]byte(b[16:28]) != [12]byte{} || le.Uint64(b[8:]) > maxDisk {
		return 0, errors.New("footer is impossible")
	}
	return int64(le.Uint64(b[8:])), nil
}

func parseTable(b []byte, pages, end int64) ([]entry, error) {
	table := make([]entry, len(b)/entryBytes)
	off, last := int64(headerBytes), int64(-1)
	for i := range table {
		p, e := b[i*entryBytes:], &table[i]
		no := le.Uint64(p)
		if no >= uint64(pages) || int64(no) <= last {
			return nil, fmt.Errorf("table entry %d is out of order", i)
		}
		e.page, e.off, e.n = int64(no), off, int64(le.Uint32(p[8:]))
		if e.n > maxPage || e.n > end-off || le.Uint32(p[12:]) != 0 {
			return nil, fmt.Errorf("table entry %d is impossible", i)
		}
		copy(e.sum[:], p[16:])
		off, last = off+e.n, e.page
	}
	if off != end {
		return nil, fmt.Errorf("pages end at %d, the table begins at %d", off, end)
	}
	return table, nil
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Written is how many pages the manifest holds.
func (f *File) Written() int { return len(f.table) }

// PageNo is the number of the i-th page that is written.
func (f *File) PageNo(i int) int64 { return f.table[i].page }

// Find gives the ordinal among the written pages of page no.
func (f *File) Find(no int64) (i int, ok bool) {
	return slices.BinarySearchFunc(f.table, no, func(e entry, no int64) int {
		switch {
		case e.page < no:
			return -1
		case e.page > no:
			return 1
		}
		return 0
	})
}

// A PageError says at which offset of the file a page is damaged.
type PageError struct {
	Off int64
	Err error
}

func (e *PageError) Error() string { return e.Err.Error() }

// Unwrap gives the evidence.
func (e *PageError) Unwrap() error { return e.Err }

// raw page i, proven to belong to the id.
func (f *File) page(i int) ([]byte, error) {
	e := f.table[i]
	b := make([]byte, e.n)
	if err := readFull(f.r, b, e.off); err != nil {
		return nil, &PageError{e.off, err}
	}
	if seal.Hash(b) != e.sum {
		return nil, &PageError{e.off, errors.New("page does not match its hash")}
	}
	return b, nil
}

// Needs gives the ids of all records that the i-th written page needs.
func (f *File) Needs(i int) ([]chunk.ID, error) {
	b, err := f.page(i)
	if err != nil {
		return nil, err
	}
	raw, _, err := parsePage(b, f.table[i].page)
	if err != nil {
		return nil, &PageError{f.table[i].off, err}
	}
	ids := make([]chunk.ID, len(raw)/32)
	for k := range ids {
		ids[k] = chunk.ID(raw[32*k:])
	}
	return ids, nil
}

// Page opens the i-th written page.
func (f *File) Page(i int) (Page, error) {
	b, err := f.page(i)
	if err != nil {
		return Page{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err := f.coder.decode(b, f.table[i].page, f.PageLen(f.table[i].page))
	if err != nil {
		return p, &PageError{f.table[i].off, err}
	}
	return p, nil
}
