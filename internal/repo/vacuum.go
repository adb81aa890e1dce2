package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// VacuumOptions say how to vacuum.
type VacuumOptions struct {
	DryRun   bool // report only; nothing is written
	Progress func(done, total int64)
	// Patience is for how long a running backup may show no sign of life before
	// it is revoked; 0 means DefaultPatience.
	Patience time.Duration
	// Waste is from which percentage of waste on a pack is rewritten; 0 means
	// DefaultWaste.
	Waste int
	// Waiting, if not nil, is called when the number of backups changes that
	// vacuum waits for: each has to say what it needs.
	Waiting func(backups int)
}

// DefaultPatience is for how long a silent backup is waited for.
const DefaultPatience = 10 * time.Minute

// patience is a variable for the sake of tests.
var patience = DefaultPatience

// A VacuumReport says what was, or would be, freed.
type VacuumReport struct {
	DeletedPacks   int   `json:"deleted_packs"`
	RewrittenPacks int   `json:"rewritten_packs"`
	FreedBytes     int64 `json:"freed_bytes"` // of packs, what was rewritten taken off
	RewrittenBytes int64 `json:"rewritten_bytes"`
	KeptWasteBytes int64 `json:"kept_waste_bytes"` // dead, in packs that stay: see Kept
	Kept           Kept  `json:"kept"`
	Running        int   `json:"running"` // backups beside this vacuum
	Revoked        int   `json:"revoked"` // sessions that died without an outcome
}

// Kept says why packs with dead bytes in them stay.
type Kept struct {
	LittleWaste int `json:"little_waste"` // not worth a rewrite
	InUse       int `json:"in_use"`       // a running backup stored them or relies on them
	Damaged     int `json:"damaged"`      // and something in them is still needed, or lost
	Locked      int `json:"locked"`       // the storage keeps them until a time that has not come
	TooMany     int `json:"too_many"`     // for one vacuum
	NoSpace     int `json:"no_space"`     // to copy what lives in them: the next vacuum has it
}

// Vacuum frees what no restore point needs. It needs no keys. Backups, restores
// and deletions may go on meanwhile. It gives fault.ErrLocked while another
// vacuum lives, and fault.ErrFenced if another one took it for dead; then
// nothing was deleted and it may be repeated.
//
// The order is the promise: docs/format/repository.md, "Vacuum and writers".
// Until the outcome of the vacuum exists it only adds; from then on all that it
// deletes is written down, for the next one to finish.
func (r *Repository) Vacuum(ctx context.Context, o VacuumOptions) (VacuumReport, error) {
	if o.Patience <= 0 {
		o.Patience = patience
	}
	v := &vacuum{r: r, o: o, sight: newSight(r, o.Patience)}
	free := blob.Freeing(ctx)
	err := v.announce(free)
	if err == nil {
		err = v.run(ctx, free)
		if err != nil && !v.decided && !v.o.DryRun && v.fenced(ctx) {
			err = fmt.Errorf("%w by another vacuum: %w", fault.ErrFenced, err)
		}
		err = errors.Join(err, v.leave(free, err))
	}
	if err != nil {
		return v.report, fmt.Errorf("vacuum: %w", err)
	}
	return v.report, nil
}

// A vacuum is one run of Vacuum.
type vacuum struct {
	r      *Repository
	o      VacuumOptions
	report VacuumReport

	id      string
	bin     [16]byte
	stop    func()          // ends the beat
	sight   *sight          // of sessions
	over    map[string]bool // sessions that had an outcome when this began
	epoch   int64
	decided bool // committed or revoked
	brief   bool // it only joins the index: others wait for it

	h         *holdings
	elected   map[index.Key][]index.Place // chunks with several records: these, the oldest first
	manifests []string                    // that were in the store before the epoch
	recs      []*record
	strays    []clearRecord // of records that somebody gave another name
	strayed   bool          // there are such, perhaps damaged
	needs     needs
	walked    map[manifest.ID]bool // all of what these need is marked
	rescued   int                  // packs
	marks     *index.Marks
	live      []int64            // bytes of live records, by pack
	kept      []int64            // bytes of a pack of nothing but those, by pack
	homeless  int                // chunks that live and are in no pack
	unknown   map[index.Key]bool // those of them that the index does not know
	stuck     []bool             // packs with records that live and are in quarantine

	dead, rewrite []uint32     // packs
	fresh         []index.Pack // what was rewritten went here
	freshIndex    string       // the index object that says so
	replaced      []string     // index objects that are not needed any more
	plan          []string     // to delete, in order
}

// run does the work. Under free it stores what is small and needed to free room;
// what it copies, and the index, are not worth what a full disk keeps back.
func (v *vacuum) run(ctx, free context.Context) (err error) {
	if err := v.lookAround(free); err != nil {
		return err
	}
	// Its own holdings: the table must not change while it is marked.
	if err := v.load(ctx); err != nil {
		return err
	}
	if err := v.listManifests(ctx); err != nil {
		return err
	}
	if v.recs, err = v.r.list(ctx); err != nil {
		return err // nobody knows what an unreadable point needs
	}
	v.strayed = len(v.r.strayNames()) > 0
	if v.strays, err = v.r.strayRecords(ctx); err != nil {
		return err
	}
	if err := v.sight.look(ctx, v.over); err != nil {
		return err
	}
	if err := v.whileDamaged(ctx, v.elders); err != nil {
		return err
	}
	if err := v.whileDamaged(ctx, v.tryMark); err != nil {
		return err
	}
	if err := v.chooseAll(ctx); err != nil {
		return err
	}
	if v.o.DryRun {
		return nil
	}
	if err := v.copyLive(ctx); errors.Is(err, fault.ErrNoSpace) && len(v.dead) > 0 {
		v.copyNothing()
	} else if err != nil {
		return err
	}
	if err := v.condemn(ctx, free); err != nil {
		return err
	}
	if err := v.await(free); err != nil {
		return err
	}
	if err := v.rescue(ctx); err != nil {
		return err
	}
	if err := v.writeIndex(ctx); errors.Is(err, fault.ErrNoSpace) && v.epoch > 0 {
		v.replaced = nil // the old index stays, and names packs that are gone
	} else if err != nil {
		return err
	}
	if err := v.planRest(ctx); err != nil {
		return err
	}
	if err := v.commit(free); err != nil {
		return err
	}
	if !v.strayed { // otherwise it may tell whose record lies under another name
		if err := v.r.sweepParity(ctx); err != nil {
			return err
		}
	}
	return v.cleanUp(free)
}

// commit writes down all that is to be deleted, and deletes it.
func (v *vacuum) commit(ctx context.Context) error {
	out, err := v.r.decide(ctx, outcome{Of: v.id, State: committed, Delete: v.plan})
	if errors.Is(err, fault.ErrExists) {
		// It was there and is gone: another vacuum ended this one.
		v.decided = true
		return fmt.Errorf("%w by another vacuum: %w", fault.ErrFenced, err)
	}
	if err != nil {
		return err
	}
	v.decided = true
	if out.State == revoked {
		return fmt.Errorf("%w by another vacuum", fault.ErrFenced)
	}
	defer v.r.forget()
	for i, name := range v.plan {
		if err := v.r.remove(ctx, name); err != nil {
			return err
		}
		v.progress(i + 1 + len(v.rewrite))
	}
	return nil
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

// whileDamaged begins a step again without the part of the index that turned out
// to be damaged.
func (v *vacuum) whileDamaged(ctx context.Context, step func(context.Context) error) error {
	for {
		err := step(ctx)
		if !index.Damaged(err) {
			return err
		}
		if _, err := v.r.mend(ctx, v.h, err); err != nil {
			return err
		}
	}
}

// tryMark finds out which chunks live.
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
		fail: v.unreadable,
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
	wanted := append(recManifests(v.recs), v.sight.manifests()...)
	for _, c := range v.strays {
		for _, s := range c.Records {
			if id, err := hexID(s); err == nil {
				if err := v.marks.Mark(ctx, index.KeyOf(id)); err != nil {
					return err
				}
			}
		}
		wanted = append(wanted, c.Manifests...)
	}
	if err := v.needs.walk(ctx, wanted); err != nil {
		return err
	}
	v.walked = v.needs.read
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

// planRest lists everything that nobody needs, packs last.
func (v *vacuum) planRest(ctx context.Context) error {
	for _, name := range v.manifests {
		if id, ok := parseHashName(name, manifestPrefix); ok && !v.needs.files[manifest.ID(id)] {
			v.plan = append(v.plan, name)
		}
	}
	outcomes := map[string]outcome{}
	noPoint := func(name string) (bool, error) {
		if !parsePointName(name) {
			return false, nil
		}
		session, _, _ := strings.Cut(name, "-")
		out, ok := outcomes[session]
		if !ok {
			var err error
			if out, err = v.r.outcomeOf(ctx, session); errors.Is(err, fault.ErrCorrupt) {
				return false, nil
			} else if err != nil {
				return false, err
			}
			outcomes[session] = out
		}
		return out.State != "" && !slices.Contains(out.Points, name), nil
	}
	// Of a session that committed, a record that it does not name was never its
	// own: somebody renamed one, and it may be all that is left of a point.
	revokedRecord := func(name string) (bool, error) {
		yes, err := noPoint(name)
		session, _, _ := strings.Cut(name, "-")
		return yes && outcomes[session].State == revoked, err
	}
	if err := v.unneeded(ctx, pointPrefix, revokedRecord); err != nil {
		return err
	}
	if err := v.planOutcomes(ctx, noPoint); err != nil {
		return err
	}
	if err := v.planSessions(ctx); err != nil {
		return err
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

// unneeded plans to delete what is garbage under prefix.
func (v *vacuum) unneeded(ctx context.Context, prefix string, garbage func(rest string) (bool, error)) error {
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

// planOutcomes deletes notes beside records that are gone, and outcomes that
// make no point exist any more. Records are listed after the outcomes were
// read: whoever commits stores its records first.
func (v *vacuum) planOutcomes(ctx context.Context, noPoint func(string) (bool, error)) error {
	done := map[string]outcome{}
	for o, err := range v.r.st.List(ctx, outcomePrefix) {
		if err != nil {
			return err
		}
		id := strings.TrimPrefix(o.Name, outcomePrefix)
		if !isID(id) {
			continue
		}
		out, err := v.r.outcomeOf(ctx, id)
		if errors.Is(err, fault.ErrCorrupt) {
			continue
		}
		if err != nil {
			return err
		}
		// One that revokes stays for ever: its writer may still wake up.
		if out.State == committed {
			done[id] = out
		}
	}
	records := map[string]bool{}
	for o, err := range v.r.st.List(ctx, pointPrefix) {
		if err != nil {
			return err
		}
		records[strings.TrimPrefix(o.Name, pointPrefix)] = true
	}
	for id, out := range done {
		if v.strayed {
			break // a record of it may be there under another name
		}
		if !slices.ContainsFunc(out.Points, func(name string) bool { return records[name] }) {
			v.plan = append(v.plan, outcomePrefix+id)
		}
	}
	gone := func(name string) (bool, error) {
		if !parsePointName(name) || records[name] {
			return false, nil
		}
		session, _, _ := strings.Cut(name, "-")
		if out, ok := done[session]; ok {
			// It is protected, or going, also while it lies under another name.
			return !v.strayed || !slices.Contains(out.Points, name), nil
		}
		return noPoint(name)
	}
	for _, prefix := range []string{suspectPrefix, protectPrefix} {
		if err := v.unneeded(ctx, prefix, gone); err != nil {
			return err
		}
	}
	return v.unneeded(ctx, goingPrefix, func(rest string) (bool, error) {
		name, ok := recordOfMark(rest)
		if !ok {
			return false, nil
		}
		return gone(name)
	})
}

// planSessions deletes what sessions that are over left, and beats of those that
// gave up. Beats are listed first: they come after the object they belong to.
func (v *vacuum) planSessions(ctx context.Context) error {
	var beats []string
	for o, err := range v.r.st.List(ctx, beatPrefix) {
		if err != nil {
			return err
		}
		beats = append(beats, strings.TrimPrefix(o.Name, beatPrefix))
	}
	owned := map[string]bool{}
	err := v.unneeded(ctx, sessionPrefix, func(rest string) (bool, error) {
		id, ok := parseSessionName(sessionPrefix + rest)
		owned[id] = ok && !v.over[id]
		return ok && v.over[id], nil
	})
	if err != nil {
		return err
	}
	vs, err := v.r.vacuums(ctx)
	if err != nil {
		return err
	}
	for _, e := range vs {
		owned[e.id] = true
	}
	for _, id := range beats {
		if isID(id) && !owned[id] {
			v.plan = append(v.plan, beatPrefix+id)
		}
	}
	return nil
}
