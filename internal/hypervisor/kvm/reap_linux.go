package kvm

import (
	"context"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/backstay/backstay/internal/hypervisor/journal"
)

// reapOthersTimeout bounds what a backup spends on other VMs' leftovers. What
// it does not manage is left to the next one.
const reapOthersTimeout = 15 * time.Second

// dataURI is where an entry says on which libvirt its thing is.
const dataURI = "uri"

// entry names a thing of ours on d's libvirt.
func (d *Driver) entry(kind, name string) journal.Entry {
	return journal.Entry{Kind: kind, Name: name, Data: map[string]string{dataURI: d.uri.String()}}
}

// reapOthers clears away what dead runs left of other VMs, which may never be
// backed up again. It never keeps this VM's backup from going on.
func (b *beginning) reapOthers(ctx context.Context, j *journal.Journal) {
	machines, err := j.Machines()
	if err != nil {
		b.warn("look for leftovers of other VMs: %v", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reapOthersTimeout)
	defer cancel()
	for _, machine := range machines {
		id, err := parseUUID(machine)
		if err != nil || machine == b.dom.uuid() || ctx.Err() != nil {
			continue
		}
		// A connection of its own: its deadline must not end calls of ours.
		other := &domain{newConn(b.dom.uri), machine, libvirt.UUID(id)}
		b.reapOther(ctx, j, other)
		other.close()
	}
}

func (b *beginning) reapOther(ctx context.Context, j *journal.Journal, other *domain) {
	l, _, err := b.d.tryLock(other, tidying)
	if l == nil || err != nil {
		return // a run of it lives, and looks after itself
	}
	defer l.Unlock()
	runs, err := j.Runs(other.uuid())
	if err != nil {
		b.warn("clean up after an interrupted run of VM %s: %v", other.name, err)
		return
	}
	for _, r := range runs {
		if !onlyOn(b.d.uri.String(), r.Open()) {
			continue
		}
		_, err := other.active(ctx)
		there := gone(err) != nil || err == nil
		if err != nil && there {
			return // not now
		}
		done, err := other.undo(ctx, r, func(e journal.Entry) bool {
			// Whether a checkpoint is the base of a restore point, only the
			// VM's own next run knows.
			return there && e.Kind == kindCheckpoint
		})
		r.Close()
		if len(done) > 0 {
			b.warn("an earlier run of VM %s was interrupted; cleaned up after it: %s", other.name, strings.Join(done, ", "))
		}
		if err != nil {
			b.warn("clean up after an interrupted run of VM %s: %v", other.name, err)
		}
	}
}

// onlyOn says whether all entries may be of the libvirt at uri: to another one
// the VM is unknown, which does not mean that it is gone.
func onlyOn(uri string, entries []journal.Entry) bool {
	for _, e := range entries {
		if on := e.Data[dataURI]; on != "" && on != uri {
			return false
		}
	}
	return true
}
