package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

const (
	packPrefix  = "data/"
	indexPrefix = "idx/l0/"
)

// adoptAtOnce is how many trailers are read at the same time.
const adoptAtOnce = 16

// packState says how far a pack can be relied on.
type packState uint8

const (
	packSound   packState = iota
	packDamaged           // shorter than its index says, or without its end
	packMissing           // named by an index, not in the store
)

// heldPack is a pack as the store has it.
type heldPack struct {
	id      [32]byte
	bytes   int64
	named   uint32 // its length as an index has it, of one that was not listed
	state   packState
	indexed bool // some index object names it
	fresh   bool // what is in it is in memory, or was
}

func (p *heldPack) name() string { return packName(p.id) }

func packName(id [32]byte) string {
	s := hex.EncodeToString(id[:])
	return packPrefix + s[:2] + "/" + s
}

// label is how people look a pack up.
func packLabel(id [32]byte) string { return "pack " + hex.EncodeToString(id[:4]) }

// parsePackName is the inverse of packName.
func parsePackName(name string) (id [32]byte, ok bool) {
	return parseHashName(name, packPrefix)
}

func parseHashName(name, prefix string) (id [32]byte, ok bool) {
	rest, found := strings.CutPrefix(name, prefix)
	if !found || len(rest) != 2+1+64 || rest[2] != '/' || rest[:2] != rest[3:5] || strings.ToLower(rest) != rest {
		return id, false
	}
	n, err := hex.Decode(id[:], []byte(rest[3:]))
	return id, err == nil && n == len(id)
}

// holdings are the packs of the repository and where each chunk lies.
type holdings struct {
	state string // the newest epoch, and what was under quarantine/, when this was loaded

	mu       sync.RWMutex
	packs    []heldPack
	listed   int                 // the first of packs, in the order of their ids
	others   map[[32]byte]uint32 // the numbers of the rest
	orphans  []index.Pack        // sound packs that no index names yet
	bad      map[index.Key]bool  // chunks that turned out to be damaged
	indexes  []blob.Object       // flat index objects that were read
	strays   []string            // objects beside runs that belong to none
	findings []Finding           // what was wrong with the caches

	quarantine quarantine

	lookMu sync.Mutex      // of what follows: see Repository.lookForNews
	looked time.Time       // when it looked last
	known  map[string]bool // flat index objects that were read
	news   bool            // it found any

	table *index.Set

	noteTwins bool // while it is loaded for a vacuum
	twins     []twin

	mendMu sync.Mutex      // held while a damaged part of a run is replaced from trailers
	mended map[string]bool // parts for which that was done
	redone map[string]bool // parts that were read once more from the store
}

func newHoldings() *holdings {
	h := &holdings{others: map[[32]byte]uint32{}, mended: map[string]bool{}, redone: map[string]bool{}, bad: map[index.Key]bool{}, quarantine: newQuarantine()}
	h.table = index.NewSet(h.rank)
	return h
}

// number gives the number of a pack that is in the store or that an index
// names. It is asked with h.mu held, or while nothing is added.
func (h *holdings) number(id [32]byte) (uint32, bool) {
	n, ok := slices.BinarySearchFunc(h.packs[:h.listed], id, func(p heldPack, id [32]byte) int { return compareIDs(p.id, id) })
	if ok {
		return uint32(n), true
	}
	late, ok := h.others[id]
	return late, ok
}

// list adds a pack of the store while the holdings are loaded.
func (h *holdings) list(p heldPack) {
	n := len(h.packs)
	h.packs = append(h.packs, p)
	if n == h.listed && (n == 0 || compareIDs(h.packs[n-1].id, p.id) < 0) {
		h.listed++
	} else {
		h.others[p.id] = uint32(n)
	}
}

// name gives the number of a pack that an index names with that length. It is
// asked with h.mu held, or while the holdings are loaded.
func (h *holdings) name(id [32]byte, bytes uint32) uint32 {
	n, ok := h.number(id)
	if !ok {
		n = uint32(len(h.packs))
		h.others[id] = n
		h.packs = append(h.packs, heldPack{id: id, named: bytes, state: packMissing})
	} else if hp := &h.packs[n]; hp.state == packSound && hp.bytes < int64(bytes) {
		hp.state = packDamaged
	}
	return n
}

// held gives the holdings and loads them first where that is still to do.
func (r *Repository) held(ctx context.Context) (*holdings, error) {
	if h := r.current(); h != nil {
		return h, nil
	}
	return r.reload(ctx, nil)
}

// reload loads the holdings again unless somebody did since old. Packs that
// become durable meanwhile are noted in both.
func (r *Repository) reload(ctx context.Context, old *holdings) (*holdings, error) {
	select {
	case r.loading <- struct{}{}:
		defer func() { <-r.loading }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if h := r.current(); h != nil && h != old {
		return h, nil
	}
	r.loadMu.Lock()
	r.late, r.keepLate = nil, true
	r.loadMu.Unlock()
	h, err := r.load(ctx)
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	if err == nil {
		for _, p := range r.late {
			h.take(p)
		}
		r.hold = h
	}
	r.late, r.keepLate = nil, false
	return h, err
}

// load looks for the newest epoch first: whatever a vacuum deletes after that, a
// session is in a later one and loads again.
func (r *Repository) load(ctx context.Context) (*holdings, error) {
	return r.loadInto(ctx, newHoldings())
}

func (r *Repository) loadInto(ctx context.Context, h *holdings) (*holdings, error) {
	h.looked = time.Now()
	n, err := r.newestEpoch(ctx)
	if err != nil {
		return nil, err
	}
	h.state = epochState(n)
	if err := r.listPacks(ctx, h); err != nil {
		return nil, err
	}
	if err := r.loadQuarantine(ctx, h); err != nil {
		return nil, err
	}
	if err := r.loadIndexes(ctx, h); err != nil {
		return nil, err
	}
	if err := r.lookAgain(ctx, h); err != nil {
		return nil, err
	}
	if err := r.loadRuns(ctx, h); err != nil {
		return nil, err
	}
	return h, r.adopt(ctx, h)
}

// loadIndexes reads all flat index objects. What a later one says of a chunk
// wins: it may be a healed copy.
func (r *Repository) loadIndexes(ctx context.Context, h *holdings) error {
	for o, err := range r.st.List(ctx, indexPrefix) {
		if err != nil {
			return err
		}
		if r.noFlat.Load() {
			h.indexes = append(h.indexes, o)
			h.findings = append(h.findings, badIndex(o.Name, errors.New("it or another one like it is wrong about where a chunk lies")))
			continue
		}
		b, err := readObject(ctx, r.st, o.Name)
		if errors.Is(err, fault.ErrNotFound) {
			continue // a vacuum was faster
		}
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return err
		}
		if err == nil {
			err = index.Decode(r.id, b, func(p index.Pack) error {
				h.packs[h.add(p)].indexed = true
				return nil
			})
		}
		if err != nil {
			h.findings = append(h.findings, Finding{Object: o.Name, Offset: -1, Err: &fault.CorruptError{Object: o.Name, Offset: -1, Err: err}})
		}
		h.indexes = append(h.indexes, o)
	}
	return nil
}

// lookAgain looks for packs that flat index objects name and that were not
// listed: somebody stored them between the two.
func (r *Repository) lookAgain(ctx context.Context, h *holdings) error {
	var late []uint32
	for n := range h.packs {
		if h.packs[n].state == packMissing {
			late = append(late, uint32(n))
		}
	}
	return each(ctx, adoptAtOnce, len(late), func(i int) error {
		_, err := r.isThere(ctx, h, late[i])
		return err
	})
}

// isThere asks the store for a pack that was not there when packs were listed,
// and that may have been stored since.
func (r *Repository) isThere(ctx context.Context, h *holdings, n uint32) (heldPack, error) {
	h.mu.RLock()
	p := h.packs[n]
	h.mu.RUnlock()
	if p.state != packMissing {
		return p, nil
	}
	size, err := r.st.Size(ctx, p.name())
	if errors.Is(err, fault.ErrNotFound) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	in := &h.packs[n]
	if in.bytes = size; size < int64(in.named) {
		in.state = packDamaged
	} else {
		in.state = packSound
	}
	return *in, nil
}

// adopt takes in the packs that no index names: those of a writer that died,
// or of an index object that is lost.
func (r *Repository) adopt(ctx context.Context, h *holdings) error {
	var from []uint32
	for n, p := range h.packs {
		if !p.indexed && p.state != packMissing {
			from = append(from, uint32(n))
		}
	}
	return r.trailers(ctx, h, from, func(n uint32, ip index.Pack, evidence error) {
		h.add(ip)
		if evidence == nil {
			h.orphans = append(h.orphans, ip)
		}
	})
}

// trailers reads the trailers of packs, several at once, and calls fn with what
// is in them, in order. Evidence is why a pack counts as damaged from now on;
// packs that are gone are passed over.
func (r *Repository) trailers(ctx context.Context, h *holdings, packs []uint32, fn func(n uint32, ip index.Pack, evidence error)) error {
	type trailer struct {
		p       heldPack
		entries []pack.Entry
		err     error
	}
	read := make([]trailer, adoptAtOnce)
	for len(packs) > 0 {
		some := packs[:min(adoptAtOnce, len(packs))]
		packs = packs[len(some):]
		h.mu.RLock()
		for i, n := range some {
			read[i] = trailer{p: h.packs[n]}
		}
		h.mu.RUnlock()
		g, ctx := errgroup.WithContext(ctx)
		for i := range some {
			g.Go(func() error {
				t := &read[i]
				t.entries, t.err = r.readEntries(ctx, t.p)
				if t.err == nil || errors.Is(t.err, fault.ErrNotFound) || errors.Is(t.err, fault.ErrCorrupt) {
					return nil
				}
				return t.err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		for i, n := range some {
			t := &read[i]
			if errors.Is(t.err, fault.ErrNotFound) {
				continue
			}
			if t.err != nil {
				h.mu.Lock()
				h.findings = append(h.findings, Finding{Object: t.p.name(), Offset: -1, Err: t.err})
				h.packs[n].state = packDamaged
				h.mu.Unlock()
			}
			fn(n, indexPack(t.p.id, t.p.bytes, t.entries), t.err)
		}
	}
	return nil
}

// there is how many packs are in the store.
func (h *holdings) there() (n int64) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for i := range h.packs {
		if h.packs[i].state != packMissing {
			n++
		}
	}
	return n
}

func indexPack(id [32]byte, bytes int64, entries []pack.Entry) index.Pack {
	ip := index.Pack{ID: id, Bytes: uint32(bytes), Entries: make([]index.Entry, len(entries))}
	for i, e := range entries {
		ip.Entries[i] = index.Entry{Key: index.KeyOf(e.ID), Off: e.Off, CLen: e.CLen}
	}
	return ip
}

// readEntries reads a pack's trailer, or all of the pack where that is lost:
// then it gives what is left, with an error in class fault.ErrCorrupt.
func (r *Repository) readEntries(ctx context.Context, p heldPack) ([]pack.Entry, error) {
	src := &storeReader{ctx, r.st, p.name()}
	entries, err := pack.ReadEntries(src, p.bytes)
	if err == nil {
		return entries, nil
	}
	if se := (*storeError)(nil); errors.As(err, &se) {
		return nil, se.err
	}
	evidence := &fault.CorruptError{Object: packLabel(p.id), Offset: -1, Err: err}
	if p.bytes > pack.MaxBytes {
		return nil, evidence
	}
	data, err := r.readPack(ctx, p)
	if err != nil {
		return nil, err
	}
	good, _ := pack.Scan(data, r.id)
	return good, evidence
}

// readPack reads as much of the pack as there is.
func (r *Repository) readPack(ctx context.Context, p heldPack) ([]byte, error) {
	if p.bytes > pack.MaxBytes {
		return nil, fault.Corrupt(packLabel(p.id), -1, "%d bytes are too many", p.bytes)
	}
	b := make([]byte, p.bytes)
	n, err := r.st.ReadAt(ctx, p.name(), b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:n], nil
}

// add notes the records of p, which overrule what was known of them unless
// that is to be relied on and p is not. It gives the number of p.
func (h *holdings) add(p index.Pack) uint32 {
	h.mu.Lock()
	n := h.name(p.ID, p.Bytes)
	h.packs[n].fresh = true
	h.mu.Unlock()
	for _, e := range p.Entries {
		h.insert(e.Key, index.Place{Pack: n, Off: e.Off, CLen: e.CLen})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.bad) > 0 {
		for _, e := range p.Entries {
			delete(h.bad, e.Key)
		}
	}
	return n
}

func (h *holdings) insert(k index.Key, at index.Place) {
	h.table.Insert(k, at, func(old index.Place) bool {
		if h.noteTwins && old != at {
			h.twins = append(h.twins, twin{k, old, at})
		}
		return h.rank(at) <= h.rank(old)
	})
}

// rank is trust as the index wants it.
func (h *holdings) rank(p index.Place) uint8 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return uint8(h.trust(p))
}

// stores says whether a writer may refer to chunk id instead of storing it, if
// it may rely on the pack that holds it. An error may be for Repository.mend.
func (h *holdings) stores(ctx context.Context, id chunk.ID) (in [32]byte, ok bool, err error) {
	k := index.KeyOf(id)
	p, ok, err := h.table.Lookup(ctx, k)
	if !ok || err != nil {
		return in, false, err
	}
	in, ok = h.reliable(k, p)
	return in, ok, nil
}

// storesFresh is stores as far as no object need be read.
func (h *holdings) storesFresh(id chunk.ID) (in [32]byte, ok bool) {
	k := index.KeyOf(id)
	p, ok := h.table.Fresh(k)
	if !ok {
		return in, false
	}
	return h.reliable(k, p)
}

func (h *holdings) reliable(k index.Key, p index.Place) (in [32]byte, ok bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.packs[p.Pack].id, h.trust(p) == sound && !h.bad[k]
}

// find gives the place of chunk id. An error may be for Repository.mend.
func (h *holdings) find(ctx context.Context, id chunk.ID) (p index.Place, in heldPack, ok bool, err error) {
	if p, ok, err = h.table.Lookup(ctx, index.KeyOf(id)); !ok {
		return p, in, false, err
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	return p, h.packs[p.Pack], true, nil
}

// distrust makes the next writer store chunk id again.
func (h *holdings) distrust(id chunk.ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bad[index.KeyOf(id)] = true
}

// publish notes a pack that has become durable.
func (r *Repository) publish(p index.Pack) {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	if r.keepLate {
		r.late = append(r.late, p)
	}
	if r.hold != nil { // otherwise it is found when somebody loads
		r.hold.take(p)
	}
}

// take notes a pack that was just stored.
func (h *holdings) take(p index.Pack) {
	h.mu.Lock()
	if _, ok := h.number(p.ID); !ok {
		h.others[p.ID] = uint32(len(h.packs))
		h.packs = append(h.packs, heldPack{id: p.ID, bytes: int64(p.Bytes)})
	}
	h.mu.Unlock()
	h.add(p)
}

// storeReader reads one object; its errors are storeErrors, so that they are
// not taken for damage.
type storeReader struct {
	ctx  context.Context
	st   blob.Store
	name string
}

type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }
func (e *storeError) Unwrap() error { return e.err }

func (s *storeReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.st.ReadAt(s.ctx, s.name, p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = &storeError{err}
	}
	return n, err
}
