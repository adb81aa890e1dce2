package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// This file is what a vacuum does because writers and other vacuums may live
// beside it. docs/format/repository.md, "Vacuum and writers", numbers the
// steps.

// pollEvery is how often a vacuum looks whether those that it waits for have
// said what they need.
var pollEvery = time.Second

// announce is step 1, as far as other vacuums are concerned.
func (v *vacuum) announce(ctx context.Context) (err error) {
	v.stop = func() {}
	if v.o.DryRun {
		return nil
	}
	if v.id, v.bin, err = newID(); err != nil {
		return err
	}
	b, err := object.Encode(vacuumObject{Format: formatVersion, Vacuum: v.id, Process: thisProcess(v.r.id), Brief: v.brief})
	if err != nil {
		return err
	}
	liveHere(v.id, true)
	if err := create(ctx, v.r.st, vacuumPrefix+v.id, b); err != nil {
		liveHere(v.id, false)
		return err
	}
	v.beat()
	if err := v.endEarlier(ctx); err != nil {
		return errors.Join(err, v.leave(ctx, err))
	}
	return nil
}

// beat shows other vacuums that this one lives.
func (v *vacuum) beat() {
	stop := eachBeat(func(ctx context.Context, n int64) (more bool) {
		if !v.brief {
			ctx = blob.Freeing(ctx)
		}
		_ = v.r.beat(ctx, v.id, n)
		return true
	})
	v.stop = sync.OnceFunc(func() {
		stop()
		liveHere(v.id, false)
	})
}

// endEarlier ends every vacuum that began before this one: what it was going
// to delete is deleted, or it can delete nothing any more.
func (v *vacuum) endEarlier(ctx context.Context) error {
	vs, err := v.r.vacuums(ctx)
	if err != nil {
		return err
	}
	for _, e := range vs {
		if e.id == v.id {
			continue
		}
		if e.outcome.State == "" {
			gone, err := v.outlive(ctx, &e)
			if err != nil {
				return err
			}
			if gone {
				continue
			}
		}
		switch {
		case e.damage != nil:
			// What it deleted is not known; what it left is found to be garbage
			// once more.
			if err := v.r.replaceOutcome(ctx, e.id); err != nil {
				return err
			}
		case e.outcome.State == "":
			if e.outcome, err = v.revoke(ctx, e.id); err != nil {
				return err
			}
		}
		for _, name := range e.outcome.Delete {
			if err := v.r.remove(ctx, name); err != nil {
				return err
			}
		}
		if err := v.r.remove(ctx, beatPrefix+e.id); err != nil {
			return err
		}
		if err := v.r.remove(ctx, vacuumPrefix+e.id); err != nil {
			return err
		}
		if e.outcome.State == committed {
			if err := v.r.remove(ctx, outcomePrefix+e.id); err != nil {
				return err
			}
		}
	}
	return nil
}

// revoke gives the outcome that a session or another vacuum now has. One that
// was there and is gone had committed, and somebody has cleaned up since.
func (v *vacuum) revoke(ctx context.Context, id string) (outcome, error) {
	out, err := v.r.decide(ctx, outcome{Of: id, State: revoked})
	if errors.Is(err, fault.ErrExists) {
		return outcome{Of: id, State: committed}, nil
	}
	return out, err
}

// outlive waits until another vacuum must be taken for dead; one that shows a
// sign of life is left alone, unless it is brief: that is waited for. It says
// whether the other one has ended and taken all of its own away.
func (v *vacuum) outlive(ctx context.Context, e *aVacuum) (gone bool, err error) {
	waits := e.brief && !v.brief
	for {
		stirred, err := v.sight.stirred(ctx, e.id)
		if err != nil {
			return false, err
		}
		if stirred && !waits {
			return false, fmt.Errorf("another vacuum is running: %w", fault.ErrLocked)
		}
		dead, err := v.sight.dead(ctx, e.id, e.process)
		if err != nil {
			return false, err
		}
		// What ends takes its outcome away last.
		out, err := v.r.outcomeOf(ctx, e.id)
		if err == nil && out.State != "" {
			if waits || dead {
				e.outcome = out // its list can be gone through by two
				return false, nil
			}
			return false, fmt.Errorf("another vacuum has just ended: %w", fault.ErrLocked)
		}
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return false, err
		}
		if _, err := v.r.st.Size(ctx, vacuumPrefix+e.id); errors.Is(err, fault.ErrNotFound) {
			return true, nil
		} else if err != nil || dead {
			return false, err
		}
		if err := sleep(ctx, pollEvery); err != nil {
			return false, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// lookAround is step 1, as far as sessions are concerned: it finds out which
// are over, and ends those whose writers are dead. Those that live show it
// within a beat.
func (v *vacuum) lookAround(ctx context.Context) error {
	v.over = map[string]bool{}
	objects, err := v.sight.list(ctx)
	if err != nil {
		return err
	}
	open := map[string]bool{}
	for _, id := range slices.Sorted(maps.Keys(objects)) {
		names := objects[id]
		out, err := v.r.outcomeOf(ctx, id)
		if errors.Is(err, fault.ErrCorrupt) {
			out, err = v.mend(ctx, id, err)
		}
		if err != nil {
			return err
		}
		if out.State != "" {
			v.over[id] = true
			continue
		}
		if err := v.sight.open(ctx, id, names); err != nil {
			return err
		}
		if v.sight.sessions[id] != nil { // otherwise it gave up just now
			open[id] = true
		}
	}
	for {
		for _, id := range slices.Sorted(maps.Keys(open)) {
			done, err := v.judge(ctx, id)
			if err != nil {
				return err
			}
			if done {
				delete(open, id)
			}
		}
		if len(open) == 0 {
			return nil
		}
		if err := sleep(ctx, pollEvery); err != nil {
			return err
		}
	}
}

// judge says whether it is known that a session without an outcome lives, or
// that it is over.
func (v *vacuum) judge(ctx context.Context, id string) (bool, error) {
	out, err := v.r.outcomeOf(ctx, id)
	if err != nil {
		return false, err
	}
	p := v.sight.sessions[id].process
	switch {
	case out.State != "":
		// Its point, if it committed, is listed later.
	case v.o.DryRun && !p.gone(v.r.id, id):
		v.report.Running++
		return true, nil
	default:
		stirred, err := v.sight.stirred(ctx, id)
		if err != nil {
			return false, err
		}
		if stirred {
			v.report.Running++
			return true, nil
		}
		dead, err := v.sight.dead(ctx, id, p)
		if err != nil || !dead {
			return false, err
		}
		if !v.o.DryRun {
			if out, err = v.revoke(ctx, id); err != nil {
				return false, err
			}
		}
		if out.State != committed { // otherwise it was faster
			v.report.Revoked++
		}
	}
	v.over[id] = true
	delete(v.sight.sessions, id)
	return true, nil
}

// listManifests notes all manifests, before any epoch of this vacuum.
func (v *vacuum) listManifests(ctx context.Context) error {
	for o, err := range v.r.st.List(ctx, manifestPrefix) {
		if err != nil {
			return err
		}
		v.manifests = append(v.manifests, o.Name)
	}
	return nil
}

// unreadable lets a manifest be missing that only a session needs, because it
// says so before it stores it.
func (v *vacuum) unreadable(id manifest.ID, err error) error {
	if !errors.Is(err, fault.ErrNotFound) {
		return err
	}
	name := hex.EncodeToString(id[:])
	for _, rec := range v.recs {
		if slices.Contains(rec.clear.Manifests, name) {
			return err
		}
	}
	return nil
}

// chooseAll is step 3. What a running session stored is left alone: it would
// only have to be taken back.
func (v *vacuum) chooseAll(ctx context.Context) error {
	v.choose()
	v.chooseSmall()
	running := map[string]bool{}
	for id := range v.sight.sessions {
		running[id] = true
	}
	if len(running) > 0 {
		chosen := slices.Concat(v.dead, v.rewrite)
		theirs := make([]bool, len(chosen))
		err := each(ctx, 16, len(chosen), func(i int) error {
			id, err := v.writerOf(ctx, v.h.packs[chosen[i]])
			theirs[i] = running[id]
			return err
		})
		if err != nil {
			return err
		}
		for i, n := range chosen {
			if theirs[i] {
				v.spare(n, &v.report.Kept.InUse)
			}
		}
	}
	if err := v.spareLocked(ctx); err != nil {
		return err
	}
	for len(v.dead)+len(v.rewrite) > maxCondemned {
		if k := len(v.rewrite); k > 0 {
			v.spare(v.rewrite[k-1], &v.report.Kept.TooMany)
		} else {
			v.spare(v.dead[len(v.dead)-1], &v.report.Kept.TooMany)
		}
	}
	return nil
}

// spareLocked leaves packs alone that the storage keeps still. They must not be
// in the list of what this vacuum deletes: once they were vacuumed away and are
// still there somebody may rely on them again.
func (v *vacuum) spareLocked(ctx context.Context) error {
	t, ok := v.r.st.(*retention)
	if !ok {
		return nil
	}
	chosen := slices.Concat(v.dead, v.rewrite)
	locked := make([]bool, len(chosen))
	err := each(ctx, 16, len(chosen), func(i int) error {
		until, err := t.locks.RetainedUntil(ctx, v.h.packs[chosen[i]].name())
		if errors.Is(err, fault.ErrNotFound) {
			return nil
		}
		locked[i] = until.After(t.now())
		return err
	})
	if err != nil {
		return err
	}
	for i, n := range chosen {
		if locked[i] {
			v.spare(n, &v.report.Kept.Locked)
		}
	}
	return nil
}

// each calls fn for 0 to n-1, several at once, and gives its first error.
func each(ctx context.Context, workers, n int, fn func(i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(workers, n) {
		wg.Go(func() {
			for i := range next {
				if err := fn(i); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		next <- i
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// writerOf is the session or vacuum that stored a pack, as far as its header
// tells.
func (v *vacuum) writerOf(ctx context.Context, p heldPack) (id string, err error) {
	head := make([]byte, pack.HeaderBytes)
	if _, err := v.r.st.ReadAt(ctx, p.name(), head, 0); errors.Is(err, fault.ErrNotFound) || errors.Is(err, io.EOF) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	bin, err := pack.HeaderSession(head, v.r.id)
	if err != nil {
		return "", nil // damaged: nobody relies on it
	}
	return strings.ToLower(ulid.ULID(bin).String()), nil
}

// spare takes pack n out of those that go.
func (v *vacuum) spare(n uint32, why *int) {
	p := &v.h.packs[n]
	if i := slices.Index(v.dead, n); i >= 0 {
		v.dead = slices.Delete(v.dead, i, i+1)
		v.report.DeletedPacks--
		v.report.FreedBytes -= p.bytes
	} else if i := slices.Index(v.rewrite, n); i >= 0 {
		v.rewrite = slices.Delete(v.rewrite, i, i+1)
		v.report.RewrittenPacks--
		v.report.RewrittenBytes -= v.live[n]
		v.report.FreedBytes -= p.bytes - v.live[n]
	} else {
		return
	}
	v.report.KeptWasteBytes += max(0, p.bytes-v.kept[n]-pack.FrameBytes)
	*why++
}

// condemn is step 4: it names what was copied, and publishes an epoch if there
// is anything that a session could still want.
func (v *vacuum) condemn(ctx, free context.Context) error {
	if len(v.fresh) > 0 {
		v.freshIndex = fmt.Sprintf("%s%s-%06d", indexPrefix, v.id, 0)
		if err := put(free, v.r.st, v.freshIndex, index.Encode(v.r.id, v.fresh)); err != nil {
			return err
		}
	}
	packs := v.goingPacks()
	unneeded := func(name string) bool {
		id, ok := parseHashName(name, manifestPrefix)
		return ok && !v.needs.files[manifest.ID(id)]
	}
	newest, err := v.r.newestEpoch(ctx)
	if err != nil {
		return err
	}
	if len(packs) == 0 && !slices.ContainsFunc(v.manifests, unneeded) {
		if _, err := v.r.epochsAfter(ctx, 0); !errors.Is(err, fault.ErrCorrupt) {
			return err
		}
		// Nobody can begin a session until there is one that can be read.
	}
	list := free
	if len(v.fresh) == 0 && len(v.dead) > fewCondemned {
		list = ctx // else it leaves no room that is kept back for the list of what is deleted
	}
	err = v.r.publishEpoch(list, newest+1, v.id, packs)
	if errors.Is(err, fault.ErrNoSpace) && len(v.fresh) == 0 && len(v.dead) > fewCondemned {
		for _, n := range slices.Clone(v.dead[fewCondemned:]) {
			v.spare(n, &v.report.Kept.TooMany)
		}
		err = v.r.publishEpoch(free, newest+1, v.id, v.goingPacks())
	}
	if errors.Is(err, fault.ErrExists) {
		return fmt.Errorf("another vacuum began: %w", fault.ErrFenced)
	}
	if err == nil {
		v.epoch = newest + 1
	}
	return err
}

// fewCondemned is how many packs are condemned at a time on a disk so full that
// there is no room for a longer list, and later for one of what is deleted.
// Tests make it small.
var fewCondemned = 2048

// goingPacks are the packs that are to go.
func (v *vacuum) goingPacks() (ids [][32]byte) {
	for _, n := range slices.Concat(v.dead, v.rewrite) {
		ids = append(ids, v.h.packs[n].id)
	}
	return ids
}

// await is step 5.
func (v *vacuum) await(ctx context.Context) error {
	if v.epoch == 0 {
		return nil
	}
	objects, err := v.sight.list(ctx)
	if err != nil {
		return err
	}
	open := map[string]bool{}
	for id := range objects {
		if !v.over[id] {
			open[id] = true
		}
	}
	for said := -1; ; {
		if err := v.sight.look(ctx, v.over); err != nil {
			return err
		}
		for _, id := range slices.Sorted(maps.Keys(open)) {
			done, err := v.settled(ctx, id)
			if err != nil {
				return err
			}
			if done {
				delete(open, id)
			}
		}
		if len(open) != said && v.o.Waiting != nil && (len(open) > 0 || said > 0) {
			v.o.Waiting(len(open))
		}
		if said = len(open); said == 0 {
			return nil
		}
		if err := sleep(ctx, pollEvery); err != nil {
			return err
		}
	}
}

// settled says whether a session is in this vacuum's epoch or has an outcome,
// which it is given if it is dead.
func (v *vacuum) settled(ctx context.Context, id string) (bool, error) {
	se := v.sight.sessions[id]
	if se == nil {
		return true, nil // it gave up
	}
	if se.epoch >= v.epoch && se.damage == nil {
		return true, nil
	}
	out, err := v.r.outcomeOf(ctx, id)
	if err != nil || out.State != "" {
		return out.State != "", err
	}
	dead, err := v.sight.dead(ctx, id, se.process)
	if err != nil || !dead {
		return false, err
	}
	if out, err = v.revoke(ctx, id); err != nil {
		return false, err
	}
	if out.State == revoked {
		v.report.Revoked++
		v.report.Running--
	}
	return true, nil
}

// rescue is step 6.
func (v *vacuum) rescue(ctx context.Context) error {
	if v.epoch == 0 {
		return nil
	}
	recs, err := v.r.list(ctx)
	if err != nil {
		return err
	}
	if err := v.sight.look(ctx, v.over); err != nil {
		return err
	}
	goes := map[uint32]bool{}
	for _, n := range slices.Concat(v.dead, v.rewrite) {
		goes[n] = true
	}
	wanted := map[uint32]bool{}
	// Of the chunks in packs that go, those that were not alive before; asked
	// for many at a time.
	doubtful := map[index.Key]uint32{}
	settle := func() error {
		alive, err := v.marks.Marked(ctx, slices.Collect(maps.Keys(doubtful)))
		if err != nil {
			return err
		}
		for k, n := range doubtful {
			if _, ok := alive[k]; !ok {
				wanted[n] = true
			}
		}
		clear(doubtful)
		return nil
	}
	needed := v.h.table.NewMarks(func(k index.Key, p index.Place, known, _ bool) error {
		if !known || !goes[p.Pack] || wanted[p.Pack] {
			return nil
		}
		if doubtful[k] = p.Pack; len(doubtful) < 1<<16 {
			return nil
		}
		return settle()
	})
	again := needs{
		r: v.r,
		visit: func(id manifest.ID, f *manifest.File, i int) error {
			ids, err := f.Needs(i)
			if err != nil {
				return manifestError(id, err)
			}
			for _, id := range ids {
				if err := needed.Mark(ctx, index.KeyOf(id)); err != nil {
					return err
				}
			}
			return nil
		},
		fail: v.unreadable,
	}
	v.recs = recs
	for _, rec := range recs {
		for _, s := range rec.clear.Records {
			id, err := hexID(s)
			if err != nil {
				return &fault.CorruptError{Object: pointPrefix + rec.name, Offset: -1, Err: err}
			}
			if err := needed.Mark(ctx, index.KeyOf(id)); err != nil {
				return err
			}
		}
	}
	// Only what was not looked at in mark: the rest is alive as a whole.
	var fresh []string
	for _, m := range append(recManifests(recs), v.sight.manifests()...) {
		if id, err := parseManifestID(point.ManifestID(m)); err != nil || !v.walked[id] {
			fresh = append(fresh, m)
		}
	}
	if err := again.walk(ctx, fresh); err != nil {
		return err
	}
	if err := needed.Flush(ctx); err != nil {
		return err
	}
	if err := settle(); err != nil {
		return err
	}
	for id := range again.files {
		v.needs.files[id] = true
	}
	for _, se := range v.sight.sessions {
		for id := range se.packs {
			if n, ok := v.h.number(id); ok {
				wanted[n] = true
			}
		}
	}
	for n := range wanted {
		if goes[n] {
			v.rescued++
			v.spare(n, &v.report.Kept.InUse)
		}
	}
	return nil
}

// fenced says whether another vacuum took this one for dead; then what it misses
// may be what that one deleted.
func (v *vacuum) fenced(ctx context.Context) bool {
	ctx, cancel := tidying(ctx)
	defer cancel()
	out, err := v.r.outcomeOf(ctx, v.id)
	return err == nil && out.State == revoked
}

// leave ends a vacuum that failed, so that what it condemned counts again.
func (v *vacuum) leave(ctx context.Context, failed error) error {
	v.stop()
	if v.o.DryRun || failed == nil {
		return nil
	}
	ctx, cancel := tidying(ctx)
	defer cancel()
	if v.decided {
		return nil // the next one goes on
	}
	if v.epoch > 0 {
		if _, err := v.r.decide(ctx, outcome{Of: v.id, State: revoked}); err != nil {
			return err
		}
	}
	return errors.Join(v.r.remove(ctx, beatPrefix+v.id), v.r.remove(ctx, vacuumPrefix+v.id))
}

// cleanUp takes away what only a vacuum under way needs.
func (v *vacuum) cleanUp(ctx context.Context) error {
	v.stop()
	if v.rescued > 0 {
		// Packs that were condemned and stay count again from here on. No
		// session may fall back: who loaded the index before this epoch loads
		// it again.
		newest, err := v.r.newestEpoch(ctx)
		if err == nil {
			err = v.r.publishEpoch(ctx, newest+1, v.id, nil)
		}
		if err != nil {
			return err
		}
		v.epoch = newest + 1
	}
	for o, err := range v.r.st.List(ctx, epochPrefix) {
		if err != nil {
			return err
		}
		if n, ok := parseEpochName(o.Name); ok && n < v.epoch {
			if err := v.r.remove(ctx, o.Name); err != nil {
				return err
			}
		}
	}
	for _, name := range []string{beatPrefix + v.id, vacuumPrefix + v.id, outcomePrefix + v.id} {
		if err := v.r.remove(ctx, name); err != nil {
			return err
		}
	}
	return nil
}
