package hyperv

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/winpath"
	"github.com/backstay/backstay/internal/wsman"
)

// ReplaceOptions say which disks of a VM get their old content back, and how.
type ReplaceOptions struct {
	VM     string // name or GUID
	RepoID string
	Disks  []vm.DiskID // that will be written
	// PowerOff switches a VM off that runs, as if its plug were pulled, at the
	// last moment. Without it such a VM is refused.
	PowerOff bool
	Start    bool
	// RemoveOld removes the files that the disks were in, once the VM has the
	// restored ones.
	RemoveOld bool
	// Of is the GUID of the VM that the restore point is of; empty if it is of
	// no VM of Hyper-V.
	Of string
}

// ErrRunning says that a VM has to be off for what was asked.
var ErrRunning = errors.New("the VM is not off")

// ErrCheckpoints says that a VM has checkpoints, which stand in the way.
var ErrCheckpoints = errors.New("the VM has checkpoints")

// A replacing is a VM that gets other disks.
type replacing struct {
	*Building
	o      ReplaceOptions
	prefix string
	sys    system
	now    settings
	drives map[vm.DiskID]drive
}

// Replace begins to give a VM restored disks. They are written beside its own,
// while it may run; Commit swaps them. Errors: fault.ErrNotFound,
// fault.ErrLocked, ErrRunning, ErrCheckpoints.
func (d *Driver) Replace(ctx context.Context, o ReplaceOptions) (*Building, error) {
	prefix, err := repoPrefix(o.RepoID)
	if err != nil {
		return nil, err
	}
	at, err := d.findSurely(ctx, o.VM)
	if err != nil {
		return nil, err
	}
	s := at.sys
	b, err := at.d.building(ctx, at.host, s.guid, s.name, at.list)
	if err != nil {
		return nil, err
	}
	b.done.Name, b.done.UUID = s.name, s.guid
	r := &replacing{Building: b, o: o, prefix: prefix, sys: s, drives: map[vm.DiskID]drive{}}
	b.commit, b.finish, b.place = r.swap, r.afterwards, r.beside
	if err := r.look(ctx); err != nil {
		return nil, fmt.Errorf("VM %q: %w", s.name, errors.Join(err, b.Abort(ctx)))
	}
	return b, nil
}

// look refuses what can't be done before anything is written.
func (r *replacing) look(ctx context.Context) (err error) {
	if r.now, err = r.d.present(ctx, r.sys); err != nil {
		return err
	}
	if r.sys.state != stateOff && !(r.o.PowerOff && r.sys.state == stateRunning) {
		return fmt.Errorf("%w: it is %s", ErrRunning, stateName(r.sys.state))
	}
	if r.o.Of != "" && !strings.EqualFold(r.o.Of, r.sys.guid) {
		// All VMs have a disk scsi0:0: it may be a slip.
		if r.o.RemoveOld {
			return fmt.Errorf("the restore point is of another VM (%s), so that its own disks are not removed: %w", r.o.Of, fault.ErrUnsupported)
		}
		r.warn("the restore point is of another VM (%s)", r.o.Of)
	}
	if err := r.noCheckpoints(ctx); err != nil {
		return err
	}
	have, err := r.d.drives(ctx, r.now.ref)
	if err != nil {
		return err
	}
	for _, d := range have {
		if slices.Contains(r.o.Disks, d.ID) {
			r.drives[d.ID] = d
		} else if d.Excluded == "" {
			r.note("disk %s (%s) is not restored, and stays as it is", d.ID, d.Source)
		}
	}
	for _, id := range r.o.Disks {
		d, has := r.drives[id]
		if !has {
			return fmt.Errorf("disk %s: the VM has none there: %w", id, fault.ErrNotFound)
		}
		if d.Excluded != "" {
			return fmt.Errorf("disk %s: %s: %w", id, d.Excluded, fault.ErrUnsupported)
		}
		p, err := winpath.Parse(d.Source)
		if err != nil {
			return err
		}
		if r.folder == "" {
			r.folder = p.Dir().String()
		}
	}
	return nil
}

func (r *replacing) noCheckpoints(ctx context.Context) error {
	list, err := r.d.checkpoints(ctx, r.sys, typeCheckpoint, typeRecovery)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return nil
	}
	var names []string
	for _, s := range list {
		names = append(names, s.text("ElementName"))
	}
	return fmt.Errorf("%w, which are of the disks that it has now: %s", ErrCheckpoints, strings.Join(names, ", "))
}

// beside names the file of a restored disk, in the folder of the one that it
// takes the place of.
func (r *replacing) beside(id vm.DiskID) (string, error) {
	d, has := r.drives[id]
	if !has {
		return "", fmt.Errorf("disk %s: %w", id, fault.ErrNotFound)
	}
	return r.sibling(d.Source, "restored", ".vhdx")
}

// sibling is a file beside another whose name says what it is and of which run.
func (r *replacing) sibling(file, what, ext string) (string, error) {
	p, err := winpath.Parse(file)
	if err != nil {
		return "", err
	}
	stem := strings.TrimSuffix(p.Base(), filepath.Ext(p.Base()))
	for _, word := range []string{"-restored-", "-before-"} { // of an earlier restore
		if at := strings.LastIndex(stem, word); at > 0 && len(stem)-at-len(word) == len(r.id) {
			stem = stem[:at]
		}
	}
	p, err = p.Dir().Join(stem + "-" + what + "-" + r.id + ext)
	return p.String(), err
}

// swap gives the VM the restored disks, each for its own. If one can't be
// given, Abort puts all back.
func (r *replacing) swap(ctx context.Context) error {
	if err := r.noCheckpoints(ctx); err != nil {
		return err
	}
	if err := r.off(ctx); err != nil {
		return err
	}
	in, err := r.d.Get(ctx, r.sys.ref)
	if err != nil {
		return err
	}
	changed := stateChanged(object{in})
	now, err := r.d.drives(ctx, r.now.ref)
	if err != nil {
		return err
	}
	for _, id := range r.o.Disks {
		d := r.drives[id]
		i := slices.IndexFunc(now, func(o drive) bool { return o.device == d.device })
		if i < 0 || !sameFile(now[i].Source, d.Source) {
			return fmt.Errorf("disk %s: it is not in %s any more: somebody changed the VM meanwhile", id, d.Source)
		}
	}
	for _, id := range r.o.Disks {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		d := r.drives[id]
		e := r.entry(kindSwap, d.setting)
		e.Data[dataID], e.Data[dataOld], e.Data[dataNew] = r.sys.guid, d.Source, r.names[id]
		e.Data[dataState] = changed
		if r.restart != nil {
			e.Data[dataPulled] = "yes"
		}
		if err := r.run.Note(e); err != nil {
			return err
		}
		if err := r.d.put(ctx, d.setting, r.names[id]); err != nil {
			return fmt.Errorf("disk %s: %w", id, err)
		}
	}
	return nil
}

// off sees to it that the VM is.
func (r *replacing) off(ctx context.Context) error {
	in, err := r.d.Get(ctx, r.sys.ref)
	if err != nil {
		return err
	}
	state, _ := object{in}.number("EnabledState")
	switch {
	case state == stateOff:
		return nil
	case state != stateRunning || !r.o.PowerOff:
		return fmt.Errorf("%w: it is %s", ErrRunning, stateName(state))
	}
	r.restart = func(ctx context.Context) error { return r.d.setState(ctx, r.sys, stateRunning) }
	r.note("the VM was switched off")
	return r.d.setState(ctx, r.sys, stateOff)
}

// put has an allocation show another file, and looks that it does.
func (d *Driver) put(ctx context.Context, setting, file string) error {
	if err := d.modifyResource(ctx, wsman.NewInstance(classDisk).Set("InstanceID", wsman.Of(setting)).
		Set("ResourceType", wsman.Of(uint16(typeDisk))).Set("ResourceSubType", wsman.Of(subDisk)).Set("HostResource", wsman.List(file))); err != nil {
		return err
	}
	in, err := d.Get(ctx, instance(classDisk, setting))
	if err != nil {
		return fmt.Errorf("read it back: %w", err)
	}
	if got := (object{in}).text("HostResource"); !sameFile(got, file) {
		return fmt.Errorf("the host took %s, and has %s", file, got)
	}
	return nil
}

// swapBack undoes a swap, of which nobody knows how far it went.
func (d *Driver) swapBack(ctx context.Context, e journal.Entry) error {
	in, err := d.Get(ctx, instance(classDisk, e.Name))
	if err != nil {
		return err // also where it is gone: the VM may be on another host, with the restored disk
	}
	switch got := (object{in}).text("HostResource"); {
	case sameFile(got, e.Data[dataOld]):
		return nil
	case !sameFile(got, e.Data[dataNew]):
		// A checkpoint's, perhaps, whose parent is the restored one.
		return fmt.Errorf("it is in %s by now, and stays as it is", got)
	}
	return d.put(ctx, e.Name, e.Data[dataOld])
}

// afterwards cares for what the VM had before.
func (r *replacing) afterwards(ctx context.Context) {
	for _, id := range r.o.Disks {
		r.setAside(ctx, id)
	}
	j, err := r.d.openJournal()
	if err == nil {
		err = r.d.dropReferences(ctx, j, r.sys, r.prefix, "")
	}
	if err != nil {
		r.warn("drop the change tracking of the old disks: %v", err)
	}
	r.note("the next backup reads everything and compares it")
	if !r.o.Start {
		return
	}
	if err := r.d.setState(ctx, r.sys, stateRunning); err != nil {
		r.warn("the VM has its restored disks, and could not be started: %v", err)
		return
	}
	r.done.Running = true
}

// trackFiles are what a host keeps beside a disk to track its changes.
var trackFiles = []string{".rct", ".mrt"}

// setAside gives a disk that the VM has no more a name that says so, or removes
// it.
func (r *replacing) setAside(ctx context.Context, id vm.DiskID) {
	old := r.drives[id].Source
	kept := hypervisor.KeptDisk{Disk: id, Path: old}
	defer func() { r.done.Kept = append(r.done.Kept, kept) }()
	ext := filepath.Ext(old)
	name, err := r.sibling(old, "before", ext)
	what := "removed"
	switch {
	case r.o.RemoveOld:
		err = r.d.files.remove(ctx, old)
	case err == nil && !strings.HasPrefix(strings.ToLower(ext), ".avhd"): // a chain knows its files by their names
		err = r.d.files.rename(ctx, old, name)
		what = "renamed"
	default:
		return
	}
	if err != nil {
		r.warn("the old disk %s could not be %s: %v", old, what, err)
		return
	}
	if kept.Path = name; r.o.RemoveOld {
		kept.Path = ""
	}
	for _, more := range trackFiles { // most have none, and none is needed
		if r.o.RemoveOld {
			r.d.files.remove(ctx, old+more)
		} else {
			r.d.files.rename(ctx, old+more, name+more)
		}
	}
}
