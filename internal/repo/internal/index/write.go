package index

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/FastFilter/xorfilter"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// PartEntries is after how many entries a writer begins another part: 108 MB.
const PartEntries = 4 << 20

// A Spool holds an object while it is made.
type Spool interface {
	io.Writer
	io.ReaderAt
	Size() int64
	Close() error
}

// RunOptions say where a run goes.
type RunOptions struct {
	Repo       [16]byte
	ID         [16]byte // the ULID in its name
	Generation uint64   // more than that of every run it replaces
	Packs      []RunPack
	// Spool makes room for a part or for the run itself.
	Spool func() Spool
	// Put stores part n, or the run itself where n is -1.
	Put func(n int, body io.ReaderAt, size int64) error

	partEntries int // PartEntries, less in tests
}

// A RunPack is a pack that a run names.
type RunPack struct {
	ID    [32]byte
	Bytes uint32
}

// A RunWriter writes a run entry by entry. In memory are the pack table and what
// the filter of one part needs: some 30 bytes for each of PartEntries. It is not
// safe for concurrent use; Close it however it ends.
type RunWriter struct {
	o      RunOptions
	sum    *summer
	part   Spool // nil between parts
	tail   Spool // fences and filters of all parts
	table  []byte
	n      uint32 // entries in this part
	all    uint64
	parts  uint32
	block  [blockBytes]byte
	fill   int // entries in block
	last   Key
	fences []byte
	hashes []uint64
	fuse   xorfilter.BinaryFuseBuilder
}

// NewRunWriter begins a run. Packs must ascend by id, each once.
func NewRunWriter(o RunOptions) (*RunWriter, error) {
	if o.partEntries == 0 {
		o.partEntries = PartEntries
	}
	for i := range o.Packs {
		if i > 0 && compareIDs(&o.Packs[i-1].ID, &o.Packs[i].ID) >= 0 {
			return nil, errors.New("packs of a run do not ascend")
		}
	}
	return &RunWriter{o: o, sum: newSummer(), tail: o.Spool()}, nil
}

// Add writes an entry, whose pack is o.Packs[ref]. Keys must ascend, each once.
func (w *RunWriter) Add(k Key, ref, off, clen uint32) error {
	switch {
	case w.all > 0 && w.last.Compare(&k) >= 0:
		return errors.New("keys of a run do not ascend")
	case int(ref) >= len(w.o.Packs) || clen >= 1<<24:
		return fmt.Errorf("an entry of pack %d with %d bytes does not fit into a run", ref, clen)
	}
	if w.part == nil {
		w.part = w.o.Spool()
		// The header is not known before the end: it goes in front when the part is stored.
		w.table = append(w.table, k[:]...)
	}
	if w.fill == 0 {
		clear(w.block[:])
		w.fences = append(w.fences, k[:8]...)
	}
	putRecord(w.block[w.fill*recordBytes:], &record{k, ref, off, clen})
	w.hashes = append(w.hashes, k.hash64())
	w.last = k
	w.fill++
	w.n++
	w.all++
	if w.fill == blockEntries {
		if err := w.endBlock(); err != nil {
			return err
		}
	}
	if int(w.n) == w.o.partEntries {
		return w.endPart()
	}
	return nil
}

func (w *RunWriter) endBlock() error {
	w.sum.seal(w.o.ID, w.parts, uint32(blocks(w.n)), w.block[:])
	w.fill = 0
	_, err := w.part.Write(w.block[:])
	return err
}

func (w *RunWriter) endPart() error {
	if w.fill > 0 {
		if err := w.endBlock(); err != nil {
			return err
		}
	}
	f, err := xorfilter.BuildBinaryFuse[uint8](&w.fuse, w.hashes)
	if err != nil {
		return fmt.Errorf("filter: %w", err)
	}
	w.table = le.AppendUint32(w.table, w.n)
	w.table = le.AppendUint32(w.table, f.SegmentLength)
	w.table = le.AppendUint32(w.table, f.SegmentCount)
	w.table = le.AppendUint32(w.table, 0)
	w.table = le.AppendUint64(w.table, f.Seed)
	for _, section := range [][]byte{w.fences, f.Fingerprints} {
		sum := seal.Hash(section)
		if _, err := w.tail.Write(section); err != nil {
			return err
		}
		if _, err := w.tail.Write(sum[:]); err != nil {
			return err
		}
	}
	var head [blockBytes]byte
	partHeader(head[:], w.o.Repo, w.o.ID, w.parts, w.n)
	w.sum.seal(w.o.ID, w.parts, 0, head[:])
	err = w.o.Put(int(w.parts), joined{head[:], w.part}, blockBytes+w.part.Size())
	w.part.Close()
	w.part = nil
	w.parts++
	w.n, w.fences, w.hashes = 0, w.fences[:0], w.hashes[:0]
	return err
}

// Finish stores the last part and then the run itself, which makes the parts
// count.
func (w *RunWriter) Finish() error {
	if w.n > 0 {
		if err := w.endPart(); err != nil {
			return err
		}
	}
	head := make([]byte, 0, runHeaderBytes+len(w.o.Packs)*runPackBytes+len(w.table)+3*sumBytes)
	head = append(head, runMagic...)
	head = append(head, w.o.Repo[:]...)
	head = append(head, w.o.ID[:]...)
	head = le.AppendUint64(head, w.o.Generation)
	head = le.AppendUint64(head, w.all)
	head = le.AppendUint32(head, uint32(len(w.o.Packs)))
	head = le.AppendUint32(head, w.parts)
	head = append(head, make([]byte, runHeaderBytes-sumBytes-len(head))...)
	section := func(from int) {
		sum := seal.Hash(head[from:])
		head = append(head, sum[:]...)
	}
	section(0)
	at := len(head)
	for i := range w.o.Packs {
		head = append(head, w.o.Packs[i].ID[:]...)
		head = le.AppendUint32(head, w.o.Packs[i].Bytes)
	}
	section(at)
	at = len(head)
	head = append(head, w.table...)
	section(at)
	return w.o.Put(-1, joined{head, w.tail}, int64(len(head))+w.tail.Size())
}

// Entries is how many entries were added.
func (w *RunWriter) Entries() int64 { return int64(w.all) }

// Parts is how many parts were stored.
func (w *RunWriter) Parts() int { return int(w.parts) }

// Close lets go of what the writer holds; it may be called twice.
func (w *RunWriter) Close() {
	if w.part != nil {
		w.part.Close()
		w.part = nil
	}
	if w.tail != nil {
		w.tail.Close()
		w.tail = nil
	}
}

// joined reads a head and, behind it, a body.
type joined struct {
	head []byte
	body io.ReaderAt
}

func (j joined) ReadAt(p []byte, off int64) (n int, err error) {
	if off < int64(len(j.head)) {
		n = copy(p, j.head[off:])
		off += int64(n)
	}
	if n == len(p) {
		return n, nil
	}
	k, err := j.body.ReadAt(p[n:], off-int64(len(j.head)))
	return n + k, err
}

func compareIDs(a, b *[32]byte) int { return bytes.Compare(a[:], b[:]) }
