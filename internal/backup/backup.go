// Package backup turns a hypervisor's snapshot of a VM into a restore point,
// once.
//
// The order is the promise: every chunk and manifest is stored, then the
// repository's outcome makes the point exist, and only then the driver may
// move its checkpoint. Whatever fails before leaves the VM as it was and the
// repository with nothing but reusable garbage.
//
// docs/design/pipeline.md has the picture and the bounds of memory.
package backup

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// Defaults of Options.
const (
	DefaultVMs        = 2
	DefaultDisks      = 3
	DefaultAudit      = 0.005
	DefaultAuditLeast = 16
)

// cleanupTime is how long an abort may take when the run's own context is over.
const cleanupTime = 2 * time.Minute

// Options hold for all jobs of one Run. Zero values choose the defaults.
type Options struct {
	Repo  *repo.Repository
	Level repo.Level
	// NoOverlays stores every changed chunk as a whole.
	NoOverlays bool
	VMs        int // VMs backed up at once
	Disks      int // disks read at once, over all VMs
	Workers    int // of each disk; 0 is two more than there are processors

	// Audit is the share of the chunks that change tracking calls unchanged
	// which every incremental reads again and compares, at least AuditLeast of
	// them. A negative Audit switches it off.
	Audit      float64
	AuditLeast int
	Seed       uint64 // of the audit's choice; 0 for a random one

	Now      func() time.Time
	Log      *slog.Logger
	Progress Progress
}

// A Progress is told how far the work has come; its methods may be called from
// several goroutines at once.
type Progress interface {
	Total(bytes int64) // there are that many bytes more to do
	Add(bytes int64)   // that many bytes are done
}

// A Job is one VM to back up.
type Job struct {
	Driver hypervisor.Driver
	Name   string // as the driver knows it
	VM     string // as the repository is to call it; "" for the driver's name
	Source string // for the record; it holds no secret

	Consistency  vm.Consistency
	FreezeLimit  time.Duration
	Exclude      []vm.DiskID
	ScratchLimit int64
}

// A Result says what became of one Job.
type Result struct {
	Job   Job
	VM    string              // as the repository calls it
	Point *point.RestorePoint // nil if Err is not
	Err   error

	// Lied are the disks whose change tracking the audit caught lying. The
	// point is good, since they were read whole; earlier ones are Suspect.
	Lied    []vm.DiskID
	Suspect []point.ID

	// Damage is what of the repository could not be read on the way, nil if
	// all could. The point is good: what it needed came from the source.
	Damage error

	Warnings []string
	Duration time.Duration // all of it
	HostTime time.Duration // of it, in the driver's Begin, Commit or Abort
}

// Run backs up all jobs, some at a time, and gives one Result for each, in the
// order of jobs. A VM that fails fails alone.
func Run(ctx context.Context, o Options, jobs []Job) []Result {
	e := newEngine(o)
	results := make([]Result, len(jobs))
	slots := make(chan struct{}, e.VMs)
	var wg sync.WaitGroup
	for i := range jobs {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			results[i] = e.backUp(ctx, jobs[i])
			if worthAnother(ctx, results[i]) {
				results[i] = e.backUpAgain(ctx, results[i])
			}
		})
	}
	wg.Wait()
	return results
}

// An engine is the Options of one Run and what its VMs share.
type engine struct {
	Options
	reading chan struct{} // a place for each disk that may be read at once

	mu       sync.Mutex
	names    map[string]string // VM names taken in this Run, by whom
	listings map[hypervisor.Driver]*listing
}

func (e *engine) session() repo.SessionOptions {
	return repo.SessionOptions{Level: e.Level, NoOverlays: e.NoOverlays}
}

func newEngine(o Options) *engine {
	if o.VMs <= 0 {
		o.VMs = DefaultVMs
	}
	if o.Disks <= 0 {
		o.Disks = DefaultDisks
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0) + 2
	}
	if o.Audit == 0 {
		o.Audit = DefaultAudit
	}
	if o.AuditLeast <= 0 {
		o.AuditLeast = DefaultAuditLeast
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Progress == nil {
		o.Progress = noProgress{}
	}
	return &engine{Options: o, reading: make(chan struct{}, o.Disks), names: map[string]string{}, listings: map[hypervisor.Driver]*listing{}}
}

type noProgress struct{}

func (noProgress) Total(int64) {}
func (noProgress) Add(int64)   {}

// backUp does one job from its name to its outcome.
func (e *engine) backUp(ctx context.Context, job Job) (res Result) {
	start := e.Now()
	res = Result{Job: job, VM: job.VM}
	defer func() { res.Duration = e.Now().Sub(start) }()
	fail := func(err error) Result {
		name := res.VM
		if name == "" {
			name = job.Name
		}
		res.Err = fmt.Errorf("back up %s: %w", name, err)
		return res
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	history, name, err := e.history(ctx, job)
	if err != nil {
		return fail(err)
	}
	res.VM = name
	defer func() { res.Damage = history.damage() }()

	// The store is asked before the guest is touched: a full or read-only
	// store must not cost a freeze.
	rs, err := e.Repo.Begin(ctx, e.session())
	if err != nil {
		return fail(err)
	}
	abort := func() {
		ctx, cancel := cleanup()
		defer cancel()
		if err := rs.Abort(ctx); err != nil {
			e.Log.Warn("abort of the repository session", "vm", name, "err", err)
		}
	}
	defer func() {
		if res.Err != nil {
			abort()
		}
	}()

	began := e.Now()
	hs, err := job.Driver.Begin(ctx, job.Name, hypervisor.Options{
		RepoID:       e.Repo.ID(),
		Consistency:  job.Consistency,
		FreezeLimit:  job.FreezeLimit,
		Previous:     history.previous(),
		Exclude:      job.Exclude,
		ScratchLimit: job.ScratchLimit,
		Log:          e.Log,
	})
	res.HostTime = e.Now().Sub(began)
	if err != nil {
		return fail(err)
	}
	committed := false
	defer func() {
		if committed {
			return
		}
		ctx, cancel := cleanup()
		defer cancel()
		if err := hs.Abort(ctx); err != nil {
			res.Err = fmt.Errorf("%w; and the snapshot could not be removed: %w", res.Err, err)
		}
	}()

	if err := history.another(hs.Machine()); err != nil {
		return fail(err)
	}
	if len(hs.Disks()) == 0 {
		return fail(hypervisor.ErrNoDisk)
	}
	p, err := e.readAll(ctx, &res, rs, hs, history)
	if history.blames(err) && ctx.Err() == nil {
		// The previous point's manifests can't be read all through. A session
		// that met this is broken; what it stored is reused by the next.
		e.Log.Warn("the previous restore point can't be built on, reading everything", "vm", name, "err", err)
		history.giveUp(err)
		abort()
		again, err2 := e.Repo.Begin(ctx, e.session())
		if err2 != nil {
			return fail(err2)
		}
		rs = again
		p, err = e.readAll(ctx, &res, rs, hs, history)
	}
	if err != nil {
		return fail(err)
	}
	if c, ok := hs.(hypervisor.Checker); ok {
		if err := c.Check(ctx); err != nil {
			return fail(err)
		}
	}
	for _, w := range hs.Warnings() { // reading may have added some
		if !slices.Contains(p.Warnings, w) {
			p.Warnings = append(p.Warnings, w)
		}
	}
	p.VM, p.Source = name, job.Source
	if w := history.stranger(job); w != "" {
		p.Warnings = append(p.Warnings, w)
	}
	p.Stats.Duration = e.Now().Sub(start)
	if err := rs.Commit(ctx, p); err != nil {
		return fail(err)
	}
	committed = true
	res.Point = p
	res.Warnings = append(res.Warnings, p.Warnings...)
	if err := history.damage(); err != nil {
		res.Warnings = append(res.Warnings, fmt.Sprintf("the repository is damaged; this point does not rest on it: %v", err))
	}

	// The point is durable. If the host can't be told, that costs a full read
	// next time and perhaps a leftover that the reaper takes, never data.
	cctx, cancel := cleanup()
	defer cancel()
	began = e.Now()
	if err := hs.Commit(cctx); err != nil {
		res.Warnings = append(res.Warnings, fmt.Sprintf("the restore point is good, but the snapshot on the host could not be finished: %v", err))
	}
	res.HostTime += e.Now().Sub(began)
	return res
}

// cleanup is a context for what must happen after the run's own is over.
func cleanup() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), cleanupTime)
}

// readAll reads every disk and the machine's definition into rs, and gives the
// restore point to commit.
func (e *engine) readAll(ctx context.Context, res *Result, rs *repo.Session, hs hypervisor.Session, h *history) (*point.RestorePoint, error) {
	p := &point.RestorePoint{
		Time:      hs.Taken().UTC(),
		Machine:   hs.Machine(),
		Grade:     hs.Grade(),
		FrozenFor: hs.FrozenFor(),
		Warnings:  slices.Clone(hs.Warnings()),
		Config:    map[string]point.Blob{},
	}
	if newest := h.newest(); newest != nil && !p.Time.After(newest.Time) {
		// Points are ordered by time. One that sorted before the point that it
		// was built on would make the next backup believe the wrong one.
		p.Warnings = append(p.Warnings, fmt.Sprintf("the clock is behind: it says %s, and the restore point before is of %s; this one is put right after it",
			p.Time.Format(time.RFC3339), newest.Time.UTC().Format(time.RFC3339)))
		p.Time = newest.Time.UTC().Add(time.Millisecond)
	}
	var random [4]byte
	rand.Read(random[:])
	p.ID = point.NewID(p.Time, random)
	for _, d := range p.Machine.Disks {
		if d.Excluded != "" {
			p.Unprotected = append(p.Unprotected, d)
		}
	}
	for _, f := range hs.Config() {
		b, err := rs.PutBlob(ctx, f.Data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
		p.Config[f.Name] = b
	}

	disks := hs.Disks()
	p.Disks = make([]point.Disk, len(disks))
	lied, lost := make([]bool, len(disks)), make([]int64, len(disks))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i, d := range disks {
		wg.Go(func() {
			select {
			case e.reading <- struct{}{}:
				defer func() { <-e.reading }()
			case <-ctx.Done():
				return
			}
			r := &reader{engine: e, src: d, info: d.Info(), session: rs, history: h, seed: e.seed()}
			var err error
			if p.Disks[i], err = r.run(ctx); err != nil {
				cancel(fmt.Errorf("disk %s: %w", r.info.ID, err))
			}
			lied[i], lost[i] = r.lied, r.lost
		})
	}
	wg.Wait()
	for i, l := range lied {
		if l {
			res.Lied = append(res.Lied, disks[i].Info().ID)
		}
	}
	res.Suspect = h.suspect
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	for i, d := range p.Disks {
		p.Stats.Add(d.Stats)
		if lost[i] > 0 {
			p.Warnings = append(p.Warnings, fmt.Sprintf("disk %s: %d chunks that tracking called unchanged are zeros now: was the disk shrunk and grown again?", d.ID, lost[i]))
		}
	}
	return p, nil
}

// seed chooses the audit's sample of one disk.
func (e *engine) seed() uint64 {
	if e.Seed != 0 {
		return e.Seed
	}
	var b [8]byte
	rand.Read(b[:])
	return binary.LittleEndian.Uint64(b[:])
}

// ErrNoSuchVM says that a driver does not list the VM.
var ErrNoSuchVM = fmt.Errorf("the host has no such VM: %w", fault.ErrNotFound)

// ErrOtherVM says that a VM was deleted, and another one made under its name,
// while a Run was under way.
var ErrOtherVM = errors.New("another VM of that name was made meanwhile")

func errNoSuchVM(name string) error { return fmt.Errorf("VM %s: %w", name, ErrNoSuchVM) }
