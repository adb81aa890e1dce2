package hyperv

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// Steps of Survey, Rehearse and RehearseRestore.
const (
	StepInventory = "inventory"
	StepHost      = "host"
	StepMachine   = "machine"
	StepRefusals  = "refusals"
	StepCycle     = "cycle"
	StepRestore   = "restore"
	StepImport    = "import"
)

// noMachine is the GUID of a VM that no host has.
const noMachine = "5D2B0E3C-0F4E-4B7B-9A59-3C1B8E6F2A01"

// surveyed are the classes whose instances of a VM's settings a survey reads.
var surveyed = []string{
	"Msvm_ProcessorSettingData", "Msvm_MemorySettingData", "Msvm_SecuritySettingData", "Msvm_SyntheticEthernetPortSettingData",
	"Msvm_EmulatedEthernetPortSettingData", "Msvm_EthernetPortAllocationSettingData", "Msvm_VssComponentSettingData",
}

// Survey asks a host what a backup asks before it changes anything, and some
// questions that it has to refuse; it changes nothing. name is a VM to look at
// closely, on whichever node of a cluster, or empty. step is told what comes next, os is the version of the
// host's Windows, empty where it does not tell. What the host refuses is no
// error: that is an answer, too.
func (d *Driver) Survey(ctx context.Context, name string, step func(string)) (os string, err error) {
	step(StepInventory)
	if err := d.surveyAll(ctx); err != nil {
		return "", err
	}
	step(StepHost)
	if os, err = d.surveyHost(ctx); err != nil {
		return "", err
	}
	if name != "" {
		step(StepMachine)
		at, err := d.find(ctx, name)
		if err != nil {
			return "", err
		}
		if !d.cluster.isAlone() {
			d.ownerFirst(ctx, at.sys.guid, nil) // to see what the cluster says
		}
		if err := at.d.surveyMachine(ctx, at.sys); err != nil {
			return "", fmt.Errorf("VM %q: %w", name, err)
		}
	}
	step(StepRefusals)
	return os, d.surveyRefusals(ctx)
}

// surveyAll asks what Machines does, and also for disks that no share reaches:
// shares are of the caller's making, and no matter of the host.
func (d *Driver) surveyAll(ctx context.Context) error {
	_, list, err := d.systems(ctx)
	if err != nil {
		return err
	}
	for _, s := range list {
		now, err := d.present(ctx, s)
		if unanswered(err) {
			return err
		}
		if err != nil {
			continue // removed while we looked
		}
		drives, err := d.drives(ctx, now.ref)
		if unanswered(err) {
			return err
		}
		for _, e := range drives {
			d.sizeOf(ctx, e.Source)
		}
	}
	return nil
}

func (d *Driver) surveyHost(ctx context.Context) (os string, err error) {
	if _, err := d.hasReferencePoints(ctx); err != nil {
		return "", err
	}
	for _, class := range []string{classSnapshots, classImages, classManagement, "Msvm_VirtualSystemManagementServiceSettingData", "Msvm_ConcreteJob", classAffected} {
		if _, err := d.query(ctx, "SELECT * FROM "+class); unanswered(err) {
			return "", err
		}
	}
	if d.members != nil { // a host of no cluster refuses
		for _, class := range []string{"MSCluster_Cluster", "MSCluster_Node", "MSCluster_ResourceGroup", "MSCluster_Resource"} {
			if _, err := d.members.query(ctx, "SELECT * FROM "+class); unanswered(err) {
				return "", err
			}
		}
	}
	other, ok := d.management.(interface {
		In(string) (*wsman.Client, error)
	})
	if !ok {
		return "", nil
	}
	cim, err := other.In("root/cimv2")
	if err != nil {
		return "", err
	}
	list, err := collect(cim.Query(ctx, "SELECT * FROM Win32_OperatingSystem"))
	if unanswered(err) {
		return "", err
	}
	for _, o := range list {
		os = o.text("Version")
	}
	return os, nil
}

func collect(items iter.Seq2[*wsman.Instance, error]) (out []object, err error) {
	for in, err := range items {
		if err != nil {
			return nil, err
		}
		out = append(out, object{in})
	}
	return out, nil
}

func (d *Driver) surveyMachine(ctx context.Context, s system) error {
	d.guest(ctx, s)
	now, err := d.present(ctx, s)
	if err != nil {
		return err
	}
	for _, class := range surveyed {
		if _, err := d.query(ctx, associated(now.ref, "Msvm_VirtualSystemSettingDataComponent", class)); unanswered(err) {
			return err
		}
	}
	if _, err := d.checkpoints(ctx, s, typeRecovery, typeCheckpoint); unanswered(err) {
		return err
	}
	t := d.target(s, "", nil)
	points, err := t.references(ctx)
	if unanswered(err) {
		return err
	}
	for _, id := range points {
		if _, err := d.Get(ctx, instance(classReference, id)); unanswered(err) {
			return err
		}
	}
	drives, err := d.drives(ctx, now.ref)
	if unanswered(err) {
		return err
	}
	for _, e := range drives {
		for _, method := range []string{"GetVirtualHardDiskSettingData", "GetVirtualHardDiskState"} {
			if _, err := d.do(ctx, familyImage, service(classImages), method, wsman.Arg("Path", wsman.Of(e.Source))); unanswered(err) {
				return err
			}
		}
		// Of a tracking id that no host has.
		if _, _, _, err := d.changes(ctx, e.Source, "rctX:"+noMachine, 0, 1<<20); unanswered(err) {
			return err
		}
	}
	return nil
}

// surveyRefusals asks what has to be refused, to see how.
func (d *Driver) surveyRefusals(ctx context.Context) error {
	for _, ask := range []func() error{
		func() error { _, err := d.Get(ctx, systemRef(noMachine)); return err },
		func() error { _, err := d.Get(ctx, wsman.NewRef(classSystem, "Name", noMachine)); return err },
		func() error { _, err := d.Get(ctx, instance("Msvm_ConcreteJob", noMachine)); return err },
		func() error { _, err := d.query(ctx, "SELECT * FROM Msvm_NoClassOfThisName"); return err },
		func() error { _, err := d.query(ctx, "SELECT FROM WHERE"); return err },
		func() error {
			_, err := d.query(ctx, associated(systemRef(noMachine), "Msvm_SettingsDefineState", classSettings))
			return err
		},
		func() error { _, err := d.Invoke(ctx, service(classImages), "NoMethodOfThisName"); return err },
		func() error {
			_, err := d.do(ctx, familyImage, service(classImages), "GetVirtualHardDiskSettingData", wsman.Arg("Path", wsman.Of(`C:\no such folder\no such disk.vhdx`)))
			return err
		},
		func() error {
			_, err := d.do(ctx, familyCIM, service(classSnapshots), "DestroySnapshot", wsman.Arg("AffectedSnapshot", wsman.Of(instance(classSettings, "Microsoft:"+noMachine))))
			return err
		},
	} {
		if err := ask(); unanswered(err) {
			return err
		}
	}
	return nil
}

// unanswered says whether err is not the host's own answer.
func unanswered(err error) bool {
	var who *wsman.SignInError
	var cut *wsman.ConnectionError
	var other *wsman.AnswerError
	return errors.As(err, &who) || errors.As(err, &cut) || errors.As(err, &other) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// rehearsal begins the names of what a recording makes, in place of a
// repository's prefix.
const rehearsal = "backstay-recorder-"

// Rehearse makes what a backup makes on a host, and takes it away again: a
// checkpoint that becomes a reference point, a second one that is destroyed,
// with a question of what changed between. Nothing is read. All is journaled,
// and what an interrupted rehearsal of this VM left goes first.
func (d *Driver) Rehearse(ctx context.Context, name string, step func(string)) error {
	step(StepCycle)
	at, err := d.findSurely(ctx, name)
	if err != nil {
		return err
	}
	return at.rehearse(ctx, name)
}

func (at sighting) rehearse(ctx context.Context, name string) (err error) {
	d, s := at.d, at.sys
	l, err := d.lock(ctx, s)
	if err != nil {
		return err
	}
	defer l.Unlock()
	j, err := d.openJournal()
	if err != nil {
		return err
	}
	if err := d.clearRehearsals(ctx, j, s, ""); err != nil {
		return err
	}
	run, err := j.Begin(s.guid, newRun())
	if err != nil {
		return err
	}
	defer run.Close()
	defer func() {
		// What was begun is taken away whatever happened.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
		defer cancel()
		if e := d.clearRehearsals(ctx, j, s, run.ID); e != nil {
			err = errors.Join(err, fmt.Errorf("left on the host: %w; record again to clean up", e))
		}
	}()
	if err := d.rehearse(ctx, d.target(s, rehearsal, run)); err != nil {
		return fmt.Errorf("VM %q: %w", name, err)
	}
	return nil
}

func (d *Driver) rehearse(ctx context.Context, t *target) error {
	level := uint8(levelApplication)
	if d.guest(ctx, t.system).best == vm.GradeCrash {
		level = levelCrash
	}
	entry := func() journal.Entry { return d.entry(kindCheckpoint, newRun(), t.prefix) }
	first := entry()
	frozen, _, err := t.checkpoint(ctx, first, level)
	if err != nil {
		return err
	}
	for _, class := range surveyed {
		if _, err := d.query(ctx, associated(frozen.ref, "Msvm_VirtualSystemSettingDataComponent", class)); unanswered(err) {
			return err
		}
	}
	if _, err := d.drives(ctx, frozen.ref); err != nil {
		return err
	}
	now, err := d.present(ctx, t.system)
	if err != nil {
		return err
	}
	if _, err := d.drives(ctx, now.ref); err != nil { // what the guest writes to meanwhile
		return err
	}
	if _, err := t.convert(ctx, first); err != nil {
		return err
	}
	points, err := t.references(ctx)
	if err != nil {
		return err
	}
	second := entry()
	if frozen, _, err = t.checkpoint(ctx, second, levelCrash); err != nil {
		return err
	}
	drives, err := d.drives(ctx, frozen.ref)
	if err != nil {
		return err
	}
	for _, id := range points {
		in, err := d.Get(ctx, instance(classReference, id))
		if errors.Is(err, fault.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		for n, since := range (object{in}).list("ResilientChangeTrackingIdentifiers") {
			if n < len(drives) && drives[n].Source != "" {
				if _, _, _, err := d.changes(ctx, drives[n].Source, since, 0, firstWindow); unanswered(err) {
					return err
				}
			}
		}
	}
	_, err = t.drop(ctx, second)
	return err
}

// clearRehearsals takes away what rehearsals left of a VM. Of all but live, the
// run that goes on, it takes only what is surely theirs.
func (d *Driver) clearRehearsals(ctx context.Context, j *journal.Journal, s system, live string) error {
	runs, err := j.Runs(s.guid)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range runs {
		t := d.target(s, rehearsal, r)
		t.reaping = r.ID != live
		for _, e := range r.Open() {
			if e.Kind != kindCheckpoint || e.Data[dataRepo] != rehearsal {
				continue
			}
			if !d.made(e) && !d.sameCluster(ctx, e) {
				if here, err := t.has(ctx, e); !here {
					errs = append(errs, err)
					continue
				}
			}
			_, err := t.unrehearse(ctx, e)
			errs = append(errs, err)
		}
		r.Close()
	}
	return errors.Join(append(errs, d.dropReferences(ctx, j, s, rehearsal, ""))...)
}

// unrehearse destroys the checkpoint of a rehearsal's entry. One that may have
// become a reference point already is made one, for dropReferences to destroy.
func (t *target) unrehearse(ctx context.Context, e journal.Entry) (what string, err error) {
	if _, begun := e.Data[dataRefBefore]; begun {
		return t.convert(ctx, e)
	}
	return t.drop(ctx, e)
}
