package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A volume with less free than both of these gets no checkpoint, and ends one:
// a VM whose host runs full is paused.
const (
	leastFree      = 2 << 30 // bytes
	leastFreeShare = 0.05
)

// ErrOnlySavedState says that the host can make no checkpoint for a backup but
// one that saves the guest's memory, and that this was not allowed.
var ErrOnlySavedState = fmt.Errorf("this host knows no checkpoints for backups, as those before Windows Server 2016: %w", fault.ErrConsistency)

// ErrHostSpace says that a volume of the host is too full to go on.
var ErrHostSpace = errors.New("too little space on the host")

// A beginning is a session while it is being made.
type beginning struct {
	where    sync.Mutex    // of d and warnings
	d        *Driver       // of the host that has the VM; changed by follow alone
	moving   chan struct{} // has something while follow looks
	roam     *roamer       // reads the VM's files
	o        hypervisor.Options
	prefix   string
	host     string // as it calls itself
	sys      system
	lock     *journal.Lock
	journal  *journal.Journal
	run      *journal.Run
	truncate bool            // the guest's applications may drop their logs
	unsaved  []string        // what of the VM's storage is not in the restore point
	named    map[string]bool // runs that the previous restore point rests on
	release  func()
	life     context.Context    // of the session
	reading  context.Context    // ends with Begin's, too: who cleans up needs no more of it
	end      context.CancelFunc // ends both
	warnings []string

	machine vm.Machine
	config  []vm.ConfigFile
	now     settings // of the VM
	ready   readiness
	entry   journal.Entry
	frozen  settings
	saved   bool // the checkpoint has the guest's memory
	taken   time.Time
	grade   vm.Grade
	disks   []*disk
	live    map[vm.DiskID]string // files that the disks were in before the checkpoint
	deltas  []string             // files that the guest writes to meanwhile
	tracked bool                 // some disk is
}

// Begin takes a snapshot of a VM: see hypervisor.Driver.
func (d *Driver) Begin(ctx context.Context, name string, o hypervisor.Options) (hypervisor.Session, error) {
	prefix, err := repoPrefix(o.RepoID)
	if err != nil {
		return nil, err
	}
	if o.Consistency == "" {
		o.Consistency = vm.PreferApplication
	}
	var unseen error
	for try, wanted := 1, name; ; try++ {
		at, err := d.find(ctx, wanted)
		if err != nil {
			return nil, err
		}
		if try == 1 {
			unseen = at.unseen
		}
		at.unseen = unseen // of the name, also where it was found by its GUID since
		s, moved, err := at.begin(ctx, name, o, prefix)
		if err == nil {
			return s, nil
		}
		if !moved || try == mostMoves {
			return nil, err
		}
		wanted = at.sys.guid
		d.log.Info("the VM moved to another node while its backup began, which begins again", "vm", name, "err", err)
	}
}

// mostMoves is how often a backup begins for a VM that moves meanwhile.
const mostMoves = 3

// begin begins on the host that has the VM. moved says that another node has it
// now, and that nothing is left of the attempt.
func (at sighting) begin(ctx context.Context, name string, o hypervisor.Options, prefix string) (s *session, moved bool, err error) {
	l, err := at.d.lock(ctx, at.sys)
	if err != nil {
		return nil, false, err
	}
	b := &beginning{d: at.d, o: o, prefix: prefix, host: at.host, sys: at.sys, lock: l, named: map[string]bool{}, release: func() {}, moving: make(chan struct{}, 1), machine: at.d.describe(at.host, at.sys)}
	if at.unseen != nil {
		b.warn("this restore point is of VM %s; another one called %q may be where nobody could look, so name the one that is meant by its GUID: %v", at.sys.guid, at.sys.name, at.unseen)
	}
	for _, p := range o.Previous {
		if c, err := parseChangeID(p.ChangeID); err == nil {
			b.named[c.Run] = true
		}
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	reading, stopReading := context.WithCancel(ctx)
	b.life, b.reading = life, reading
	b.end = func() {
		stopReading()
		end()
	}
	// What is opened now is read after ctx is over.
	stop := context.AfterFunc(ctx, b.end)
	s, err = b.session(ctx, at.list)
	if err == nil && !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		err = fmt.Errorf("VM %q: %w", name, err)
		moved = ctx.Err() == nil && b.follow(ctx, at.d, err)
		if e := b.undo(ctx); e != nil {
			moved = false
			err = fmt.Errorf("%w; %w: %w", err, hypervisor.ErrLeft, e)
		}
		b.close()
		return nil, moved, err
	}
	s.watch()
	return s, false, nil
}

// at is the Driver of the host that has the VM, as far as is known.
func (b *beginning) at() *Driver {
	b.where.Lock()
	defer b.where.Unlock()
	return b.d
}

// target is the VM with this session's run, on the host that has it.
func (b *beginning) target() *target {
	t := b.at().target(b.sys, b.prefix, b.run)
	t.truncate = b.truncate
	return t
}

// undo takes away what the journal names.
func (b *beginning) undo(ctx context.Context) error {
	if b.run == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	var errs []error
	for _, e := range b.run.Open() {
		if e.Kind == kindCheckpoint {
			_, err := b.target().drop(ctx, e)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// close lets go of everything but what is on the host.
func (b *beginning) close() {
	b.end()
	for _, d := range b.disks {
		d.img.Close()
	}
	if b.run != nil {
		b.run.Close()
	}
	b.release()
	b.lock.Unlock()
}

func (b *beginning) warn(format string, args ...any) {
	b.where.Lock()
	defer b.where.Unlock()
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}

// session goes through all steps. After an error its caller undoes what the
// journal names.
func (b *beginning) session(ctx context.Context, list []system) (s *session, err error) {
	d := b.d
	if b.journal, err = d.openJournal(); err != nil {
		return nil, err
	}
	if err := b.reap(ctx); err != nil {
		return nil, err
	}
	b.reapOthers(ctx, list)
	b.warnings = append(b.warnings, d.reapRestores(ctx, b.host, list, b.sys.guid)...)
	id := newRun()
	if b.run, err = b.journal.Begin(b.sys.guid, id); err != nil {
		return nil, err
	}
	b.entry = d.entry(kindCheckpoint, id, b.prefix)
	if b.now, err = d.present(ctx, b.sys); err != nil {
		return nil, err
	}
	before, err := d.drives(ctx, b.now.ref)
	if err != nil {
		return nil, err
	}
	fibres, err := d.fibres(ctx, b.now.ref)
	if err != nil {
		return nil, err
	}
	if len(fibres) > 0 {
		b.warn("the VM has a Fibre Channel adapter of its own; what it reaches by it is not in the restore point")
		b.unsaved = append(b.unsaved, "what it reaches by Fibre Channel")
	}
	var volumes []string
	for i := range before {
		if d.exclude(&before[i], b.o.Exclude); before[i].Excluded == "" {
			volumes = append(volumes, volumeOf(before[i].Source))
		} else {
			b.unsaved = append(b.unsaved, "disk "+string(before[i].ID))
		}
	}
	if len(volumes) == 0 {
		return nil, noDisk(before)
	}
	if slices.ContainsFunc(volumes, isShared) && len(d.cluster.known()) == 0 {
		d.nodes(ctx) // should this one go down, who the others are is too late to ask
	}
	b.roam = newRoamer(b)
	if b.release, err = d.slot(ctx, volumes); err != nil {
		b.release = func() {}
		return nil, err
	}
	for _, e := range before {
		if e.Excluded == "" {
			if err := d.checkSpace(ctx, e.Source); err != nil {
				return nil, err
			}
		}
	}
	if err := b.freeze(ctx); err != nil {
		return nil, err
	}
	if err := b.open(ctx, before); err != nil {
		return nil, err
	}
	b.describeConfig(ctx)
	s = &session{beginning: b}
	for _, e := range b.disks {
		e.s = s
	}
	return s, nil
}

// A NoDiskError says of each disk of a VM why it can't be backed up. It is a
// hypervisor.ErrNoDisk.
type NoDiskError struct{ Disks []vm.Disk }

func noDisk(list []drive) error {
	e := &NoDiskError{}
	for _, d := range list {
		e.Disks = append(e.Disks, d.Disk)
	}
	return e
}

func (e *NoDiskError) Error() string {
	text := hypervisor.ErrNoDisk.Error()
	for _, d := range e.Disks {
		text += fmt.Sprintf("; %s: %s", d.ID, d.Excluded)
	}
	return text
}

// Unwrap is hypervisor.ErrNoDisk.
func (e *NoDiskError) Unwrap() error { return hypervisor.ErrNoDisk }

// checkSpace fails if the volume of a file is about to be full. A host that
// doesn't tell is believed to have space.
func (d *Driver) checkSpace(ctx context.Context, file string) error {
	free, total, err := d.files.space(ctx, file)
	if err == nil && free < leastFree && float64(free) < leastFreeShare*float64(total) {
		return fmt.Errorf("the volume of %s has only %d of %d bytes free: %w", file, free, total, ErrHostSpace)
	}
	return nil
}

// freeze makes the checkpoint, as still as the guest allows and policy asks.
func (b *beginning) freeze(ctx context.Context) (err error) {
	modern, err := b.d.hasReferencePoints(ctx)
	if err != nil {
		return err
	}
	b.ready = b.d.guest(ctx, b.sys)
	switch {
	case !modern && !b.d.savedState:
		return ErrOnlySavedState
	case !modern:
		return b.save(ctx, "this host knows no checkpoints for backups")
	}
	level, grade := uint8(levelCrash), vm.GradeCrash
	if b.o.Consistency != vm.Crash && b.ready.best != vm.GradeCrash {
		level, grade = levelApplication, b.ready.best
		if b.ready.outdated != "" {
			b.warn("%s", b.ready.outdated)
		}
	}
	if err := b.accept(grade, b.ready.why); err != nil {
		return err
	}
	defer func() {
		if b.d.truncateLogs && err == nil && b.grade != vm.GradeApplication {
			b.warn("do not count on the applications' logs having been truncated: the restore point is %s-consistent only", b.grade)
		}
	}()
	b.truncate = b.d.truncateLogs && grade == vm.GradeApplication
	if b.truncate && len(b.unsaved) > 0 {
		// A log may be of a database that is on one of those, and saved by nobody.
		b.truncate = false
		b.warn("the applications' logs are not truncated, since not all that they belong to is in the restore point: it has not %s", strings.Join(b.unsaved, ", "))
	}
	err = b.make(ctx, level, grade)
	if level == levelApplication && refusedByHost(err) && ctx.Err() == nil {
		// The guest did not hold still.
		if err := b.accept(vm.GradeCrash, err.Error()); err != nil {
			return err
		}
		if err := b.undo(ctx); err != nil {
			return err
		}
		b.truncate = false
		err = b.make(ctx, levelCrash, vm.GradeCrash)
	}
	if b.d.savedState && b.sys.state == stateRunning && refusedByHost(err) && ctx.Err() == nil {
		if err := b.undo(ctx); err != nil {
			return err
		}
		return b.save(ctx, err.Error())
	}
	return err
}

// refusedByHost says whether err is the host's own word that it could not make
// a checkpoint, and that it may make another kind.
func refusedByHost(err error) bool {
	var job *JobError
	var code *ReturnError
	return (errors.As(err, &job) || errors.As(err, &code)) && !errors.Is(err, errBusy) && !errors.Is(err, fault.ErrConsistency)
}

func (b *beginning) accept(grade vm.Grade, why string) error {
	warning, err := hypervisor.Accept(b.o.Consistency, grade, why)
	if warning != "" {
		b.warn("%s", warning)
	}
	if err != nil {
		return &GradeError{err}
	}
	return nil
}

// A GradeError says that the guest could not be held as still as policy asks.
// It is in the class fault.ErrConsistency.
type GradeError struct{ Err error }

func (e *GradeError) Error() string { return e.Err.Error() }

// Unwrap gives the reason.
func (e *GradeError) Unwrap() error { return e.Err }

// make makes a checkpoint that promises grade, or is less if the host says so.
func (b *beginning) make(ctx context.Context, level uint8, grade vm.Grade) error {
	b.taken = time.Now()
	s, warning, err := b.target().checkpoint(ctx, b.entry, level)
	if err != nil {
		return err
	}
	b.frozen, b.grade = s, grade
	if got, ok := s.number("ConsistencyLevel"); warning == nil && ok && level == levelApplication && got == levelCrash {
		warning = errors.New("the host calls its checkpoint crash-consistent")
	}
	if warning != nil && level == levelApplication {
		b.grade = vm.GradeCrash
		return b.accept(b.grade, warning.Error())
	}
	if warning != nil {
		b.warn("%v", warning)
	}
	return nil
}

// save makes a checkpoint with the guest's memory, of which there is no change
// tracking.
func (b *beginning) save(ctx context.Context, why string) error {
	grade := vm.GradeCrash // a VM that does not run has no memory to save
	if b.sys.state == stateRunning {
		grade = vm.GradeSavedState
	}
	if err := b.accept(grade, why); err != nil {
		return err
	}
	b.saved = true
	return b.make(ctx, 0, grade)
}

// open opens the disks of the checkpoint and plans how to read each. before are
// those of the VM: what of them the checkpoint left out is named.
func (b *beginning) open(ctx context.Context, before []drive) error {
	frozen, err := b.d.drives(ctx, b.frozen.ref)
	if err != nil {
		return err
	}
	shares := map[string]bool{}
	for i := range frozen {
		b.d.exclude(&frozen[i], b.o.Exclude)
		if share, err := b.d.files.share(frozen[i].Source); err == nil {
			shares[share] = true
		}
	}
	b.live = map[vm.DiskID]string{}
	for _, e := range before {
		b.live[e.ID] = e.Source
		if slices.ContainsFunc(frozen, func(f drive) bool { return f.ID == e.ID }) {
			continue
		}
		if e.Excluded == "" {
			e.Excluded = "the host left it out of the checkpoint"
			if b.truncate && b.grade == vm.GradeApplication {
				b.warn("the applications have truncated their logs, and disk %s is not in the restore point, since %s: back up by other means what is on it", e.ID, e.Excluded)
			}
		}
		frozen = append(frozen, e)
	}
	slices.SortFunc(frozen, func(a, b drive) int { return compareIDs(a.ID, b.ID) })
	facts := vmFacts{guid: b.sys.guid, node: b.d.nodeName(), old: !tracks(b.now.text("Version")), saved: b.saved}
	if facts.bases, err = b.bases(ctx); err != nil {
		return err
	}
	for _, e := range frozen {
		if e.Excluded == "" {
			if err := b.openDisk(ctx, &e, shares, facts); err != nil {
				return &DiskError{string(e.ID), err}
			}
		}
		b.machine.Disks = append(b.machine.Disks, e.Disk)
	}
	if len(b.disks) == 0 {
		return hypervisor.ErrNoDisk
	}
	// What the VM's disks are in now, besides, grows while we read and is
	// merged when we are done.
	now, err := b.d.sources(ctx, b.now.ref)
	if err != nil {
		return err
	}
	for _, file := range now {
		if !slices.ContainsFunc(frozen, func(f drive) bool { return strings.EqualFold(f.Source, file) }) {
			b.deltas = append(b.deltas, file)
		}
	}
	return nil
}

// A DiskError says that a disk of a VM can't be opened where it lies on the host.
type DiskError struct {
	Disk string
	Err  error
}

func (e *DiskError) Error() string { return "disk " + e.Disk + ": " + e.Err.Error() }

// Unwrap gives the reason.
func (e *DiskError) Unwrap() error { return e.Err }

func (b *beginning) openDisk(ctx context.Context, e *drive, shares map[string]bool, of vmFacts) error {
	img, chain, err := openChain(b.life, b.roam, e.Source, e.Format, shares)
	if err != nil {
		return err
	}
	info := img.Info()
	e.SizeBytes = img.Size()
	for _, w := range info.Warnings {
		b.warn("%s: %s", e.Source, w)
	}
	f := diskFacts{id: e.ID, device: e.device, format: e.Format, size: e.SizeBytes, identity: info.FormatDetails["disk identity"], chain: chain}
	d := &disk{info: e.Disk, img: img, b: b, node: b.d, plan: decide(f, of, b.o.Previous), window: window{bytes: firstWindow}}
	b.disks = append(b.disks, d)
	if d.plan.track {
		b.tracked = true
		d.change = changeID{1, b.sys.guid, b.entry.Name, e.device, f.identity, b.live[e.ID]}.String()
	}
	if d.plan.mode == point.Incremental {
		// Whether the host still knows, only an answer tells.
		if err := d.ask(ctx, 0); err != nil {
			if ctx.Err() != nil {
				return err
			}
			d.plan = decision{mode: point.Full, reason: lost + err.Error(), track: true}
		}
	}
	return nil
}

// bases are our reference points of this repository that the previous restore
// point rests on.
func (b *beginning) bases(ctx context.Context) (map[string]reference, error) {
	out := map[string]reference{}
	runs, err := b.journal.Runs(b.sys.guid)
	if err != nil {
		return nil, err
	}
	for _, r := range runs {
		for _, e := range r.Open() {
			if e.Kind != kindReference || e.Data[dataRepo] != b.prefix || !b.named[e.Data[dataRun]] {
				continue
			}
			in, err := b.d.Get(ctx, instance(classReference, e.Name))
			base := reference{id: e.Name, node: e.Data[dataNode], moved: e.Data[dataMoved]}
			switch {
			case errors.Is(err, fault.ErrNotFound) && b.target().onHost(ctx) == nil:
				base.missing = true
			case err != nil:
				return nil, fmt.Errorf("read a reference point: %w", err)
			default:
				o := object{in}
				base.disks, base.tracking = o.list("VirtualDiskIdentifiers"), o.list("ResilientChangeTrackingIdentifiers")
			}
			out[e.Data[dataRun]] = base
		}
	}
	return out, nil
}
