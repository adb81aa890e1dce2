package backup

import (
	"context"
	"errors"
	"testing"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

func TestUniqueName(t *testing.T) {
	at := func(name, host, uuid string) *point.RestorePoint {
		m := vm.Machine{Name: "disk.qcow2", UUID: uuid}
		if host != "" {
			m.Host, m.HostID = host, "id-"+host
		}
		return &point.RestorePoint{VM: name, Machine: m}
	}
	const plain, onB = "disk.qcow2", "disk.qcow2@b"
	for _, c := range []struct {
		name string
		all  []*point.RestorePoint
		uuid string
		want string // for host b
	}{
		{"the first", nil, "", plain},
		{"its own", []*point.RestorePoint{at(plain, "b", "")}, "", plain},
		{"another host's", []*point.RestorePoint{at(plain, "a", "")}, "", onB},
		{"again", []*point.RestorePoint{at(plain, "a", ""), at(onB, "b", "")}, "", onB},
		{"the other's are gone", []*point.RestorePoint{at(onB, "b", "")}, "", onB},
		{"from before hosts were noted", []*point.RestorePoint{at(plain, "", "")}, "", plain},
		{"given by hand", []*point.RestorePoint{at("both", "a", ""), at("both", "b", "")}, "", plain},
		{"another VM of this host", []*point.RestorePoint{at(plain, "b", "1")}, "", plain},
		{"moved here", []*point.RestorePoint{at(plain, "a", "1")}, "1", plain},
		{"another host's VM", []*point.RestorePoint{at(plain, "a", "1")}, "2", onB},
	} {
		m := at("", "b", c.uuid).Machine
		if got := uniqueName(m, c.all); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// A VM is found by its name or its UUID, and two of one name never come to
// share a history.
func TestFindByNameOrUUID(t *testing.T) {
	driver := &listed{vms: []vm.Machine{{Name: "web01", UUID: "1a"}, {Name: "web01", UUID: "2b"}, {Name: "db01", UUID: "3c"}}}
	for _, c := range []struct {
		job  Job
		uuid string // "" for an error
	}{
		{Job{Name: "db01"}, "3c"},
		{Job{Name: "3C"}, "3c"},
		{Job{Name: "2b"}, ""},
		{Job{Name: "2b", VM: "second"}, "2b"},
		{Job{Name: "1a", VM: "first"}, "1a"},
		{Job{Name: "nobody"}, ""},
		{Job{Name: ""}, ""},
	} {
		c.job.Driver = driver
		m, err := newEngine(Options{}).find(t.Context(), c.job)
		if m.UUID != c.uuid || (err == nil) != (c.uuid != "") {
			t.Errorf("%q as %q: %+v, %v", c.job.Name, c.job.VM, m, err)
		}
	}
}

// A host is asked for its VMs once for all jobs, and again for a VM that it did
// not have then.
func TestHostIsListedOnce(t *testing.T) {
	driver := &listed{vms: []vm.Machine{{Name: "web01", UUID: "1a"}, {Name: "db01", UUID: "3c"}}}
	e := newEngine(Options{})
	for name, asked := range map[string]int{"web01": 1, "db01": 1, "3c": 1} {
		if _, err := e.find(t.Context(), Job{Driver: driver, Name: name}); err != nil || driver.asked != asked {
			t.Errorf("%s: asked %d times, %v", name, driver.asked, err)
		}
	}
	driver.vms = append(driver.vms, vm.Machine{Name: "new01", UUID: "4d"})
	if m, err := e.find(t.Context(), Job{Driver: driver, Name: "new01"}); m.UUID != "4d" || driver.asked != 2 {
		t.Errorf("a VM that came since: %+v, %v, asked %d times", m, err, driver.asked)
	}
	if _, err := e.find(t.Context(), Job{Driver: driver, Name: "nobody"}); !errors.Is(err, ErrNoSuchVM) {
		t.Errorf("%v", err)
	}
}

// A VM that is not in a list with gaps may be there all the same: nobody says
// that there is none.
func TestListWithGaps(t *testing.T) {
	gap := &hypervisor.PartialError{Err: errors.New("node hv02 does not answer")}
	driver := &listedInPart{listed{vms: []vm.Machine{{Name: "web01", UUID: "1a"}}}, gap}
	e := newEngine(Options{})
	for range 2 { // of a fresh list, and of one that is there
		if m, err := e.find(t.Context(), Job{Driver: driver, Name: "web01"}); m.UUID != "1a" || err != nil {
			t.Errorf("one that is listed: %+v, %v", m, err)
		}
		if _, err := e.find(t.Context(), Job{Driver: driver, Name: "db01"}); !errors.Is(err, gap) || errors.Is(err, ErrNoSuchVM) {
			t.Errorf("one that is not: %v", err)
		}
	}
	driver.gap = nil
	if _, err := e.find(t.Context(), Job{Driver: driver, Name: "db01"}); !errors.Is(err, ErrNoSuchVM) {
		t.Errorf("of the whole list: %v", err)
	}
}

// listedInPart is a listed whose list may have gaps.
type listedInPart struct {
	listed
	gap error
}

func (l *listedInPart) List(ctx context.Context) ([]vm.Machine, error) {
	list, _ := l.Machines(ctx)
	return list, l.gap
}

// A VM that was off when it was backed up last has lost nothing where its driver
// counts changes from every backup on.
func TestOffAtTheLastBackup(t *testing.T) {
	points := []*point.RestorePoint{{VM: "web01", Machine: vm.Machine{State: "shut off"}, Disks: []point.Disk{{Disk: vm.Disk{ID: "scsi0:0"}, ChangeID: "since then"}}}}
	for _, handsOn := range []bool{true, false} {
		h := &history{points: points, handsOn: handsOn}
		b, ok := h.base("scsi0:0")
		if !ok || (b.ChangeID == "") != handsOn || (b.why == "") == handsOn {
			t.Errorf("hands on %v: %+v, %v", handsOn, b, ok)
		}
	}
}

// listed is a host that can do no more than list its VMs.
type listed struct {
	vms   []vm.Machine
	asked int
}

func (l *listed) Machines(context.Context) ([]vm.Machine, error) { l.asked++; return l.vms, nil }
func (*listed) Close() error                                     { return nil }
func (*listed) Begin(context.Context, string, hypervisor.Options) (hypervisor.Session, error) {
	return nil, errors.New("only a list")
}
