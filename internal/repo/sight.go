package repo

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

// A sight is what a vacuum sees of the sessions beside it.
type sight struct {
	r        *Repository
	patience time.Duration
	sessions map[string]*seenSession
	read     map[string]bool // session objects
	watches  map[string]*watch
}

// A seenSession is all that the objects of one session say together.
type seenSession struct {
	id        string
	process   *process
	epoch     int64
	manifests map[string]bool
	packs     map[[32]byte]bool
	damage    error // of one of its objects: then nobody knows what it needs
}

// A watch is when a beat was last seen to change, by our own clock.
type watch struct {
	beat  string
	since time.Time
}

func newSight(r *Repository, patience time.Duration) *sight {
	return &sight{r: r, patience: patience, sessions: map[string]*seenSession{}, read: map[string]bool{}, watches: map[string]*watch{}}
}

// list gives the ids of all sessions that have objects, and those objects.
func (s *sight) list(ctx context.Context) (map[string][]string, error) {
	objects := map[string][]string{}
	for o, err := range s.r.st.List(ctx, sessionPrefix) {
		if err != nil {
			return nil, err
		}
		if id, ok := parseSessionName(o.Name); ok {
			objects[id] = append(objects[id], o.Name)
		}
	}
	return objects, nil
}

// look reads what sessions said since the last look, but for those that are
// over.
func (s *sight) look(ctx context.Context, over map[string]bool) error {
	objects, err := s.list(ctx)
	if err != nil {
		return err
	}
	for id, names := range objects {
		if over[id] {
			continue
		}
		if err := s.open(ctx, id, names); err != nil {
			return err
		}
	}
	return nil
}

// open reads the objects of one session.
func (s *sight) open(ctx context.Context, id string, names []string) error {
	for _, name := range names {
		if s.read[name] {
			continue
		}
		b, err := readObject(ctx, s.r.st, name)
		if errors.Is(err, fault.ErrNotFound) {
			continue // it gave up: it will never commit
		}
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return err
		}
		se := s.sessions[id]
		if se == nil {
			se = &seenSession{id: id, manifests: map[string]bool{}, packs: map[[32]byte]bool{}}
			s.sessions[id] = se
		}
		s.read[name] = true
		if err == nil {
			err = se.add(name, b)
		}
		if err != nil {
			se.damage = err
		}
	}
	return nil
}

func (se *seenSession) add(name string, b []byte) error {
	var o sessionObject
	if err := object.Decode(name, b, &o); err != nil {
		return err
	}
	if o.Format > formatVersion || o.Session != se.id {
		return fault.Corrupt(name, -1, "it has format %d and is of session %q", o.Format, o.Session)
	}
	packs := make([][32]byte, len(o.Packs))
	for i, p := range o.Packs {
		id, err := hexID(p)
		if err != nil {
			return &fault.CorruptError{Object: name, Offset: -1, Err: err}
		}
		packs[i] = id
	}
	se.process = o.Process
	se.epoch = max(se.epoch, o.Epoch)
	for _, m := range o.Manifests {
		se.manifests[m] = true
	}
	for _, p := range packs {
		se.packs[p] = true
	}
	return nil
}

// manifests are all that sessions need.
func (s *sight) manifests() (names []string) {
	for _, id := range slices.Sorted(maps.Keys(s.sessions)) {
		names = append(names, slices.Sorted(maps.Keys(s.sessions[id].manifests))...)
	}
	return names
}

// dead says whether the owner of a session or vacuum must be taken for dead:
// its process is gone, or it was silent for too long.
func (s *sight) dead(ctx context.Context, id string, p *process) (bool, error) {
	if p.gone(s.r.id, id) {
		return true, nil
	}
	b, err := readObject(ctx, s.r.st, beatPrefix+id)
	if err != nil && !errors.Is(err, fault.ErrNotFound) && !errors.Is(err, fault.ErrCorrupt) {
		return false, err
	}
	w := s.watches[id]
	if w == nil || w.beat != string(b) {
		s.watches[id] = &watch{string(b), time.Now()}
		return false, nil
	}
	return time.Since(w.since) >= s.patience, nil
}

// stirred says whether the beat of id was seen to change.
func (s *sight) stirred(ctx context.Context, id string) (bool, error) {
	before := s.watches[id]
	if _, err := s.dead(ctx, id, nil); err != nil {
		return false, err
	}
	return before != nil && s.watches[id] != before, nil
}
