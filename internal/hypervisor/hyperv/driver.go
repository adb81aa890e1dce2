package hyperv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/vm"
)

// How long ending things may take.
const (
	settleTime = 90 * time.Second
	busyTime   = 30 * time.Second
	endTime    = 110 * time.Second // all of it, the merge not counted
	// failTime is how long a VM whose node does not answer may take to be on
	// another: a cluster waits four minutes before it gives a silent node up.
	failTime  = 6 * time.Minute
	mergeWait = time.Hour
	watchTime = 5 * time.Second // between two looks at what the guest writes meanwhile
)

// A Driver speaks to one Hyper-V host, and finds VMs on the other nodes of its
// cluster, each of which has a Driver of its own.
type Driver struct {
	*client
	members    *client // of the cluster's namespace; nil for none
	cluster    *cluster
	files      files
	host       *url.URL
	stateDir   string
	log        *slog.Logger
	savedState bool
	// truncateLogs has applications in guests truncate their logs.
	truncateLogs bool

	settleTime, busyTime, mergeWait, watchTime time.Duration
	failTime, roamTime, nodeOutage, openTime   time.Duration
	lookTime, undoTime                         time.Duration // of a restore that is taken back

	slots chan struct{}
	mu    sync.Mutex
	node  string // as the host calls itself, "" before it was asked
}

var (
	_ hypervisor.Driver           = (*Driver)(nil)
	_ hypervisor.TrackingResetter = (*Driver)(nil)
	_ hypervisor.Lister           = (*Driver)(nil)
	_ hypervisor.OffTracker       = (*Driver)(nil)
)

// newDriver makes a Driver of what reaches a host.
func newDriver(m management, f files, o Options) *Driver {
	d := &Driver{client: &client{m, jobPoll, pollPatience}, files: f, host: o.Host, stateDir: o.StateDir, log: o.Log,
		savedState: o.AllowSavedState, truncateLogs: o.TruncateLogs, settleTime: settleTime, busyTime: busyTime, mergeWait: o.MergeWait, watchTime: watchTime, failTime: failTime, roamTime: roamTime, nodeOutage: nodeOutage, openTime: openTime, lookTime: lookTime, undoTime: undoTime,
		slots: make(chan struct{}, sessionsPerHost), cluster: &cluster{drivers: map[string]*Driver{}, volumes: map[string]chan struct{}{}}}
	if d.stateDir == "" {
		d.stateDir = "/var/lib/backstay"
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.mergeWait == 0 {
		d.mergeWait = mergeWait
	}
	return d
}

// Close ends the connections to the host and to the other nodes of its cluster.
func (d *Driver) Close() error {
	return errors.Join(d.files.close(), d.client.Close(), d.cluster.close(d))
}

// hostKey names the host in the journal.
func (d *Driver) hostKey() string { return strings.ToLower(d.host.Hostname()) }

// TracksOff says that a reference point is made of a VM that is off, too.
func (d *Driver) TracksOff() {}

// List names all VMs, those of a cluster's other nodes too, with one question to
// each. Nodes that can't be asked are left out, and named in a PartialError.
func (d *Driver) List(ctx context.Context) ([]vm.Machine, error) {
	seen, errs := d.everywhere(ctx)
	if len(seen) == 0 {
		return nil, oneError(errs)
	}
	var out []vm.Machine
	for _, p := range seen {
		for _, s := range p.list {
			out = append(out, p.d.describe(p.host, s))
		}
	}
	if len(errs) > 0 {
		return out, &hypervisor.PartialError{Err: oneError(errs)}
	}
	return out, nil
}

// called is what people know the host by.
func (d *Driver) called() string { return cmp.Or(d.nodeName(), d.hostKey()) }

// look lists the VMs of the host, and remembers what it calls itself.
func (d *Driver) look(ctx context.Context) (host string, list []system, err error) {
	if host, list, err = d.systems(ctx); err == nil {
		d.mu.Lock()
		d.node = host
		d.mu.Unlock()
	}
	return host, list, err
}

// nodeName is what the host calls itself, "" if it does not.
func (d *Driver) nodeName() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.node
}

// entry begins a journal entry of something on this host.
func (d *Driver) entry(kind, name, prefix string) journal.Entry {
	return journal.Entry{Kind: kind, Name: name, Data: map[string]string{dataHost: d.hostKey(), dataNode: d.nodeName(), dataRepo: prefix}}
}

// made says whether an entry was made on this host, by whichever name the
// source called it then.
func (d *Driver) made(e journal.Entry) bool {
	node := d.nodeName()
	return e.Data[dataHost] == d.hostKey() || node != "" && strings.EqualFold(e.Data[dataNode], node)
}

// Machines lists all VMs with their disks, those of a cluster's other nodes too.
// A disk whose size the host doesn't tell has the size 0.
func (d *Driver) Machines(ctx context.Context) ([]vm.Machine, error) {
	seen, errs := d.everywhere(ctx)
	if len(errs) > 0 {
		return nil, oneError(errs) // a list that is not whole would look so
	}
	var out []vm.Machine
	for _, p := range seen {
		for _, s := range p.list {
			m, err := p.d.machine(ctx, p.host, s)
			if errors.Is(err, fault.ErrNotFound) {
				continue // removed while we looked
			}
			if err != nil {
				return nil, fmt.Errorf("VM %q: %w", s.name, err)
			}
			out = append(out, m)
		}
	}
	return out, nil
}

func (d *Driver) machine(ctx context.Context, host string, s system) (vm.Machine, error) {
	m := d.describe(host, s)
	now, err := d.present(ctx, s)
	if err != nil {
		return m, err
	}
	drives, err := d.drives(ctx, now.ref)
	if err != nil {
		return m, err
	}
	for _, e := range drives {
		d.exclude(&e, nil)
		if e.Excluded == "" {
			e.SizeBytes = d.sizeOf(ctx, e.Source)
		}
		m.Disks = append(m.Disks, e.Disk)
	}
	return m, nil
}

// describe is a machine without its disks.
func (d *Driver) describe(host string, s system) vm.Machine {
	if host == "" {
		host = d.host.Hostname()
	}
	return vm.Machine{Name: s.name, Host: host, HostID: strings.ToLower(host), UUID: s.guid, Hypervisor: "hyperv", State: stateName(s.state)}
}

// exclude says of a disk why it is not protected, if there is a reason.
func (d *Driver) exclude(e *drive, asked []vm.DiskID) {
	switch {
	case slices.Contains(asked, e.ID):
		e.Excluded = reasonRequest
	case e.Excluded == "":
		if _, err := d.files.share(e.Source); err != nil {
			e.Excluded = fmt.Sprintf("no share reaches %s: %v", e.Source, err)
		}
	}
}

// tidying, after the name of a lock's holder, says that it will be free soon.
const tidying = ", cleaning up"

// lock keeps other runs of ours away from a VM.
func (d *Driver) lock(ctx context.Context, s system) (*journal.Lock, error) {
	deadline := time.Now().Add(reapOthersTime + 5*time.Second)
	for again := false; ; again = true { // at least twice: who has just taken it has not written what for
		l, who, err := journal.TryLock(filepath.Join(d.stateDir, "hyperv"), s.guid, "")
		switch {
		case l != nil || err != nil:
			return l, err
		case again && !strings.HasSuffix(who, tidying) || time.Now().After(deadline):
			return nil, fmt.Errorf("VM %q: another backup or restore of it is running (%s): %w", s.name, who, fault.ErrLocked)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

func (d *Driver) openJournal() (*journal.Journal, error) {
	return journal.Open(filepath.Join(d.stateDir, "hyperv", "journal"))
}

func (d *Driver) target(s system, prefix string, run *journal.Run) *target {
	return &target{client: d.client, host: d.hostKey(), node: d.nodeName(), system: s, run: run, prefix: prefix, settleTime: d.settleTime, busyTime: d.busyTime}
}

// slot waits for a place among the sessions of the host and of each volume,
// and gives what frees them.
func (d *Driver) slot(ctx context.Context, volumes []string) (release func(), err error) {
	var held []chan struct{}
	release = func() {
		for _, c := range held {
			<-c
		}
		held = nil
	}
	places := []chan struct{}{d.slots}
	slices.Sort(volumes) // so that no two wait for each other
	c := d.cluster
	c.mu.Lock()
	for _, v := range slices.Compact(volumes) {
		if !isShared(v) {
			v = d.hostKey() + " " + v
		}
		if c.volumes[v] == nil {
			c.volumes[v] = make(chan struct{}, sessionsPerVolume)
		}
		places = append(places, c.volumes[v])
	}
	c.mu.Unlock()
	for _, c := range places {
		select {
		case c <- struct{}{}:
			held = append(held, c)
		case <-ctx.Done():
			release()
			return nil, context.Cause(ctx)
		}
	}
	return release, nil
}
