package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// beside are the objects that stand beside records of restore points.
func beside(t testing.TB, st blob.Store) (names []string) {
	t.Helper()
	for _, prefix := range []string{suspectPrefix, protectPrefix, goingPrefix} {
		got, err := blobtest.Names(bg, st, prefix)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, got...)
	}
	return names
}

func TestAProtectedPointStays(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, testChunk), nil, nil)
	q := mustBackup(t, r, "web01", noise(2, testChunk), nil, nil)
	for range 2 { // the second changes nothing
		if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{Why: "before the migration"}); err != nil {
			t.Fatal(err)
		}
	}
	var pe *ProtectedError
	if err := r.DeletePoint(bg, p.VM, p.ID); !errors.As(err, &pe) || !errors.Is(err, fault.ErrLocked) || pe.Why != "before the migration" {
		t.Errorf("delete: %v", err)
	}
	if err := r.DeletePoint(bg, q.VM, q.ID); err != nil {
		t.Errorf("the other: %v", err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	points, err := mustOpen(t, st).Points(bg)
	if err != nil || len(points) != 1 || !points[0].Protected || points[0].ProtectedWhy != pe.Why {
		t.Fatalf("%+v, %v", points, err)
	}
	if got := beside(t, st); len(got) != 1 || !strings.HasPrefix(got[0], protectPrefix) {
		t.Errorf("beside the points there is %q", got)
	}
	// A note that nobody can read protects as well, and can be taken away.
	name := protectPrefix + strings.TrimPrefix(mustNames(t, st, pointPrefix)[0], pointPrefix)
	if err := put(bg, st, name, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if err := r.DeletePoint(bg, p.VM, p.ID); !errors.As(err, &pe) {
		t.Errorf("delete with a damaged note: %v", err)
	}
	if points, err = r.Points(bg); err != nil || !points[0].Protected {
		t.Errorf("with a damaged note: %+v, %v", points, err)
	}
	for _, want := range []bool{true, false} {
		if was, err := r.Unprotect(bg, p.VM, p.ID); err != nil || was != want {
			t.Errorf("unprotect: %v, %v", was, err)
		}
	}
	if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
		t.Error(err)
	}
	if got := beside(t, st); len(got) != 0 {
		t.Errorf("beside no point there is %q", got)
	}
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{}); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("protect what is gone: %v", err)
	}
}

func TestAProtectedPointIsDeletedByForce(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, testChunk), nil, nil)
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteProtected(bg, p.VM, p.ID); err != nil {
		t.Fatal(err)
	}
	if got := beside(t, st); len(got) != 0 {
		t.Errorf("beside no point there is %q", got)
	}
}

// What a delete that was killed left does not stay for ever, nor does it stand
// in the way of who knows that it is dead.
func TestMarksOfDeletesThatDied(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, testChunk), nil, nil)
	q := mustBackup(t, r, "web01", noise(2, testChunk), nil, nil)
	for i, name := range mustNames(t, st, pointPrefix) {
		rec := strings.TrimPrefix(name, pointPrefix)
		for _, mark := range []string{goingPrefix + rec + "-01arz3ndektsv4rrffq69g5fav", protectPrefix + rec} {
			if i == 0 && strings.HasPrefix(mark, protectPrefix) {
				continue
			}
			if err := put(bg, st, mark, []byte("{}")); err != nil {
				t.Fatal(err)
			}
		}
	}
	patience := protectPatience
	protectPatience = time.Millisecond
	defer func() { protectPatience = patience }()
	var ge *GoingError
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{}); !errors.As(err, &ge) || !errors.Is(err, fault.ErrLocked) {
		t.Errorf("protect: %v", err)
	}
	if err := r.DeletePoint(bg, p.VM, p.ID); !errors.As(err, new(*ProtectedError)) {
		t.Errorf("a delete that began since: %v", err)
	}
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{Force: true}); err != nil {
		t.Errorf("protect by force: %v", err)
	}
	// The record of the other goes as if its delete had died behind it.
	for _, name := range mustNames(t, st, pointPrefix) {
		if _, err := st.Size(bg, goingPrefix+strings.TrimPrefix(name, pointPrefix)+"-01arz3ndektsv4rrffq69g5fav"); err == nil {
			if err := st.Delete(bg, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := r.Point(bg, q.VM, q.ID); !errors.Is(err, fault.ErrNotFound) {
		t.Fatalf("this test shows nothing: %v", err)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := beside(t, st); len(got) != 1 {
		t.Errorf("after a vacuum there is %q", got)
	}
}

// Whoever was told that a point is protected finds it there, in whatever order
// the steps of deletes and protections come, and wherever some of them die.
func TestProtectAgainstDelete(t *testing.T) {
	patience := protectPatience
	protectPatience = 3 * time.Millisecond
	defer func() { protectPatience = patience }()
	first, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, testChunk), nil, nil)
	rapid.Check(t, func(t *rapid.T) {
		st := cloneMem(t, first)
		turns := &turns{}
		told := false
		for i := range 3 {
			s := &steps{Store: st, ask: make(chan struct{}), may: make(chan bool)}
			turns.actors = append(turns.actors, s)
			own, err := Open(bg, s, testKey)
			if err != nil {
				t.Fatal(err)
			}
			turns.run(s, func() {
				if i == 0 {
					told = own.Protect(bg, p.VM, p.ID, ProtectOptions{}) == nil
				} else {
					_ = own.DeletePoint(bg, p.VM, p.ID)
				}
			})
		}
		turns.play(t)
		_, err := mustOpenIn(t, st).Point(bg, p.VM, p.ID)
		if told && err != nil {
			t.Fatalf("it was said to be protected: %v", err)
		}
	})
}

func mustOpenIn(t *rapid.T, st blob.Store) *Repository {
	r, err := Open(bg, st, testKey)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func cloneMem(t *rapid.T, from blob.Store) *mem.Store {
	to := mem.New()
	for o, err := range from.List(bg, "") {
		if err != nil {
			t.Fatal(err)
		}
		b, err := readObject(bg, from, o.Name)
		if err == nil {
			err = put(bg, to, o.Name, b)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

var errDied = errors.New("it died here")

// steps is a store whose every call waits for its turn, once it is on.
type steps struct {
	blob.Store
	ask    chan struct{}
	may    chan bool
	closed chan struct{}
	on     bool
	dead   bool
}

func (s *steps) turn() error {
	if !s.on {
		return nil
	}
	if s.dead {
		return errDied
	}
	s.ask <- struct{}{}
	if !<-s.may {
		s.dead = true
		return errDied
	}
	return nil
}

func (s *steps) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	if err := s.turn(); err != nil {
		return err
	}
	return s.Store.Put(ctx, name, body, size)
}

func (s *steps) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	if err := s.turn(); err != nil {
		return err
	}
	return s.Store.Create(ctx, name, body, size)
}

func (s *steps) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if err := s.turn(); err != nil {
		return 0, err
	}
	return s.Store.ReadAt(ctx, name, p, off)
}

func (s *steps) Size(ctx context.Context, name string) (int64, error) {
	if err := s.turn(); err != nil {
		return 0, err
	}
	return s.Store.Size(ctx, name)
}

func (s *steps) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		if err := s.turn(); err != nil {
			yield(blob.Object{}, err)
			return
		}
		s.Store.List(ctx, prefix)(yield)
	}
}

func (s *steps) Delete(ctx context.Context, name string) error {
	if err := s.turn(); err != nil {
		return err
	}
	return s.Store.Delete(ctx, name)
}

// turns lets actors make one step at a time, in an order that is drawn.
type turns struct{ actors []*steps }

func (ts *turns) run(s *steps, fn func()) {
	s.on, s.closed = true, make(chan struct{})
	go func() {
		defer close(s.closed)
		fn()
	}()
}

func (ts *turns) play(t *rapid.T) {
	var ready []*steps // at a step
	moving := slices.Clone(ts.actors)
	var last *steps
	left := 0
	for i := 0; ; i++ {
		// All are at a step or done before the next is drawn: so the draws
		// alone say what happens, but for how often a wait looks.
		for _, s := range moving {
			select {
			case <-s.ask:
				ready = append(ready, s)
			case <-s.closed:
			}
		}
		if len(ready) == 0 {
			return
		}
		// The same one goes on for some steps: others then sleep long.
		k := slices.Index(ready, last)
		if k < 0 || left == 0 {
			k = rapid.IntRange(0, len(ready)-1).Draw(t, fmt.Sprintf("actor %d", i))
			left = rapid.IntRange(1, 8).Draw(t, fmt.Sprintf("steps %d", i))
		}
		last = ready[k]
		left--
		last.may <- rapid.IntRange(0, 39).Draw(t, fmt.Sprintf("dies %d", i)) != 39
		moving = []*steps{last}
		ready = slices.Delete(ready, k, k+1)
	}
}

func TestAMarkSaysWhoseItIs(t *testing.T) {
	const rec, id = "01arz3ndektsv4rrffq69g5fav-000003", "01brz3ndektsv4rrffq69g5fav"
	if got, ok := recordOfMark(rec + "-" + id); !ok || got != rec {
		t.Errorf("%q, %v", got, ok)
	}
	for _, s := range []string{"", rec, rec + "-", rec + "-x", id + "-" + id, "x-" + rec} {
		if got, ok := recordOfMark(s); ok {
			t.Errorf("%q is taken for a mark of %q", s, got)
		}
	}
}

// Copies are protected as their originals are, and promised nothing that their
// own repository does not promise.
func TestCopiesOfProtectedAndImmutablePoints(t *testing.T) {
	from := mem.New()
	initImmutable(t, from)
	r := mustOpen(t, from)
	p, err := backup(bg, r, "web01", noise(1, testChunk), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	plain, other := newRepo(t)
	strict := mem.New()
	initImmutable(t, strict)
	for _, c := range []struct {
		name    string
		to      *Repository
		promise bool
	}{{"without a policy", other, false}, {"with one", mustOpen(t, strict), true}} {
		t.Run(c.name, func(t *testing.T) {
			mustCopy(t, r, c.to, []*point.RestorePoint{p}, CopyDone)
			got, err := c.to.Point(bg, p.VM, p.ID)
			if err != nil {
				t.Fatal(err)
			}
			if (got.ImmutableUntil != nil) != c.promise || c.promise && got.ImmutableUntil.Before(*p.ImmutableUntil) || got.Protected {
				t.Errorf("immutable until %v, the original until %v", got.ImmutableUntil, p.ImmutableUntil)
			}
		})
	}
	// A protection that came later is brought over, too.
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{Why: "audit"}); err != nil {
		t.Fatal(err)
	}
	q, err := r.Point(bg, p.VM, p.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []blob.Store{plain, mem.New()} {
		if _, err := to.Size(bg, configName); err != nil {
			if err := Init(bg, to, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
				t.Fatal(err)
			}
		}
		d := mustOpen(t, to)
		if _, err := copyAll(bg, r, d, []*point.RestorePoint{q}); err != nil {
			t.Fatal(err)
		}
		got, err := d.Point(bg, p.VM, p.ID)
		if err != nil || !got.Protected || got.ProtectedWhy != "audit" {
			t.Errorf("%+v, %v", got, err)
		}
		if err := d.DeletePoint(bg, p.VM, p.ID); !errors.As(err, new(*ProtectedError)) {
			t.Errorf("delete: %v", err)
		}
	}
}
