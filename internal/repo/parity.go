package repo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/parity"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

const (
	parityPrefix = "par/"
	// parityCode is what repo.json calls the parity of docs/format/parity.md.
	parityCode = "rs-64-2"
)

// guarded are the prefixes of the objects that have parity, but for repo.json.
var guarded = []string{packPrefix, manifestPrefix, outcomePrefix, pointPrefix}

// keepsParity says whether writers store parity. Another code than ours, of a
// newer version, is left to that: no parity is legal.
func (r *Repository) keepsParity() bool { return r.conf.Parity == parityCode }

// guard stores the parity of an object that is durable, if the repository keeps
// parity. The order is what makes parity without its object garbage.
func (r *Repository) guard(ctx context.Context, name string, sum [32]byte, src io.ReaderAt, bytes int64) error {
	if !r.keepsParity() || bytes < 1 || bytes > parity.MaxBytes {
		return nil
	}
	return storeParity(ctx, r.st, r.id, name, sum, src, bytes)
}

func storeParity(ctx context.Context, st blob.Store, id [16]byte, name string, sum [32]byte, src io.ReaderAt, bytes int64) error {
	b, err := parity.Encode(id, sum, src, bytes)
	if err != nil {
		return err
	}
	return put(ctx, st, parityPrefix+name, b)
}

// guardWhole is guard of an object whose hash is not known yet.
func (r *Repository) guardWhole(ctx context.Context, name string, src io.ReaderAt, bytes int64) error {
	if !r.keepsParity() {
		return nil
	}
	sum, err := hashOf(src, bytes)
	if err != nil {
		return err
	}
	return r.guard(ctx, name, sum, src, bytes)
}

func hashOf(src io.ReaderAt, bytes int64) (sum [32]byte, err error) {
	h := blake3.New()
	if _, err := io.Copy(h, io.NewSectionReader(src, 0, bytes)); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// guardOutcome stores the parity of a session's outcome that made points exist.
// They do, whatever becomes of this: Check says what has none.
func (r *Repository) guardOutcome(ctx context.Context, o outcome) {
	if o.State != committed || len(o.Points) == 0 {
		return
	}
	if b, err := object.Encode(o); err == nil {
		_ = r.guardWhole(ctx, outcomePrefix+o.Of, strings.NewReader(string(b)), int64(len(b)))
	}
}

// sweepParity deletes all parity whose object is gone. Since parity comes after
// its object and a name is never used again, it can never be needed: no fence is
// needed either.
func (r *Repository) sweepParity(ctx context.Context) error {
	for _, prefix := range guarded {
		if err := r.sweepUnder(ctx, prefix); err != nil {
			return err
		}
	}
	return nil
}

func (r *Repository) sweepUnder(ctx context.Context, prefix string) error {
	var next func() (blob.Object, error, bool)
	var have string // the first object that is not before the parity's
	for o, err := range r.st.List(ctx, parityPrefix+prefix) {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(o.Name, parityPrefix)
		if next == nil {
			var stop func()
			next, stop = iter.Pull2(r.st.List(ctx, prefix))
			defer stop()
		}
		for have < name {
			have = "\xff" // behind all names
			if h, err, ok := next(); err != nil {
				return err
			} else if ok {
				have = h.Name
			}
		}
		if have == name {
			continue
		}
		// It may be newer than the listing.
		switch _, err := r.st.Size(ctx, name); {
		case err == nil:
		case !errors.Is(err, fault.ErrNotFound):
			return err
		default:
			err := r.st.Delete(ctx, o.Name)
			if err != nil && !errors.Is(err, fault.ErrLocked) && !errors.Is(err, fault.ErrDenied) {
				return err // what may not be deleted yet does no harm
			}
		}
	}
	return nil
}

// ParityState says which objects could heal.
type ParityState struct {
	Kept    bool  // writers store parity
	Lacking int64 // objects without it, or whose parity has the wrong length
	Made    int64 // packs that lacked it and have it now
}

// parityInventory counts what has no parity, of what this check looked at, and
// gives the names.
func (c *check) parityInventory(ctx context.Context) error {
	c.report.Parity.Kept = c.r.keepsParity()
	if !c.report.Parity.Kept {
		return nil
	}
	wanted := map[string]bool{configName: true}
	for id := range c.files {
		wanted[manifestObject(id)] = true
	}
	for _, rec := range c.recs {
		session, _, _ := strings.Cut(rec.name, "-")
		wanted[pointPrefix+rec.name], wanted[outcomePrefix+session] = true, true
	}
	has := make([]bool, len(c.h.packs))
	for o, err := range c.r.st.List(ctx, parityPrefix) {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(o.Name, parityPrefix)
		if id, ok := parsePackName(name); ok {
			c.h.mu.RLock()
			n, ok := c.h.number(id)
			c.h.mu.RUnlock()
			if ok && int(n) < len(has) {
				p := &c.h.packs[n]
				has[n] = p.state != packSound || o.Bytes == parity.Bytes(p.bytes)
			}
			continue
		}
		delete(wanted, name)
	}
	c.lacking = map[[32]byte]bool{}
	for n := range has {
		if !has[n] && c.h.packs[n].state == packSound {
			c.lacking[c.h.packs[n].id] = true
			c.unguarded = append(c.unguarded, c.h.packs[n].name())
		}
	}
	for name := range wanted {
		c.unguarded = append(c.unguarded, name)
	}
	c.report.Parity.Lacking = int64(len(c.unguarded))
	return nil
}

// parity checks a parity object. Only its own checksum is looked at: what it is
// for may be damaged, and that is another finding.
func (s *scrubber) parity(name string, b []byte) error {
	p, err := parity.Open(s.r.id, b)
	switch id, isPack := parsePackName(strings.TrimPrefix(name, parityPrefix)); {
	case err != nil:
		return err
	case !p.Whole():
		return errors.New("checksum does not match")
	case isPack && p.Sum != id:
		return errors.New("it is for another pack")
	}
	return nil
}

// guardRead makes the parity of a pack that lacks it and was just found sound.
// Data is all of the pack, or nil where it was read in pieces: then it is read
// once more, and proven again. Trouble is none: the report says what has none.
func (s *scrubber) guardRead(ctx context.Context, p heldPack, data []byte) {
	if !s.o.guard || !s.lacking[p.id] || ctx.Err() != nil {
		return
	}
	if data == nil {
		var err error
		if data, err = s.read(ctx, p); err != nil || seal.Hash(data) != p.id {
			return
		}
	}
	if s.r.guard(ctx, p.name(), p.id, bytes.NewReader(data), int64(len(data))) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Parity.Made++
	s.report.Parity.Lacking--
}
