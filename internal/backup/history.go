package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A history is what the repository holds of one VM, oldest point first.
type history struct {
	engine *engine
	name   string
	uuid   string // of the VM, as the host's list had it; "" for none
	points []*point.RestorePoint
	// handsOn says that a VM which is off hands on the change ID of its last
	// point.
	handsOn bool

	mu      sync.Mutex
	suspect []point.ID // points that this run marked
	useless error      // why no point must be built on; nil if one may
	damaged int        // how often something could not be read
	first   error      // of those
}

// history finds out how the repository is to call the VM, and what it has.
func (e *engine) history(ctx context.Context, job Job) (*history, string, error) {
	machine, err := e.find(ctx, job)
	if err != nil {
		return nil, "", err
	}
	_, tracksOff := job.Driver.(hypervisor.OffTracker)
	h := &history{engine: e, uuid: machine.UUID, handsOn: !tracksOff}
	all, err := e.Repo.Points(ctx)
	switch {
	case errors.Is(err, fault.ErrCorrupt):
		// One damaged record must not end the protection of a VM. Without the
		// newest point its checkpoint is not found either, and all is read.
		h.note(err)
	case err != nil:
		return nil, "", err
	}
	name := job.VM
	if name == "" {
		name = uniqueName(machine, all)
	}
	e.mu.Lock()
	other, taken := e.names[name]
	if !taken {
		e.names[name] = job.Source
	}
	e.mu.Unlock()
	if taken {
		return nil, "", fmt.Errorf("%s and %s would both be VM %s: %w", other, job.Source, name, fault.ErrExists)
	}
	h.name = name
	for _, p := range all {
		if p.VM == name {
			h.points = append(h.points, p)
		}
	}
	return h, name, nil
}

// A listing is what a host said of its VMs, once in a Run: a host of a hundred
// of them is not asked for each one's sake.
type listing struct {
	mu       sync.Mutex
	machines []vm.Machine // without their disks, perhaps
	gaps     error        // why there may be more; nil if these are all
	asked    bool
}

// list asks a driver for its VMs, and again only if anew is said. gaps is why
// there may be more of them; nil if these are all.
func (e *engine) list(ctx context.Context, d hypervisor.Driver, anew bool) (machines []vm.Machine, gaps error, fresh bool, err error) {
	e.mu.Lock()
	l := e.listings[d]
	if l == nil {
		l = &listing{}
		e.listings[d] = l
	}
	e.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.asked && !anew {
		return l.machines, l.gaps, false, nil
	}
	ask := d.Machines
	if lister, ok := d.(hypervisor.Lister); ok {
		ask = lister.List
	}
	machines, err = ask(ctx)
	if errors.As(err, new(*hypervisor.PartialError)) {
		e.Log.Warn("not all VMs of a host are known", "err", err)
		gaps, err = err, nil
	}
	if err != nil {
		return nil, nil, false, err
	}
	l.machines, l.gaps, l.asked = machines, gaps, true
	return machines, gaps, true, nil
}

// find looks for the VM of job. One that is not there may have come since the
// host was asked; whether one exists that is not in a list with gaps, nobody
// knows.
func (e *engine) find(ctx context.Context, job Job) (vm.Machine, error) {
	machines, gaps, fresh, err := e.list(ctx, job.Driver, false)
	if err != nil {
		return vm.Machine{}, err
	}
	m, err := choose(machines, job)
	if errors.Is(err, ErrNoSuchVM) && !fresh {
		if machines, gaps, _, err = e.list(ctx, job.Driver, true); err != nil {
			return vm.Machine{}, err
		}
		m, err = choose(machines, job)
	}
	if errors.Is(err, ErrNoSuchVM) && gaps != nil {
		err = fmt.Errorf("VM %s: not found, but %w", job.Name, gaps)
	}
	return m, err
}

func choose(machines []vm.Machine, job Job) (vm.Machine, error) {
	var named []vm.Machine
	for _, m := range machines {
		if m.UUID != "" && strings.EqualFold(m.UUID, job.Name) {
			named = []vm.Machine{m}
			break
		}
		if m.Name == job.Name {
			named = append(named, m)
		}
	}
	if len(named) == 0 {
		return vm.Machine{}, errNoSuchVM(job.Name)
	}
	m := named[0]
	// Two VMs of one name would share a history. Which of them is meant is for
	// the driver to ask.
	twins := slices.ContainsFunc(machines, func(o vm.Machine) bool { return o.Name == m.Name && o.UUID != m.UUID })
	if twins && len(named) == 1 && job.VM == "" {
		return vm.Machine{}, fmt.Errorf("VM %s: another one on that host is called %q, too: say with --vm what to call this one: %w", job.Name, m.Name, fault.ErrExists)
	}
	return m, nil
}

// uniqueName is the machine's own name, or NAME@HOST where the repository
// knows another host's VM by that name already. A VM that moved to another
// host keeps its UUID and with it its name; one without a UUID keeps the name
// that it has from its host. Points that do not say their host are no
// stranger's.
func uniqueName(m vm.Machine, all []*point.RestorePoint) string {
	qualified := m.Name + "@" + m.Host
	for _, p := range slices.Backward(all) {
		same := m.UUID != "" && p.Machine.UUID == m.UUID ||
			m.UUID == "" && p.Machine.UUID == "" && m.HostID != "" && p.Machine.HostID == m.HostID
		if same && (p.VM == m.Name || p.VM == qualified) {
			return p.VM
		}
	}
	for _, p := range all {
		if other := p.Machine.HostID; p.VM == m.Name && other != "" && other != m.HostID && m.Host != "" {
			return qualified
		}
	}
	return m.Name
}

// another fails if the VM that is held still is not the one whose history this
// is: one that was made anew, under its name, since the host was asked.
func (h *history) another(m vm.Machine) error {
	if h.uuid == "" || m.UUID == "" || strings.EqualFold(h.uuid, m.UUID) {
		return nil
	}
	return fmt.Errorf("it was %s when the host was asked for its VMs, and is %s now: %w; back it up once more", h.uuid, m.UUID, ErrOtherVM)
}

// stranger warns that the VM may be another than the one whose points there
// are. Image files have nothing but their name: those of one name from two
// directories share a history, and whoever moved one wants that.
func (h *history) stranger(job Job) string {
	p := h.newest()
	if p == nil || job.VM != "" || p.Machine.UUID != "" || p.Source == "" || p.Source == job.Source {
		return ""
	}
	return fmt.Sprintf("the restore point before is of %s, this one of %s: if those are two VMs, name each with --vm", p.Source, job.Source)
}

// note remembers that something of the repository could not be read.
func (h *history) note(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.damaged++; h.damaged == 1 {
		h.first = err
	}
}

// damage sums up what was noted.
func (h *history) damage() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.damaged > 1 {
		return fmt.Errorf("%w (and %d more)", h.first, h.damaged-1)
	}
	return h.first
}

// blames says whether err, of reading all disks, may come from the previous
// point, so that it may go well without that.
func (h *history) blames(err error) bool {
	if h.newest() == nil || h.useless != nil || errors.Is(err, ErrSource) {
		return false
	}
	return errors.Is(err, fault.ErrCorrupt) || errors.Is(err, fault.ErrNotFound)
}

// giveUp makes all disks be read whole and stored anew.
func (h *history) giveUp(err error) {
	h.note(err)
	h.useless = err
}

// newest is the newest point, or nil.
func (h *history) newest() *point.RestorePoint {
	if len(h.points) == 0 {
		return nil
	}
	return h.points[len(h.points)-1]
}

// A base is the point's disk that the next one of that ID is built on.
type base struct {
	point.Disk
	at  int    // of history.points
	why string // its change tracking must not be believed because of this; "" if it may
}

// base finds what to build the disk on, if the newest point has it. That is
// not always the newest point: one that was taken while the VM was off hands
// on the change ID of the one before, and the bitmap goes on counting from
// that. A storage snapshot may take disk and bitmap back to before the later
// point, so bitmap and base belong together only at the point that began to
// count, the oldest with that change ID.
func (h *history) base(id vm.DiskID) (base, bool) {
	newest := len(h.points) - 1
	d, ok := h.diskAt(newest, id)
	if !ok {
		return base{}, false
	}
	b := base{Disk: d, at: newest}
	if d.ChangeID != "" {
		for i := newest - 1; i >= 0; i-- {
			older, ok := h.diskAt(i, id)
			if !ok || older.ChangeID != d.ChangeID {
				break
			}
			b.Disk, b.at = older, i
		}
		// Only the backup of a VM that runs begins to count, unless its driver
		// says otherwise. If the oldest that is left is another, what the bitmap
		// belongs to was deleted.
		if s := h.points[b.at].Machine.State; h.handsOn && s != "running" && s != "paused" {
			b.Disk, b.at, b.why = d, newest, "the restore point that change tracking counts from is gone"
		}
	}
	for _, i := range []int{newest, b.at} {
		if s := h.points[i].Suspect; s != "" {
			b.why = "the previous restore point is suspect: " + s
		}
	}
	if b.why != "" {
		b.ChangeID = ""
	}
	return b, true
}

// diskAt is the disk of that ID in point i, if there are both.
func (h *history) diskAt(i int, id vm.DiskID) (point.Disk, bool) {
	if i >= 0 {
		for _, d := range h.points[i].Disks {
			if d.ID == id {
				return d, true
			}
		}
	}
	return point.Disk{}, false
}

// previous is what the driver is told of the disks' bases. Change IDs that
// must not be believed are left out, so that everything is read.
func (h *history) previous() map[vm.DiskID]hypervisor.PreviousDisk {
	p := h.newest()
	if p == nil {
		return nil
	}
	out := map[vm.DiskID]hypervisor.PreviousDisk{}
	for _, d := range p.Disks {
		if b, ok := h.base(d.ID); ok {
			out[d.ID] = hypervisor.PreviousDisk{SizeBytes: b.SizeBytes, ChangeID: b.ChangeID}
		}
	}
	return out
}

// mark calls every point suspect that rests on the change tracking of disk:
// the newest ones, back to the last that the base rests on and that was read
// whole, which is good.
func (h *history) mark(ctx context.Context, disk vm.DiskID, why string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b, _ := h.base(disk)
	for i := len(h.points) - 1; i >= 0; i-- {
		p := h.points[i]
		if d, ok := h.diskAt(i, disk); !ok || d.Mode != point.Incremental {
			if i > b.at {
				continue // nothing rests on it
			}
			return nil
		}
		if err := h.engine.Repo.MarkSuspect(ctx, h.name, p.ID, why); err != nil {
			return fmt.Errorf("mark %s suspect: %w", p.Ref(), err)
		}
		h.suspect = append(h.suspect, p.ID)
	}
	return nil
}
