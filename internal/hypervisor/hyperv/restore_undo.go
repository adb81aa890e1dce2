package hyperv

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/wsman"
)

// undoTime is how long a host that went away is waited for while a restore is
// taken back.
const undoTime = 60 * time.Second

// undoRestore takes away what a run's journal names, the newest first. What it
// can't, stays in the journal.
func (d *Driver) undoRestore(ctx context.Context, run *journal.Run, patience time.Duration) error {
	var errs []error
	until := time.Now().Add(patience)
	entries := run.Open()
	for _, e := range slices.Backward(entries) {
		err := d.persist(ctx, until, func() error { return d.undoOne(ctx, e) })
		switch {
		case err == nil:
			errs = append(errs, run.Done(e.Kind, e.Name))
		case errors.Is(err, errMaybeLater):
			// Nobody can say whether it comes yet: the next run looks again.
		default:
			var rest *NotEmptyError
			var unknown *UnknownImportError
			if errors.As(err, &rest) || errors.As(err, &unknown) { // what is left is others'
				errs = append(errs, run.Done(e.Kind, e.Name))
			}
			errs = append(errs, fmt.Errorf("%s %s: %w", e.Kind, e.Name, err))
			if (e.Kind == kindNewVM || e.Kind == kindPlanned || e.Kind == kindSwap) && unknown == nil {
				return errors.Join(errs...) // its disks are in use
			}
		}
	}
	return errors.Join(errs...)
}

// persist tries again what failed because the host was out of reach or busy.
func (d *Driver) persist(ctx context.Context, until time.Time, do func() error) error {
	for {
		err := do()
		var cut *wsman.ConnectionError
		var file *FilesError
		again := errors.As(err, &cut) || errors.Is(err, wsman.ErrBusy) || errors.Is(err, errBusy) ||
			errors.As(err, &file) && !errors.Is(err, fault.ErrDenied) && !errors.Is(err, fault.ErrUnsupported)
		if !again || time.Now().After(until) || ctx.Err() != nil {
			return err
		}
		if sleep(ctx, d.poll) != nil {
			return err
		}
	}
}

// errMaybeLater says that a VM is not there, and may still come.
var errMaybeLater = errors.New("it is not there yet")

func (d *Driver) undoOne(ctx context.Context, e journal.Entry) error {
	switch e.Kind {
	case kindNewVM:
		return d.destroyNew(ctx, e)
	case kindPlanned:
		return d.destroyPlanned(ctx, e)
	case kindSwap:
		err := d.swapBack(ctx, e)
		if rehearsed(e) && !unanswered(err) {
			return nil // its VM goes as a whole
		}
		return err
	case kindFile:
		return missingIsFine(d.files.remove(ctx, e.Name))
	case kindFolder:
		return d.removeFolder(ctx, e.Name)
	}
	return fmt.Errorf("what that is, this version does not know: %w", fault.ErrUnsupported)
}

func missingIsFine(err error) error {
	if errors.Is(err, fault.ErrNotFound) {
		return nil
	}
	return err
}

// destroyNew destroys the VM that an entry is about: that of its GUID, or of
// the name that only we give.
func (d *Driver) destroyNew(ctx context.Context, e journal.Entry) error {
	if job := parseRef(e.Data[dataJob]); job.Class != "" && e.Data[dataID] == "" {
		waiting, cancel := context.WithTimeout(ctx, d.settleTime)
		err := d.wait(waiting, "its job", job)
		over := waiting.Err() != nil
		cancel()
		if over {
			return err
		}
	}
	for until := time.Now().Add(d.lookTime); ; {
		if found, err := d.destroyFound(ctx, e); found || err != nil {
			return err
		}
		// Its disks are in use wherever it is by now.
		if s, node, err := d.onAnotherNode(ctx, e); err != nil {
			return err
		} else if node != "" {
			return fmt.Errorf("VM %q is on node %s by now, and its disks stay", s.name, node)
		}
		switch {
		case e.Data[dataID] != "":
			// While it is only imported the host may make a VM of it yet, and
			// may have just now: once the import is gone, it won't.
			if err := d.destroyPlanned(ctx, e); err != nil {
				return err
			}
			_, err := d.destroyFound(ctx, e)
			return err
		case e.Data[dataJob] != "" || e.Data[dataLate] != "":
			return nil
		case time.Now().After(until):
			return errMaybeLater
		}
		if err := sleep(ctx, d.poll); err != nil {
			return errMaybeLater
		}
	}
}

// destroyFound destroys the VM that an entry is about, if the host has it.
func (d *Driver) destroyFound(ctx context.Context, e journal.Entry) (found bool, err error) {
	_, list, err := d.systems(ctx)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(list, func(s system) bool { return s.guid == e.Data[dataID] || s.name == e.Name })
	if i < 0 {
		return false, nil
	}
	return true, d.destroySystem(ctx, list[i].ref)
}

// onAnotherNode is where in its cluster the VM of an entry is, if its host has
// it no more; node is empty for one that is nowhere. A node that can't be asked
// may have it: that is an error.
func (d *Driver) onAnotherNode(ctx context.Context, e journal.Entry) (s system, node string, err error) {
	if d.cluster.isAlone() {
		return s, "", nil
	}
	seen, errs := d.everywhere(ctx)
	for _, p := range seen {
		i := slices.IndexFunc(p.list, func(s system) bool { return s.guid == e.Data[dataID] || s.name == e.Name })
		if i >= 0 {
			return p.list[i], p.host, nil
		}
	}
	return s, "", oneError(errs)
}

func (d *Driver) destroySystem(ctx context.Context, ref wsman.Ref) error {
	_, err := d.manage(ctx, "DestroySystem", wsman.Arg("AffectedSystem", wsman.Of(ref)))
	if err == nil {
		return nil
	}
	if _, e := d.Get(ctx, ref); errors.Is(e, fault.ErrNotFound) {
		return nil
	}
	return err
}

// A NotEmptyError is a folder of ours in which others have files.
type NotEmptyError struct{ Folder string }

func (e *NotEmptyError) Error() string {
	return fmt.Sprintf("folder %s stays: there is something in it that is not ours", e.Folder)
}

// Folders that a host makes in a VM's, and the files that it may leave there.
var (
	hostFolders = []string{"Virtual Machines", "Snapshots", "Planned Virtual Machines", "Virtual Hard Disks"}
	hostFiles   = []string{".vmcx", ".vmrs", ".vmgs", ".xml", ".bin", ".vsv"}
)

// removeFolder removes a folder of ours with what the host left of a VM that is
// gone.
func (d *Driver) removeFolder(ctx context.Context, folder string) error {
	if _, err := d.files.list(ctx, folder); err != nil {
		return missingIsFine(err)
	}
	_, live, err := d.systems(ctx)
	if err != nil {
		return err
	}
	for _, sub := range hostFolders {
		at := folder + `\` + sub
		names, err := d.files.list(ctx, at)
		if errors.Is(err, fault.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			guid, ok := guidOf(strings.TrimSuffix(name, filepath.Ext(name)))
			if !ok || !slices.Contains(hostFiles, strings.ToLower(filepath.Ext(name))) || slices.ContainsFunc(live, func(s system) bool { return s.guid == guid }) {
				continue
			}
			if err := missingIsFine(d.files.remove(ctx, at+`\`+name)); err != nil {
				return err
			}
			if err := d.removeEmpty(ctx, at+`\`+strings.TrimSuffix(name, filepath.Ext(name))); err != nil {
				return err
			}
		}
		if err := d.removeEmpty(ctx, at); err != nil {
			return err
		}
	}
	return d.removeEmpty(ctx, folder)
}

// removeEmpty removes a folder, unless there is something in it: that is a
// NotEmptyError.
func (d *Driver) removeEmpty(ctx context.Context, folder string) error {
	err := missingIsFine(d.files.remove(ctx, folder))
	if err == nil {
		return nil
	}
	if errors.Is(err, smb.ErrNotEmpty) { // also where it holds only folders, which are not listed
		return &NotEmptyError{folder}
	}
	if names, e := d.files.list(ctx, folder); e == nil && len(names) > 0 {
		return &NotEmptyError{folder}
	}
	return err
}

// reapRestores takes away what restores to this host left that died. held is
// whose lock the caller has. It says what it did, and never keeps anybody from
// going on.
func (d *Driver) reapRestores(ctx context.Context, host string, list []system, held string) (said []string) {
	j, err := d.restoreJournal()
	if err != nil {
		return []string{fmt.Sprintf("look for leftovers of restores: %v", err)}
	}
	machines, err := j.Machines()
	if err != nil {
		return []string{fmt.Sprintf("look for leftovers of restores: %v", err)}
	}
	host = strings.ToLower(host)
	for _, machine := range machines {
		if machine != held {
			l, _, err := journal.TryLock(filepath.Join(d.stateDir, "hyperv"), machine, tidying)
			if l == nil || err != nil {
				continue // it lives
			}
			said = append(said, d.reapRestore(ctx, j, machine, host)...)
			l.Unlock()
			continue
		}
		said = append(said, d.reapRestore(ctx, j, machine, host)...)
	}
	return said
}

func (d *Driver) reapRestore(ctx context.Context, j *journal.Journal, machine, host string) (said []string) {
	runs, err := j.Runs(machine)
	if err != nil {
		return []string{fmt.Sprintf("clean up after an interrupted restore: %v", err)}
	}
	for _, r := range runs {
		open := r.Open()
		if len(open) == 0 || open[0].Data[dataHost] != host {
			continue
		}
		why, err := d.inUse(ctx, open)
		if why != "" {
			said = append(said, leave(r, open, why))
			continue
		}
		if errors.Is(err, errElsewhere) {
			continue
		}
		var names []string
		pulled := false
		for _, e := range open {
			names = append(names, e.Name)
			pulled = pulled || e.Data[dataPulled] != ""
			if e.Kind == kindNewVM && e.Data[dataID] == "" && e.Data[dataJob] == "" {
				// It had time enough to come since.
				e.Data[dataLate] = "yes"
				err = errors.Join(err, r.Note(e))
			}
		}
		if err == nil {
			err = d.undoRestore(ctx, r, reapOthersTime)
		}
		if err != nil {
			said = append(said, fmt.Sprintf("clean up after an interrupted restore: %v", err))
		} else {
			text := "a restore was interrupted; took away what it had made: " + strings.Join(names, ", ")
			if pulled {
				text += "; the VM was switched off for it, and is off"
			}
			said = append(said, text)
		}
		r.Close()
	}
	return said
}
