package hyperv

import (
	"context"
	"errors"
	"strings"
	"time"

	"path/filepath"

	"github.com/backstay/backstay/internal/hypervisor/journal"
)

// reapOthersTime bounds what a backup spends on other VMs' leftovers. What it
// does not manage is left to the next one.
const reapOthersTime = 15 * time.Second

// settleRun clears away the checkpoint that a dead run left. One whose restore
// point is durable, or that was made for another repository and may be, becomes
// a reference point: that gives the space back, too, and loses nothing. What was
// made on another host is left to that, unless it came here with the VM.
func (d *Driver) settleRun(ctx context.Context, s system, r *journal.Run, prefix string, durable func(run string) bool) (done []string, err error) {
	for _, e := range r.Open() {
		if e.Kind != kindCheckpoint {
			continue
		}
		t := d.target(s, e.Data[dataRepo], r)
		t.reaping = true
		if !d.made(e) && !d.sameCluster(ctx, e) {
			if here, one := t.has(ctx, e); !here {
				err = errors.Join(err, one)
				continue
			}
		}
		var what string
		var one error
		switch {
		case e.Data[dataType] != typeRecovery:
			what, one = t.drop(ctx, e) // it can't be converted
		case e.Data[dataRepo] == rehearsal:
			what, one = t.unrehearse(ctx, e) // there is no restore point of it
		case e.Data[dataDurable] != "" || e.Data[dataRepo] != prefix || durable(e.Name):
			what, one = t.convert(ctx, e)
		default:
			what, one = t.drop(ctx, e)
		}
		if what != "" {
			done = append(done, what)
		}
		err = errors.Join(err, one)
	}
	return done, err
}

// reap clears away what earlier runs of ours left of this VM.
func (b *beginning) reap(ctx context.Context) error {
	runs, err := b.journal.Runs(b.sys.guid)
	if err != nil {
		return err
	}
	for _, r := range runs {
		done, err := b.d.settleRun(ctx, b.sys, r, b.prefix, func(run string) bool { return b.named[run] })
		r.Close()
		if len(done) > 0 {
			b.warn("an earlier run was interrupted; cleaned up after it: %s", strings.Join(done, ", "))
		}
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			b.warn("clean up after an interrupted run: %v", err)
		}
	}
	if err := b.d.dropReferences(ctx, b.journal, b.sys, rehearsal, ""); err != nil {
		if ctx.Err() != nil {
			return err
		}
		b.warn("clean up after an interrupted recording: %v", err)
	}
	return nil
}

// reapOthers does the same for other VMs of the host, which may never be backed
// up again. It never keeps this VM's backup from going on.
func (b *beginning) reapOthers(ctx context.Context, list []system) {
	machines, err := b.journal.Machines()
	if err != nil {
		b.warn("look for leftovers of other VMs: %v", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reapOthersTime)
	defer cancel()
	elsewhere := map[string]sighting{}
	for _, guid := range machines {
		if guid == b.sys.guid || ctx.Err() != nil {
			continue
		}
		other, gone := system{guid: guid, name: guid}, true
		for _, s := range list {
			if s.guid == guid {
				other, gone = s, false
			}
		}
		where := b.d
		if gone && b.leftOnCluster(ctx, guid) {
			if len(elsewhere) == 0 {
				elsewhere = b.otherNodes(ctx)
			}
			if at, ok := elsewhere[guid]; ok {
				where, other, gone = at.d, at.sys, false
			}
		}
		b.reapOther(ctx, where, other, gone)
	}
}

// leftOnCluster says whether a run left a checkpoint of a VM on a node of the
// host's cluster.
func (b *beginning) leftOnCluster(ctx context.Context, guid string) bool {
	runs, err := b.journal.Runs(guid)
	if err != nil {
		return false
	}
	for _, r := range runs {
		for _, e := range r.Open() {
			if e.Kind == kindCheckpoint && b.d.sameCluster(ctx, e) {
				return true
			}
		}
	}
	return false
}

// otherNodes are the VMs of the cluster's other nodes.
func (b *beginning) otherNodes(ctx context.Context) map[string]sighting {
	out := map[string]sighting{}
	seen, _ := b.d.everywhere(ctx)
	for _, p := range seen {
		for _, s := range p.list {
			out[s.guid] = sighting{place: p, sys: s}
		}
	}
	return out
}

func (b *beginning) reapOther(ctx context.Context, where *Driver, other system, gone bool) {
	runs, err := b.journal.Runs(other.guid)
	if err != nil {
		b.warn("clean up after an interrupted run of VM %s: %v", other.name, err)
		return
	}
	ours := false
	for _, r := range runs {
		for _, e := range r.Open() {
			ours = ours || e.Kind == kindCheckpoint && (!gone || b.d.made(e) && e.Data[dataGone] == "")
		}
	}
	if !ours {
		return
	}
	l, _, err := journal.TryLock(filepath.Join(b.d.stateDir, "hyperv"), other.guid, tidying)
	if l == nil || err != nil {
		return // a run of it lives, and looks after itself
	}
	defer l.Unlock()
	if runs, err = b.journal.Runs(other.guid); err != nil {
		return // it was sound a moment ago, and the next run looks again
	}
	for _, r := range runs {
		if gone {
			b.sayGone(other, r)
			r.Close()
			continue
		}
		// Whether its restore point is durable, only its own next run knows.
		done, err := where.settleRun(ctx, other, r, "", func(string) bool { return true })
		r.Close()
		if len(done) > 0 {
			b.warn("an earlier run of VM %s was interrupted; cleaned up after it: %s", other.name, strings.Join(done, ", "))
		}
		if err != nil && ctx.Err() == nil {
			b.warn("clean up after an interrupted run of VM %s: %v", other.name, err)
		}
	}
}

// sayGone says, once, that a VM went away with a checkpoint. Its entries stay:
// if it was moved, a backup of it where it is now needs them, and if it was
// deleted, they cost nothing.
func (b *beginning) sayGone(other system, r *journal.Run) {
	for _, e := range r.Open() {
		if e.Kind != kindCheckpoint || !b.d.made(e) || e.Data[dataGone] != "" {
			continue
		}
		e.Data[dataGone] = "yes"
		if r.Note(e) == nil {
			b.warn("VM %s is not on this host any more; if it moved with a checkpoint %s%s, its next backup removes that", other.name, e.Data[dataRepo], e.Name)
		}
	}
}
