package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// lockGeneration is what the time until which an object is kept is rounded up
// to: however often points come to need it, it is extended once in that time.
const lockGeneration = 10 * 24 * time.Hour

// generation is the end of the lock generation that t lies in.
func generation(t time.Time) time.Time {
	g := int64(lockGeneration / time.Second)
	return time.Unix((t.Unix()+g-1)/g*g, 0).UTC()
}

// An ImmutableError says that a restore point was promised to stay. It is in
// class fault.ErrLocked.
type ImmutableError struct {
	Point string // VM/ID
	Until time.Time
}

func (e *ImmutableError) Error() string {
	return fmt.Sprintf("%s is immutable until %s", e.Point, e.Until.Local().Format("2006-01-02 15:04:05"))
}

func (e *ImmutableError) Is(target error) bool { return target == fault.ErrLocked }

// ImmutableFor is how long every new restore point stays, 0 for not at all.
func (r *Repository) ImmutableFor() time.Duration {
	return time.Duration(r.conf.Immutable) * time.Second
}

// kept says whether an object is one that restore points, or the opening of
// the repository, cannot do without. Indexes are made again from packs, and
// everything else is of sessions and vacuums that are under way.
func kept(name string) bool {
	for _, p := range []string{packPrefix, manifestPrefix, pointPrefix, outcomePrefix, keysPrefix, parityPrefix} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return name == configName
}

// retention is the store of an immutable repository where the storage itself
// keeps objects. Delete leaves alone what is kept still: a vacuum that meets it
// again later deletes it then.
type retention struct {
	blob.Store
	locks  blob.Retainer
	period time.Duration
	now    func() time.Time

	mu     sync.Mutex
	known  map[string]time.Time // until when, as far as somebody asked
	spared int
	last   time.Time // until when the last of those is kept
}

// retain puts st under the retention of a repository, if the storage can.
func retain(ctx context.Context, st blob.Store, period time.Duration) (blob.Store, error) {
	locks, ok := st.(blob.Retainer)
	if period <= 0 || !ok {
		return st, nil
	}
	if can, err := locks.Retains(ctx); !can || err != nil {
		return st, err
	}
	t := &retention{Store: st, locks: locks, period: period, now: time.Now, known: map[string]time.Time{}}
	locks.SetRetention(t.until)
	return t, nil
}

// until is how long an object that is stored now is kept.
func (t *retention) until(name string) time.Time {
	if !kept(name) {
		return time.Time{}
	}
	return generation(t.now().Add(t.period))
}

func (t *retention) note(name string, until time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known[name] = until
}

func (t *retention) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	until := t.until(name) // before it is stored: never later than what is promised
	err := t.Store.Put(ctx, name, body, size)
	if err == nil && !until.IsZero() {
		t.note(name, until)
	}
	return err
}

// Delete implements blob.Store. A key that was taken away is at least hidden;
// everything else that is kept still stays in sight.
func (t *retention) Delete(ctx context.Context, name string) error {
	if !kept(name) || strings.HasPrefix(name, keysPrefix) {
		return t.Store.Delete(ctx, name)
	}
	until, err := t.locks.RetainedUntil(ctx, name)
	if errors.Is(err, fault.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if until.After(t.now()) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.spared++
		if until.After(t.last) {
			t.last = until
		}
		return nil
	}
	return t.Store.Delete(ctx, name)
}

func (t *retention) ReadShape() blob.ReadShape { return blob.ShapeOf(t.Store) }

// keep sees to it that the object is kept until then: one question for an
// object in the life of t, and one request more in each lock generation.
func (t *retention) keep(ctx context.Context, name string, until time.Time) error {
	t.mu.Lock()
	have, known := t.known[name]
	t.mu.Unlock()
	if !known {
		var err error
		if have, err = t.locks.RetainedUntil(ctx, name); err != nil {
			return err
		}
	}
	if have.Before(until) {
		have = generation(until)
		if err := t.locks.Retain(ctx, name, have); err != nil {
			return err
		}
	}
	t.note(name, have)
	return nil
}

// Spared says how many objects vacuums of this process did not delete because
// the storage keeps them, and until when the last of them; zero where the
// storage does not say.
func (r *Repository) Spared() (objects int, until time.Time) {
	n := int(r.spared.Load())
	t, ok := r.st.(*retention)
	if !ok {
		return n, until
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return n + t.spared, t.last
}

// remove deletes for a vacuum, which passes over what the store lets nobody
// delete yet and meets it again next time.
func (r *Repository) remove(ctx context.Context, name string) error {
	err := r.st.Delete(ctx, name)
	if errors.Is(err, fault.ErrHeld) {
		r.spared.Add(1)
		return nil
	}
	return err
}

// promise writes into points until when they stay.
func (s *Session) promise(points []*point.RestorePoint) {
	if s.r.conf.Immutable <= 0 {
		return
	}
	until := time.Now().Add(s.r.ImmutableFor()).UTC().Truncate(time.Second)
	for _, p := range points {
		p.ImmutableUntil = &until
	}
}

// lockBeforeCommit makes the storage keep, for as long as the points were
// promised to stay, every object that they need: their packs, also those that
// older sessions stored, their manifests and the bases of these, and what opens
// the repository. It runs before the outcome exists, so that no point ever does
// whose chunks somebody may delete.
func (s *Session) lockBeforeCommit(ctx context.Context, points []*point.RestorePoint, records []string) error {
	t, ok := s.r.st.(*retention)
	if !ok || len(points) == 0 {
		return nil
	}
	for try := 1; ; try++ {
		names := map[string]bool{configName: true}
		for o, err := range t.List(ctx, keysPrefix) {
			if err != nil {
				return err
			}
			names[o.Name] = true
		}
		for _, name := range records {
			names[pointPrefix+name] = true
		}
		err := s.r.neededBy(ctx, points, names)
		if err == nil {
			err = t.keepAll(ctx, names, *points[0].ImmutableUntil)
		}
		if !errors.Is(err, fault.ErrNotFound) || try == loadTries {
			return err
		}
		// Somebody removed a key since they were listed, or a vacuum moved chunks
		// out of a pack that nothing kept any more.
		if _, err := s.r.reload(ctx, s.r.current()); err != nil {
			return err
		}
	}
}

// keepAll is keep for many objects.
func (t *retention) keepAll(ctx context.Context, names map[string]bool, until time.Time) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(32)
	for name := range names {
		g.Go(func() error {
			if err := t.keep(ctx, name, until); err != nil {
				return fmt.Errorf("keep %s until %s: %w", name, until.Format(time.RFC3339), err)
			}
			return nil
		})
	}
	return g.Wait()
}

// neededBy adds to names the manifests and packs that points need.
func (r *Repository) neededBy(ctx context.Context, points []*point.RestorePoint, names map[string]bool) error {
	var wants []want
	locate := func() error {
		h, err := r.locate(ctx, wants)
		if err != nil {
			return err
		}
		h.mu.RLock()
		defer h.mu.RUnlock()
		for i := range wants {
			names[h.packs[wants[i].place.Pack].name()] = true
		}
		wants = wants[:0]
		return nil
	}
	add := func(ids ...chunk.ID) error {
		for _, id := range ids {
			if wants = append(wants, want{ref: ref{id: id}}); len(wants) >= windowChunks {
				if err := locate(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	var recs []*record
	for _, p := range points {
		rec := &record{}
		for _, d := range p.Disks {
			rec.clear.Manifests = append(rec.clear.Manifests, string(d.Manifest))
		}
		for _, b := range p.Config {
			if err := add(b.Chunks...); err != nil {
				return err
			}
		}
		recs = append(recs, rec)
	}
	n := needs{
		r: r,
		visit: func(id manifest.ID, f *manifest.File, i int) error {
			ids, err := f.Needs(i)
			if err != nil {
				return manifestError(id, err)
			}
			return add(ids...)
		},
		fail: func(_ manifest.ID, err error) error { return err },
	}
	if err := n.walk(ctx, recManifests(recs)); err != nil {
		return err
	}
	for id := range n.files {
		names[manifestName(point.ManifestID(fmt.Sprintf("%x", id[:])))] = true
	}
	return locate()
}

// mayDelete says whether the point's promise is over, and so the storage's.
func (r *Repository) mayDelete(ctx context.Context, ref, record string, p *point.RestorePoint) error {
	if p != nil && p.ImmutableUntil != nil && p.ImmutableUntil.After(time.Now()) {
		return &ImmutableError{ref, *p.ImmutableUntil}
	}
	if p == nil {
		// Nobody can read what was promised, but not before the session began.
		id, _, _ := strings.Cut(record, "-")
		if u, err := ulid.ParseStrict(strings.ToUpper(id)); err == nil {
			if until := u.Timestamp().Add(r.ImmutableFor()); until.After(time.Now()) && r.ImmutableFor() > 0 {
				return &ImmutableError{ref, until}
			}
		}
	}
	t, ok := r.st.(*retention)
	if !ok {
		return nil
	}
	until, err := t.locks.RetainedUntil(ctx, pointPrefix+record)
	if err != nil && !errors.Is(err, fault.ErrNotFound) {
		return err
	}
	if until.After(t.now()) {
		return &ImmutableError{ref, until}
	}
	return nil
}
