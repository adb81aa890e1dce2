package repo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/oklog/ulid/v2"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

const (
	outcomePrefix = "outcome/"
	vacuumPrefix  = "vacuum/"
	committed     = "committed"
	revoked       = "revoked"
)

// outcome is what became of a session or a vacuum.
type outcome struct {
	Format int      `json:"format"`
	Of     string   `json:"of"`
	State  string   `json:"state"`
	Points []string `json:"points,omitempty"` // of a session: the records it made exist
	Delete []string `json:"delete,omitempty"` // of a vacuum: the objects to delete, in order
}

// vacuumObject is vacuum/….
type vacuumObject struct {
	Format  int      `json:"format"`
	Vacuum  string   `json:"vacuum"`
	Process *process `json:"process,omitempty"`
	Brief   bool     `json:"brief,omitempty"` // it joins the index and condemns nothing
}

// idTime is a variable so that tests can turn the clock.
var idTime = ulid.Now

// newID makes a ULID that nobody will ever make again: no promise of the
// repository rests on its time.
func newID() (s string, b [16]byte, err error) {
	u, err := ulid.New(idTime(), rand.Reader)
	return strings.ToLower(u.String()), u, err
}

// isID says whether s is a ULID as names hold it.
func isID(s string) bool {
	_, err := ulid.ParseStrict(strings.ToUpper(s))
	return err == nil && strings.ToLower(s) == s
}

// outcomeOf reads the outcome of a session or vacuum; State is empty where
// there is none.
func (r *Repository) outcomeOf(ctx context.Context, id string) (o outcome, err error) {
	name := outcomePrefix + id
	b, err := readObject(ctx, r.st, name)
	if errors.Is(err, fault.ErrNotFound) {
		return o, nil
	}
	if err != nil {
		return o, err
	}
	return decodeOutcome(id, b)
}

func decodeOutcome(id string, b []byte) (o outcome, err error) {
	name := outcomePrefix + id
	if err := object.Decode(name, b, &o); err != nil {
		return o, err
	}
	if o.Format > formatVersion {
		return o, fmt.Errorf("%s has format %d, this version reads up to %d: %w", name, o.Format, formatVersion, fault.ErrUnsupported)
	}
	if o.Of != id || o.State != committed && o.State != revoked {
		return o, fault.Corrupt(name, -1, "it says %q of %q", o.State, o.Of)
	}
	return o, nil
}

// decide creates the outcome of o.Of and gives the one that then holds, which
// somebody else may have been faster to create.
func (r *Repository) decide(ctx context.Context, o outcome) (outcome, error) {
	o.Format = formatVersion
	b, err := object.Encode(o)
	if err != nil {
		return o, err
	}
	err = create(ctx, r.st, outcomePrefix+o.Of, b)
	if err != nil && !errors.Is(err, fault.ErrExists) {
		// It may be there and not yet be durable: a store makes sure that what
		// it calls existing is, so ask once more before believing what is read.
		err = create(ctx, r.st, outcomePrefix+o.Of, b)
	}
	if err == nil {
		return o, nil
	}
	if !errors.Is(err, fault.ErrExists) {
		return o, err
	}
	// A Create that failed may have stored the object nevertheless, and one
	// that found it there may have been our own, repeated: only the object
	// itself can tell.
	held, rerr := r.outcomeOf(ctx, o.Of)
	if rerr != nil {
		return o, errors.Join(err, rerr)
	}
	if held.State == "" {
		return o, err
	}
	return held, nil
}

// aVacuum is one of vacuum/ with its outcome.
type aVacuum struct {
	id      string
	process *process
	brief   bool
	outcome outcome
	damage  error // why the outcome cannot be read, nil if it can
}

// vacuums lists all vacuums that began and are not yet cleaned away.
func (r *Repository) vacuums(ctx context.Context) (vs []aVacuum, err error) {
	for o, err := range r.st.List(ctx, vacuumPrefix) {
		if err != nil {
			return nil, err
		}
		id := strings.TrimPrefix(o.Name, vacuumPrefix)
		if !isID(id) {
			continue
		}
		out, err := r.outcomeOf(ctx, id)
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return nil, err
		}
		v := aVacuum{id: id, outcome: out, damage: err}
		var vo vacuumObject
		if b, err := readObject(ctx, r.st, o.Name); err == nil && object.Decode(o.Name, b, &vo) == nil {
			v.process, v.brief = vo.Process, vo.Brief // otherwise its beat must tell
		}
		vs = append(vs, v)
	}
	return vs, nil
}

// replaceOutcome puts the outcome "revoked" in the place of a damaged one.
func (r *Repository) replaceOutcome(ctx context.Context, of string) error {
	b, err := object.Encode(outcome{Format: formatVersion, Of: of, State: revoked})
	if err != nil {
		return err
	}
	return put(ctx, r.st, outcomePrefix+of, b)
}

// epochState is the state of holdings that were loaded in epoch n.
func epochState(n int64) string { return fmt.Sprintf("epoch %d\n", n) }

// settle loads the index again if a vacuum condemned something since it was
// loaded, or a check found damage.
func (r *Repository) settle(ctx context.Context, p *presence) error {
	notes, err := r.quarantines(ctx)
	if err != nil {
		return err
	}
	h, err := r.held(ctx)
	if err != nil {
		return err
	}
	if h.state != epochState(p.epoch)+strings.Join(notes, "\n") {
		_, err = r.reload(ctx, h)
	}
	return err
}
