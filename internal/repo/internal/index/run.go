package index

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/FastFilter/xorfilter"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

const (
	runHeaderBytes = 128
	runPackBytes   = 36
	runPartBytes   = 40
	fenceBytes     = 8
)

// Gone is the number of a pack that does not count any more: what a run says
// to be in it is passed over.
const Gone = ^uint32(0)

var runMagic = []byte("BSTYRUN1")

// A Source reads what is stored; a blob.Store is one.
type Source interface {
	ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error)
}

// A PartError says that a part of a run cannot be relied on: it is damaged, or
// not there, or cannot be read.
type PartError struct {
	Object string // the part, or the run
	Err    error
}

func (e *PartError) Error() string { return e.Object + ": " + e.Err.Error() }
func (e *PartError) Unwrap() error { return e.Err }

// A damage is what is wrong with bytes that were read, as opposed to trouble
// with reading them.
type damage struct{ err error }

func (d *damage) Error() string { return d.err.Error() }
func (d *damage) Unwrap() error { return d.err }

// Damaged says whether err is about bytes that are not what was written, and
// not about trouble with reading them.
func Damaged(err error) bool {
	var d *damage
	return errors.As(err, &d)
}

// PartName is the name of part n of the run called run.
func PartName(run string, n int) string { return fmt.Sprintf("%s-%06d", run, n) }

// A Run is a set of entries sorted by key, cut into parts. In memory are the
// first eight bytes of each block's first key, and the filters of those parts
// that were asked for a key. It is safe for concurrent use.
type Run struct {
	Name       string
	Generation uint64

	src     Source
	repo    [16]byte
	id      [16]byte
	entries int64
	numbers []uint32 // the caller's, of the packs
	parts   []part
}

// A part is a range of keys: from its first up to the first of the next.
type part struct {
	name     string
	first    Key
	entries  uint32
	ord      int64    // of its first entry in the run
	fences   []uint64 // by block: the first 8 bytes of its first key, big-endian
	filterAt int64
	shape    filterShape
	damage   atomic.Pointer[error] // why it does not count, nil while it does

	mu     sync.Mutex // held while the filter is loaded
	filter atomic.Pointer[xorfilter.BinaryFuse[uint8]]
}

// OpenOptions say how to open a run.
type OpenOptions struct {
	Repo [16]byte
	ID   [16]byte // the ULID in its name
	// Size is the length of an object as the store lists it.
	Size func(name string) (bytes int64, ok bool)
	// Number gives each pack a number, which may be Gone. They ascend by id.
	Number func(RunPack) uint32
}

// OpenRun opens the run called name. A part that is damaged as far as can be
// seen without reading it does not count: see LostParts. Where the run itself
// is damaged the error is Damaged.
func OpenRun(ctx context.Context, src Source, name string, o OpenOptions) (*Run, error) {
	size, _ := o.Size(name)
	r := &Run{Name: name, src: src, repo: o.Repo, id: o.ID}
	packs, parts, err := r.readHeader(ctx, size)
	if err != nil {
		return nil, err
	}
	at := int64(runHeaderBytes)
	if err := r.readPacks(ctx, at, packs, o.Number); err != nil {
		return nil, err
	}
	at += packs*runPackBytes + sumBytes
	table, err := r.section(ctx, at, parts*runPartBytes)
	if err != nil {
		return nil, err
	}
	at += parts*runPartBytes + sumBytes
	r.parts = make([]part, parts)
	for i := range r.parts {
		p := &r.parts[i]
		b := table[i*runPartBytes:]
		p.name, p.first, p.entries, p.ord = PartName(name, i), Key(b[:16]), le.Uint32(b[16:]), r.entries
		p.shape = filterShape{le.Uint64(b[32:]), le.Uint32(b[20:]), le.Uint32(b[24:])}
		if err := p.shape.check(); err != nil {
			return nil, &damage{err}
		}
		if p.entries == 0 || i > 0 && r.parts[i-1].first.Compare(&p.first) >= 0 {
			return nil, &damage{errors.New("its parts do not ascend")}
		}
		fences := blocks(p.entries) * fenceBytes
		p.filterAt = at + fences + sumBytes
		next := p.filterAt + p.shape.bytes() + sumBytes
		if next > size {
			return nil, &damage{errors.New("it ends inside a filter")}
		}
		switch bytes, ok := o.Size(p.name); {
		case !ok:
			p.lose(&damage{errors.New("it is not in the store")})
		case bytes != partBytes(p.entries):
			p.lose(&damage{fmt.Errorf("it is %d bytes long, want %d", bytes, partBytes(p.entries))})
		default:
			if err := r.readFences(ctx, p, at); err != nil && !Damaged(err) {
				return nil, err
			} else if err != nil {
				p.lose(err)
			}
		}
		r.entries += int64(p.entries)
		at = next
	}
	if at != size {
		return nil, &damage{errors.New("bytes behind the last filter")}
	}
	return r, nil
}

// read reads all of p or gives an error; that the object is shorter is damage.
func (r *Run) read(ctx context.Context, name string, p []byte, off int64) error {
	n, err := r.src.ReadAt(ctx, name, p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return &damage{io.ErrUnexpectedEOF}
	}
	return err
}

// section reads n bytes of the run and the hash behind them. The caller has
// compared n with the size of the object.
func (r *Run) section(ctx context.Context, off, n int64) ([]byte, error) {
	b := make([]byte, n+sumBytes)
	if err := r.read(ctx, r.Name, b, off); err != nil {
		return nil, err
	}
	if sum := seal.Hash(b[:n]); !bytes.Equal(sum[:], b[n:]) {
		return nil, &damage{fmt.Errorf("checksum of %d bytes at %d does not match", n, off)}
	}
	return b[:n:n], nil
}

func (r *Run) readHeader(ctx context.Context, size int64) (packs, parts int64, err error) {
	if size < runHeaderBytes+2*sumBytes {
		return 0, 0, &damage{io.ErrUnexpectedEOF}
	}
	b, err := r.section(ctx, 0, runHeaderBytes-sumBytes)
	if err != nil {
		return 0, 0, err
	}
	packs, parts = int64(le.Uint32(b[56:])), int64(le.Uint32(b[60:]))
	switch {
	case !bytes.Equal(b[:8], runMagic):
		err = errors.New("it does not begin like a run")
	case !bytes.Equal(b[8:24], r.repo[:]):
		err = fmt.Errorf("it belongs to repository %x", b[8:24])
	case !bytes.Equal(b[24:40], r.id[:]):
		err = errors.New("it is not the run that its name says")
	case len(bytes.Trim(b[64:], "\x00")) > 0:
		err = errors.New("header has bytes that must be zero")
	case runHeaderBytes+packs*runPackBytes+parts*runPartBytes+2*sumBytes > size:
		err = errors.New("it ends inside its tables")
	}
	if err != nil {
		return 0, 0, &damage{err}
	}
	r.Generation = le.Uint64(b[40:])
	return packs, parts, nil
}

func (r *Run) readPacks(ctx context.Context, at, n int64, number func(RunPack) uint32) error {
	b, err := r.section(ctx, at, n*runPackBytes)
	if err != nil {
		return err
	}
	for i := int64(1); i < n; i++ {
		if bytes.Compare(b[(i-1)*runPackBytes:][:32], b[i*runPackBytes:][:32]) >= 0 {
			return &damage{errors.New("its packs do not ascend")}
		}
	}
	r.numbers = make([]uint32, n)
	for i := range r.numbers {
		p := b[i*runPackBytes:]
		r.numbers[i] = number(RunPack{[32]byte(p[:32]), le.Uint32(p[32:])})
	}
	return nil
}

func (r *Run) readFences(ctx context.Context, p *part, at int64) error {
	b, err := r.section(ctx, at, blocks(p.entries)*fenceBytes)
	if err != nil {
		return err
	}
	p.fences = make([]uint64, blocks(p.entries))
	for i := range p.fences {
		p.fences[i] = be.Uint64(b[i*fenceBytes:])
	}
	if p.fences[0] != be.Uint64(p.first[:]) || !slices.IsSorted(p.fences) {
		p.fences = nil
		return &damage{errors.New("its blocks do not ascend")}
	}
	return nil
}

// Len is how many entries the run has, those of damaged parts included.
func (r *Run) Len() int64 { return r.entries }

// Bytes is the memory that the run takes now.
func (r *Run) Bytes() (n int64) {
	n = int64(len(r.numbers)) * 4
	for i := range r.parts {
		p := &r.parts[i]
		n += int64(len(p.fences))*8 + 128
		if f := p.filter.Load(); f != nil {
			n += int64(len(f.Fingerprints))
		}
	}
	return n
}

// Objects are the names of the run and of its parts, the run first.
func (r *Run) Objects() []string {
	names := []string{r.Name}
	for i := range r.parts {
		names = append(names, r.parts[i].name)
	}
	return names
}

// A Range is the keys from First up to and without End; none ends it where
// there is no End.
type Range struct {
	First, End Key
	NoEnd      bool
}

// Has says whether k is in the range.
func (r *Range) Has(k *Key) bool {
	return r.First.Compare(k) <= 0 && (r.NoEnd || k.Compare(&r.End) < 0)
}

// A LostPart is a part that does not count, and the keys it should have.
type LostPart struct {
	Range
	PartError
}

// keys are those that part i should have.
func (r *Run) keys(i int) Range {
	if i+1 == len(r.parts) {
		return Range{First: r.parts[i].first, NoEnd: true}
	}
	return Range{First: r.parts[i].first, End: r.parts[i+1].first}
}

func (p *part) lose(err error) { p.damage.CompareAndSwap(nil, &err) }

func (p *part) lost() bool { return p.damage.Load() != nil }

// Lose makes a part not count from now on, which turned out to be damaged.
func (r *Run) Lose(e *PartError) {
	for i := range r.parts {
		if r.parts[i].name == e.Object {
			r.parts[i].lose(e.Err)
		}
	}
}

// Packs are the caller's numbers of the packs that the run names.
func (r *Run) Packs() []uint32 { return r.numbers }

// LostParts are the parts that do not count.
func (r *Run) LostParts() (out []LostPart) {
	for i := range r.parts {
		if err := r.parts[i].damage.Load(); err != nil {
			out = append(out, LostPart{r.keys(i), PartError{r.parts[i].name, *err}})
		}
	}
	return out
}

// part gives the part whose range has k.
func (r *Run) part(k *Key) int {
	return sort.Search(len(r.parts), func(i int) bool { return r.parts[i].first.Compare(k) > 0 }) - 1
}

// loaded gives the filter of p and loads it first where that is still to do.
func (r *Run) loaded(ctx context.Context, p *part) (*xorfilter.BinaryFuse[uint8], error) {
	if f := p.filter.Load(); f != nil {
		return f, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.filter.Load(); f != nil {
		return f, nil
	}
	b, err := r.section(ctx, p.filterAt, p.shape.bytes())
	if err != nil {
		return nil, &PartError{p.name, err}
	}
	f := p.shape.open(b)
	p.filter.Store(f)
	return f, nil
}

// LoadFilters brings all filters into memory, which lookups do one by one.
func (r *Run) LoadFilters(ctx context.Context) error {
	for i := range r.parts {
		if !r.parts[i].lost() {
			if _, err := r.loaded(ctx, &r.parts[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// candidates are the blocks of p that may hold k, the last included. There is
// more than one only where keys agree in their first eight bytes.
func (p *part) candidates(k *Key) (lo, hi int64, err error) {
	k8 := be.Uint64(k[:8])
	lo = int64(sort.Search(len(p.fences), func(i int) bool { return p.fences[i] >= k8 }))
	hi = int64(sort.Search(len(p.fences), func(i int) bool { return p.fences[i] > k8 })) - 1
	if lo = max(0, lo-1); hi-lo >= windowBlocks {
		return 0, 0, &PartError{p.name, &damage{errors.New("too many of its blocks begin alike")}}
	}
	return lo, hi, nil
}

// A found is an entry of a run and its ordinal in it.
type found struct {
	at  Place
	ord int64
}

// scratch is what a lookup needs of memory.
type scratch struct {
	sum   *summer
	block [blockBytes]byte
}

var scratches = sync.Pool{New: func() any { return &scratch{sum: newSummer()} }}

// lookup finds k. A place in a pack that is gone does not count.
func (r *Run) lookup(ctx context.Context, k *Key) (f found, ok bool, err error) {
	i := r.part(k)
	if i < 0 || r.parts[i].lost() {
		return f, false, nil
	}
	p := &r.parts[i]
	filter, err := r.loaded(ctx, p)
	if err != nil || !filter.Contains(k.hash64()) {
		return f, false, err
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	lo, hi, err := p.candidates(k)
	if err != nil {
		return f, false, err
	}
	for no := hi; no >= lo; no-- {
		if err := r.read(ctx, p.name, s.block[:], (no+1)*blockBytes); err != nil {
			return f, false, &PartError{p.name, err}
		}
		if err := r.check(s.sum, uint32(i), no, s.block[:]); err != nil {
			return f, false, err
		}
		if f, ok, err = r.find(p, no, s.block[:], k); ok || err != nil {
			return f, ok, err
		}
	}
	return f, false, nil
}

// check compares a block that was just read with its checksum.
func (r *Run) check(sum *summer, part uint32, no int64, block []byte) error {
	if err := sum.check(r.id, part, uint32(no+1), block); err != nil {
		return &PartError{r.parts[part].name, &damage{err}}
	}
	return nil
}

// find looks for k in a block that was checked.
func (r *Run) find(p *part, no int64, block []byte, k *Key) (f found, ok bool, err error) {
	at, ok := searchBlock(block, inBlock(p.entries, no), k)
	if !ok {
		return f, false, nil
	}
	e := getRecord(block[at*recordBytes:])
	n, err := r.number(&e)
	if err != nil {
		return f, false, &PartError{p.name, err}
	}
	return found{Place{n, e.off, e.clen}, p.ord + no*blockEntries + int64(at)}, n != Gone, nil
}

func (r *Run) number(e *record) (uint32, error) {
	if int(e.ref) >= len(r.numbers) {
		return 0, &damage{fmt.Errorf("an entry names pack %d of %d", e.ref, len(r.numbers))}
	}
	return r.numbers[e.ref], nil
}
