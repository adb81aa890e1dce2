package repo

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// A fullStore has room for nothing but what is marked as freeing room.
type fullStore struct {
	blob.Store
	t *testing.T
}

func (s fullStore) room(ctx context.Context, name string, size int64) error {
	if !blob.IsFreeing(ctx) {
		return fault.ErrNoSpace
	}
	for _, prefix := range []string{packPrefix, manifestPrefix, parityPrefix, indexPrefix, runPrefix, sessionPrefix} {
		if strings.HasPrefix(name, prefix) || size > 64<<10 {
			s.t.Errorf("%s, %d bytes, takes what is kept back", name, size)
		}
	}
	return nil
}

func (s fullStore) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	if err := s.room(ctx, name, size); err != nil {
		return err
	}
	return s.Store.Put(ctx, name, body, size)
}

func (s fullStore) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	if err := s.room(ctx, name, size); err != nil {
		return err
	}
	return s.Store.Create(ctx, name, body, size)
}

// Where there is room for nothing, points can be deleted and vacuumed away all
// the same, and a backup gets none of what is kept back for that.
func TestFreeingOnAFullStore(t *testing.T) {
	st, h, p := garbageRepo(t)
	r := mustOpen(t, fullStore{st, t})
	if _, err := r.Begin(bg, SessionOptions{}); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("a backup began: %v", err)
	}
	if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
		t.Fatalf("delete: %v", err)
	}
	h.points = h.points[1:]
	rep, err := r.Vacuum(bg, VacuumOptions{})
	if err != nil || rep.DeletedPacks == 0 || rep.FreedBytes <= 0 || rep.Revoked == 0 {
		t.Fatalf("%+v, %v; want packs to go, and the session that crashed to be over", rep, err)
	}
	mustBeWhole(t, st, h, h.points...)

	// The index that could not be written is written by the next one.
	r = mustOpen(t, st)
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	mustBeWhole(t, st, h, h.points...)
}

// A list of condemned packs that needs much of what is kept back would leave no
// room for the list of what is deleted: so a long one gets none of it, and some
// packs wait for the next vacuum.
func TestALongListIsCutShortOnAFullStore(t *testing.T) {
	few := fewCondemned
	fewCondemned = 1
	t.Cleanup(func() { fewCondemned = few })
	st, h, p := garbageRepo(t)
	r := mustOpen(t, fullStore{st, t})
	if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
		t.Fatalf("delete: %v", err)
	}
	h.points = h.points[1:]
	rep, err := r.Vacuum(bg, VacuumOptions{})
	if err != nil || rep.DeletedPacks != 1 || rep.Kept.TooMany == 0 {
		t.Fatalf("%+v, %v; want one pack to go, and the others to be kept as too many", rep, err)
	}
	mustBeWhole(t, st, h, h.points...)
}
