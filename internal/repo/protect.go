package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

// Protections and marks of deletions stand beside the records of restore points.
// Whoever deletes sets a mark and then looks for a protection; whoever protects
// does so and then looks for marks. So of two who meet at least one sees the
// other, and no clock or lock is needed: docs/format/repository.md.
const (
	protectPrefix = "protect/" // a protection: its being there is what counts
	goingPrefix   = "going/"   // a mark, with a name of its own
)

// protectPatience is for how long Protect waits for deletions under way. Tests
// make it short.
var protectPatience = 10 * time.Second

// A ProtectedError says that a restore point is protected. It is in class
// fault.ErrLocked.
type ProtectedError struct {
	Point string // VM/ID
	Why   string // as whoever protected it put it, or empty
}

func (e *ProtectedError) Error() string {
	if e.Why == "" {
		return e.Point + " is protected"
	}
	return fmt.Sprintf("%s is protected: %s", e.Point, e.Why)
}

// Is puts it in the class of what somebody holds.
func (e *ProtectedError) Is(target error) bool { return target == fault.ErrLocked }

// A GoingError says that somebody began to delete the restore point that was to
// be protected and did not yet end, or never will. It is in class
// fault.ErrLocked.
type GoingError struct{ Point string }

func (e *GoingError) Error() string {
	return e.Point + " is being deleted, or somebody began to and was stopped"
}

// Is puts it in the class of what somebody holds.
func (e *GoingError) Is(target error) bool { return target == fault.ErrLocked }

// ProtectOptions say how to protect.
type ProtectOptions struct {
	Why string // for people; sealed
	// Force says that no deletion is under way, whatever marks of some are left.
	Force bool
}

// Protect makes DeletePoint refuse to delete a restore point, until Unprotect.
// When it returned nil no deletion that began before will take the point, either.
// With a GoingError the protection is there, and a deletion that is under way may
// win over it. One that is protected already keeps its reason.
func (r *Repository) Protect(ctx context.Context, vm string, id point.ID, o ProtectOptions) error {
	rec, err := r.record(ctx, vm, id)
	if err != nil {
		return err
	}
	name := protectPrefix + rec.name
	b, err := object.EncodeSealed(struct {
		Format int `json:"format"`
	}{formatVersion}, &r.keys.Meta, object.Binding{Repo: r.id, Name: name}, []byte(o.Why))
	if err != nil {
		return err
	}
	if err := create(ctx, r.st, name, b); err != nil && !errors.Is(err, fault.ErrExists) {
		return err
	}
	for until := time.Now().Add(protectPatience); ; {
		going, err := r.goings(ctx, rec.name, o.Force)
		if err != nil {
			return err
		}
		if !going {
			break
		}
		if time.Now().After(until) {
			return &GoingError{rec.point.Ref()}
		}
		if err := sleep(ctx, min(pollEvery, protectPatience)); err != nil {
			return err
		}
	}
	if _, err := r.st.Size(ctx, pointPrefix+rec.name); !errors.Is(err, fault.ErrNotFound) {
		return err
	}
	return errors.Join(noPoint(vm, id), r.st.Delete(ctx, name))
}

// goings says whether there are marks of deletions of a record, after it took
// them away if it was told to.
func (r *Repository) goings(ctx context.Context, record string, remove bool) (any bool, err error) {
	for o, err := range r.st.List(ctx, goingPrefix+record+"-") {
		if err != nil {
			return false, err
		}
		if !remove {
			return true, nil
		}
		if err := r.st.Delete(ctx, o.Name); err != nil {
			return false, err
		}
	}
	return false, nil
}

// Unprotect takes the protection of a restore point away, and says whether there
// was one.
func (r *Repository) Unprotect(ctx context.Context, vm string, id point.ID) (was bool, err error) {
	rec, err := r.record(ctx, vm, id)
	if err != nil {
		return false, err
	}
	name := protectPrefix + rec.name
	if _, err := r.st.Size(ctx, name); errors.Is(err, fault.ErrNotFound) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return true, r.st.Delete(ctx, name)
}

// protections gives the reasons of all points that are protected. One whose note
// cannot be read is protected all the same.
func (r *Repository) protections(ctx context.Context) (map[string]string, error) {
	return r.notes(ctx, protectPrefix)
}

// takeAway deletes the record of a restore point, unless somebody protects it.
// Ref is how people name it. Afterwards nothing is left beside it.
func (r *Repository) takeAway(ctx context.Context, ref, record string, force bool) error {
	id, _, err := newID()
	if err != nil {
		return err
	}
	b, err := object.Encode(struct {
		Format int `json:"format"`
	}{formatVersion})
	if err != nil {
		return err
	}
	mark := goingPrefix + record + "-" + id
	if err := create(blob.Freeing(ctx), r.st, mark, b); err != nil {
		return err
	}
	err = r.unlessProtected(ctx, ref, record, force)
	if err == nil {
		err = r.st.Delete(ctx, pointPrefix+record)
		if err != nil && !errors.Is(err, fault.ErrDenied) && !errors.Is(err, fault.ErrReadOnly) {
			// The store may yet do it: who protects the point has to know.
			return err
		}
	}
	if err != nil {
		ctx, cancel := tidying(ctx)
		defer cancel()
		return errors.Join(err, r.st.Delete(ctx, mark))
	}
	names := []string{suspectPrefix + record, protectPrefix + record}
	for o, err := range r.st.List(ctx, goingPrefix+record+"-") {
		if err != nil {
			return err
		}
		names = append(names, o.Name)
	}
	for _, name := range names {
		if err := r.st.Delete(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func (r *Repository) unlessProtected(ctx context.Context, ref, record string, force bool) error {
	if force {
		return nil
	}
	_, err := r.st.Size(ctx, protectPrefix+record)
	if errors.Is(err, fault.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	pe := &ProtectedError{Point: ref}
	if r.keys != nil {
		pe.Why, _ = r.readNote(ctx, protectPrefix+record) // without a reason it counts as well
	}
	return pe
}

// recordOfMark gives the record that the rest of a mark's name is about.
func recordOfMark(rest string) (record string, ok bool) {
	i := strings.LastIndexByte(rest, '-')
	if i < 0 || !parsePointName(rest[:i]) || !isID(rest[i+1:]) {
		return "", false
	}
	return rest[:i], true
}
