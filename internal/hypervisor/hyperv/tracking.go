package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

// ResetTracking destroys the reference points of a VM that we made for one
// repository. The next backup reads everything.
func (d *Driver) ResetTracking(ctx context.Context, name, repoID string) error {
	prefix, err := repoPrefix(repoID)
	if err != nil {
		return err
	}
	return d.locked(ctx, name, func(d *Driver, s system, j *journal.Journal) error {
		return d.dropReferences(ctx, j, s, prefix, "")
	})
}

// UnknownReferencePoints are the ids of those that the host has of a VM and
// that are not in the journal: another product's, or ours of a state directory
// that is lost. Reference points have no names that would tell.
func (d *Driver) UnknownReferencePoints(ctx context.Context, name string) (unknown []string, err error) {
	err = d.locked(ctx, name, func(d *Driver, s system, j *journal.Journal) error {
		have, err := d.target(s, "", nil).references(ctx)
		if err != nil {
			return err
		}
		known, err := knownReferences(j, s)
		unknown = slices.DeleteFunc(have, func(id string) bool { return known[id] })
		return err
	})
	return unknown, err
}

// DestroyReferencePoint destroys one that UnknownReferencePoints named. Those
// in the journal are left to ResetTracking, which knows whose they are.
//
// Errors: fault.ErrNotFound, fault.ErrExists for one that is in the journal.
func (d *Driver) DestroyReferencePoint(ctx context.Context, name, id string) error {
	return d.locked(ctx, name, func(d *Driver, s system, j *journal.Journal) error {
		t := d.target(s, "", nil)
		have, err := t.references(ctx)
		if err != nil {
			return err
		}
		known, err := knownReferences(j, s)
		switch {
		case err != nil:
			return err
		case !slices.Contains(have, id):
			return fmt.Errorf("reference point %s of VM %q: %w", id, s.name, fault.ErrNotFound)
		case known[id]:
			return fmt.Errorf("reference point %s is that of a repository whose tracking can be reset: %w", id, fault.ErrExists)
		}
		return t.destroyReference(ctx, id)
	})
}

// locked does something with a VM, on the host that has it, that no backup of
// it may run beside.
func (d *Driver) locked(ctx context.Context, name string, do func(*Driver, system, *journal.Journal) error) error {
	at, err := d.findSurely(ctx, name)
	if err != nil {
		return err
	}
	l, err := d.lock(ctx, at.sys)
	if err != nil {
		return err
	}
	defer l.Unlock()
	j, err := d.openJournal()
	if err != nil {
		return err
	}
	return do(at.d, at.sys, j)
}

// knownReferences are the ids of a VM's reference points in the journal.
func knownReferences(j *journal.Journal, s system) (map[string]bool, error) {
	runs, err := j.Runs(s.guid)
	known := map[string]bool{}
	for _, r := range runs {
		for _, e := range r.Open() {
			known[e.Name] = known[e.Name] || e.Kind == kindReference
		}
	}
	return known, err
}

// dropReferences destroys our reference points of one repository but that of
// the run keep. One that was made on another host and is not on this one stays
// in the journal.
func (d *Driver) dropReferences(ctx context.Context, j *journal.Journal, s system, prefix, keep string) error {
	runs, err := j.Runs(s.guid)
	if err != nil {
		return err
	}
	var errs []error
	var have []string
	asked := false
	for _, r := range runs {
		t := d.target(s, prefix, r)
		for _, e := range r.Open() {
			if e.Kind != kindReference || e.Data[dataRepo] != prefix || e.Data[dataRun] == keep {
				continue
			}
			if !d.made(e) && !d.sameCluster(ctx, e) {
				if !asked {
					if have, err = t.references(ctx); err != nil {
						return errors.Join(append(errs, err)...)
					}
					asked = true
				}
				if !slices.Contains(have, e.Name) {
					continue
				}
			}
			errs = append(errs, t.forget(ctx, r, e))
		}
		r.Close()
	}
	return errors.Join(errs...)
}
