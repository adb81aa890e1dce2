package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// errSim is every error that the simulation makes up.
var errSim = errors.New("made up")

// A world is a store that several processes use at once, with a clock of its
// own. A seed decides whose call of the store comes next, who sleeps, who dies
// and which calls fail.
type world struct {
	t     *testing.T
	seed  uint64
	rnd   *rand.Rand
	disk  *mem.Store
	procs []*proc

	mu      sync.Mutex // of what follows
	calls   []*call
	content map[point.ID][]byte
	done    map[point.ID]bool // reported as committed
	deleted map[point.ID]bool // or about to be
	stats   map[string]int
}

// A proc is one process: a view of the store in which calls wait for their
// turn.
type proc struct {
	blob.Store
	w     *world
	name  string
	rnd   *rand.Rand
	dead  bool
	slept atomic.Bool
	until int // the step at which it wakes up
	ended atomic.Bool
}

// A call is a call of the store that waits.
type call struct {
	p       *proc
	op      blobtest.Op
	name    string
	verdict chan verdict
}

type verdict struct {
	apply bool
	err   error
}

// turn waits until the call may be made.
func (p *proc) turn(ctx context.Context, op blobtest.Op, name string) (verdict, error) {
	c := &call{p, op, name, make(chan verdict, 1)}
	p.w.mu.Lock()
	if p.dead {
		p.w.mu.Unlock()
		return verdict{}, errSim
	}
	p.w.calls = append(p.w.calls, c)
	p.w.mu.Unlock()
	select {
	case v := <-c.verdict:
		return v, v.err
	case <-ctx.Done():
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		p.w.calls = slices.DeleteFunc(p.w.calls, func(o *call) bool { return o == c })
		return verdict{}, ctx.Err()
	}
}

func (p *proc) change(ctx context.Context, op blobtest.Op, name string, call func(context.Context) error) error {
	v, err := p.turn(ctx, op, name)
	if v.apply {
		return errors.Join(call(context.WithoutCancel(ctx)), err)
	}
	return err
}

func (p *proc) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return p.change(ctx, blobtest.OpPut, name, func(ctx context.Context) error { return p.Store.Put(ctx, name, body, size) })
}

func (p *proc) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return p.change(ctx, blobtest.OpCreate, name, func(ctx context.Context) error { return p.Store.Create(ctx, name, body, size) })
}

func (p *proc) Delete(ctx context.Context, name string) error {
	return p.change(ctx, blobtest.OpDelete, name, func(ctx context.Context) error { return p.Store.Delete(ctx, name) })
}

func (p *proc) ReadAt(ctx context.Context, name string, b []byte, off int64) (int, error) {
	if _, err := p.turn(ctx, blobtest.OpReadAt, name); err != nil {
		return 0, err
	}
	return p.Store.ReadAt(ctx, name, b, off)
}

func (p *proc) Size(ctx context.Context, name string) (int64, error) {
	if _, err := p.turn(ctx, blobtest.OpSize, name); err != nil {
		return 0, err
	}
	return p.Store.Size(ctx, name)
}

// List is no single moment: others may have a turn in the middle of it.
func (p *proc) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		if _, err := p.turn(ctx, blobtest.OpList, prefix); err != nil {
			yield(blob.Object{}, err)
			return
		}
		var first []blob.Object
		for o, err := range p.Store.List(ctx, prefix) {
			if err != nil {
				yield(o, err)
				return
			}
			first = append(first, o)
		}
		first = first[:len(first)/2]
		last := ""
		for _, o := range first {
			if last = o.Name; !yield(o, nil) {
				return
			}
		}
		if _, err := p.turn(ctx, blobtest.OpList, prefix); err != nil {
			yield(blob.Object{}, err)
			return
		}
		for o, err := range p.Store.List(ctx, prefix) {
			if err == nil && o.Name <= last {
				continue
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

// start lets a process do something.
func (w *world) start(name string, do func(p *proc, r *Repository) error) {
	p := &proc{Store: w.disk, w: w, name: name, rnd: rand.New(rand.NewPCG(w.seed, uint64(len(w.procs))))}
	w.procs = append(w.procs, p)
	go func() {
		defer func() { p.ended.Store(true) }()
		for range 1 + p.rnd.IntN(3) {
			r, err := Open(bg, p, testKey)
			if err == nil {
				err = do(p, r)
				r.Close()
			}
			switch {
			case err == nil:
				w.count(name)
			case errors.Is(err, errSim):
			case errors.Is(err, fault.ErrFenced):
				w.count(name + " fenced")
			default:
				w.t.Errorf("seed %d: %s: %v", w.seed, name, err)
			}
		}
	}()
}

func (w *world) count(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats[what]++
}

// backup stores a disk that shares chunks with others, often over a point that
// may be deleted any time.
func (p *proc) backup(r *Repository) error {
	points, err := r.Points(bg)
	if err != nil {
		return err
	}
	var prev *point.RestorePoint
	var old []byte
	if len(points) > 0 && p.rnd.IntN(4) > 0 {
		prev = points[p.rnd.IntN(len(points))]
		p.w.mu.Lock()
		old = p.w.content[prev.ID]
		p.w.mu.Unlock()
	}
	content := bytes.Clone(old)
	if prev == nil || p.rnd.IntN(3) == 0 {
		content = make([]byte, int64(2+p.rnd.IntN(5))*testChunk)
	}
	for range 1 + p.rnd.IntN(4) {
		i := p.rnd.Int64N(int64(len(content)) / testChunk)
		// Few different ones, so that others have them too.
		copy(content[i*testChunk:(i+1)*testChunk], noise(uint64(p.rnd.IntN(12)), testChunk))
	}
	var made point.ID
	err = backupAs(bg, r, p.name, content, prev, old, func(x *point.RestorePoint) {
		made = x.ID
		p.w.mu.Lock()
		defer p.w.mu.Unlock()
		p.w.content[x.ID] = content
	})
	if errors.Is(err, fault.ErrNotFound) && prev != nil && p.w.isDeleted(prev.ID) {
		return nil // deleted before the session could hold it
	}
	if err == nil {
		p.w.mu.Lock()
		p.w.done[made] = true
		p.w.mu.Unlock()
		var joined bool
		if joined, err = r.JoinIndex(bg); joined {
			p.w.count("joined")
		}
	}
	return err
}

func (w *world) isDeleted(id point.ID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.deleted[id]
}

func (p *proc) vacuum(r *Repository) error {
	rep, err := r.Vacuum(bg, VacuumOptions{Patience: time.Duration(1+p.rnd.IntN(120)) * time.Second})
	if errors.Is(err, fault.ErrLocked) {
		return nil
	}
	if err == nil && rep.DeletedPacks > 0 {
		p.w.count("deleted packs")
	}
	if err == nil && rep.RewrittenPacks > 0 {
		p.w.count("rewritten packs")
	}
	if rep.Kept.InUse > 0 {
		p.w.count("packs in use")
	}
	if rep.Revoked > 0 {
		p.w.count("revoked")
	}
	return err
}

func (p *proc) remove(r *Repository) error {
	points, err := r.Points(bg)
	if err != nil || len(points) == 0 {
		return err
	}
	x := points[p.rnd.IntN(len(points))]
	p.w.mu.Lock()
	p.w.deleted[x.ID] = true
	p.w.mu.Unlock()
	err = r.DeletePoint(bg, x.VM, x.ID)
	if errors.Is(err, fault.ErrNotFound) {
		return nil
	}
	return err
}

// restore reads a point that is held, whatever others do to it.
func (p *proc) restore(r *Repository) error {
	points, err := r.Points(bg)
	if err != nil || len(points) == 0 {
		return err
	}
	x := points[p.rnd.IntN(len(points))]
	release, err := r.Hold(bg, x)
	if errors.Is(err, fault.ErrNotFound) && p.w.isDeleted(x.ID) {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	// Whoever slept for too long has lost his hold.
	got, err := read(r, x)
	if err != nil && p.w.isDeleted(x.ID) && p.slept.Load() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", x.Ref(), err)
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if !bytes.Equal(got, p.w.content[x.ID]) {
		return fmt.Errorf("%s: content differs", x.Ref())
	}
	return nil
}

// run gives everybody turns until all have ended.
func (w *world) run() {
	for step := 0; ; step++ {
		synctest.Wait()
		if !slices.ContainsFunc(w.procs, func(p *proc) bool { return !p.ended.Load() }) {
			return
		}
		if step > 200_000 {
			w.t.Fatalf("seed %d: it never ends", w.seed)
		}
		switch n := w.rnd.IntN(1000); {
		case n < 20:
			time.Sleep(time.Duration(w.rnd.IntN(20_000)) * time.Millisecond)
			continue
		case n < 27:
			p := w.procs[w.rnd.IntN(len(w.procs))]
			p.until = step + w.rnd.IntN(2000)
			p.slept.Store(true)
		case n < 29:
			w.kill(w.procs[w.rnd.IntN(len(w.procs))])
			continue
		}
		w.mu.Lock()
		ready := slices.DeleteFunc(slices.Clone(w.calls), func(c *call) bool { return c.p.until > step })
		slices.SortStableFunc(ready, func(a, b *call) int {
			return cmp.Or(cmp.Compare(a.p.name, b.p.name), cmp.Compare(a.op, b.op), cmp.Compare(a.name, b.name))
		})
		if len(ready) == 0 {
			w.mu.Unlock()
			time.Sleep(time.Second)
			continue
		}
		c := ready[w.rnd.IntN(len(ready))]
		w.calls = slices.DeleteFunc(w.calls, func(o *call) bool { return o == c })
		w.mu.Unlock()
		v := verdict{apply: true}
		switch n := w.rnd.IntN(1000); {
		case n < 3:
			v = verdict{false, errSim}
		case n < 6:
			v = verdict{true, errSim} // the reply is lost
		}
		c.verdict <- v
	}
}

// kill ends a process. What it had asked for may or may not happen.
func (w *world) kill(p *proc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.dead = true
	for _, c := range w.calls {
		if c.p == p {
			c.verdict <- verdict{w.rnd.IntN(2) == 0, errSim}
		}
	}
	w.calls = slices.DeleteFunc(w.calls, func(c *call) bool { return c.p == p })
}

func simulate(t *testing.T, base *mem.Store, seed uint64, stats map[string]int) {
	cryptotest.SetGlobalRandom(t, seed)
	synctest.Test(t, func(t *testing.T) {
		w := &world{
			t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 1)), disk: base.Clone(), stats: stats,
			content: map[point.ID][]byte{}, done: map[point.ID]bool{}, deleted: map[point.ID]bool{},
		}
		// Every clock is wrong by up to ten days, differently each time.
		jumps := rand.New(rand.NewPCG(seed, 2))
		var mu sync.Mutex
		idTime = func() uint64 {
			mu.Lock()
			defer mu.Unlock()
			return uint64(1_700_000_000_000 + jumps.Int64N(20*24*3600*1000))
		}
		defer func() { idTime = ulid.Now }()
		for i := range 3 {
			w.start("vm"+strconv.Itoa(i), (*proc).backup)
		}
		w.start("vacuum0", (*proc).vacuum)
		w.start("vacuum1", (*proc).vacuum)
		w.start("delete", (*proc).remove)
		w.start("restore", (*proc).restore)
		w.run()
		w.check(t)
	})
}

// check looks at what is left when everybody is gone.
func (w *world) check(t *testing.T) {
	for round := range 3 {
		r := mustOpen(t, w.disk)
		points, err := r.Points(bg)
		if err != nil {
			t.Fatalf("seed %d: %v", w.seed, err)
		}
		there := map[point.ID]bool{}
		for _, p := range points {
			there[p.ID] = true
			got, err := read(r, p)
			if err != nil || !bytes.Equal(got, w.content[p.ID]) {
				t.Fatalf("seed %d, round %d: %s: lost: %v", w.seed, round, p.Ref(), err)
			}
		}
		for id := range w.done {
			if !there[id] && !w.deleted[id] {
				t.Fatalf("seed %d, round %d: %s is gone", w.seed, round, id)
			}
		}
		rep, err := r.Check(bg, CheckOptions{ReadData: true})
		if err != nil || len(rep.Findings) > 0 {
			t.Fatalf("seed %d, round %d: %+v, %v", w.seed, round, rep.Findings, err)
		}
		if _, err := r.Vacuum(bg, VacuumOptions{Patience: time.Second}); err != nil {
			t.Fatalf("seed %d: vacuum at the end: %v", w.seed, err)
		}
	}
	for _, prefix := range []string{sessionPrefix, beatPrefix, vacuumPrefix} {
		if names, _ := blobtest.Names(bg, w.disk, prefix); len(names) > 0 {
			t.Errorf("seed %d: left behind: %q", w.seed, names)
		}
	}
}

// Whatever order the calls of backups, vacuums, deletions and restores come in,
// whoever sleeps through what, whoever dies and whatever the clocks say:
// no point that exists misses anything.
func TestSimulation(t *testing.T) {
	seeds := 200
	if testing.Short() {
		seeds = 20
	}
	if s := os.Getenv("BACKSTAY_SEEDS"); s != "" {
		seeds, _ = strconv.Atoi(s)
	}
	realBeats(t)
	joinAt(t, 1)
	first, _ := strconv.ParseUint(os.Getenv("BACKSTAY_SEED"), 10, 64)
	base := mem.New()
	mustInit(t, base)
	stats := map[string]int{}
	for i := range seeds {
		simulate(t, base, first+uint64(i), stats)
		if t.Failed() {
			break
		}
	}
	t.Logf("%d seeds from %d on: %v", seeds, first, stats)
	if t.Failed() || seeds < 100 {
		return
	}
	for _, what := range []string{"vm0", "vm1", "vm2", "vm0 fenced", "vacuum0", "vacuum1", "delete", "restore", "deleted packs", "rewritten packs", "packs in use", "revoked", "joined"} {
		if stats[what] == 0 {
			t.Errorf("%q never happened", what)
		}
	}
}
