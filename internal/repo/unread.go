package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// A RecordError says that the record of a restore point cannot be read, and so
// nobody knows whose it is and what it needs.
type RecordError struct {
	Name string // as DeleteRecord takes it
	Err  error
}

func (e *RecordError) Error() string { return "restore point record " + e.Name + ": " + e.Err.Error() }

// Unwrap gives the evidence.
func (e *RecordError) Unwrap() error { return e.Err }

// UnreadRecords gives all RecordErrors that err holds.
func UnreadRecords(err error) []*RecordError {
	if re, ok := err.(*RecordError); ok {
		return []*RecordError{re}
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return UnreadRecords(e.Unwrap())
	case interface{ Unwrap() []error }:
		var all []*RecordError
		for _, err := range e.Unwrap() {
			all = append(all, UnreadRecords(err)...)
		}
		return all
	}
	return nil
}

// IsRecordName says whether name is one that DeleteRecord takes.
func IsRecordName(name string) bool { return parsePointName(strings.TrimPrefix(name, pointPrefix)) }

// DeleteRecord makes a restore point cease to exist whose record is damaged. It
// needs no keys. One that can be read, or whose trouble is another than damage,
// is left alone: DeletePoint is for the first, and the second may pass. That it
// is protected does not hold it.
func (r *Repository) DeleteRecord(ctx context.Context, name string) error {
	name = strings.TrimPrefix(name, pointPrefix)
	found := false
	var evidence error
	err := r.eachRecord(ctx, func(n string, _ *record, err error) error {
		if n == name {
			found, evidence = true, err
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case !found:
		return fmt.Errorf("restore point record %s: %w", name, fault.ErrNotFound)
	case evidence == nil:
		return fmt.Errorf("restore point record %s is not damaged: delete the restore point by its own name", name)
	case !errors.Is(evidence, fault.ErrCorrupt):
		return &RecordError{name, evidence}
	}
	if err := r.mayDelete(ctx, "restore point record "+name, name, nil); err != nil {
		return err
	}
	if err := r.takeAway(ctx, "restore point record "+name, name, true); err != nil {
		return err
	}
	session, _, _ := strings.Cut(name, "-")
	if _, err := r.outcomeOf(ctx, session); errors.Is(err, fault.ErrCorrupt) {
		_, err := r.bury(ctx, session)
		return err
	}
	return nil
}

// bury puts the outcome "revoked" in the place of a damaged one, if none of the
// session's records is left. Whatever that one said, it means the same now: no
// point exists by it, and a writer that still sleeps can never commit.
func (r *Repository) bury(ctx context.Context, session string) (done bool, err error) {
	for _, err := range r.st.List(ctx, pointPrefix+session+"-") {
		return false, err
	}
	return true, r.replaceOutcome(blob.Freeing(ctx), session)
}

// mend makes "revoked" of the damaged outcome of a session that has no records,
// and otherwise gives the evidence.
func (v *vacuum) mend(ctx context.Context, session string, evidence error) (outcome, error) {
	if v.o.DryRun {
		return outcome{}, evidence
	}
	done, err := v.r.bury(ctx, session)
	if err == nil && !done {
		err = evidence
	}
	return outcome{Of: session, State: revoked}, err
}
