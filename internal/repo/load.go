package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"sync"

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

// packState says how far a pack can be relied on.
type packState uint8

const (
	packSound   packState = iota
	packDamaged           // shorter than its index says, or without its end
	packMissing           // named by an index, not in the store
)

// heldPack is a pack as the store has it.
type heldPack struct {
	id    [32]byte
	bytes int64
	state packState
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
	state string // what was under vacuum/ and quarantine/ when this was loaded

	mu       sync.RWMutex
	packs    []heldPack
	byID     map[[32]byte]uint32
	orphans  []index.Pack       // sound packs that no index names yet
	bad      map[index.Key]bool // chunks that turned out to be damaged
	indexes  []blob.Object      // index objects that were read
	findings []Finding          // what was wrong with the caches
	planned  map[string]bool    // objects that a committed vacuum deletes

	quarantine quarantine

	table *index.Table
}

// held gives the holdings and loads them first where that is still to do.
func (r *Repository) held(ctx context.Context) (*holdings, error) {
	r.loadMu.RLock()
	h := r.hold
	r.loadMu.RUnlock()
	if h != nil {
		return h, nil
	}
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	if r.hold != nil {
		return r.hold, nil
	}
	h, err := r.load(ctx)
	if err == nil {
		r.hold = h
	}
	return h, err
}

// reload loads the holdings again unless somebody did since old.
func (r *Repository) reload(ctx context.Context, old *holdings) (*holdings, error) {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	if r.hold != nil && r.hold != old {
		return r.hold, nil
	}
	h, err := r.load(ctx)
	if err == nil {
		r.hold = h
	}
	return h, err
}

// load reads vacuum/ first: whatever a vacuum does after that, a session
// will see another list there and load again.
func (r *Repository) load(ctx context.Context) (*holdings, error) {
	h := &holdings{byID: map[[32]byte]uint32{}, bad: map[index.Key]bool{}, planned: map[string]bool{}, quarantine: newQuarantine(), table: new(index.Table)}
	vs, err := r.vacuums(ctx)
	if err != nil {
		return nil, err
	}
	for _, v := range vs {
		h.state += v.String()
		if v.damage != nil {
			// Readers find what is there; writers are stopped by settle.
			h.findings = append(h.findings, Finding{Object: outcomePrefix + v.id, Offset: -1, Err: v.damage})
		}
		for _, name := range v.outcome.Delete {
			h.planned[name] = true
		}
	}
	for o, err := range r.st.List(ctx, packPrefix) {
		if err != nil {
			return nil, err
		}
		if id, ok := parsePackName(o.Name); ok && !h.planned[o.Name] {
			h.byID[id] = uint32(len(h.packs))
			h.packs = append(h.packs, heldPack{id: id, bytes: o.Bytes})
		}
	}
	if err := r.loadQuarantine(ctx, h); err != nil {
		return nil, err
	}
	indexed, err := r.loadIndexes(ctx, h)
	if err != nil {
		return nil, err
	}
	return h, r.adopt(ctx, h, indexed)
}

// loadIndexes reads all index objects. What a later one says of a chunk wins:
// it may be a healed copy.
func (r *Repository) loadIndexes(ctx context.Context, h *holdings) (indexed map[[32]byte]bool, err error) {
	indexed = map[[32]byte]bool{}
	for o, err := range r.st.List(ctx, indexPrefix) {
		if err != nil {
			return nil, err
		}
		if h.planned[o.Name] {
			continue
		}
		b, err := readObject(ctx, r.st, o.Name)
		if errors.Is(err, fault.ErrNotFound) {
			continue // a vacuum was faster
		}
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return nil, err
		}
		if err == nil {
			err = index.Decode(r.id, b, func(p index.Pack) error {
				if !h.planned[packName(p.ID)] {
					indexed[p.ID] = true
					h.add(p)
				}
				return nil
			})
		}
		if err != nil {
			h.findings = append(h.findings, Finding{Object: o.Name, Offset: -1, Err: &fault.CorruptError{Object: o.Name, Offset: -1, Err: err}})
		}
		h.indexes = append(h.indexes, o)
	}
	return indexed, nil
}

// adopt takes in the packs that no index names: those of a writer that died,
// or of an index object that is lost.
func (r *Repository) adopt(ctx context.Context, h *holdings, indexed map[[32]byte]bool) error {
	for _, p := range h.packs[:len(h.packs):len(h.packs)] {
		if indexed[p.id] {
			continue
		}
		entries, err := r.readEntries(ctx, p)
		if errors.Is(err, fault.ErrNotFound) {
			continue
		}
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return err
		}
		if err != nil {
			h.findings = append(h.findings, Finding{Object: p.name(), Offset: -1, Err: err})
		}
		ip := indexPack(p.id, p.bytes, entries)
		if err != nil {
			h.packs[h.byID[p.id]].state = packDamaged
		}
		h.add(ip)
		if err == nil {
			h.orphans = append(h.orphans, ip)
		}
	}
	return nil
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
// that is to be relied on and p is not.
func (h *holdings) add(p index.Pack) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n, ok := h.byID[p.ID]
	if !ok {
		n = uint32(len(h.packs))
		h.byID[p.ID] = n
		h.packs = append(h.packs, heldPack{id: p.ID, bytes: 0, state: packMissing})
	} else if hp := &h.packs[n]; hp.state == packSound && hp.bytes < int64(p.Bytes) {
		hp.state = packDamaged
	}
	for _, e := range p.Entries {
		at := index.Place{Pack: n, Off: e.Off, CLen: e.CLen}
		h.table.Insert(e.Key, at, func(old index.Place) bool { return h.trust(at) <= h.trust(old) })
		delete(h.bad, e.Key)
	}
}

// stores says whether a writer may refer to chunk id instead of storing it.
func (h *holdings) stores(id chunk.ID) bool {
	k := index.KeyOf(id)
	p, ok := h.table.Lookup(k)
	if !ok {
		return false
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.trust(p) == sound && !h.bad[k]
}

// find gives the place of chunk id.
func (h *holdings) find(id chunk.ID) (p index.Place, in heldPack, ok bool) {
	if p, ok = h.table.Lookup(index.KeyOf(id)); !ok {
		return p, in, false
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	return p, h.packs[p.Pack], true
}

// distrust makes the next writer store chunk id again.
func (h *holdings) distrust(id chunk.ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bad[index.KeyOf(id)] = true
}

// publish notes a pack that has become durable.
func (r *Repository) publish(p index.Pack) {
	r.loadMu.RLock()
	defer r.loadMu.RUnlock()
	h := r.hold
	if h == nil {
		return // it will be found when somebody loads
	}
	h.mu.Lock()
	if _, ok := h.byID[p.ID]; !ok {
		h.byID[p.ID] = uint32(len(h.packs))
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
