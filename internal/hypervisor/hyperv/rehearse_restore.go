package hyperv

import (
	"context"
	"errors"
	"fmt"

	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/winpath"
)

// What the VMs of a rehearsed restore are like.
const (
	rehearsedBytes      = 64 << 20  // of each disk, which is empty
	rehearsedFile       = 16 << 20  // more than the file of one takes
	rehearsedMemory     = 512 << 20 // never taken: the VM is never started
	rehearsedProcessors = 2
)

// spareDisk is the file that the rehearsed swap gives a disk.
const spareDisk vm.DiskID = "other"

// A RestorePlan is what RehearseRestore makes on a host, and takes away again.
type RestorePlan struct {
	Host    string // as it calls itself
	VM      string // of which the definition is copied; it is not changed
	Defined string // the VM that is made by a description
	// Imported is the VM that is made of the copied definition, with so many
	// disks; empty where that can't be read, and then NoImport says why.
	Imported string
	Disks    int
	NoImport error
	// Folders are where each VM gets a folder of its own: in the first that is
	// there.
	Folders []string
	// DiskBytes is the size of each disk, which is empty.
	DiskBytes int64
}

// A RestoreRehearsal is what came of one.
type RestoreRehearsal struct {
	// Folder is that in which the VMs' own were.
	Folder string
	// Said is what its owner may want to know.
	Said []string
}

// A rehearsal of a restore, while it goes on.
type restoring struct {
	d      *Driver // of the host that has the VM
	sys    system
	now    settings
	drives []drive
	files  map[string][]byte // the VM's definition; nil for none
	plan   RestorePlan
	out    RestoreRehearsal
}

// RehearseRestore makes what a restore makes on a host, by the same code, and
// takes it away again: a VM of a description, whose disk is swapped for another,
// and one that is imported of the definition of the VM name, which is not
// changed. Neither is started or connected to anything. agree hears beforehand
// what will be made; its error ends it. All is journaled as restores are, so
// that what an interrupted rehearsal left goes with the next restore, backup or
// rehearsal there. What the host refuses of the definition is no error.
func (d *Driver) RehearseRestore(ctx context.Context, name string, agree func(RestorePlan) error, step func(string)) (RestoreRehearsal, error) {
	step(StepRestore)
	at, err := d.findSurely(ctx, name)
	if err != nil {
		return RestoreRehearsal{}, err
	}
	r := &restoring{d: at.d, sys: at.sys, plan: RestorePlan{Host: at.host, VM: at.sys.name, DiskBytes: rehearsedBytes}}
	if err := r.look(ctx); err != nil {
		return r.out, fmt.Errorf("VM %q: %w", name, err)
	}
	if err := agree(r.plan); err != nil {
		return r.out, err
	}
	err = r.make(ctx, r.defined(), r.define)
	if unanswered(err) || errors.As(err, new(*LeftError)) || r.plan.Imported == "" {
		return r.out, err
	}
	step(StepImport)
	return r.out, errors.Join(err, r.make(ctx, r.imported(), r.importAll))
}

// look reads of the VM what is needed, and plans.
func (r *restoring) look(ctx context.Context) (err error) {
	if r.now, err = r.d.present(ctx, r.sys); err != nil {
		return err
	}
	all, err := r.d.drives(ctx, r.now.ref)
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Excluded == "" {
			r.drives = append(r.drives, e)
		}
	}
	r.plan.Defined = rehearsal + newRun()
	files, err := r.d.configFiles(ctx, r.now)
	if unanswered(err) {
		return err
	}
	r.files = map[string][]byte{}
	for _, f := range files {
		r.files[f.Name] = f.Data
	}
	switch _, has := definitionFile(r.files); {
	case r.sys.state != stateOff && r.sys.state != stateRunning:
		// What it has in memory is among its files; and a copy that is not off
		// is nobody's to take away once this run is dead.
		r.plan.NoImport = fmt.Errorf("it is %s", stateName(r.sys.state))
	case err != nil:
		r.plan.NoImport = err
	case !has:
		r.plan.NoImport = errors.New("its definition is no .vmcx")
	case len(r.drives) == 0:
		r.plan.NoImport = errors.New("it has no disk in a file")
	default:
		r.plan.Imported, r.plan.Disks = rehearsal+newRun(), len(r.drives)
	}
	list, why := (&making{Building: &Building{d: r.d}, o: r.defined()}).places(ctx)
	if len(list) == 0 {
		return &FolderError{errors.Join(why...)}
	}
	for _, p := range list {
		r.plan.Folders = append(r.plan.Folders, p.String())
	}
	return nil
}

// defined is the VM that is made by a description: of the generation of the one
// that was named, with one disk, and a network card that is connected to nothing.
func (r *restoring) defined() NewVMOptions {
	def := definitionOf(r.sys, r.now)
	def.Processors, def.MemoryBytes, def.Notes = rehearsedProcessors, rehearsedMemory, "made by backstay hyperv record, and not needed"
	def.NICs = []vm.NIC{{Model: "synthetic"}}
	at := vm.DiskPlace{ID: "ide0:0", Bus: "ide", SizeBytes: rehearsedBytes}
	if def.Firmware == "uefi" {
		at = vm.DiskPlace{ID: "scsi0:0", Bus: "scsi", SizeBytes: rehearsedBytes}
	}
	if len(r.drives) > 0 {
		at.Source = r.drives[0].Source // beside which it may lie
	}
	def.Disks = []vm.DiskPlace{at}
	return NewVMOptions{Name: r.plan.Defined, Known: true, Definition: def, Disks: []vm.DiskID{at.ID}}
}

// imported is the VM that is made of the definition of the one that was named.
func (r *restoring) imported() NewVMOptions {
	o := NewVMOptions{Name: r.plan.Imported, Known: true, Definition: definitionOf(r.sys, r.now), Files: r.files}
	for _, e := range r.drives {
		o.Disks = append(o.Disks, e.ID)
		o.Definition.Disks = append(o.Definition.Disks, placeOf(e.Disk))
	}
	return o
}

// A LeftError says that something of a rehearsal is still on the host.
type LeftError struct{ err error }

func (e *LeftError) Error() string {
	return fmt.Sprintf("left on the host: %v", e.err)
}

func (e *LeftError) Unwrap() error { return e.err }

// make makes a VM, has do what is to be seen of it, and takes it away.
func (r *restoring) make(ctx context.Context, o NewVMOptions, do func(context.Context, *making) error) (err error) {
	m, err := r.d.newMaking(ctx, o, rehearsal)
	if err != nil {
		return err
	}
	m.rehearses = true
	// Chance names files: a replay tells nothing else of ours from the host's own.
	names := map[vm.DiskID]string{}
	m.place = func(id vm.DiskID) (string, error) {
		if names[id] == "" {
			names[id] = newRun() + ".vhdx"
		}
		return m.folder + `\` + names[id], nil
	}
	r.out.Said = append(r.out.Said, m.done.Warnings...) // of what an earlier run left
	if err := m.begin(ctx); err != nil {
		return err
	}
	if p, err := winpath.Parse(m.folder); err == nil {
		r.out.Folder = p.Dir().String()
	}
	defer func() {
		if e := m.Abort(ctx); e != nil {
			err = errors.Join(err, &LeftError{e})
		}
	}()
	need := map[vm.DiskID]int64{spareDisk: rehearsedFile}
	for _, id := range o.Disks {
		need[id] = rehearsedFile
	}
	if err := m.Room(ctx, need); err != nil {
		return err
	}
	for _, id := range o.Disks {
		if err := writeEmpty(ctx, m.Building, id); err != nil {
			return fmt.Errorf("disk %s: %w", id, err)
		}
	}
	if err := do(ctx, m); err != nil {
		return fmt.Errorf("VM %q: %w", o.Name, err)
	}
	return nil
}

// writeEmpty writes a disk of nothing, as a restore writes one.
func writeEmpty(ctx context.Context, b *Building, id vm.DiskID) error {
	out, _, err := b.Create(ctx, id)
	if err != nil {
		return err
	}
	w, err := vhdx.NewWriter(out, image.CreateOptions{VirtualBytes: rehearsedBytes})
	if err != nil {
		return err // Abort closes the file
	}
	return errors.Join(w.Finish(), w.Close())
}

func (r *restoring) define(ctx context.Context, m *making) error {
	// Before there is a VM, so that its file goes after that.
	if err := writeEmpty(ctx, m.Building, spareDisk); err != nil {
		return err
	}
	other := m.names[spareDisk]
	delete(m.names, spareDisk)
	if err := m.define(ctx); err != nil {
		return err
	}
	if err := m.readBack(ctx); err != nil {
		return err
	}
	return m.rehearseSwap(ctx, other)
}

// readBack reads the VM's settings as a recording has them of any VM.
func (m *making) readBack(ctx context.Context) error {
	for _, class := range surveyed {
		if _, err := m.settings(ctx, class); unanswered(err) {
			return err
		}
	}
	_, err := m.d.drives(ctx, m.now.ref)
	return err
}

// rehearseSwap gives the VM another file for its disk, as a restore over the
// original does. Abort gives it the first one again.
func (m *making) rehearseSwap(ctx context.Context, file string) error {
	_, list, err := m.d.systems(ctx)
	if err != nil {
		return err
	}
	sys, err := choose(list, m.sys.guid)
	if err != nil {
		return err
	}
	b := &Building{d: m.d, host: m.host, run: m.run, id: m.id, names: map[vm.DiskID]string{}, rehearses: true}
	for _, id := range m.o.Disks {
		b.names[id] = file
	}
	r := &replacing{Building: b, o: ReplaceOptions{Disks: m.o.Disks}, sys: sys, drives: map[vm.DiskID]drive{}}
	if err := r.look(ctx); err != nil {
		return err
	}
	if err := r.swap(ctx); err != nil {
		return err
	}
	return m.readBack(ctx)
}

// importAll imports the definition: one that is not there, one with a disk that
// is not there, and then as a restore does.
func (r *restoring) importAll(ctx context.Context, m *making) error {
	file, err := m.sendDefinition(ctx)
	if err != nil {
		return err
	}
	nothing := m.folder + `\import-` + m.id + `\nothing.vmcx`
	if _, err := m.d.do(ctx, familyMsvm, service(classManagement), "ImportSystemDefinition", importOf(nothing)...); unanswered(err) {
		return err
	}
	if err := m.importBroken(ctx, file); unanswered(err) {
		return err
	}
	if err := m.undoImport(ctx); err != nil {
		return err
	}
	err = m.importFile(ctx, file)
	if err == nil {
		if err = m.readBack(ctx); err == nil {
			m.dropImported(ctx)
			err = m.giveName(ctx)
		}
	}
	if errors.Is(err, errImport) || hostSaid(err) {
		r.out.Said = append(r.out.Said, fmt.Sprintf("the host does not take the definition of VM %q as it is, and so a restore makes such a VM of its description: %v", r.sys.name, err))
		return nil
	}
	return err
}

// importBroken has the host say what it thinks of a VM whose disk is nowhere.
func (m *making) importBroken(ctx context.Context, file string) error {
	planned, err := m.planSystem(ctx, file)
	if err != nil {
		return err
	}
	if err := m.nameImported(ctx); err != nil {
		return err
	}
	have, err := m.d.drives(ctx, m.now.ref)
	if err != nil {
		return err
	}
	for _, e := range have {
		if e.setting == "" {
			continue
		}
		if err := m.d.put(ctx, e.setting, m.folder+`\nothing.vhdx`); unanswered(err) {
			return err
		}
		break
	}
	return m.d.validate(ctx, planned)
}

// rehearsed says whether an entry is of what a recording made.
func rehearsed(e journal.Entry) bool { return e.Data[dataRepo] == rehearsal }
