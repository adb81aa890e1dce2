package hyperv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/winpath"
)

// Kinds of journal entries of restores. They lie in a journal of their own,
// since a VM that is being made has no GUID to be found by.
const (
	kindFolder = "folder" // name: its path
	kindFile   = "file"   // name: its path
	kindNewVM  = "vm"     // name: what it is called until it is whole
	kindSwap   = "swap"   // name: InstanceID of the disk's allocation
)

// What such an entry says besides: dataHost is what the host calls itself,
// dataJob the job that makes the VM, dataID the GUID of the VM that is made or
// swapped for.
const (
	dataOld = "old" // file that the VM's disk was in
	dataNew = "new" // file that it shall be in

	dataLate = "late" // a VM of which nothing was seen had time enough to come
)

// NewVMOptions say what VM to make.
type NewVMOptions struct {
	Name       string // as people call it
	RepoID     string
	Definition vm.Definition // what it is like; its Disks say where each hangs
	Known      bool          // the Definition is a hypervisor's and no guess
	Disks      []vm.DiskID   // that will be written
	// Files are the host's own definition of a VM of Hyper-V, by name: .vmcx,
	// .vmgs, .vmrs. Where there is a .vmcx the VM is made by importing it.
	Files map[string][]byte
	// Folder is where on the host the VM's own folder is made; "" for where the
	// host keeps new VMs.
	Folder      string
	ConnectNICs bool // to the networks of the same names
	KeepMACs    bool
	Start       bool
}

// A Building is a VM that is being made, or given restored disks.
type Building struct {
	d      *Driver
	host   string // as it calls itself, lower case
	lock   *journal.Lock
	run    *journal.Run
	id     string // of the run
	folder string

	names map[vm.DiskID]string // of the files
	outs  []image.Output
	done  hypervisor.Built

	// commit makes what all this is for. It is what tells the two kinds apart.
	commit func(context.Context) error
	// place names the file of a disk.
	place func(vm.DiskID) (string, error)
	// finish is what comes once nothing can be lost any more; what goes wrong
	// there is a warning.
	finish func(context.Context)
	// restart switches a VM on again that was switched off for this; nil for
	// none.
	restart func(context.Context) error
	// rehearses says that all of it is a recording's, and is nobody's to use.
	rehearses bool
}

var _ hypervisor.Builder = (*Building)(nil)

// lookTime is how long a VM is looked for whose making may have begun.
const lookTime = 10 * time.Second

func (b *Building) warn(format string, args ...any) {
	b.done.Warnings = append(b.done.Warnings, fmt.Sprintf(format, args...))
}

func (b *Building) note(format string, args ...any) {
	b.done.Notes = append(b.done.Notes, fmt.Sprintf(format, args...))
}

func (d *Driver) restoreJournal() (*journal.Journal, error) {
	return journal.Open(filepath.Join(d.stateDir, "hyperv", "restores"))
}

// machineOf is what a VM that does not exist yet is called in the journal and
// by locks: two restores of one name to one host are kept apart.
func machineOf(host, name string) string {
	sum := sha256.Sum256([]byte(host + "\x00" + strings.ToLower(name)))
	return fmt.Sprintf("new-%x", sum[:8])
}

// NewVM begins to make a VM. Leftovers of restores that died are taken away
// first. Errors: fault.ErrExists where the host has a VM of that name,
// fault.ErrLocked where one is being made.
func (d *Driver) NewVM(ctx context.Context, o NewVMOptions) (*Building, error) {
	prefix, err := repoPrefix(o.RepoID)
	if err != nil {
		return nil, err
	}
	if _, isGUID := guidOf(o.Name); isGUID || strings.TrimSpace(o.Name) == "" || strings.ContainsFunc(o.Name, func(r rune) bool { return r < ' ' }) {
		return nil, fmt.Errorf("VM %q: no name for a new VM: %w", o.Name, fault.ErrUnsupported)
	}
	m, err := d.newMaking(ctx, o, prefix)
	if err != nil {
		return nil, err
	}
	if err := m.begin(ctx); err != nil {
		return nil, err
	}
	return m.Building, nil
}

// newMaking takes the lock for a VM that is to be made, and makes nothing yet.
// Names until it is whole begin with prefix.
func (d *Driver) newMaking(ctx context.Context, o NewVMOptions, prefix string) (*making, error) {
	host, list, err := d.systems(ctx)
	if err != nil {
		return nil, err
	}
	if err := free(list, o.Name); err != nil {
		return nil, err
	}
	b, err := d.building(ctx, host, machineOf(strings.ToLower(host), o.Name), o.Name, list)
	if err != nil {
		return nil, err
	}
	b.done.Name = o.Name
	m := &making{Building: b, o: o, temporary: prefix + b.id}
	b.commit = m.build
	b.finish = func(ctx context.Context) {
		m.start(ctx)
		m.noteRole(ctx)
	}
	b.place = func(id vm.DiskID) (string, error) { return b.folder + `\` + m.file(id), nil }
	return m, nil
}

// begin plans the VM and makes its folder. After an error nothing is left, or
// the error says what.
func (m *making) begin(ctx context.Context) error {
	err := m.plan()
	if err == nil {
		err = m.makeFolder(ctx)
	}
	if err != nil {
		return fmt.Errorf("VM %q: %w", m.o.Name, errors.Join(err, m.Abort(ctx)))
	}
	return nil
}

// building takes the lock and begins a run, after it has cleaned up.
func (d *Driver) building(ctx context.Context, host, machine, name string, list []system) (*Building, error) {
	b := &Building{d: d, host: strings.ToLower(host), id: newRun(), names: map[vm.DiskID]string{}, finish: func(context.Context) {}}
	var err error
	if b.lock, err = d.lock(ctx, system{guid: machine, name: name}); err != nil {
		return nil, err
	}
	b.done.Warnings = d.reapRestores(ctx, host, list, machine)
	j, err := d.restoreJournal()
	if err == nil {
		b.run, err = j.Begin(machine, b.id)
	}
	if err != nil {
		b.lock.Unlock()
		return nil, err
	}
	return b, nil
}

// free says that no VM of the list has a name.
func free(list []system, name string) error {
	if i := slices.IndexFunc(list, func(s system) bool { return strings.EqualFold(s.name, name) }); i >= 0 {
		return fmt.Errorf("VM %q: the host has one of that name (%s): %w", name, list[i].guid, fault.ErrExists)
	}
	return nil
}

func (b *Building) entry(kind, name string) journal.Entry {
	e := journal.Entry{Kind: kind, Name: name, Data: map[string]string{dataHost: b.host}}
	if b.rehearses {
		e.Data[dataRepo] = rehearsal
	}
	return e
}

// Room asks each volume for what its disks need.
func (b *Building) Room(ctx context.Context, need map[vm.DiskID]int64) error {
	sum, folders := map[string]int64{}, map[string]string{}
	for id, n := range need {
		name, err := b.place(id)
		if err != nil {
			return err
		}
		p, err := winpath.Parse(name)
		if err != nil {
			return err
		}
		volume := volumeOf(name)
		sum[volume] += n
		folders[volume] = p.Dir().String()
	}
	for volume, n := range sum {
		if err := b.d.files.room(ctx, folders[volume], n); err != nil {
			return err
		}
	}
	return nil
}

// Create makes the file of a disk.
func (b *Building) Create(ctx context.Context, id vm.DiskID) (image.Output, string, error) {
	name, err := b.place(id)
	if err != nil {
		return nil, "", err
	}
	e := b.entry(kindFile, name)
	if err := b.run.Note(e); err != nil {
		return nil, "", err
	}
	out, err := b.d.files.create(ctx, name)
	if errors.Is(err, fault.ErrExists) { // somebody else's
		err = errors.Join(err, b.run.Done(e.Kind, e.Name))
	}
	if err != nil {
		return nil, "", err
	}
	b.names[id] = name
	b.outs = append(b.outs, out)
	return out, name, nil
}

// Open opens the file of a disk.
func (b *Building) Open(ctx context.Context, id vm.DiskID) (image.Image, error) {
	name := b.names[id]
	if name == "" {
		return nil, fmt.Errorf("disk %s: %w", id, fault.ErrNotFound)
	}
	f, err := openNamed(ctx, b.d.files, name)
	if err != nil {
		return nil, err
	}
	img, err := vhdx.Open(f, nil)
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

// Commit makes the VM.
func (b *Building) Commit(ctx context.Context) (hypervisor.Built, error) {
	if err := b.commit(ctx); err != nil {
		return hypervisor.Built{}, fmt.Errorf("VM %q: %w", b.done.Name, err)
	}
	// From here on it is there, and nothing takes it away.
	if err := b.run.Clear(); err != nil {
		b.warn("the restore is complete, but its journal could not be removed, and the next run may take it for one that was interrupted: %v", err)
	}
	b.finish(ctx)
	b.lock.Unlock()
	return b.done, nil
}

// Abort takes away what was made.
func (b *Building) Abort(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	for _, out := range b.outs {
		out.Close() // a file that is open stays
	}
	err := b.d.undoRestore(ctx, b.run, b.d.undoTime)
	if b.restart != nil && err == nil {
		if err = b.restart(ctx); err != nil {
			err = fmt.Errorf("switch the VM on again: %w", err)
		}
	} else if b.restart != nil {
		err = fmt.Errorf("%w; the VM was switched off for this, and is still off", err)
	}
	b.run.Close()
	b.lock.Unlock()
	return err
}
