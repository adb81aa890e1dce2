package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// A Level says how hard to compress: "none", "fast", "default" or "high".
// The empty Level is "fast".
type Level string

// The levels and what they mean to zstd.
const (
	LevelNone    Level = "none"    // stored as it is
	LevelFast    Level = "fast"    // 1
	LevelDefault Level = "default" // 3
	LevelHigh    Level = "high"    // 9
)

// zstd gives the level of libzstd; 0 stands for no compression.
func (l Level) zstd() (int, error) {
	switch l {
	case "", LevelFast:
		return 1, nil
	case LevelNone:
		return 0, nil
	case LevelDefault:
		return 3, nil
	case LevelHigh:
		return 9, nil
	}
	return 0, fmt.Errorf("unknown compression level %q: want %s, %s, %s or %s", string(l), LevelNone, LevelFast, LevelDefault, LevelHigh)
}

// SessionOptions hold for one session.
type SessionOptions struct {
	Level Level
	// NoOverlays stores every changed chunk as a whole.
	NoOverlays bool
}

// A Session stores the disks of one VM and publishes their restore points
// together. Several at once share what they store.
//
// It goes open → committed, failed or aborted, and never back.
type Session struct {
	r        *Repository
	id       string
	bin      [16]byte
	level    int
	overlays bool
	ctx      context.Context // of the packs that are stored in the background
	cancel   context.CancelFunc
	seen     *presence // by vacuums

	mu       sync.Mutex
	quiet    sync.Cond            // signalled when flying falls
	flying   int                  // packs full and not yet durable
	err      error                // what broke the session
	pending  map[index.Key]*twice // chunks that are in packs not yet durable, with who counted them as new
	again    map[index.Key]bool   // those of them that are stored though they lie elsewhere
	slots    map[*slot]struct{}   // packs that take records
	tail     *slot                // what is left of streams that ended
	stored   []index.Pack         // durable packs that no index names yet
	indexes  int                  // index objects written
	indexed  time.Time            // when the last one was, or the session began
	finished map[point.ManifestID]*manifest.Spool
	reused   map[point.ManifestID]bool // manifests of existing points that still hold
	writers  []*DiskWriter
	over     bool
	unknown  bool          // nobody can say whether the outcome was stored
	vain     time.Duration // waited for what others said to store and did not
}

// Begin starts a session. Vacuums that run at the same time leave what it needs
// alone until Commit or Abort, as long as it shows that it lives.
func (r *Repository) Begin(ctx context.Context, o SessionOptions) (*Session, error) {
	if err := r.needKeys(); err != nil {
		return nil, err
	}
	return r.begin(ctx, o)
}

// begin is Begin also for who has no keys: he can copy records as they are.
func (r *Repository) begin(ctx context.Context, o SessionOptions) (*Session, error) {
	level, err := o.Level.zstd()
	if err != nil {
		return nil, err
	}
	s := &Session{
		r: r, level: level, overlays: !o.NoOverlays,
		pending: map[index.Key]*twice{}, again: map[index.Key]bool{}, slots: map[*slot]struct{}{}, indexed: time.Now(),
		finished: map[point.ManifestID]*manifest.Spool{}, reused: map[point.ManifestID]bool{},
	}
	s.quiet.L = &s.mu
	if s.id, s.bin, err = newID(); err != nil {
		return nil, err
	}
	s.seen = newPresence(r, s.id)
	err = s.seen.announce(ctx)
	if err == nil {
		err = r.settle(ctx, s.seen)
	}
	if err != nil {
		s.seen.end(ctx)
		_ = s.seen.withdraw(ctx) // otherwise a vacuum does
		return nil, fmt.Errorf("begin session: %w", err)
	}
	// Packs outlive the call that filled them; Abort is what ends them early.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.seen.keep(func() {
		s.fail(fmt.Errorf("session %s: %w", s.id, fault.ErrFenced))
	})
	return s, nil
}

// ID is the session's name in the store.
func (s *Session) ID() string { return s.id }

// fail breaks the session: it can no longer commit.
func (s *Session) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.quiet.Broadcast()
	return err
}

// broken is what broke the session, if anything did.
func (s *Session) broken() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return errors.New("session is over")
	}
	return s.err
}

// PutBlob stores a small file.
func (s *Session) PutBlob(ctx context.Context, data []byte) (point.Blob, error) {
	b := point.Blob{SizeBytes: int64(len(data))}
	if err := s.broken(); err != nil {
		return b, err
	}
	sl := s.openSlot(nil)
	defer s.closeSlot(sl)
	for len(data) > 0 {
		part := data[:min(int64(len(data)), s.r.conf.ChunkBytes)]
		data = data[len(part):]
		w := s.r.worker(s.level)
		id := w.ID(part)
		_, _, err := s.store(ctx, sl, w, id, part)
		s.r.idle(s.level, w)
		if err != nil {
			return b, err
		}
		b.Chunks = append(b.Chunks, id)
	}
	return b, nil
}

// Commit makes all of points exist, or none of them. It gives fault.ErrFenced
// if the session was revoked meanwhile; then the backup may be repeated.
//
// The order is the promise: packs, index, manifests and records are durable
// before the outcome says that they count.
func (s *Session) Commit(ctx context.Context, points ...*point.RestorePoint) error {
	if err := s.broken(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if err := s.flush(ctx); err != nil {
		return s.fail(err)
	}
	if err := s.writeIndex(ctx); err != nil {
		return s.fail(err)
	}
	s.r.noteWrong(ctx)
	if err := s.needManifests(ctx, points); err != nil {
		return s.fail(err)
	}
	if err := s.writeManifests(ctx, points); err != nil {
		return s.fail(err)
	}
	s.countTwice(points)
	s.promise(points)
	names, err := s.writeRecords(ctx, points)
	if err != nil {
		return s.fail(err)
	}
	if err := s.lockBeforeCommit(ctx, points, names); err != nil {
		return s.fail(err)
	}
	o, err := s.r.decide(ctx, outcome{Of: s.id, State: committed, Points: names})
	if err != nil {
		s.unknown = true
		return s.fail(fmt.Errorf("commit: %w", err))
	}
	s.r.guardOutcome(ctx, o)
	if o.State == revoked {
		return s.fail(fmt.Errorf("session %s: %w", s.id, fault.ErrFenced))
	}
	s.end(ctx)
	return nil
}

// Abort ends a session that was not committed; after Commit it does nothing.
// What was stored can be reused by the next backup until vacuum takes it.
func (s *Session) Abort(ctx context.Context) error {
	s.mu.Lock()
	over, unknown := s.over, s.unknown
	s.mu.Unlock()
	if over {
		return nil
	}
	s.cancel()
	s.fail(errors.New("session was aborted"))
	s.end(ctx)
	if unknown {
		// The outcome may or may not be there: make sure that one is.
		out, err := s.r.decide(ctx, outcome{Of: s.id, State: revoked})
		if err != nil || out.State == committed {
			return err // a vacuum may still have to look at this session
		}
	}
	return s.seen.withdraw(ctx)
}

// end lets go of everything that the session holds, when nothing is stored any
// more. Durable packs that no index names are left to the next session.
func (s *Session) end(ctx context.Context) {
	s.mu.Lock()
	s.over = true
	for s.flying > 0 {
		s.quiet.Wait()
	}
	slots, spools, writers, stored := s.slots, s.finished, s.writers, s.stored
	s.slots, s.finished, s.writers, s.stored, s.tail = nil, nil, nil, nil, nil
	s.mu.Unlock()
	s.cancel()
	for sl := range slots {
		s.r.unlist(sl)
		sl.mu.Lock()
		if sl.b != nil {
			sl.b.Free()
			sl.b = nil
		}
		sl.mu.Unlock()
	}
	for _, sp := range spools {
		sp.Close()
	}
	for _, w := range writers {
		w.close()
	}
	if h := s.r.current(); h != nil && len(stored) > 0 {
		h.mu.Lock()
		h.orphans = append(h.orphans, stored...)
		h.mu.Unlock()
	}
	s.seen.end(ctx)
}

// current is the holdings if they are loaded.
func (r *Repository) current() *holdings {
	r.loadMu.RLock()
	defer r.loadMu.RUnlock()
	return r.hold
}

// writeIndex names all durable packs of this session, and those that a dead
// writer left, in index objects.
func (s *Session) writeIndex(ctx context.Context) (err error) {
	s.mu.Lock()
	packs := s.stored
	s.stored = nil
	s.mu.Unlock()
	if h := s.r.current(); h != nil {
		h.mu.Lock()
		packs = append(h.orphans, packs...)
		h.orphans = nil
		h.mu.Unlock()
	}
	for len(packs) > 0 {
		n, bytes := 0, int64(0)
		for n < len(packs) && (n == 0 || bytes < index.CutBytes) {
			bytes += packs[n].EncodedBytes()
			n++
		}
		name := fmt.Sprintf("%s%s-%06d", indexPrefix, s.id, s.indexes)
		if err := put(ctx, s.r.st, name, index.Encode(s.r.id, packs[:n])); err != nil {
			s.mu.Lock()
			s.stored = packs // end leaves them to the next session
			s.mu.Unlock()
			return fmt.Errorf("store index: %w", err)
		}
		s.indexes++
		packs = packs[n:]
	}
	return nil
}

// needManifests keeps the manifests that are about to be stored from vacuums,
// which no point names yet.
func (s *Session) needManifests(ctx context.Context, points []*point.RestorePoint) error {
	var ids []point.ManifestID
	for _, p := range points {
		for _, d := range p.Disks {
			ids = append(ids, d.Manifest)
		}
	}
	return s.seen.need(ctx, ids...)
}

func (s *Session) writeManifests(ctx context.Context, points []*point.RestorePoint) error {
	for _, p := range points {
		for _, d := range p.Disks {
			if s.reused[d.Manifest] {
				continue
			}
			sp, ok := s.finished[d.Manifest]
			if !ok {
				return fmt.Errorf("%s: disk %s: manifest %.8s is not of this session", p.Ref(), d.ID, d.Manifest)
			}
			if err := s.r.st.Put(ctx, manifestName(d.Manifest), sp, sp.Size()); err != nil {
				return fmt.Errorf("store manifest: %w", err)
			}
			if err := s.r.guardWhole(ctx, manifestName(d.Manifest), sp, sp.Size()); err != nil {
				return fmt.Errorf("store parity of manifest: %w", err)
			}
		}
	}
	return nil
}

func (s *Session) writeRecords(ctx context.Context, points []*point.RestorePoint) (names []string, err error) {
	for i, p := range points {
		name := fmt.Sprintf("%s-%06d", s.id, i)
		b, err := s.r.encodeRecord(name, p)
		if err != nil {
			return nil, err
		}
		if err := put(ctx, s.r.st, pointPrefix+name, b); err != nil {
			return nil, fmt.Errorf("store restore point: %w", err)
		}
		if err := s.r.guardWhole(ctx, pointPrefix+name, bytes.NewReader(b), int64(len(b))); err != nil {
			return nil, fmt.Errorf("store parity of restore point: %w", err)
		}
		names = append(names, name)
	}
	return names, nil
}

// knows says whether chunk id, or an overlay's record of that name, need not be
// stored.
func (s *Session) knows(ctx context.Context, h *holdings, id chunk.ID) (bool, error) {
	in, known, err := s.r.stores(ctx, h, id)
	if err != nil || known && s.seen.rely(in) {
		return known, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pendingOrFresh(h, id), nil
}

// pendingOrFresh is asked with s.mu held. The order matters: a chunk enters the
// table before it leaves pending.
func (s *Session) pendingOrFresh(h *holdings, id chunk.ID) bool {
	if _, ok := s.pending[index.KeyOf(id)]; ok {
		return true
	}
	in, known := h.storesFresh(id)
	return known && s.seen.rely(in)
}

// claim says whether chunk id need not be stored; if not, it is from now on
// this caller's to store, and what comes of it is t's to know, which may be nil.
func (s *Session) claim(ctx context.Context, h *holdings, id chunk.ID, t *twice) (known bool, err error) {
	// What is read from the store is asked for without holding anybody up.
	in, known, err := s.r.stores(ctx, h, id)
	if err != nil || known && s.seen.rely(in) {
		return known, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pendingOrFresh(h, id) {
		return true, nil
	}
	s.pending[index.KeyOf(id)] = t
	return false, nil
}

// claimAgain makes the record id this caller's to store though there is one,
// unless this session is storing it already.
func (s *Session) claimAgain(id chunk.ID) bool {
	k := index.KeyOf(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.pending[k]; ok {
		return false
	}
	s.pending[k], s.again[k] = nil, true
	return true
}
