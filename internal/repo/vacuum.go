package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// VacuumOptions say how to vacuum.
type VacuumOptions struct {
	DryRun   bool // report only; nothing is written or locked
	Progress func(done, total int64)
}

// A VacuumReport says what was, or would be, freed.
type VacuumReport struct {
	DeletedPacks   int   `json:"deleted_packs"`
	RewrittenPacks int   `json:"rewritten_packs"`
	FreedBytes     int64 `json:"freed_bytes"` // of packs, what was rewritten taken off
	RewrittenBytes int64 `json:"rewritten_bytes"`
	KeptWasteBytes int64 `json:"kept_waste_bytes"` // dead, in packs not worth a rewrite
	Revoked        int   `json:"revoked"`          // sessions that died without an outcome
}

// Vacuum frees what no restore point needs. It needs no keys. It gives
// fault.ErrLocked while a writer is known to live, and fault.ErrFenced if a
// session began meanwhile where the store cannot show that; then nothing was
// deleted and it may be repeated.
//
// The order is the promise: docs/format/repository.md, "Vacuum and writers".
// Until the outcome of the vacuum exists it only adds; from then on all that it
// deletes is written down, for the next one to finish.
func (r *Repository) Vacuum(ctx context.Context, o VacuumOptions) (VacuumReport, error) {
	v := &vacuum{r: r, o: o}
	if !o.DryRun {
		r.sessMu.Lock()
		n := r.sessions
		r.sessMu.Unlock()
		if n > 0 {
			return v.report, fmt.Errorf("a backup is running: %w", fault.ErrLocked)
		}
		if l, ok := r.st.(blob.Locker); ok {
			release, err := l.Lock(ctx, writersLock, true)
			if err != nil {
				return v.report, err
			}
			defer release()
			v.locked = true
		}
	}
	if err := v.run(ctx); err != nil {
		return v.report, fmt.Errorf("vacuum: %w", err)
	}
	return v.report, nil
}

// A vacuum is one run of Vacuum.
type vacuum struct {
	r      *Repository
	o      VacuumOptions
	report VacuumReport

	locked   bool // no other vacuum lives
	id       string
	bin      [16]byte
	sessions []string // that began before, all decided now
	h        *holdings
	recs     []*record
	needs    needs
	marks    *index.Marks
	live     []int64            // bytes of live records, by pack
	kept     []int64            // bytes of a pack of nothing but those, by pack
	homeless int                // chunks that live and are in no pack
	unknown  map[index.Key]bool // those of them that the index does not know
	stuck    []bool             // packs with records that live and are in quarantine

	dead, rewrite []uint32     // packs
	fresh         []index.Pack // what was rewritten went here
	replaced      []string     // index objects that are not needed any more
	plan          []string     // to delete, in order
}

func (v *vacuum) run(ctx context.Context) (err error) {
	if err := v.fence(ctx); err != nil {
		return err
	}
	// Its own holdings: the table must not change while it is marked.
	if v.h, err = v.r.load(ctx); err != nil {
		return err
	}
	if v.recs, err = v.r.list(ctx); err != nil {
		return err // nobody knows what an unreadable point needs
	}
	if err := v.mark(ctx); err != nil {
		return err
	}
	v.choose()
	v.chooseSmall()
	if v.o.DryRun {
		return nil
	}
	if err := v.copyLive(ctx); err != nil {
		return err
	}
	if err := v.writeIndex(ctx); err != nil {
		return err
	}
	if err := v.planRest(ctx); err != nil {
		return err
	}
	out, err := v.r.decide(ctx, outcome{Of: v.id, State: committed, Delete: v.plan})
	if err != nil {
		return err
	}
	if out.State == revoked {
		return fmt.Errorf("a backup began: %w", fault.ErrFenced)
	}
	defer v.r.forget()
	for i, name := range v.plan {
		if err := v.r.st.Delete(ctx, name); err != nil {
			return err
		}
		v.progress(i + 1 + len(v.rewrite))
	}
	return v.r.sweepParity(ctx)
}

// progress counts packs rewritten and then objects deleted; the total grows
// when the deletions are known.
func (v *vacuum) progress(done int) {
	if v.o.Progress != nil {
		v.o.Progress(int64(done), int64(len(v.rewrite)+max(len(v.plan), len(v.rewrite)+len(v.dead))))
	}
}

// forget makes the next user load the holdings again.
func (r *Repository) forget() {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	r.hold = nil
}

// fence announces the vacuum, finishes earlier ones and decides every session
// that has no outcome.
func (v *vacuum) fence(ctx context.Context) (err error) {
	if !v.o.DryRun {
		if v.id, v.bin, err = newID(); err != nil {
			return err
		}
		b, err := object.Encode(started{Format: formatVersion, Vacuum: v.id})
		if err != nil {
			return err
		}
		if err := create(ctx, v.r.st, vacuumPrefix+v.id, b); err != nil {
			return err
		}
		if err := v.finishEarlier(ctx); err != nil {
			return err
		}
	}
	for o, err := range v.r.st.List(ctx, sessionPrefix) {
		if err != nil {
			return err
		}
		id := strings.TrimPrefix(o.Name, sessionPrefix)
		if !isID(id) {
			continue
		}
		out, err := v.r.outcomeOf(ctx, id)
		if errors.Is(err, fault.ErrCorrupt) {
			out, err = v.mend(ctx, id, err)
		}
		if err != nil {
			return err
		}
		if out.State == "" {
			v.report.Revoked++
			if v.o.DryRun {
				continue
			}
			if out, err = v.r.decide(ctx, outcome{Of: id, State: revoked}); err != nil {
				return err
			}
			if out.State == committed {
				v.report.Revoked-- // it was faster
			}
		}
		v.sessions = append(v.sessions, id)
	}
	return nil
}

// finishEarlier ends every vacuum that began before this one: what it was going
// to delete is deleted, or it can delete nothing any more.
func (v *vacuum) finishEarlier(ctx context.Context) error {
	vs, err := v.r.vacuums(ctx)
	if err != nil {
		return err
	}
	for _, e := range vs {
		if e.id == v.id {
			continue
		}
		if e.damage != nil {
			// What it deletes is not known. Only the lock says that it is dead;
			// what it left is found to be garbage once more.
			if !v.locked {
				return e.damage
			}
			if err := v.r.replaceOutcome(ctx, e.id); err != nil {
				return err
			}
			e.outcome = outcome{Of: e.id, State: revoked}
		}
		if e.outcome.State == "" {
			if e.outcome, err = v.r.decide(ctx, outcome{Of: e.id, State: revoked}); err != nil {
				return err
			}
		}
		for _, name := range e.outcome.Delete {
			if err := v.r.st.Delete(ctx, name); err != nil {
				return err
			}
		}
		if err := v.r.st.Delete(ctx, vacuumPrefix+e.id); err != nil {
			return err
		}
		if e.outcome.State == committed {
			if err := v.r.st.Delete(ctx, outcomePrefix+e.id); err != nil {
				return err
			}
		}
	}
	return nil
}

// mark finds out which chunks live. Where a part of the index turns out to be
// damaged it begins again without that.
func (v *vacuum) mark(ctx context.Context) error {
	for {
		err := v.tryMark(ctx)
		if !index.Damaged(err) {
			return err
		}
		if _, err := v.r.mend(ctx, v.h, err); err != nil {
			return err
		}
	}
}

func (v *vacuum) tryMark(ctx context.Context) error {
	v.marks = v.h.table.NewMarks(v.marked)
	v.live, v.kept, v.stuck = make([]int64, len(v.h.packs)), make([]int64, len(v.h.packs)), make([]bool, len(v.h.packs))
	v.homeless, v.unknown = 0, map[index.Key]bool{}
	v.needs = needs{
		r: v.r,
		visit: func(id manifest.ID, f *manifest.File, i int) error {
			ids, err := f.Needs(i)
			if err != nil {
				return manifestError(id, err)
			}
			for _, id := range ids {
				if err := v.marks.Mark(ctx, index.KeyOf(id)); err != nil {
					return err
				}
			}
			return nil
		},
		fail: func(_ manifest.ID, err error) error { return err },
	}
	for _, rec := range v.recs {
		for _, s := range rec.clear.Records {
			id, err := hexID(s)
			if err != nil {
				return &fault.CorruptError{Object: pointPrefix + rec.name, Offset: -1, Err: err}
			}
			if err := v.marks.Mark(ctx, index.KeyOf(id)); err != nil {
				return err
			}
		}
	}
	if err := v.needs.walk(ctx, v.recs); err != nil {
		return err
	}
	return v.marks.Flush(ctx)
}

// marked keeps a chunk. One that is in no pack is lost already; that is for
// Check to say.
func (v *vacuum) marked(k index.Key, p index.Place, known, fresh bool) error {
	if !known {
		v.unknown[k] = true
	}
	switch {
	case !known || v.h.packs[p.Pack].state == packMissing:
		v.homeless++
	case v.h.inQuarantine(v.h.packs[p.Pack].id, p.Off):
		v.stuck[p.Pack] = true
	}
	if fresh {
		e := pack.Entry{CLen: p.CLen}
		v.live[p.Pack] += e.Bytes()
		v.kept[p.Pack] += e.Bytes() + pack.EntryBytes
	}
	return nil
}

// copyLive writes what lives in packs that are mostly dead into new ones,
// record by record as they are.
func (v *vacuum) copyLive(ctx context.Context) error {
	mem := pack.NewMemory(2 * pack.TargetBytes)
	b := pack.NewBuilder(mem, v.r.id, v.bin)
	defer func() { b.Free() }()
	send := func() error {
		if b.Len() == 0 {
			return nil
		}
		entries := b.Entries()
		_, sum := b.Finish()
		if err := v.r.st.Put(ctx, packName(sum), b, b.Bytes()); err != nil {
			return err
		}
		if err := v.r.guard(ctx, packName(sum), sum, b, b.Bytes()); err != nil {
			return err
		}
		v.fresh = append(v.fresh, indexPack(sum, b.Bytes(), entries))
		b.Free()
		b = pack.NewBuilder(mem, v.r.id, v.bin)
		return nil
	}
	kept := v.rewrite[:0]
	for i, n := range v.rewrite {
		p := v.h.packs[n]
		data, records, err := v.liveRecords(ctx, n)
		if err != nil && !errors.Is(err, fault.ErrCorrupt) && !errors.Is(err, syscall.EIO) {
			return err
		}
		if err != nil {
			// Leave it as it is: Check will name it.
			v.report.RewrittenPacks--
			v.report.RewrittenBytes -= v.live[n]
			v.report.FreedBytes -= p.bytes - v.live[n]
			v.report.KeptWasteBytes += p.bytes - v.live[n]
			continue
		}
		for _, e := range records {
			rec := data[e.Off:e.End()]
			if b.Full(len(rec)) {
				if err := send(); err != nil {
					return err
				}
			}
			if _, err := b.Append(e, rec); err != nil {
				return err
			}
		}
		kept = append(kept, n)
		v.progress(i + 1)
	}
	v.rewrite = kept
	return send()
}

// liveRecords reads pack n and gives its live records, each with its checksum
// right; otherwise an error in class fault.ErrCorrupt.
func (v *vacuum) liveRecords(ctx context.Context, n uint32) (data []byte, live []pack.Entry, err error) {
	p := v.h.packs[n]
	if data, err = v.r.readPack(ctx, p); err != nil {
		return nil, nil, err
	}
	good, _ := pack.Scan(data, v.r.id)
	keys := make([]index.Key, len(good))
	for i, e := range good {
		keys[i] = index.KeyOf(e.ID)
	}
	places, err := v.marks.Marked(ctx, keys)
	if index.Damaged(err) {
		err = fmt.Errorf("%w: %w", fault.ErrCorrupt, err)
	}
	if err != nil {
		return nil, nil, err
	}
	var bytes int64
	for _, e := range good {
		if at, ok := places[index.KeyOf(e.ID)]; ok && at.Pack == n && at.Off == e.Off {
			live = append(live, e)
			bytes += e.Bytes()
		}
	}
	if bytes != v.live[n] {
		return nil, nil, fault.Corrupt(packLabel(p.id), -1, "%d bytes of live records are readable, %d are needed", bytes, v.live[n])
	}
	return data, live, nil
}

// planRest lists everything that nobody needs, packs last.
func (v *vacuum) planRest(ctx context.Context) error {
	exists := map[string]bool{}
	for _, rec := range v.recs {
		exists[rec.name] = true
	}
	unneeded := func(prefix string, garbage func(rest string) (bool, error)) error {
		for o, err := range v.r.st.List(ctx, prefix) {
			if err != nil {
				return err
			}
			yes, err := garbage(strings.TrimPrefix(o.Name, prefix))
			if err != nil {
				return err
			}
			if yes {
				v.plan = append(v.plan, o.Name)
			}
		}
		return nil
	}
	noPoint := func(name string) (bool, error) { return parsePointName(name) && !exists[name], nil }
	err := errors.Join(
		unneeded(manifestPrefix, func(rest string) (bool, error) {
			id, ok := parseHashName(manifestPrefix+rest, manifestPrefix)
			return ok && !v.needs.files[manifest.ID(id)], nil
		}),
		unneeded(pointPrefix, noPoint),
		unneeded(suspectPrefix, noPoint),
		unneeded(outcomePrefix, func(id string) (bool, error) { return v.emptyOutcome(ctx, id, exists) }),
	)
	if err != nil {
		return err
	}
	for _, id := range v.sessions {
		v.plan = append(v.plan, sessionPrefix+id)
	}
	v.plan = append(v.plan, v.replaced...)
	goes := map[[32]byte]bool{}
	for _, n := range slices.Concat(v.dead, v.rewrite) {
		v.plan = append(v.plan, v.h.packs[n].name())
		goes[v.h.packs[n].id] = true
	}
	v.planQuarantine(goes)
	return nil
}

// emptyOutcome says whether the outcome of id makes no point exist any more.
// One that revokes stays for ever, because its writer may still wake up.
func (v *vacuum) emptyOutcome(ctx context.Context, id string, exists map[string]bool) (bool, error) {
	if !isID(id) {
		return false, nil
	}
	out, err := v.r.outcomeOf(ctx, id)
	if errors.Is(err, fault.ErrCorrupt) {
		return false, nil
	}
	if err != nil || out.State != committed {
		return false, err
	}
	return !slices.ContainsFunc(out.Points, func(name string) bool { return exists[name] }), nil
}
