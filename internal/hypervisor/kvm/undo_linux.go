package kvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

// Kinds of journal entries. They are on disk between two runs, perhaps of two
// versions: add to them, never rename.
const (
	kindFreeze     = "freeze"     // name: the VM's UUID
	kindJob        = "job"        // name: the job's NBD socket
	kindNBD        = "qemu-nbd"   // name: its socket
	kindScratch    = "scratch"    // name: the directory
	kindCheckpoint = "checkpoint" // name: the checkpoint
)

// undoOrder is what goes first: the guest is freed before all else, and a
// file is removed when nobody writes it any more.
var undoOrder = []string{kindFreeze, kindJob, kindNBD, kindScratch, kindCheckpoint}

// askAgain is how long libvirt may take to end a job it was asked to end. A
// restart may make it forget.
const askAgain = 40 * time.Second

// undo takes away what run has made, but for entries that keep names; those
// are struck off if strike says so. It does all it can, and what it can't stays
// in the journal. done says in words what was found and undone.
func (d *domain) undo(ctx context.Context, run *journal.Run, keep func(journal.Entry) bool) (done []string, err error) {
	entries := run.Open()
	slices.SortStableFunc(entries, func(a, b journal.Entry) int {
		return slices.Index(undoOrder, a.Kind) - slices.Index(undoOrder, b.Kind)
	})
	var errs []error
	for _, e := range entries {
		if keep != nil && keep(e) {
			continue
		}
		what, err := d.undoOne(ctx, e)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", e.Kind, e.Name, err))
			continue
		}
		if what != "" {
			done = append(done, what)
		}
		if err := run.Done(e.Kind, e.Name); err != nil {
			errs = append(errs, err)
		}
	}
	return done, errors.Join(errs...)
}

func (d *domain) undoOne(ctx context.Context, e journal.Entry) (what string, err error) {
	switch e.Kind {
	case kindFreeze:
		return d.undoFreeze(ctx, e)
	case kindJob:
		return d.endJob(ctx, e.Name)
	case kindNBD:
		// One that nobody ever spoke to waits for its first client and ends
		// with its last.
		c, err := net.DialTimeout("unix", e.Name, time.Second)
		if err != nil {
			return "", nil
		}
		c.Close()
		return "ended a qemu-nbd", nil
	case kindScratch:
		if !strings.HasPrefix(filepath.Base(e.Name), "backstay-") {
			return "", fmt.Errorf("no name of ours: %w", fault.ErrUnsupported)
		}
		if _, err := os.Lstat(e.Name); err != nil {
			return "", nil
		}
		return "removed scratch files", os.RemoveAll(e.Name)
	case kindCheckpoint:
		if !strings.HasPrefix(e.Name, "backstay-") {
			return "", fmt.Errorf("no name of ours: %w", fault.ErrUnsupported)
		}
		return d.deleteCheckpoint(ctx, e.Name)
	}
	return "", fmt.Errorf("written by a newer version: %w", fault.ErrUnsupported)
}

// What an entry of a freeze says besides.
const (
	dataBoot  = "boot"  // the host's boot id
	dataUntil = "until" // when the watchdog gives up, RFC 3339
)

// oursLonger is for how long after its watchdog has given up a freeze is still
// taken for ours.
const oursLonger = 10 * time.Minute

// freezeEntry is for a freeze of d that the watchdog tries to end until then.
func freezeEntry(d *domain, until time.Time) journal.Entry {
	return journal.Entry{Kind: kindFreeze, Name: d.uuid(), Data: map[string]string{
		dataURI: d.uri.String(), dataBoot: bootID(), dataUntil: until.UTC().Format(time.RFC3339)}}
}

// bootID is another one after each start of the host.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // "" is nobody's
	return strings.TrimSpace(string(b))
}

// stillOurs says whether a guest that is frozen now can be so by the freeze
// that e names. Somebody else may have frozen it since.
func stillOurs(e journal.Entry, boot string, now time.Time) bool {
	until, err := time.Parse(time.RFC3339, e.Data[dataUntil])
	return err == nil && boot != "" && e.Data[dataBoot] == boot && now.Before(until.Add(oursLonger))
}

// undoFreeze thaws a guest that a run of ours left frozen.
func (d *domain) undoFreeze(ctx context.Context, e journal.Entry) (string, error) {
	var status string
	err := d.agent(ctx, agentTimeout, "guest-fsfreeze-status", nil, &status)
	var a *agentError
	if errors.As(err, &a) || errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning) {
		return "", nil // off, restarted, or without its agent: not frozen by us any more
	}
	if err != nil || status != "frozen" {
		return "", err
	}
	if !stillOurs(e, bootID(), time.Now()) {
		return "left the guest frozen: that freeze can not be ours any more", nil
	}
	ctx, cancel := context.WithTimeout(ctx, thawPatience)
	defer cancel()
	if _, err := d.thaw(ctx); err != nil {
		return "", err
	}
	return "thawed the guest, which was still frozen", nil
}

// endJob ends the pull backup that serves socket, and no other.
//
// It asks libvirt once and then only looks. libvirt ends the job in the thread
// that handles all events, which may be stuck for up to 30 s: so long it waits
// with a guest agent that connects while a backup runs. Asking again does not
// make that shorter.
func (d *domain) endJob(ctx context.Context, socket string) (string, error) {
	var asked time.Time
	did := ""
	for {
		now, err := d.backupSocket(ctx)
		if errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning) {
			return did, nil // the VM is gone, and its job with it
		}
		if err != nil || now != socket {
			return did, err
		}
		if time.Since(asked) > askAgain {
			err = d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) error { return l.DomainAbortJob(dom) })
			if err != nil && code(err) != libvirt.ErrOperationInvalid {
				return "", err
			}
			asked, did = time.Now(), "ended a backup job"
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// deleteCheckpoint deletes a checkpoint of ours with its bitmaps. The record
// goes last, so that it can be done again.
func (d *domain) deleteCheckpoint(ctx context.Context, name string) (string, error) {
	have, err := d.checkpoints(ctx)
	if errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning) {
		return "", nil // the VM is gone
	}
	if err != nil {
		return "", err
	}
	on, err := d.active(ctx)
	if err != nil {
		return "", err
	}
	did := ""
	if have[name] {
		did = "deleted checkpoint " + name
	}
	drop := func(flags libvirt.DomainCheckpointDeleteFlags) error {
		err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) error {
			return l.DomainCheckpointDelete(libvirt.DomainCheckpoint{Name: name, Dom: dom}, flags)
		})
		if code(err) == libvirt.ErrNoDomainCheckpoint {
			return nil
		}
		return err
	}
	if on && have[name] && drop(0) == nil {
		have[name] = false
	}
	// What libvirt could not do, or does not know of any more, is done by hand.
	bitmaps, err := d.removeBitmaps(ctx, on, func(b string) bool { return b == name })
	if err != nil {
		return "", err
	}
	if bitmaps > 0 && did == "" {
		did = "removed an orphaned bitmap"
	}
	if have[name] {
		if err := drop(libvirt.DomainCheckpointDeleteMetadataOnly); err != nil {
			return "", fmt.Errorf("delete checkpoint %s: %w", name, err)
		}
	}
	return did, nil
}

// removeBitmaps removes the bitmaps that which names from the VM's disks.
func (d *domain) removeBitmaps(ctx context.Context, on bool, which func(name string) bool) (n int, err error) {
	_, def, err := d.xml(ctx, 0)
	if err != nil {
		return 0, err
	}
	if !on {
		return removeImageBitmaps(ctx, def, which)
	}
	nodes, err := d.nodes(ctx)
	if err != nil {
		return 0, err
	}
	for _, e := range disks(def, nil) {
		for _, layer := range e.layers {
			node := nodes[layer]
			for _, b := range node.Bitmaps {
				if !which(b.Name) || node.RO {
					continue // one below a snapshot goes when its layer does
				}
				err := d.monitor(ctx, "block-dirty-bitmap-remove", map[string]any{"node": layer, "name": b.Name}, nil)
				if err != nil {
					return n, err
				}
				n++
			}
		}
	}
	return n, nil
}

// dropCheckpoints deletes all checkpoints with the prefix but keep, and then
// the bitmaps with the prefix that belong to no checkpoint.
func (d *domain) dropCheckpoints(ctx context.Context, prefix, keep string) error {
	have, err := d.checkpoints(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for name := range have {
		if strings.HasPrefix(name, prefix) && name != keep {
			if _, err := d.deleteCheckpoint(ctx, name); err != nil {
				errs = append(errs, err)
			}
		}
	}
	on, err := d.active(ctx)
	if err == nil {
		_, err = d.removeBitmaps(ctx, on, func(b string) bool { return strings.HasPrefix(b, prefix) && b != keep })
	}
	return errors.Join(append(errs, err)...)
}
