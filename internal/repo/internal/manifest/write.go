package manifest

import (
	"crypto/rand"
	"fmt"
	"hash/crc32"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// A Writer streams one manifest into a Spool, page by page in ascending order.
// It is not safe for concurrent use.
type Writer struct {
	h     Header
	raw   []byte
	out   *Spool
	coder *coder
	table []byte
	last  int64
}

// NewWriter starts a manifest; h's Salt is chosen here.
func NewWriter(h Header, meta *seal.Key) (*Writer, error) {
	rand.Read(h.Salt[:])
	return newWriter(h, meta)
}

func newWriter(h Header, meta *seal.Key) (*Writer, error) {
	if h.DiskBytes < 0 || h.DiskBytes >= maxDisk {
		return nil, fmt.Errorf("a disk cannot have %d bytes", h.DiskBytes)
	}
	w := &Writer{h: h, raw: h.encode(), out: NewSpool(), last: -1}
	w.coder = newCoder(w.raw, h.Salt, meta)
	_, err := w.out.Write(w.raw)
	return w, err
}

// Page writes page no, which comes behind all pages written before.
func (w *Writer) Page(no int64, p Page) error {
	if no <= w.last || no >= w.h.Pages() || len(p.IDs) != w.h.PageLen(no) || len(p.Data) != len(p.IDs) {
		panic(fmt.Sprintf("manifest: page %d of %d after %d", no, w.h.Pages(), w.last))
	}
	w.last = no
	b, err := w.coder.encode(no, p)
	if err != nil {
		return err
	}
	return w.add(no, b)
}

func (w *Writer) add(no int64, b []byte) error {
	sum := seal.Hash(b)
	w.table = le.AppendUint64(w.table, uint64(no))
	w.table = le.AppendUint32(w.table, uint32(len(b)))
	w.table = le.AppendUint32(w.table, 0)
	w.table = append(w.table, sum[:]...)
	_, err := w.out.Write(b)
	return err
}

// Finish writes the end and gives the file, which the caller closes.
func (w *Writer) Finish() (ID, *Spool, error) {
	foot := make([]byte, footerBytes)
	copy(foot, footerMagic)
	le.PutUint64(foot[8:], uint64(len(w.table)/entryBytes))
	le.PutUint32(foot[28:], crc32.Checksum(foot[:28], castagnoli))
	if _, err := w.out.Write(w.table); err != nil {
		return ID{}, nil, err
	}
	if _, err := w.out.Write(foot); err != nil {
		return ID{}, nil, err
	}
	return ID(seal.Hash(w.raw, w.table)), w.out, nil
}

// Abandon lets go of what was written.
func (w *Writer) Abandon() { w.out.Close() }

// Base says whether a base is being written, no differential.
func (w *Writer) Base() bool { return !w.h.Differential() }
