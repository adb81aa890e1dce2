package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/wsman"
)

// Kinds of journal entries. They are on disk between two runs, perhaps of two
// versions: add to them, never rename.
const (
	kindCheckpoint = "checkpoint"      // name: the run
	kindReference  = "reference-point" // name: its InstanceID; it stays as long as its reference point
)

// What an entry says besides.
const (
	dataHost      = "host"      // of the source's URL
	dataNode      = "node"      // as that host called itself
	dataRepo      = "repo"      // prefix of the repository's names
	dataRun       = "run"       // of a reference point: which run made it
	dataType      = "type"      // of checkpoint: VirtualSystemType
	dataBefore    = "before"    // ids of the checkpoints that were there, a line each
	dataJob       = "job"       // path of the job that makes it
	dataID        = "id"        // InstanceID of the checkpoint
	dataDurable   = "durable"   // the restore point is: never destroy, convert
	dataRefBefore = "refbefore" // ids of the reference points before converting, a line each
	dataRefJob    = "refjob"    // path of the job that converts it
	dataMoved     = "moved"     // node from which the VM moved between checkpoint and reference point
	dataGone      = "gone"      // it was said that the host does not have the VM any more
)

// Kinds of checkpoint, as CreateSnapshot numbers them.
const (
	snapshotFull     = 2 // with the guest's memory
	snapshotRecovery = 32768
)

// How still the host is asked to hold the guest.
const (
	levelApplication = 1
	levelCrash       = 2
)

// What applications in the guest make of a backup: a full one lets them truncate
// their logs, a copy leaves those to whoever else needs them.
const (
	backupFull = 1
	backupCopy = 2
)

// A target is one VM and where its journal is: what checkpoints are made of and
// undone with.
type target struct {
	*client
	system
	host   string // the VM's, as the journal names it
	node   string // as that host calls itself, "" for not known
	run    *journal.Run
	prefix string
	// reaping says that run is a dead one. What is new since then may be
	// anybody's, whatever became of the dead run's job.
	reaping bool
	// settleTime is how long a job of a run that died, or of one that is
	// cancelled, is waited for.
	settleTime time.Duration
	// busyTime is how long a host that is busy with the VM is asked again.
	busyTime time.Duration
	// truncate has applications in the guest truncate their logs.
	truncate bool
}

func ids(list []settings) (out []string) {
	for _, s := range list {
		out = append(out, s.id)
	}
	return out
}

func lines(s string) []string { return strings.FieldsFunc(s, func(r rune) bool { return r == '\n' }) }

// checkpoint makes one and gives it, with what the host warned of on the way.
// e is its journal entry, which is noted before anything is made and says more
// with every step. Level 0 saves the guest's memory.
func (t *target) checkpoint(ctx context.Context, e journal.Entry, level uint8) (s settings, warning, err error) {
	kind, in := typeRecovery, []wsman.Argument{wsman.Arg("AffectedSystem", wsman.Of(t.ref))}
	if level == 0 {
		kind = typeCheckpoint
		in = append(in, wsman.Arg("SnapshotSettings", wsman.Of("")), wsman.Arg("SnapshotType", wsman.Of(uint16(snapshotFull))))
	} else {
		backup := uint8(backupCopy)
		if t.truncate {
			backup = backupFull
		}
		how := wsman.NewInstance("Msvm_VirtualSystemSnapshotSettingData").
			Set("ConsistencyLevel", wsman.Of(level)).
			Set("GuestBackupType", wsman.Of(backup)).
			Set("IgnoreNonSnapshottableDisks", wsman.Of(true))
		in = append(in, wsman.Arg("SnapshotSettings", wsman.Of(how)), wsman.Arg("SnapshotType", wsman.Of(uint16(snapshotRecovery))))
	}
	before, err := t.checkpoints(ctx, t.system, kind)
	if err != nil {
		return s, nil, err
	}
	e.Data[dataType], e.Data[dataBefore] = kind, strings.Join(ids(before), "\n")
	delete(e.Data, dataJob)
	delete(e.Data, dataID)
	if err := t.run.Note(e); err != nil {
		return s, nil, err
	}
	var out object
	var job wsman.Ref
	err = t.patiently(ctx, func() (err error) {
		out, job, err = t.start(ctx, familyCIM, service(classSnapshots), "CreateSnapshot", in...)
		return err
	})
	if neverBegan(err) {
		return s, nil, errors.Join(err, t.run.Done(e.Kind, e.Name))
	}
	if err != nil {
		return s, nil, err // the entry stays: something may have been made
	}
	if job.Class != "" {
		e.Data[dataJob] = job.String()
		if err := t.run.Note(e); err != nil {
			return s, nil, err
		}
		if err := t.wait(ctx, "CreateSnapshot", job); warned(err) {
			warning = err // it is there, and may be less than it was asked to be
		} else if err != nil {
			return s, nil, err
		}
	}
	if made := out.ref("ResultingSnapshot"); made.Class != "" {
		in, err := t.Get(ctx, made)
		if err != nil {
			return s, nil, fmt.Errorf("read the checkpoint: %w", err)
		}
		s = asSettings(object{in})
	} else if s, err = t.find(ctx, e, true); err != nil {
		return s, nil, err
	}
	e.Data[dataID] = s.id
	if err := t.run.Note(e); err != nil {
		return s, nil, err
	}
	t.rename(ctx, s, t.prefix+e.Name)
	return s, warning, nil
}

// neverBegan says whether a call surely made nothing: the host was not reached,
// or refused before it began. A host that failed later may have made it.
func neverBegan(err error) bool {
	var code *ReturnError
	var refused *wsman.Fault
	var cut *wsman.ConnectionError
	var who *wsman.SignInError
	switch {
	case errors.As(err, &who):
		return true
	case errors.As(err, &code):
		return code.refused()
	case errors.As(err, &refused):
		switch refused.Subcode {
		case "AccessDenied", "SchemaValidationError", "InvalidSelectors", "InvalidBody", "ActionNotSupported":
			return true
		}
		return errors.Is(err, fault.ErrDenied)
	}
	return errors.As(err, &cut) && !cut.Sent
}

// rename gives a checkpoint our name, by which people know whose it is. It is
// found by its id, so that a host that refuses costs nothing.
func (t *target) rename(ctx context.Context, s settings, name string) {
	t.do(ctx, familyMsvm, service(classManagement), "ModifySystemSettings", wsman.Arg("SystemSettings",
		wsman.Of(wsman.NewInstance(classSettings).Set("InstanceID", wsman.Of(s.id)).Set("ElementName", wsman.Of(name)))))
}

// An UnknownError says that there are checkpoints of which nobody can say
// whether they are ours.
type UnknownError struct{ IDs []string }

func (e *UnknownError) Error() string {
	return fmt.Sprintf("the host does not say which checkpoint it made; new since then, and left alone: %s", strings.Join(e.IDs, ", "))
}

// errNoCheckpoint says that there is no checkpoint of an entry, or no more.
var errNoCheckpoint = fmt.Errorf("no checkpoint was made: %w", fault.ErrNotFound)

// errElsewhere says that the host does not have the VM, or not any more.
var errElsewhere = fmt.Errorf("the VM is not on this host any more: %w", fault.ErrNotFound)

// onHost fails unless the host has the VM. Of a VM that it has not, it says
// nothing else either, and a host whose management restarts has none at all.
func (t *target) onHost(ctx context.Context) error {
	_, err := t.Get(ctx, t.ref)
	if errors.Is(err, fault.ErrNotFound) {
		return errElsewhere
	}
	return err
}

// none is errNoCheckpoint where the host's list of checkpoints can be believed.
func (t *target) none(ctx context.Context) error {
	if err := t.onHost(ctx); err != nil {
		return err
	}
	return errNoCheckpoint
}

// gone says whether the host has the VM and surely not, or no more, what p
// names.
func (t *target) gone(ctx context.Context, p wsman.Ref) bool {
	_, err := t.Get(ctx, p)
	return errors.Is(err, fault.ErrNotFound) && t.onHost(ctx) == nil
}

// has says whether the host has the checkpoint of an entry, by its id or by our
// name.
func (t *target) has(ctx context.Context, e journal.Entry) (bool, error) {
	have, err := t.checkpoints(ctx, t.system, e.Data[dataType])
	return slices.ContainsFunc(have, func(s settings) bool {
		return strings.EqualFold(s.id, e.Data[dataID]) || s.text("ElementName") == t.prefix+e.Name
	}), err
}

// find is the checkpoint that e is about: that which the host says our job
// made, or that which has our name. If this run's job has just made one, it is
// the only one that is new.
func (t *target) find(ctx context.Context, e journal.Entry, sure bool) (settings, error) {
	have, err := t.checkpoints(ctx, t.system, e.Data[dataType])
	if err != nil {
		return settings{}, err
	}
	byID := func(id string) (settings, bool) {
		i := slices.IndexFunc(have, func(s settings) bool { return strings.EqualFold(s.id, id) })
		if i < 0 {
			return settings{}, false
		}
		return have[i], true
	}
	if id := e.Data[dataID]; id != "" {
		if s, ok := byID(id); ok {
			return s, nil
		}
		return settings{}, t.none(ctx)
	}
	for _, s := range have {
		if s.text("ElementName") == t.prefix+e.Name {
			return s, nil
		}
	}
	if job := parseRef(e.Data[dataJob]); job.Class != "" {
		made, err := t.made(ctx, job, classSettings)
		if err != nil {
			return settings{}, err
		}
		for _, p := range made {
			if s, ok := byID(p.Key("InstanceID")); ok {
				return s, nil
			}
		}
		// The host says what it made, and that is gone: what is new is another's.
		sure = sure && len(made) == 0
	}
	before := lines(e.Data[dataBefore])
	fresh := slices.DeleteFunc(slices.Clone(have), func(s settings) bool {
		return slices.Contains(before, s.id)
	})
	switch {
	case len(fresh) == 0:
		return settings{}, t.none(ctx)
	case len(fresh) == 1 && sure:
		return fresh[0], nil
	}
	return settings{}, &UnknownError{ids(fresh)}
}

// settle waits for the job of an entry, if it goes on, and finds what it made.
func (t *target) settle(ctx context.Context, e journal.Entry) (settings, error) {
	sure := false
	if job := parseRef(e.Data[dataJob]); job.Class != "" && e.Data[dataID] == "" {
		waiting, cancel := context.WithTimeout(ctx, t.settleTime)
		defer cancel()
		err := t.wait(waiting, "CreateSnapshot", job)
		if waiting.Err() != nil {
			return settings{}, err
		}
		sure = !t.reaping && (err == nil || warned(err))
	}
	return t.find(ctx, e, sure)
}

// drop destroys the checkpoint of an entry and strikes it off. what says what
// was done.
func (t *target) drop(ctx context.Context, e journal.Entry) (what string, err error) {
	s, err := t.settle(ctx, e)
	if errors.Is(err, errNoCheckpoint) {
		if !t.reaping && e.Data[dataJob] == "" && e.Data[dataID] == "" {
			return "", nil // the host may be about to make it: the next run looks again
		}
		return "", t.run.Done(e.Kind, e.Name)
	}
	if err != nil {
		return "", err
	}
	err = t.patiently(ctx, func() error {
		_, err := t.do(ctx, familyCIM, service(classSnapshots), "DestroySnapshot", wsman.Arg("AffectedSnapshot", wsman.Of(s.ref)))
		return err
	})
	if err != nil && !warned(err) && !t.gone(ctx, s.ref) {
		return "", err
	}
	return "destroyed checkpoint " + s.text("ElementName"), t.run.Done(e.Kind, e.Name)
}

// references are the ids of a VM's reference points.
func (t *target) references(ctx context.Context) (out []string, err error) {
	list, err := t.query(ctx, associated(t.ref, "Msvm_ReferencePointOfVirtualSystem", classReference))
	if err != nil {
		return nil, fmt.Errorf("list its reference points: %w", err)
	}
	for _, o := range list {
		out = append(out, o.text("InstanceID"))
	}
	return out, nil
}

// convert makes a reference point of the checkpoint of an entry, whose restore
// point is durable. It can be begun again wherever it was cut off.
func (t *target) convert(ctx context.Context, e journal.Entry) (what string, err error) {
	if e.Data[dataDurable] == "" {
		e.Data[dataDurable] = "yes"
		if err := t.run.Note(e); err != nil {
			return "", err
		}
	}
	if job := parseRef(e.Data[dataRefJob]); job.Class != "" {
		// What an earlier run began may still go on.
		waiting, cancel := context.WithTimeout(ctx, t.settleTime)
		defer cancel()
		err := t.wait(waiting, "ConvertToReferencePoint", job)
		if waiting.Err() != nil {
			return "", err
		}
	}
	var made wsman.Ref
	var fresh []string
	s, err := t.find(ctx, e, false)
	switch {
	case errors.Is(err, errNoCheckpoint):
		// It was converted already, or somebody deleted it. What is new since
		// then may be anybody's, unless the host says that it is ours.
		made, fresh, err = t.newReference(ctx, e, false)
	case err == nil:
		made, fresh, err = t.toReference(ctx, e, s)
	}
	if err != nil {
		return "", err
	}
	if made.Class != "" {
		if err = t.run.Note(t.referenceOf(e, made.Key("InstanceID"))); err != nil {
			return "", err
		}
	}
	if err := t.run.Done(e.Kind, e.Name); err != nil {
		return "", err
	}
	switch {
	case made.Class != "":
		return "converted checkpoint " + e.Name + " into a reference point", nil
	case len(fresh) > 0:
		return "", fmt.Errorf("the host does not say which reference point it made, so that the next backup reads everything; new since then, and left alone: %s", strings.Join(fresh, ", "))
	}
	return "", fmt.Errorf("checkpoint %s is gone and there is no reference point of it, so that the next backup reads everything", e.Name)
}

// referenceOf is the journal entry of a reference point that was made here of
// the checkpoint of e, which may have been made on another node.
func (t *target) referenceOf(e journal.Entry, id string) journal.Entry {
	at := journal.Entry{Kind: kindReference, Name: id,
		Data: map[string]string{dataHost: t.host, dataNode: t.node, dataRepo: e.Data[dataRepo], dataRun: e.Name}}
	from := e.Data[dataMoved]
	if from == "" && t.node != "" && !strings.EqualFold(e.Data[dataNode], t.node) {
		from = e.Data[dataNode]
	}
	if from != "" {
		at.Data[dataMoved] = from
	}
	return at
}

// toReference converts a checkpoint that is there, and gives what newReference
// does.
func (t *target) toReference(ctx context.Context, e journal.Entry, s settings) (made wsman.Ref, fresh []string, err error) {
	before, err := t.references(ctx)
	if err != nil {
		return made, nil, err
	}
	e.Data[dataRefBefore] = strings.Join(before, "\n")
	delete(e.Data, dataRefJob)
	if err := t.run.Note(e); err != nil {
		return made, nil, err
	}
	var out object
	err = t.patiently(ctx, func() error {
		var job wsman.Ref
		var err error
		out, job, err = t.start(ctx, familyCIM, service(classSnapshots), "ConvertToReferencePoint",
			wsman.Arg("AffectedSnapshot", wsman.Of(s.ref)), wsman.Arg("ReferencePointSettings", wsman.Of("")))
		if err != nil || job.Class == "" {
			return err
		}
		e.Data[dataRefJob] = job.String()
		if err := t.run.Note(e); err != nil {
			return err
		}
		return t.wait(ctx, "ConvertToReferencePoint", job)
	})
	if err != nil && !warned(err) {
		return made, nil, err
	}
	if made = out.ref("ResultingReferencePoint"); made.Class != "" {
		return made, nil, nil
	}
	return t.newReference(ctx, e, true)
}

// newReference is the reference point that the host says our job made; if it
// has surely just made one, the only one that is new. Where it is none of them,
// fresh are those that are new. One that another product made is of another
// moment, and to take it for ours would miss writes.
func (t *target) newReference(ctx context.Context, e journal.Entry, sure bool) (made wsman.Ref, fresh []string, err error) {
	told := false
	if job := parseRef(e.Data[dataRefJob]); job.Class != "" {
		rows, err := t.made(ctx, job, classReference)
		if err != nil {
			return made, nil, err
		}
		if len(rows) == 1 {
			return rows[0], nil, nil
		}
		told = len(rows) > 0
	}
	if _, begun := e.Data[dataRefBefore]; !begun {
		return made, nil, nil // it was never asked for
	}
	fresh, err = t.references(ctx)
	if err != nil {
		return made, nil, err
	}
	before := lines(e.Data[dataRefBefore])
	fresh = slices.DeleteFunc(fresh, func(id string) bool { return slices.Contains(before, id) })
	if len(fresh) == 1 && sure && !told {
		return instance(classReference, fresh[0]), nil, nil
	}
	return made, fresh, nil
}

// forget destroys a reference point of ours and strikes it off.
func (t *target) forget(ctx context.Context, run *journal.Run, e journal.Entry) error {
	if err := t.destroyReference(ctx, e.Name); err != nil {
		return err
	}
	return run.Done(e.Kind, e.Name)
}

// destroyReference is done, too, where there is none of that id.
func (t *target) destroyReference(ctx context.Context, id string) error {
	p := instance(classReference, id)
	err := t.patiently(ctx, func() error {
		_, err := t.do(ctx, familyCIM, service(classReferences), "DestroyReferencePoint", wsman.Arg("AffectedReferencePoint", wsman.Of(p)))
		return err
	})
	if err != nil && !warned(err) && !t.gone(ctx, p) {
		return fmt.Errorf("reference point %s: %w", id, err)
	}
	return nil
}

// patiently does again what the host is too busy for.
func (t *target) patiently(ctx context.Context, do func() error) error {
	until := time.Now().Add(t.busyTime)
	for {
		err := do()
		if !errors.Is(err, errBusy) || time.Now().After(until) {
			return err
		}
		if e := sleep(ctx, t.poll); e != nil {
			return err
		}
	}
}
