package repo

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/copies"
	"github.com/backstay/backstay/internal/repo/internal/index"
)

// runPrefix is where runs of the index lie, each beside its parts.
const runPrefix = "idx/l1/"

// loadTries is how often runs are listed while vacuums replace them.
const loadTries = 10

// parseRunName takes the name of a run or, where part is not -1, of a part.
func parseRunName(name string) (id [16]byte, part int, ok bool) {
	rest, ours := strings.CutPrefix(name, runPrefix)
	run, no, isPart := strings.Cut(rest, "-")
	u, err := ulid.ParseStrict(strings.ToUpper(run))
	if !ours || err != nil || !isID(run) {
		return id, 0, false
	}
	if !isPart {
		return u, -1, true
	}
	part, err = strconv.Atoi(no)
	return u, part, err == nil && part >= 0 && index.PartName(runPrefix+run, part) == name
}

// loadRuns opens all runs. While it lists and opens them a vacuum may replace
// one by another that it did not see: then it begins again.
func (r *Repository) loadRuns(ctx context.Context, h *holdings) error {
	dropped := map[string]bool{}
	for range loadTries {
		again, err := r.tryRuns(ctx, h, dropped)
		if !again || err != nil {
			return err
		}
	}
	return errors.New("vacuums replace the index faster than it can be read")
}

// Dropped are runs whose copies on the local disk were found to be damaged.
func (r *Repository) tryRuns(ctx context.Context, h *holdings, dropped map[string]bool) (again bool, err error) {
	sizes := map[string]int64{}
	var names []string
	for o, err := range r.st.List(ctx, runPrefix) {
		if err != nil {
			return false, err
		}
		if _, _, ok := parseRunName(o.Name); ok {
			sizes[o.Name] = o.Bytes
			names = append(names, o.Name)
		}
	}
	var runs []*index.Run
	var findings []Finding
	ours := map[string]bool{}
	for _, name := range names {
		id, part, _ := parseRunName(name)
		if part >= 0 {
			continue
		}
		run, err := index.OpenRun(ctx, r.indexSource(), name, index.OpenOptions{
			Repo: r.id, ID: id,
			Size:   func(o string) (int64, bool) { n, ok := sizes[o]; return n, ok },
			Number: h.numberer(),
		})
		if errors.Is(err, fault.ErrNotFound) {
			return true, nil // and what replaces it may not have been listed
		}
		if (index.Damaged(err) || err == nil && len(run.LostParts()) > 0) && !dropped[name] {
			if dropped[name] = true; r.dropCopy(name) {
				return true, nil // perhaps that was all
			}
		}
		if index.Damaged(err) {
			// Its parts say nothing without it: it goes with them as a stray.
			findings = append(findings, badIndex(name, err))
			continue
		}
		if err != nil {
			return false, err
		}
		lost := run.LostParts()
		if len(lost) > 0 {
			if _, err := r.st.Size(ctx, name); errors.Is(err, fault.ErrNotFound) {
				return true, nil
			}
		}
		for _, l := range lost {
			findings = append(findings, badIndex(l.Object, l.Err))
		}
		for _, o := range run.Objects() {
			ours[o] = true
		}
		runs = append(runs, run)
	}
	for _, name := range names {
		if !ours[name] {
			h.strays = append(h.strays, name)
		}
	}
	if r.copies != nil {
		r.copies.Only(func(base string) bool { return ours[runPrefix+base] })
	}
	h.findings = append(h.findings, findings...)
	for _, run := range runs {
		h.table.AddRun(run)
		for _, n := range run.Packs() {
			if n != index.Gone {
				h.packs[n].indexed = true
			}
		}
	}
	for _, run := range runs {
		for _, l := range run.LostParts() {
			if err := r.readKeys(ctx, h, run, l.Range); err != nil {
				return false, err
			}
		}
	}
	return false, nil
}

func badIndex(name string, err error) Finding {
	return Finding{Object: name, Offset: -1, Err: &fault.CorruptError{Object: name, Offset: -1, Err: err}}
}

// numberer gives the numbers of packs that ascend by id.
func (h *holdings) numberer() func(index.RunPack) uint32 {
	at := 0
	return func(p index.RunPack) uint32 {
		for at < h.listed && compareIDs(h.packs[at].id, p.ID) < 0 {
			at++
		}
		if at < h.listed && h.packs[at].id == p.ID && h.packs[at].bytes >= int64(p.Bytes) {
			return uint32(at)
		}
		return h.name(p.ID, p.Bytes)
	}
}

// readKeys takes the chunks within keys from the trailers of the packs that the
// run names.
func (r *Repository) readKeys(ctx context.Context, h *holdings, run *index.Run, keys index.Range) error {
	var from []uint32
	h.mu.RLock()
	for _, n := range run.Packs() {
		if n != index.Gone && h.packs[n].state != packMissing {
			from = append(from, n)
		}
	}
	h.mu.RUnlock()
	return r.trailers(ctx, h, from, func(n uint32, ip index.Pack, _ error) {
		for _, e := range ip.Entries {
			if keys.Has(&e.Key) {
				h.insert(e.Key, index.Place{Pack: n, Off: e.Off, CLen: e.CLen})
			}
		}
	})
}

// mend takes an error of looking something up in h. If a part of a run turned
// out to be damaged, what it said is taken from trailers; if a run is gone the
// holdings are loaded again. Then it gives the holdings to ask once more, and
// otherwise the error.
func (r *Repository) mend(ctx context.Context, h *holdings, err error) (*holdings, error) {
	e := (*index.PartError)(nil)
	switch {
	case !errors.As(err, &e):
		return nil, err
	case index.Damaged(err):
		return h, r.mendPart(ctx, h, e)
	case errors.Is(err, fault.ErrNotFound):
		return r.reload(ctx, h)
	}
	return nil, err
}

func (r *Repository) mendPart(ctx context.Context, h *holdings, e *index.PartError) error {
	h.mendMu.Lock()
	defer h.mendMu.Unlock()
	h.mu.RLock()
	done := h.mended[e.Object]
	h.mu.RUnlock()
	if done {
		return nil
	}
	if !h.redone[e.Object] {
		h.redone[e.Object] = true
		run, _, _ := strings.Cut(e.Object, "-")
		if filter := r.dropCopy(run); r.dropCopy(e.Object) || filter {
			return nil // perhaps it was only the copy
		}
	}
	run, keys, ok := h.table.Lost(e)
	if !ok {
		return e
	}
	// Until all is read the part still counts, so that nobody is told that it
	// knows nothing of a chunk.
	if err := r.readKeys(ctx, h, run, keys); err != nil {
		return err
	}
	run.Lose(e)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mended[e.Object] = true
	h.findings = append(h.findings, badIndex(e.Object, e.Err))
	return nil
}

// stores is h.stores, or that of the holdings that replace h.
func (r *Repository) stores(ctx context.Context, h *holdings, id chunk.ID) (in [32]byte, ok bool, err error) {
	for {
		in, ok, err = h.stores(ctx, id)
		if err == nil {
			return in, ok, nil
		}
		if h, err = r.mend(ctx, h, err); err != nil {
			return in, false, fmt.Errorf("chunk %s: %w", id.Short(), err)
		}
	}
}

// A beyondError says that a record would end behind its pack: the pack was cut
// off, or the index is wrong.
type beyondError struct {
	id  chunk.ID
	at  index.Place
	err error
}

func (e *beyondError) Error() string { return e.err.Error() }
func (e *beyondError) Unwrap() error { return e.err }

// correct looks whether it is the index that is wrong, where no record of chunk
// id could be read at the place at. If the trailer of the pack says otherwise
// what the index said is taken from trailers. It says whether the chunk is known
// to be elsewhere now.
func (r *Repository) correct(ctx context.Context, h *holdings, id chunk.ID, at index.Place) (elsewhere bool, err error) {
	h.mu.RLock()
	p := h.packs[at.Pack]
	h.mu.RUnlock()
	entries, err := r.readEntries(ctx, p)
	if errors.Is(err, fault.ErrCorrupt) || errors.Is(err, fault.ErrNotFound) {
		return false, nil // it is the pack
	}
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if e.ID == id && e.Off == at.Off && e.CLen == at.CLen {
			return false, nil
		}
	}
	k := index.KeyOf(id)
	lie, err := h.table.Blame(ctx, k, at)
	switch {
	case err != nil:
		return false, err
	case lie != nil:
		err = r.mendPart(ctx, h, lie)
	default:
		r.noFlat.Store(true)
		h, err = r.reload(ctx, h)
	}
	if err != nil {
		return false, err
	}
	h.mu.Lock()
	delete(h.bad, k)
	h.mu.Unlock()
	now, _, ok, err := h.find(ctx, id)
	return ok && now != at, err
}

// findIn is h.find, or that of the holdings that replace h, whose numbers of
// packs the place then has. A place behind the end of its pack is one that the
// trailer confirms, or that nothing can be said of.
func (r *Repository) findIn(ctx context.Context, h *holdings, id chunk.ID) (p index.Place, in heldPack, ok bool, err error) {
	for corrected := false; ; {
		p, in, ok, err = h.find(ctx, id)
		if err != nil {
			if h, err = r.mend(ctx, h, err); err != nil {
				return p, in, false, fmt.Errorf("chunk %s: %w", id.Short(), err)
			}
			continue
		}
		w := want{place: p}
		if !ok || in.state == packMissing || w.end() <= in.bytes || corrected {
			return p, in, ok, nil
		}
		elsewhere, err := r.correct(ctx, h, id, p)
		if err != nil || !elsewhere {
			return p, in, ok, err
		}
		corrected = true
		if h, err = r.held(ctx); err != nil {
			return p, in, false, err
		}
	}
}

const (
	// manyPacks is from which size of all runs on, in bytes, packs are listed
	// directory by directory: some 40,000 of them.
	manyPacks = 16 << 20
	// listsAtOnce is how many listings go on then.
	listsAtOnce = 16
)

// listPacks notes all packs of the store. Where there are many it lists them in
// pieces, several at once: a listing is slow, of whatever store.
func (r *Repository) listPacks(ctx context.Context, h *holdings) error {
	var runs int64
	for o, err := range r.st.List(ctx, runPrefix) {
		if err != nil {
			return err
		}
		if _, part, ok := parseRunName(o.Name); ok && part < 0 {
			runs += o.Bytes
		}
	}
	prefixes := []string{packPrefix}
	if runs >= manyPacks {
		prefixes = prefixes[:0]
		for i := range 256 {
			prefixes = append(prefixes, fmt.Sprintf("%s%02x/", packPrefix, i))
		}
	}
	pieces := make([][]heldPack, len(prefixes))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(listsAtOnce)
	for i, prefix := range prefixes {
		g.Go(func() error {
			for o, err := range r.st.List(ctx, prefix) {
				if err != nil {
					return err
				}
				if id, ok := parsePackName(o.Name); ok {
					pieces[i] = append(pieces[i], heldPack{id: id, bytes: o.Bytes})
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	n := 0
	for _, piece := range pieces {
		n += len(piece)
	}
	h.packs = make([]heldPack, 0, n+n/16)
	for i, piece := range pieces {
		for _, p := range piece {
			h.list(p)
		}
		pieces[i] = nil
	}
	return nil
}

// KeepIndex keeps copies of the index in a local directory, for a store that is
// far away: at most maxBytes of all repositories whose indexes are kept there.
// The directory may be deleted at any time. It is to be called before the
// repository is used.
func (r *Repository) KeepIndex(dir string, maxBytes int64) {
	r.copies = copies.New(r.st, dir, r.ID(), maxBytes)
}

// indexSource is where runs are read.
func (r *Repository) indexSource() index.Source {
	if r.copies == nil {
		return r.st
	}
	return r.copies
}

// dropCopy removes the local copy of an object of the index; it says whether
// there was one.
func (r *Repository) dropCopy(name string) bool { return r.copies != nil && r.copies.Drop(name) }
