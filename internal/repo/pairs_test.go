package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// A pauser is a store that stops before its n-th call until told to go on.
// Calls of others that share it go on: a process whose backup waits for its
// disk still shows that it lives. Calls of beats, which come by the clock, do
// not count.
type pauser struct {
	blob.Store
	at     int
	paused chan string // gets the call that waits; closed once there is none any more
	resume chan struct{}

	mu sync.Mutex
	n  int
}

func pauseAt(n int, st blob.Store) *pauser {
	return &pauser{Store: st, at: n, paused: make(chan string, 1), resume: make(chan struct{})}
}

func (p *pauser) call(op, name string) {
	for _, clock := range []string{beatPrefix, epochPrefix, outcomePrefix, sessionPrefix} {
		if strings.HasPrefix(name, clock) {
			return // may be the session's that shows that it lives
		}
	}
	p.mu.Lock()
	n := p.n
	p.n++
	p.mu.Unlock()
	if n == p.at {
		p.paused <- op + " " + name
		<-p.resume
	}
}

func (p *pauser) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	p.call("put", name)
	return p.Store.Put(ctx, name, body, size)
}

func (p *pauser) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	p.call("create", name)
	return p.Store.Create(ctx, name, body, size)
}

func (p *pauser) Delete(ctx context.Context, name string) error {
	p.call("delete", name)
	return p.Store.Delete(ctx, name)
}

func (p *pauser) ReadAt(ctx context.Context, name string, b []byte, off int64) (int, error) {
	p.call("read", name)
	return p.Store.ReadAt(ctx, name, b, off)
}

func (p *pauser) Size(ctx context.Context, name string) (int64, error) {
	p.call("size", name)
	return p.Store.Size(ctx, name)
}

func (p *pauser) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	p.call("list", prefix)
	return p.Store.List(ctx, prefix)
}

// A pairWorld is a repository in which every operation finds something to do.
type pairWorld struct {
	h      *history
	base   *mem.Store
	keep   []*point.RestorePoint // that nobody deletes
	prev   *point.RestorePoint   // one of them, of web01
	victim *point.RestorePoint   // that deletions delete
	other  *sourceRepo           // that is copied from
	key    string                // one that may go
	mu     *sync.Mutex           // of h.content
}

func (w *pairWorld) made(content []byte) func(*point.RestorePoint) {
	return func(p *point.RestorePoint) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.h.content[p.ID] = content
	}
}

func (w *pairWorld) was(p *point.RestorePoint) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.h.content[p.ID]
}

func newPairWorld(t *testing.T) *pairWorld {
	st, h, q := garbageRepo(t)
	r := mustOpen(t, st)
	gone := noise(31, 6*testChunk)
	v := mustBackup(t, r, "db04", gone, nil, nil)
	h.add(v, gone)
	ring, err := OpenKeyring(bg, st, testKey)
	if err != nil {
		t.Fatal(err)
	}
	in, err := ring.Add(bg, NewKey{Passphrase: password, Label: "second", KDF: cheap})
	if err != nil {
		t.Fatal(err)
	}
	return &pairWorld{h: h, base: st, keep: slices.Clone(h.points[:2]), prev: q, victim: v, other: newSource(t, small), key: in.ID, mu: &sync.Mutex{}}
}

// A pairOp is one operation as a process of its own would do it.
type pairOp struct {
	name string
	do   func(w *pairWorld, st blob.Store) error
	// ends are classes of errors that it may give beside another, having done no
	// harm.
	ends []error
}

func (w *pairWorld) open(st blob.Store, do func(r *Repository) error) error {
	r, err := Open(bg, st, testKey)
	if err != nil {
		return err
	}
	defer r.Close()
	return do(r)
}

// hold reads a point as restore does.
func (w *pairWorld) hold(st blob.Store, p *point.RestorePoint) error {
	return w.open(st, func(r *Repository) error {
		p, err := r.Point(bg, p.VM, p.ID)
		if err != nil {
			return err
		}
		release, err := r.Hold(bg, p)
		if err != nil {
			return err
		}
		defer release()
		got, err := read(r, p)
		if err == nil && !bytes.Equal(got, w.was(p)) {
			err = errors.New("content differs")
		}
		return err
	})
}

// protect protects a point, wants it there then, and lets it go again.
func (w *pairWorld) protect(r *Repository, p *point.RestorePoint) error {
	if err := r.Protect(bg, p.VM, p.ID, ProtectOptions{Why: "a pair"}); err != nil {
		return err
	}
	got, err := r.Point(bg, p.VM, p.ID)
	if err != nil {
		return fmt.Errorf("it was protected and is gone: %v", err) // in no class
	}
	if !got.Protected {
		return errors.New("it was protected and is not")
	}
	_, err = r.Unprotect(bg, p.VM, p.ID)
	return err
}

var pairOps = []pairOp{
	{"backup", func(w *pairWorld, st blob.Store) error {
		_, b := disks()
		more := append(bytes.Clone(b), noise(71, 2*testChunk)...)
		return w.open(st, func(r *Repository) error {
			return backupAs(bg, r, "web01", more, w.prev, b, w.made(more))
		})
	}, nil},
	{"backup over a point that goes", func(w *pairWorld, st blob.Store) error {
		old := w.was(w.victim)
		more := append(bytes.Clone(old), noise(72, 2*testChunk)...)
		return w.open(st, func(r *Repository) error {
			return backupAs(bg, r, "db04", more, w.victim, old, w.made(more))
		})
	}, []error{fault.ErrNotFound}},
	{"restore", func(w *pairWorld, st blob.Store) error { return w.hold(st, w.prev) }, nil},
	{"restore of a point that goes", func(w *pairWorld, st blob.Store) error { return w.hold(st, w.victim) }, []error{fault.ErrNotFound}},
	{"point delete", func(w *pairWorld, st blob.Store) error {
		return w.open(st, func(r *Repository) error { return r.DeletePoint(bg, w.victim.VM, w.victim.ID) })
	}, []error{fault.ErrNotFound, fault.ErrLocked}}, // protected
	{"protect", func(w *pairWorld, st blob.Store) error {
		return w.open(st, func(r *Repository) error { return w.protect(r, w.prev) })
	}, nil},
	{"protect a point that goes", func(w *pairWorld, st blob.Store) error {
		return w.open(st, func(r *Repository) error { return w.protect(r, w.victim) })
	}, []error{fault.ErrNotFound, fault.ErrLocked}}, // deleted, or going
	{"vacuum", func(w *pairWorld, st blob.Store) error {
		r, err := OpenKeyless(bg, st)
		if err != nil {
			return err
		}
		_, err = r.Vacuum(bg, VacuumOptions{Patience: time.Minute})
		return err
	}, []error{fault.ErrLocked}},
	{"check", func(w *pairWorld, st blob.Store) error {
		return w.open(st, func(r *Repository) error {
			rep, err := r.Check(bg, CheckOptions{ReadData: true})
			for _, f := range rep.Findings {
				err = errors.Join(err, fmt.Errorf("%s: %w", f.Object, f.Err))
			}
			return err
		})
	}, nil},
	{"repair", func(w *pairWorld, st blob.Store) error {
		return w.open(st, func(r *Repository) error {
			rep, err := r.Repair(bg, RepairOptions{Scrub: true})
			for _, f := range rep.Left.Findings {
				err = errors.Join(err, fmt.Errorf("%s: %w", f.Object, f.Err))
			}
			return err
		})
	}, nil},
	{"keys", func(w *pairWorld, st blob.Store) error {
		ring, err := OpenKeyring(bg, st, testKey)
		if err != nil {
			return err
		}
		in, err := ring.Add(bg, NewKey{Passphrase: password, KDF: cheap})
		if err == nil {
			in, err = ring.Rotate(bg, in.ID, NewKey{Passphrase: password, KDF: cheap}, false)
		}
		if err == nil {
			err = ring.Remove(bg, in.ID, false)
		}
		if err == nil {
			err = ring.Remove(bg, w.key, false)
		}
		return err
	}, []error{fault.ErrNotFound, fault.ErrLocked}},
	{"copy from", func(w *pairWorld, st blob.Store) error {
		to := mem.New()
		if err := Init(bg, to, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
			return err
		}
		return w.open(st, func(from *Repository) error {
			points, err := from.Points(bg)
			if err != nil {
				return err
			}
			return w.open(to, func(to *Repository) error {
				got, err := copyAll(bg, from, to, points)
				for ref, c := range got {
					if c.State != CopyDone && c.State != CopyGone {
						err = errors.Join(err, fmt.Errorf("%s: %s: %w", ref, c.State, c.Err))
					}
				}
				return err
			})
		})
	}, nil},
	{"copy to", func(w *pairWorld, st blob.Store) error {
		return w.open(st, func(to *Repository) error {
			_, err := copyAll(bg, w.other.r, to, w.other.points)
			return err
		})
	}, nil},
	{"init", func(w *pairWorld, st blob.Store) error {
		err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap})
		if errors.Is(err, fault.ErrExists) {
			err = nil
		}
		return err
	}, nil},
}

// Whatever an operation is doing when another one runs from its beginning to its
// end, or as far as it gets: both do what they promise. This is the table
// in docs/format/locking.md.
func TestEveryOperationBesideEveryOther(t *testing.T) {
	w := newPairWorld(t)
	if os.Getenv("BACKSTAY_SOAK") != "" {
		moments := 0
		for _, first := range pairOps {
			for _, second := range pairOps {
				for at := 0; w.pair(t, first, second, at) && !t.Failed(); at++ {
					moments++
				}
			}
		}
		t.Logf("%d operations, %d moments", len(pairOps), moments)
		return
	}
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	moments := 30
	if testing.Short() {
		moments = 8
	}
	for range moments {
		w.pair(t, pairOps[rnd.IntN(len(pairOps))], pairOps[rnd.IntN(len(pairOps))], rnd.IntN(50))
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// pair lets second run while first waits before its call number at; it says
// whether there was such a call.
func (w *pairWorld) pair(t *testing.T, first, second pairOp, at int) bool {
	disk := w.base.Clone()
	h := &history{content: map[point.ID][]byte{}}
	for id, b := range w.h.content {
		h.content[id] = b
	}
	run := *w
	run.h = h
	st := pauseAt(at, disk)
	done := make(chan error, 1)
	go func() {
		err := first.do(&run, st)
		close(st.paused)
		done <- err
	}()
	call, paused := <-st.paused
	where := fmt.Sprintf("%s, and before its call %d (%s) %s", first.name, at, call, second.name)
	if paused {
		// What waits for the first does so until it goes on.
		ended := make(chan error, 1)
		go func() { ended <- second.do(&run, disk) }()
		var err error
		select {
		case err = <-ended:
			close(st.resume)
		case <-time.After(100 * time.Millisecond):
			close(st.resume)
			err = <-ended
		}
		if err != nil && !isOne(err, second.ends) {
			t.Errorf("%s: the second: %v", where, err)
		}
	}
	if err := <-done; err != nil && !isOne(err, first.ends) {
		t.Errorf("%s: the first: %v", where, err)
	}
	for round := range 2 {
		r := mustOpen(t, disk)
		points, err := r.Points(bg)
		if err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		there := map[point.ID]bool{}
		for _, p := range points {
			there[p.ID] = true
			want, ok := h.content[p.ID]
			if !ok {
				want = w.other.content[p.Ref()]
			}
			if got, err := readDisk(r, p); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: round %d: %s is lost: %v", where, round, p.Ref(), err)
			}
		}
		for _, p := range w.keep {
			if !there[p.ID] {
				t.Errorf("%s: %s is gone", where, p.Ref())
			}
		}
		rep, err := r.Check(bg, CheckOptions{ReadData: true})
		if err != nil || len(rep.Findings) > 0 {
			t.Errorf("%s: round %d: %+v, %v", where, round, rep.Findings, err)
		}
		finish(t, disk)
		r.Close()
	}
	for _, prefix := range []string{sessionPrefix, beatPrefix, vacuumPrefix} {
		if left := names(t, disk, prefix); len(left) > 0 {
			t.Errorf("%s: left behind: %q", where, left)
		}
	}
	return paused
}

func isOne(err error, classes []error) bool {
	return slices.ContainsFunc(classes, func(c error) bool { return errors.Is(err, c) })
}

// A keeper keeps objects as a bucket with locks does.
type keeper struct {
	*mem.Store
	mu    sync.Mutex
	until map[string]time.Time
	asked func(name string) // before somebody asks until when one is kept
}

func (k *keeper) Retains(context.Context) (bool, error)    { return true, nil }
func (k *keeper) SetRetention(func(name string) time.Time) {}

func (k *keeper) Retain(_ context.Context, name string, until time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.until[name] = until
	return nil
}

func (k *keeper) RetainedUntil(ctx context.Context, name string) (time.Time, error) {
	if k.asked != nil {
		k.asked(name)
	}
	if _, err := k.Size(ctx, name); err != nil {
		return time.Time{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.until[name], nil
}

// A key that is removed while a backup makes the storage keep what its point
// needs costs the backup nothing.
func TestAKeyGoesWhileAPointIsLocked(t *testing.T) {
	st := &keeper{Store: mem.New(), until: map[string]time.Time{}}
	initImmutable(t, st)
	ring, err := OpenKeyring(bg, st, testKey)
	if err != nil {
		t.Fatal(err)
	}
	in, err := ring.Add(bg, NewKey{Passphrase: password, KDF: cheap})
	if err != nil {
		t.Fatal(err)
	}
	st.asked = func(name string) {
		if strings.HasPrefix(name, keysPrefix) {
			if err := st.Store.Delete(bg, keysPrefix+in.ID); err != nil {
				t.Error(err)
			}
		}
	}
	a, _ := disks()
	p := mustBackup(t, mustOpen(t, st), "web01", a, nil, nil)
	mustRead(t, mustOpen(t, st), p, a)
	for o, err := range st.List(bg, "") {
		if err != nil {
			t.Fatal(err)
		}
		if (o.Name == configName || strings.HasPrefix(o.Name, keysPrefix)) && st.until[o.Name].IsZero() {
			t.Errorf("%s is not kept", o.Name)
		}
	}
}

// A restore that began reads the small files of its point, too, though that is
// deleted and vacuumed away.
func TestSmallFilesAreHeld(t *testing.T) {
	st, r := newRepo(t)
	a, _ := disks()
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(bg, int64(len(a)), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(len(a)) / testChunk {
		if _, err := w.Put(bg, i, cut(a, i)); err != nil {
			t.Fatal(err)
		}
	}
	m, err := w.Finish(bg)
	if err != nil {
		t.Fatal(err)
	}
	nvram := noise(12, 40*testChunk) // more than the disk: its pack is worth a rewrite
	file, err := s.PutBlob(bg, nvram)
	if err != nil {
		t.Fatal(err)
	}
	p := newPoint("web01", m, int64(len(a)))
	p.Config = map[string]point.Blob{"nvram": file}
	if err := s.Commit(bg, p); err != nil {
		t.Fatal(err)
	}
	release, err := r.Hold(bg, p)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	other := mustOpen(t, st)
	if err := other.DeletePoint(bg, p.VM, p.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := other.Vacuum(bg, VacuumOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := mustOpen(t, st).ReadBlob(bg, file); err != nil || !bytes.Equal(got, nvram) {
		t.Errorf("the file is lost: %v", err)
	}
}
