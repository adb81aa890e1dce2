package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// A DiskWriter takes the chunks of one disk, in any order and from several
// goroutines.
type DiskWriter struct {
	s     *Session
	size  int64
	prev  *Disk // nil without a previous point
	draft *manifest.Draft
	slot  *slot
	once  sync.Once // closes slot
	bases bases     // for overlays

	twice twice
	made  point.ManifestID // when it is finished
}

// PutKind says what became of a chunk.
type PutKind int

// The kinds.
const (
	Hole  PutKind = iota // nothing but zeros
	Same                 // what the previous point has at this index
	Known                // in the repository already
	New                  // stored now
)

// A Put is what became of one chunk.
type Put struct {
	Kind        PutKind
	StoredBytes int64 // in a pack, overhead included; 0 unless Kind is New
}

// Disk starts a disk of sizeBytes. Chunks that are never mentioned are those
// of previous, or holes where there is no previous. Previous must be the
// manifest of a restore point that exists; otherwise Disk gives
// fault.ErrNotFound.
func (s *Session) Disk(ctx context.Context, sizeBytes int64, previous point.ManifestID) (*DiskWriter, error) {
	if err := s.broken(); err != nil {
		return nil, err
	}
	if sizeBytes < 0 || sizeBytes >= 1<<62 {
		return nil, fmt.Errorf("a disk cannot have %d bytes", sizeBytes)
	}
	w := &DiskWriter{s: s, size: sizeBytes, draft: manifest.NewDraft()}
	if previous != "" {
		// A vacuum that no longer finds the point finds the session: that is
		// why the point must exist after the session said what it needs.
		if err := s.seen.need(ctx, previous); err != nil {
			return nil, err
		}
		if err := s.r.mustBeNamed(ctx, previous); err != nil {
			return nil, err
		}
		d, err := s.r.OpenDisk(ctx, previous)
		if err != nil {
			return nil, err
		}
		w.prev = d
	}
	w.slot = s.openSlot(&w.twice)
	s.mu.Lock()
	s.writers = append(s.writers, w)
	s.mu.Unlock()
	return w, nil
}

// mustBeNamed makes sure that a restore point that exists names manifest id.
func (r *Repository) mustBeNamed(ctx context.Context, id point.ManifestID) error {
	recs, err := r.list(ctx)
	for _, rec := range recs {
		if slices.Contains(rec.clear.Manifests, string(id)) {
			return nil
		}
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("manifest %.8s of a restore point: %w", id, fault.ErrNotFound)
}

func (w *DiskWriter) chunks() int64 { return chunk.Count(w.size, w.s.r.conf.ChunkBytes) }

func (w *DiskWriter) len(index int64) int64 {
	return chunk.Len(index, w.size, w.s.r.conf.ChunkBytes)
}

func (w *DiskWriter) check(index int64) error {
	if index < 0 || index >= w.chunks() {
		return fmt.Errorf("chunk %d of a disk with %d chunks", index, w.chunks())
	}
	return nil
}

// Put stores chunk index. Plain may be reused when Put returns.
func (w *DiskWriter) Put(ctx context.Context, index int64, plain []byte) (Put, error) {
	if err := w.check(index); err != nil {
		return Put{}, err
	}
	if int64(len(plain)) != w.len(index) {
		return Put{}, fmt.Errorf("chunk %d has %d bytes, want %d", index, len(plain), w.len(index))
	}
	if err := w.s.broken(); err != nil {
		return Put{}, err
	}
	if chunk.IsZero(plain) {
		return Put{Kind: Hole}, w.draft.SetHole(index)
	}
	pw := w.s.r.worker(w.s.level)
	defer w.s.r.idle(w.s.level, pw)
	id := pw.ID(plain)
	c, put, err := w.place(ctx, pw, index, id, plain)
	if err != nil {
		return Put{}, err
	}
	return put, w.draft.Set(index, c.id, c.base)
}

// Hole says that chunk index reads as zeros.
func (w *DiskWriter) Hole(index int64) error {
	if err := w.check(index); err != nil {
		return err
	}
	return w.draft.SetHole(index)
}

// Previous is the chunk that the previous point has at index; it is a hole
// also behind the previous point's end.
func (w *DiskWriter) Previous(ctx context.Context, index int64) (id chunk.ID, hole bool, err error) {
	c, hole, err := w.previous(ctx, index)
	return c.id, hole, err
}

func (w *DiskWriter) previous(ctx context.Context, index int64) (c ref, hole bool, err error) {
	if index < 0 {
		return c, true, fmt.Errorf("chunk %d does not exist", index)
	}
	if w.prev == nil || index >= w.prev.Chunks() {
		return c, true, nil
	}
	return w.prev.ref(ctx, index)
}

// PreviousData calls fn with each chunk that within touches and of which the
// previous point has data, in ascending order. What has no data costs nothing.
func (w *DiskWriter) PreviousData(ctx context.Context, within extent.Extent, fn func(index int64)) error {
	if w.prev == nil || within.Off >= w.prev.Size() {
		return nil
	}
	first, end, err := w.prev.within(within.Intersect(extent.Extent{Len: w.prev.Size()}))
	if err != nil {
		return err
	}
	return w.prev.walk(ctx, first, end, func(index int64, _ ref) error {
		fn(index)
		return nil
	})
}

// ReadPrevious fills buf with the previous point's chunk index, verified by
// id, and with zeros where that ends. What is in buf after an error is nothing
// to rely on.
func (w *DiskWriter) ReadPrevious(ctx context.Context, index int64, buf []byte) error {
	c, hole, err := w.previous(ctx, index)
	if err != nil {
		return err
	}
	n := 0
	if !hole {
		r := w.s.r
		pw := r.worker(readLevel)
		defer r.idle(readLevel, pw)
		o := &opener{r: r, w: pw, plain: r.plains.get(int(r.conf.ChunkBytes)), over: buf[:len(buf):len(buf)]}
		plain, base, err := o.read(ctx, c, chunk.Len(index, w.prev.Size(), r.conf.ChunkBytes))
		if err == nil {
			if n = min(len(buf), len(plain)); n > 0 && &plain[0] != &buf[0] {
				copy(buf, plain)
			}
		}
		if err != nil || base == nil || !w.s.overlays || !w.bases.keep(index, base) {
			r.plains.put(o.plain)
		}
		if err != nil {
			return err
		}
	}
	clear(buf[n:])
	return nil
}

// Finish completes the disk. Its manifest is durable when Commit returns. A
// disk that did not change at all keeps the manifest that it had.
func (w *DiskWriter) Finish(ctx context.Context) (point.ManifestID, error) {
	if err := w.s.broken(); err != nil {
		return "", err
	}
	id, err := w.finish(ctx)
	if err != nil {
		return "", w.s.fail(err)
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.made = id
	return id, nil
}

func (w *DiskWriter) finish(ctx context.Context) (point.ManifestID, error) {
	defer w.close()
	if err := w.keepLast(ctx); err != nil {
		return "", err
	}
	w.once.Do(func() { w.s.closeSlot(w.slot) })
	pages, base, err := w.plan(ctx)
	if err != nil {
		return "", err
	}
	if w.prev != nil && w.prev.Size() == w.size && len(pages) == 0 {
		w.s.mu.Lock()
		defer w.s.mu.Unlock()
		w.s.reused[w.prev.id] = true
		return w.prev.id, nil
	}
	mw, err := manifest.NewWriter(manifest.Header{Repo: w.s.r.id, ChunkBytes: w.s.r.conf.ChunkBytes, DiskBytes: w.size, Base: base}, &w.s.r.keys.Meta)
	if err != nil {
		return "", err
	}
	for _, no := range pages {
		if err = ctx.Err(); err == nil {
			err = w.writePage(ctx, mw, no)
		}
		if err != nil {
			mw.Abandon()
			return "", err
		}
	}
	id, sp, err := mw.Finish()
	if err != nil {
		mw.Abandon()
		return "", err
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	if w.s.over {
		sp.Close()
		return "", errors.New("session is over")
	}
	name := point.ManifestID(hex.EncodeToString(id[:]))
	w.s.finished[name] = sp
	return name, nil
}

// keepLast stores the chunk at the end of the shorter of both disks again if it
// is kept and has another length now.
func (w *DiskWriter) keepLast(ctx context.Context) error {
	if w.prev == nil {
		return nil
	}
	last := min(w.chunks(), w.prev.Chunks()) - 1
	if last < 0 || w.len(last) == chunk.Len(last, w.prev.Size(), w.s.r.conf.ChunkBytes) {
		return nil
	}
	said, err := w.draft.Said(last)
	if err != nil || said != manifest.Nothing {
		return err
	}
	buf := make([]byte, w.len(last))
	if err := w.ReadPrevious(ctx, last, buf); err != nil {
		return err
	}
	_, err = w.Put(ctx, last, buf)
	return err
}

// rebaseShare is which part of a base's pages a differential may replace:
// beyond one in rebaseShare the whole is written anew.
const rebaseShare = 4

// plan says which pages to write, over which base.
func (w *DiskWriter) plan(ctx context.Context) (pages []int64, base manifest.ID, err error) {
	touched := w.draft.Pages()
	if w.prev == nil {
		return touched, base, nil
	}
	if w.prev.Size() == w.size {
		changed := make([]int64, 0, len(touched))
		for _, no := range touched {
			differs, err := w.differs(ctx, no)
			if err != nil {
				return nil, base, err
			}
			if differs {
				changed = append(changed, no)
			}
		}
		if len(changed) == 0 {
			return nil, base, nil
		}
		replaced := merge(changed, w.prev.replaced())
		if len(replaced)*rebaseShare <= w.prev.basePages() {
			return replaced, w.prev.baseID(), nil
		}
	}
	return merge(touched, w.prev.written()), base, nil
}

func merge(a, b []int64) []int64 {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// differs says whether page no says anything that the previous point does not.
func (w *DiskWriter) differs(ctx context.Context, no int64) (bool, error) {
	p, err := w.draft.Page(no)
	if err != nil {
		return false, err
	}
	old, err := w.prev.page(ctx, no)
	if err != nil {
		return false, err
	}
	for i := range old.IDs {
		switch p.Said[i] {
		case manifest.Hole:
			if old.Data[i] {
				return true, nil
			}
		case manifest.Data:
			if !old.Data[i] || old.IDs[i] != p.IDs[i] || old.Base(i) != p.Base(i) {
				return true, nil
			}
		}
	}
	return false, nil
}

// writePage writes page no: what was said, and otherwise what was.
func (w *DiskWriter) writePage(ctx context.Context, mw *manifest.Writer, no int64) error {
	first := no * manifest.Positions
	n := min(manifest.Positions, w.chunks()-first)
	if n <= 0 {
		return nil // the disk is shorter now
	}
	out := manifest.Page{IDs: make([]chunk.ID, n), Data: make([]bool, n)}
	if w.prev != nil && first < w.prev.Chunks() {
		old, err := w.prev.page(ctx, no)
		if err != nil {
			return err
		}
		for i := range min(len(old.IDs), len(out.IDs)) {
			if old.Data[i] {
				out.Set(i, old.IDs[i], old.Base(i))
			}
		}
	}
	p, err := w.draft.Page(no)
	if err != nil {
		return err
	}
	for i := range out.IDs {
		switch p.Said[i] {
		case manifest.Hole:
			out.Data[i] = false
		case manifest.Data:
			out.Set(i, p.IDs[i], p.Base(i))
		}
	}
	if !slices.Contains(out.Data, true) && mw.Base() {
		return nil // a page of holes need not be written
	}
	return mw.Page(no, out)
}

// close lets go of what the writer holds; it may be called twice.
func (w *DiskWriter) close() {
	w.draft.Close()
	w.bases.clear()
	if w.prev != nil {
		w.prev.Close()
	}
}
