package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// A stray is a restore point record that lies under a name which its session
// never gave: somebody renamed or copied files. Two records that were exchanged
// are none, since both names are right; only who has keys sees those.

// strayNames are the strays of when records were last listed.
func (r *Repository) strayNames() []string {
	r.recMu.Lock()
	defer r.recMu.Unlock()
	return slices.Clone(r.strays)
}

// strayRecords reads what strays need. One that cannot be read needs nothing
// that anybody knows of.
func (r *Repository) strayRecords(ctx context.Context) (all []clearRecord, err error) {
	for _, name := range r.strayNames() {
		b, err := readObject(ctx, r.st, pointPrefix+name)
		if errors.Is(err, fault.ErrNotFound) || errors.Is(err, fault.ErrCorrupt) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var c clearRecord
		if object.Decode(pointPrefix+name, b, &c) != nil {
			continue
		}
		c.Manifests = slices.DeleteFunc(c.Manifests, func(m string) bool {
			_, err := parseManifestID(point.ManifestID(m))
			return err != nil
		})
		all = append(all, c)
	}
	return all, nil
}

// misplaced puts records back under their names whose bytes lie under another
// one, and says how many it did, or would. It goes before what parity heals: what
// lies in a wrong place may be the last copy, and is overwritten by that.
func (m *mender) misplaced(ctx context.Context) (n int, err error) {
	found := map[string][]byte{} // whole, and perhaps under a wrong name
	for _, f := range m.c.report.Findings {
		name, ok := strings.CutPrefix(f.Object, pointPrefix)
		if !ok {
			continue
		}
		b, err := readObject(ctx, m.r.st, f.Object)
		if err == nil {
			err = object.Check(f.Object, b)
		}
		switch {
		case err == nil:
			found[name] = b
		case ctx.Err() != nil:
			return n, context.Cause(ctx)
		}
	}
	if len(found) == 0 {
		return 0, nil
	}
	named, err := m.r.committedNames(ctx)
	if err != nil {
		return 0, err
	}
	for _, at := range slices.Sorted(maps.Keys(found)) {
		name, err := m.r.trueName(ctx, found[at], named)
		if err != nil {
			return n, err
		}
		if name == "" || name == at {
			continue
		}
		moved, err := m.moveBack(ctx, at, name, found[at], named)
		if err != nil {
			return n, err
		}
		if moved {
			n++
			if err := m.dropAside(ctx, at, name, found[at]); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// setAside stores b once more, which lies under the name at and is about to be
// overwritten, where it is the record of another name and not in its place: who
// dies before it is there leaves a stray, and does not lose it.
func (m *mender) setAside(ctx context.Context, at string, b []byte, named map[string]bool) error {
	name, err := m.r.trueName(ctx, b, named)
	if name == "" || err != nil {
		return err
	}
	now, err := readObject(ctx, m.r.st, pointPrefix+name)
	switch {
	case err == nil && bytes.Equal(now, b):
		return nil
	case err != nil && !errors.Is(err, fault.ErrNotFound) && !errors.Is(err, fault.ErrCorrupt):
		return err
	}
	id, _, err := newID()
	if err != nil {
		return err
	}
	aside := at + "-" + id
	if err := create(ctx, m.r.st, pointPrefix+aside, b); err != nil {
		return err
	}
	m.aside[at] = aside
	return nil
}

// overwrite puts b in the place of the record at, where now lies.
func (m *mender) overwrite(ctx context.Context, at string, now, b []byte, named map[string]bool) error {
	if err := m.setAside(ctx, at, now, named); err != nil {
		return err
	}
	err := put(ctx, m.r.st, pointPrefix+at, b)
	if aside := m.aside[at]; err != nil && aside != "" {
		if still, e := readObject(ctx, m.r.st, pointPrefix+at); e == nil && bytes.Equal(still, now) {
			delete(m.aside, at)
			_ = m.r.remove(ctx, pointPrefix+aside)
		}
	}
	return err
}

// dropAside removes what was set aside of the name at, if that, b, is in its place.
func (m *mender) dropAside(ctx context.Context, at, name string, b []byte) error {
	aside := m.aside[at]
	if aside == "" {
		return nil
	}
	now, err := readObject(ctx, m.r.st, pointPrefix+name)
	if err != nil || !bytes.Equal(now, b) {
		return err
	}
	return m.r.remove(ctx, pointPrefix+aside)
}

// committedNames are the records that sessions made exist, also those that were
// deleted since while another of the same session was not.
func (r *Repository) committedNames(ctx context.Context) (map[string]bool, error) {
	names := map[string]bool{}
	for o, err := range r.st.List(ctx, outcomePrefix) {
		if err != nil {
			return nil, err
		}
		out, err := r.outcomeOf(ctx, strings.TrimPrefix(o.Name, outcomePrefix))
		if err != nil && !errors.Is(err, fault.ErrCorrupt) {
			return nil, err
		}
		if err == nil && out.State == committed {
			for _, name := range out.Points {
				names[name] = true
			}
		}
	}
	return names, nil
}

// trueName is the name that a record was stored under: the one that its sealed
// part belongs to, or, without keys, the one whose parity is of these bytes. It
// is empty if that is none of names.
func (r *Repository) trueName(ctx context.Context, b []byte, names map[string]bool) (string, error) {
	sum := seal.Hash(b)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !parsePointName(name) {
			continue
		}
		if r.keys != nil {
			if _, err := r.decodeRecord(name, b); err == nil {
				return name, nil
			}
			continue
		}
		par, err := r.parityOf(ctx, pointPrefix+name)
		switch {
		case err == nil && par.Sum == sum:
			return name, nil
		case ctx.Err() != nil:
			return "", context.Cause(ctx)
		}
	}
	return "", nil
}

// moveBack stores b, which lies at a wrong place, under the name that it had. A
// stray goes when it is safe there.
func (m *mender) moveBack(ctx context.Context, at, name string, b []byte, named map[string]bool) (bool, error) {
	full := pointPrefix + name
	got := Mended{Object: full, By: []string{ByName}}
	now, err := readObject(ctx, m.r.st, full)
	switch {
	case err == nil:
		if _, bad := m.r.decodeRecord(name, now); bad == nil && !bytes.Equal(now, b) {
			return false, nil // without keys nobody can say which one is right
		} else if bad != nil && !m.o.DryRun {
			err = m.overwrite(ctx, name, now, b, named)
		}
	case errors.Is(err, fault.ErrNotFound):
		err = m.bringBack(ctx, name, b)
	case errors.Is(err, fault.ErrCorrupt):
		err = nil
		if !m.o.DryRun {
			err = put(ctx, m.r.st, full, b)
		}
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if err != nil {
		got.By, got.Err = nil, fmt.Errorf("it lies under the name %s: %w", at, err)
		m.say(got)
		if !errors.Is(err, fault.ErrCorrupt) && !errors.Is(err, fault.ErrNotFound) {
			m.tried[pointPrefix+at] = true // next time it may be brought back: parity must not take its place
		}
		return false, nil
	}
	m.say(got)
	m.tried[full] = true
	if named[at] {
		return true, nil
	}
	m.gone[pointPrefix+at] = true
	if m.o.DryRun {
		return true, nil
	}
	if now, err = readObject(ctx, m.r.st, full); err != nil || !bytes.Equal(now, b) {
		return true, err
	}
	return true, m.r.remove(ctx, pointPrefix+at)
}

// bringBack makes a record exist again that was given another name. Nobody
// deleted it, since then it would be in no place at all; but a vacuum that did
// not find it may have freed what it needs. So it is done as a session, which
// keeps that, and only if all of it is there.
func (m *mender) bringBack(ctx context.Context, name string, b []byte) error {
	rec, err := m.r.decodeRecord(name, b)
	if err != nil {
		return err
	}
	if going, err := m.r.goings(ctx, name, false); err != nil {
		return err
	} else if going {
		return &GoingError{"restore point record " + name}
	}
	if !m.o.DryRun {
		id, _, err := newID()
		if err != nil {
			return err
		}
		pr := newPresence(m.r, id)
		pr.needs = slices.Clone(rec.clear.Manifests)
		if err := pr.announce(ctx); err != nil {
			return err
		}
		pr.keep(func() {})
		defer func() {
			pr.end(ctx)
			_ = pr.withdraw(ctx)
		}()
		if err := m.r.settle(ctx, pr); err != nil {
			return err
		}
		if err := m.r.allThere(ctx, rec, func(in [32]byte) bool { return pr.rely(in) }); err != nil {
			return err
		}
		err = create(ctx, m.r.st, pointPrefix+name, b)
		if errors.Is(err, fault.ErrExists) {
			return nil // somebody was faster
		}
		if err != nil {
			return err
		}
		// A vacuum that took this for dead did not wait for it, and may have freed
		// what was proven to be there. One that does so from now on finds the record.
		held, err := m.r.outcomeOf(ctx, id)
		if err == nil && held.State == revoked {
			err = fmt.Errorf("%w by a vacuum", fault.ErrFenced)
		}
		if err != nil {
			return errors.Join(err, m.r.remove(ctx, pointPrefix+name))
		}
		return nil
	}
	return m.r.allThere(ctx, rec, func([32]byte) bool { return true })
}

// allThere says whether everything is stored that a restore point needs. Rely is
// asked for each pack.
func (r *Repository) allThere(ctx context.Context, rec *record, rely func(pack [32]byte) bool) error {
	h, err := r.held(ctx)
	if err != nil {
		return err
	}
	stored := func(id [32]byte) error {
		_, p, ok, err := r.findIn(ctx, h, id)
		if err == nil && (!ok || p.state == packMissing || !rely(p.id)) {
			err = fault.Corrupt(pointPrefix+rec.name, -1, "chunk %x that it needs is not there any more", index.KeyOf(id))
		}
		return err
	}
	n := needs{
		r: r,
		visit: func(id manifest.ID, f *manifest.File, i int) error {
			ids, err := f.Needs(i)
			if err != nil {
				return manifestError(id, err)
			}
			for _, id := range ids {
				if err := stored(id); err != nil {
					return err
				}
			}
			return nil
		},
		fail: func(id manifest.ID, err error) error { return fmt.Errorf("%s: %w", manifestObject(id), err) },
	}
	for _, s := range rec.clear.Records {
		id, err := hexID(s)
		if err != nil {
			return err
		}
		if err := stored(id); err != nil {
			return err
		}
	}
	return n.walk(ctx, rec.clear.Manifests)
}
