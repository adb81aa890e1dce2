package kvm

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// maxSocketPath is what the kernel allows in bytes.
const maxSocketPath = 107

// scratchReserve is the free space in bytes below which a session is given up:
// a guest whose old bytes find no room in scratch space gets write errors.
const scratchReserve = 256 << 20

// maxNVRAM bounds in bytes what we take for a file of UEFI variables.
const maxNVRAM = 64 << 20

// A beginning is a session while it is being made.
type beginning struct {
	d      *Driver
	o      hypervisor.Options
	prefix string
	dom    *domain
	lock   *lock
	run    *journal.Run

	machine  vm.Machine
	config   []vm.ConfigFile
	all      []diskDef
	defs     []diskDef // the protected ones
	facts    []diskFacts
	plans    []decision // one for each of defs
	ready    readiness
	have     map[string]bool // checkpoints
	warnings []string

	dir        string // of the run, in the scratch directory
	socket     string
	checkpoint string // new, "" for none
	owner      [2]int // QEMU's uid and gid
	taken      time.Time
	grade      vm.Grade
	held       time.Duration

	live bool // the VM has a QEMU, and what can track tracks from now on

	// unsure says that nobody told us whether the job began.
	unsure bool
}

// Begin takes a snapshot of a VM: see hypervisor.Driver.
func (d *Driver) Begin(ctx context.Context, name string, o hypervisor.Options) (hypervisor.Session, error) {
	if !isLocal(d.uri) {
		return nil, fmt.Errorf("back up from %s: run backstay on that host, its disks can be read only there: %w", d.uri.Redacted(), fault.ErrUnsupported)
	}
	prefix, err := checkpointPrefix(o.RepoID)
	if err != nil {
		return nil, err
	}
	if o.Consistency == "" {
		o.Consistency = vm.PreferApplication
	}
	c := newConn(d.uri)
	dom, err := c.lookup(ctx, name)
	if err != nil {
		c.close()
		return nil, err
	}
	l, err := d.lock(dom)
	if err != nil {
		c.close()
		return nil, err
	}
	b := &beginning{d: d, o: o, prefix: prefix, dom: dom, lock: l, owner: [2]int{-1, -1}}
	s, err := b.session(ctx)
	if err != nil {
		err = fmt.Errorf("VM %q: %w", name, err)
		if b.run != nil {
			var keep func(journal.Entry) bool
			if b.unsure {
				if e := b.settle(ctx); e != nil {
					err = fmt.Errorf("%w; whether the backup job began is not known, the next run looks again: %w", err, e)
					keep = ofJob
				}
			}
			undoing, cancel := withTimeout(ctx, endTimeout)
			if _, e := dom.undo(undoing, b.run, keep); e != nil {
				err = fmt.Errorf("%w; %w: %w", err, hypervisor.ErrLeft, e)
			}
			cancel()
			b.run.Close()
		}
		l.Unlock()
		c.close()
		return nil, err
	}
	return s, nil
}

// session goes through all steps. After an error its caller undoes what the
// journal names.
func (b *beginning) session(ctx context.Context) (*session, error) {
	id := newUUID()
	j, err := b.d.openJournal()
	if err != nil {
		return nil, err
	}
	if err := b.reap(ctx, j); err != nil {
		return nil, err
	}
	b.reapOthers(ctx, j)
	if b.run, err = j.Begin(b.dom.uuid(), id); err != nil {
		return nil, err
	}
	if what, err := b.dom.job(ctx); err != nil {
		return nil, err
	} else if what != "" {
		return nil, fmt.Errorf("libvirt is busy with %s of it, which is not ours: %w", what, fault.ErrLocked)
	}
	on, state, reason, err := b.dom.now(ctx)
	if err != nil {
		return nil, err
	}
	def, err := b.look(ctx, state)
	if err != nil {
		return nil, err
	}
	b.dir = filepath.Join(b.d.scratchDir, b.prefix+id)
	b.socket = filepath.Join(b.dir, "nbd.sock")
	if len(b.socket) > maxSocketPath {
		return nil, fmt.Errorf("scratch directory %s: its name is too long for a socket in it: %w", b.d.scratchDir, fault.ErrUnsupported)
	}
	if !on {
		return b.offline(ctx, def, reason)
	}
	return b.online(ctx, def, state)
}

// reap clears away what earlier runs of ours left. The checkpoint of a run
// that died after its restore point was durable is the base of this one; one
// that was made for another repository is left to that one's next run.
func (b *beginning) reap(ctx context.Context, j *journal.Journal) error {
	runs, err := j.Runs(b.dom.uuid())
	if err != nil {
		return err
	}
	var durable []string
	for _, p := range b.o.Previous {
		durable = append(durable, baseOf(p))
	}
	for _, r := range runs {
		for _, e := range r.Open() {
			if e.Kind == kindCheckpoint && slices.Contains(durable, e.Name) {
				if err := r.Done(e.Kind, e.Name); err != nil {
					return err
				}
			}
		}
		done, err := b.dom.undo(ctx, r, func(e journal.Entry) bool {
			return e.Kind == kindCheckpoint && !strings.HasPrefix(e.Name, b.prefix)
		})
		r.Close()
		if len(done) > 0 {
			b.warn("an earlier run was interrupted; cleaned up after it: %s", strings.Join(done, ", "))
		}
		if err != nil {
			return fmt.Errorf("clean up after an interrupted run: %w", err)
		}
	}
	return nil
}

func (b *beginning) warn(format string, args ...any) {
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}

// look reads the definition: what disks there are, and the files to keep.
func (b *beginning) look(ctx context.Context, state libvirt.DomainState) (*libvirtxml.Domain, error) {
	_, def, err := b.dom.xml(ctx, 0)
	if err != nil {
		return nil, err
	}
	if b.machine, err = b.d.describe(ctx, b.dom, state); err != nil {
		return nil, err
	}
	for _, e := range disks(def, b.o.Exclude) {
		if e.Excluded == "" {
			if e.SizeBytes, err = b.dom.size(ctx, string(e.ID)); err != nil {
				return nil, fmt.Errorf("disk %s: %w", e.ID, err)
			}
		}
		b.add(e)
	}
	if len(b.defs) == 0 {
		return nil, hypervisor.ErrNoDisk
	}
	text, _, err := b.dom.xml(ctx, libvirt.DomainXMLInactive)
	if err != nil {
		return nil, err
	}
	b.config = []vm.ConfigFile{{Name: "domain.xml", Data: []byte(text)}}
	if path := nvramPath(def); path != "" {
		data, err := readNVRAM(path)
		if err != nil {
			b.warn("the UEFI variables are not in the restore point: %v", err)
		} else {
			b.config = append(b.config, vm.ConfigFile{Name: "nvram", Data: data})
		}
	}
	if b.have, err = b.dom.checkpoints(ctx); err != nil {
		return nil, err
	}
	return def, nil
}

// add takes a disk into account.
func (b *beginning) add(e diskDef) {
	b.all = append(b.all, e)
	if e.medium {
		return // what is in a drive is nothing that somebody forgot to protect
	}
	b.machine.Disks = append(b.machine.Disks, e.Disk)
	if e.Excluded == "" {
		b.defs = append(b.defs, e)
	}
}

func readNVRAM(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxNVRAM {
		return nil, fmt.Errorf("%s has %d bytes: %w", path, st.Size(), fault.ErrUnsupported)
	}
	return os.ReadFile(path)
}

// decideAll plans every disk.
func (b *beginning) decideAll() {
	b.plans = nil
	for _, f := range b.facts {
		b.plans = append(b.plans, decide(f, b.dom.uuid(), b.prefix, b.o.Previous, b.have))
	}
}

// policy says whether grade is enough, and notes a warning where a lower one
// is merely less than what was preferred.
func (b *beginning) policy(grade vm.Grade, why string) error {
	warning, err := hypervisor.Accept(b.o.Consistency, grade, why)
	if warning != "" {
		b.warn("%s", warning)
	}
	return err
}

// online takes the snapshot of a VM that has a QEMU.
func (b *beginning) online(ctx context.Context, def *libvirtxml.Domain, state libvirt.DomainState) (*session, error) {
	nodes, err := b.dom.nodes(ctx)
	if err != nil {
		return nil, err
	}
	for i := range b.defs {
		e := &b.defs[i]
		if err := b.resolve(ctx, e); err != nil {
			return nil, fmt.Errorf("disk %s: %w", e.ID, err)
		}
		f := diskFacts{id: e.ID, files: e.files(), size: e.SizeBytes, format: e.Format, readOnly: e.readOnly}
		if len(e.layers) > 0 {
			f.oldQcow2 = nodes[e.layers[0]].Image.Specific.Data.Compat == "0.10"
		}
		if base := baseOf(b.o.Previous[e.ID]); base != "" {
			f.bitmap = bitmapState(nodes, e.layers, base)
		}
		b.facts = append(b.facts, f)
	}
	b.decideAll()
	if b.ready, err = b.dom.ready(ctx, state, def, b.d.freezeHook); err != nil {
		return nil, err
	}
	if b.ready.foreign {
		b.warn("%s: they were left alone; thaw them with \"virsh domfsthaw %s\"", b.ready.why, b.dom.name)
	}
	freeze := b.o.Consistency != vm.Crash && b.ready.best != vm.GradeCrash
	if !freeze || b.ready.best != vm.GradeApplication {
		if err := b.policy(b.ready.best, b.ready.why); err != nil {
			return nil, err
		}
	}
	if b.owner[0], b.owner[1] = qemuOwner(def); b.owner[0] < 0 {
		b.owner[0], b.owner[1] = processOwner(b.dom.uuid())
	}
	if err := b.scratch(); err != nil {
		return nil, err
	}
	if err := b.snapshot(ctx, freeze); err != nil {
		return nil, err
	}
	return b.open(ctx)
}

// scratch makes the run's directory, and sees that there is room.
func (b *beginning) scratch() error {
	if err := b.run.Note(b.d.entry(kindScratch, b.dir)); err != nil {
		return err
	}
	if err := makeScratch(b.dir, b.owner[0], b.owner[1]); err != nil {
		return err
	}
	free, err := freeBytes(b.dir)
	if err != nil {
		return err
	}
	if free < scratchReserve {
		return fmt.Errorf("scratch directory %s has %d bytes free, at least %d are needed: %w", b.d.scratchDir, free, int64(scratchReserve), fault.ErrNoSpace)
	}
	return nil
}

// snapshot begins the backup job, in a freeze or without one. When libvirt
// finds a bitmap broken that looked sound, it is done again in full.
func (b *beginning) snapshot(ctx context.Context, freeze bool) error {
	for attempt := 0; ; attempt++ {
		begin, err := b.prepare()
		if err != nil {
			return err
		}
		err = b.hold(ctx, freeze, begin)
		switch c := code(err); {
		case err == nil:
			return nil
		case attempt > 0, c != libvirt.ErrCheckpointInconsistent && c != libvirt.ErrNoDomainCheckpoint:
			return err
		}
		b.distrust(err)
	}
}

// distrust turns the disks that libvirt's complaint names, or all if it names
// none, from incremental to full.
func (b *beginning) distrust(complaint error) {
	text := complaint.Error()
	named := func(id vm.DiskID) bool { return strings.Contains(text, "disk '"+string(id)+"'") }
	some := slices.ContainsFunc(b.defs, func(e diskDef) bool { return named(e.ID) })
	for i, e := range b.defs {
		if b.plans[i].mode == point.Incremental && (!some || named(e.ID)) {
			b.plans[i] = decision{mode: point.Full, reason: lost + text, track: true}
		}
	}
}

// prepare writes down what is going to be made, and gives the call that makes
// it: nothing is worked out while the guest stands still.
func (b *beginning) prepare() (begin func(ctx context.Context) error, err error) {
	if b.checkpoint != "" { // of an attempt that failed: its name is not used again
		if err := b.run.Done(kindCheckpoint, b.checkpoint); err != nil {
			return nil, err
		}
		b.checkpoint = ""
	}
	if slices.ContainsFunc(b.plans, func(p decision) bool { return p.track }) {
		b.checkpoint = b.prefix + newUUID()
		if err := b.run.Note(b.d.entry(kindCheckpoint, b.checkpoint)); err != nil {
			return nil, err
		}
	}
	if err := b.run.Note(b.d.entry(kindJob, b.socket)); err != nil {
		return nil, err
	}
	backup, checkpoint, err := b.describeJob()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		// Not to be interrupted: a job that begins behind our back is one that
		// nobody ends.
		err := b.dom.once(context.WithoutCancel(ctx), beginTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) error {
			return l.DomainBackupBegin(dom, backup, checkpoint, 0)
		})
		b.unsure = unanswered(err)
		return err
	}, nil
}

// unanswered says whether err leaves open what became of a call.
func unanswered(err error) bool {
	return errors.Is(err, errLost) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// ofJob are the entries of what a job that may yet begin would need or make.
func ofJob(e journal.Entry) bool {
	return e.Kind == kindJob || e.Kind == kindScratch || e.Kind == kindCheckpoint
}

// settle waits until a job whose beginning nobody saw is there or is known not
// to come: ending it before it begins would end nothing. What needs the VM's
// job has to wait for the call that holds it now.
func (b *beginning) settle(ctx context.Context) error {
	ctx, cancel := withTimeout(ctx, endTimeout)
	defer cancel()
	patient := b.dom.patient
	b.dom.patient = true
	defer func() { b.dom.patient = patient }()
	for {
		if on, err := b.dom.active(ctx); err != nil || !on {
			return gone(err)
		}
		if err := b.dom.monitor(ctx, "query-version", map[string]any{}, nil); err != nil {
			return err
		}
		what, err := b.dom.job(ctx)
		if err != nil {
			return err
		}
		now, err := b.dom.backupSocket(ctx)
		if err != nil {
			return err
		}
		if settled(what, now, b.socket) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// settled says whether ours, the socket of a job that may have begun, has its
// final place: job is what libvirt is doing, now the socket of its backup.
func settled(job, now, ours string) bool { return job == "" || now == ours }

// gone makes nothing of the error that a VM is not there any more.
func gone(err error) error {
	if errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning) {
		return nil
	}
	return err
}

// describeJob writes the two documents that libvirt wants. Every disk of the
// VM is named: libvirt would back up those that are not.
func (b *beginning) describeJob() (backup string, checkpoint libvirt.OptString, err error) {
	pull := &libvirtxml.DomainBackupPull{
		Server: &libvirtxml.DomainBackupPullServer{UNIX: &libvirtxml.DomainBackupPullServerUNIX{Socket: b.socket}},
		Disks:  &libvirtxml.DomainBackupPullDisks{},
	}
	points := &libvirtxml.DomainCheckpointDisks{}
	for _, e := range b.all {
		if e.hostdev {
			continue
		}
		x := libvirtxml.DomainBackupPullDisk{Name: string(e.ID), Backup: "no"}
		c := libvirtxml.DomainCheckpointDisk{Name: string(e.ID), Checkpoint: "no"}
		if i := slices.IndexFunc(b.defs, func(p diskDef) bool { return p.ID == e.ID }); i >= 0 {
			x.Backup, x.BackupMode = "yes", "full"
			x.Scratch = &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{
				File: filepath.Join(b.dir, string(e.ID)+".scratch")}}
			if b.plans[i].mode == point.Incremental {
				x.BackupMode, x.Incremental = "incremental", b.plans[i].base
			}
			if b.plans[i].track {
				c.Checkpoint = "bitmap"
			}
		}
		pull.Disks.Disks = append(pull.Disks.Disks, x)
		points.Disks = append(points.Disks, c)
	}
	job := libvirtxml.DomainBackup{Pull: pull}
	if backup, err = job.Marshal(); err != nil {
		return "", nil, err
	}
	if b.checkpoint == "" {
		return backup, nil, nil
	}
	text, err := xml.Marshal(&libvirtxml.DomainCheckpoint{Name: b.checkpoint,
		Description: "made by Backstay for incremental backups", Disks: points})
	return backup, libvirt.OptString{string(text)}, err
}

// hold takes the snapshot, within a freeze if that is wanted and can be had.
func (b *beginning) hold(ctx context.Context, freeze bool, begin func(context.Context) error) error {
	b.grade, b.held = vm.GradeCrash, 0
	snap := func() error {
		if b.d.afterFreeze != nil {
			b.d.afterFreeze()
		}
		b.taken = time.Now()
		return begin(ctx)
	}
	if !freeze {
		return snap()
	}
	f, err := b.freezer(ctx)
	var lost string
	if err == nil {
		defer f.close()
		b.held, lost, err = f.hold(ctx, snap)
	}
	switch {
	case errors.Is(err, errNotFrozen) && ctx.Err() == nil:
		if err := b.policy(vm.GradeCrash, err.Error()); err != nil {
			return err
		}
		return snap()
	case err != nil:
		return err
	case lost != "":
		return b.policy(vm.GradeCrash, lost)
	}
	b.grade = b.ready.best
	return nil
}

// processOwner finds the VM's QEMU among the host's processes; -1 if it is not
// there.
func processOwner(uuid string) (uid, gid int) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		args, err := os.ReadFile(line)
		if err != nil || !strings.Contains(string(args), "\x00-uuid\x00"+uuid+"\x00") {
			continue
		}
		dir := filepath.Dir(line)
		if !isQEMU(dir) {
			continue
		}
		if uid, gid, ok := fileOwner(dir); ok {
			return uid, gid
		}
	}
	return -1, -1
}

// isQEMU says whether the process at dir in /proc runs a QEMU that root has
// installed: anybody may give a program of his own such arguments, and would
// be given the scratch files.
func isQEMU(dir string) bool {
	exe, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil || !qemuName(exe) {
		return false
	}
	uid, _, ok := fileOwner(filepath.Join(dir, "exe"))
	return ok && uid == 0
}

// qemuName knows the names under which distributions install it.
func qemuName(exe string) bool {
	name := strings.TrimSuffix(filepath.Base(exe), " (deleted)") // upgraded since
	return strings.HasPrefix(name, "qemu-system-") || name == "qemu-kvm"
}
