package hyperv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// A clusterLab is a cluster of simulated nodes, over their real protocol, with
// a VM web01 on the first.
type clusterLab struct {
	*host.Cluster
	t     *testing.T
	state string
	nodes []*host.Host
	ends  []*sim.Endpoint
	disk  []byte // of web01
}

func newClusterLab(t *testing.T, nodes int) *clusterLab {
	t.Helper()
	l := &clusterLab{t: t, state: imagetest.MemoryDir(t), disk: make([]byte, diskSize)}
	dir := imagetest.MemoryDir(t)
	for i := range nodes {
		name := fmt.Sprintf("HV%02d", i+1)
		h, err := host.New(host.Options{Dir: filepath.Join(dir, name), Shared: filepath.Join(dir, "csv"), Name: name, JobTime: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		l.nodes = append(l.nodes, h)
	}
	t.Cleanup(func() {
		for _, e := range l.ends {
			if e != nil {
				e.Close()
			}
		}
	})
	l.Cluster = host.NewCluster("HVC", l.nodes...)
	l.add(0, "web01")
	for _, h := range l.nodes {
		e, err := sim.Serve(h, "", sim.Options{User: "backup", Password: "secret", HTTP: true})
		if err != nil {
			t.Fatal(err)
		}
		l.ends = append(l.ends, e)
	}
	return l
}

func (l *clusterLab) add(node int, name string) (guid string) {
	l.t.Helper()
	guid, err := l.nodes[node].AddVM(host.Spec{Name: name, Root: `C:\ClusterStorage\Volume1\` + fmt.Sprint(node) + name, Disks: []host.DiskSpec{{Bytes: diskSize}}})
	if err != nil {
		l.t.Fatal(err)
	}
	return guid
}

// driver is one that was opened at a node.
func (l *clusterLab) driver(node int) *Driver {
	l.t.Helper()
	connect := func(i int) *Driver {
		c, err := wsman.New(wsman.Config{URL: l.ends[i].URL, User: "backup", Password: secret.New([]byte("secret"))})
		if err != nil {
			l.t.Fatal(err)
		}
		members, err := c.In(clusterNamespace)
		if err != nil {
			l.t.Fatal(err)
		}
		d := newDriver(c, simFiles{l.nodes[i]}, Options{Host: &url.URL{Scheme: "hyperv", Host: fmt.Sprintf("node%d", i)}, StateDir: l.state})
		d.poll, d.busyTime, d.settleTime, d.watchTime = 5*time.Millisecond, 50*time.Millisecond, 20*time.Second, 5*time.Millisecond
		d.members = &client{members, d.poll, d.patience}
		return d
	}
	home := connect(node)
	home.cluster.dial = func(name string) (*Driver, error) {
		for i := range l.nodes {
			if strings.EqualFold(name, fmt.Sprintf("HV%02d", i+1)) {
				d := connect(i)
				d.cluster = home.cluster
				return d, nil
			}
		}
		return nil, fmt.Errorf("node %s: %w", name, fault.ErrNotFound)
	}
	l.t.Cleanup(func() { home.Close() })
	return home
}

func (l *clusterLab) write(off int64, p string) {
	l.t.Helper()
	copy(l.disk[off:], p)
	if err := l.Owner("web01").WriteBytes("web01", 0, off, []byte(p)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *clusterLab) move(to int) {
	l.t.Helper()
	if err := l.Move("web01", fmt.Sprintf("HV%02d", to+1)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *clusterLab) begin(d *Driver, prev map[vm.DiskID]hypervisor.PreviousDisk) hypervisor.Session {
	l.t.Helper()
	s, err := d.Begin(l.t.Context(), "web01", hypervisor.Options{RepoID: ourRepo, Previous: prev})
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

// wantRead reads all of the disk and compares.
func (l *clusterLab) wantRead(s hypervisor.Session, want []byte) {
	l.t.Helper()
	got := make([]byte, diskSize)
	if _, err := s.Disks()[0].ReadAt(got, 0); err != nil && err != io.EOF {
		l.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		l.t.Error("what is read is not what the guest wrote before the checkpoint")
	}
}

func (l *clusterLab) wantMode(s hypervisor.Session, want point.Mode, reason string) {
	l.t.Helper()
	if mode, why := s.Disks()[0].Mode(); mode != want || !strings.Contains(why, reason) {
		l.t.Errorf("%s (%s), want %s (%s)", mode, why, want, reason)
	}
}

// wantLeft counts what the cluster has of web01, wherever that is.
func (l *clusterLab) wantLeft(checkpoints, references int) {
	l.t.Helper()
	h := l.Owner("web01")
	if h == nil {
		l.t.Fatal("no node has web01")
	}
	points := len(h.Instances("root/virtualization/v2", classReference))
	frozen := len(h.Instances("root/virtualization/v2", "Msvm_SnapshotOfVirtualSystem"))
	if frozen != checkpoints || points != references {
		l.t.Errorf("the VM has %d checkpoints and %d reference points, want %d and %d", frozen, points, checkpoints, references)
	}
}

// A VM is found wherever it is, backed up there, and what was made of it before
// it moved is found after.
func TestBackupFollowsTheVM(t *testing.T) {
	l := newClusterLab(t, 3)
	d := l.driver(2) // which never has it
	l.write(0, "one")
	s := l.begin(d, nil)
	if m := s.Machine(); m.Host != "HV01" {
		t.Errorf("it is on %s", m.Host)
	}
	l.wantRead(s, l.disk)
	prev := mustCommit(t, s)
	l.write(100_000, "two")
	s = l.begin(d, prev)
	l.wantMode(s, point.Incremental, "")
	prev = mustCommit(t, s)
	l.wantLeft(0, 1)

	l.move(1)
	l.write(200_000, "three")
	s = l.begin(d, prev)
	l.wantMode(s, point.Full, "the VM moved from HV01 to HV02")
	l.wantRead(s, l.disk)
	prev = mustCommit(t, s)
	l.wantLeft(0, 1) // the older one went, though it was made elsewhere
	l.write(300_000, "four")
	s = l.begin(l.driver(0), prev)
	l.wantMode(s, point.Incremental, "")
	l.wantRead(s, l.disk)
	mustCommit(t, s)
	l.wantLeft(0, 1)
}

// A VM that moves while it is read is read on, and its checkpoint is looked
// after on its new node.
func TestVMMovesWhileItIsRead(t *testing.T) {
	for name, end := range map[string]func(*clusterLab, *testing.T, hypervisor.Session){
		"commit": func(l *clusterLab, t *testing.T, s hypervisor.Session) {
			prev := mustCommit(t, s)
			l.wantLeft(0, 1)
			next := l.begin(l.driver(0), prev)
			l.wantMode(next, point.Full, "the VM moved from HV01 to HV02")
			mustAbort(t, next)
		},
		"abort": func(l *clusterLab, t *testing.T, s hypervisor.Session) {
			mustAbort(t, s)
			l.wantLeft(0, 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newClusterLab(t, 2)
			l.write(0, "before")
			s := l.begin(l.driver(0), nil)
			want := bytes.Clone(l.disk)
			l.move(1)
			l.write(0, "after")
			l.wantRead(s, want)
			if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
				t.Errorf("check: %v", err)
			}
			end(l, t, s)
		})
	}
}

// Of a VM that moved between checkpoint and reference point everything is read
// next time, also where it is back on its old node by then.
func TestVMMovesAwayAndBack(t *testing.T) {
	for _, c := range []struct {
		name, reason string
		end          func(*clusterLab, *testing.T, hypervisor.Session) map[vm.DiskID]hypervisor.PreviousDisk
	}{
		{"after the commit", "the VM moved from HV01 to HV02 while", func(l *clusterLab, t *testing.T, s hypervisor.Session) map[vm.DiskID]hypervisor.PreviousDisk {
			l.move(1)
			prev := mustCommit(t, s)
			l.move(0)
			return prev
		}},
		{"before it", "the VM moved from HV02 to HV01 while", func(l *clusterLab, t *testing.T, s hypervisor.Session) map[vm.DiskID]hypervisor.PreviousDisk {
			l.move(1)
			if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
				t.Errorf("check: %v", err)
			}
			l.move(0)
			return mustCommit(t, s)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newClusterLab(t, 2)
			l.write(0, "one")
			prev := c.end(l, t, l.begin(l.driver(0), nil))
			l.wantLeft(0, 1)
			l.write(100_000, "two")
			s := l.begin(l.driver(0), prev)
			l.wantMode(s, point.Full, c.reason)
			prev = mustCommit(t, s)
			l.wantLeft(0, 1)
			s = l.begin(l.driver(0), prev)
			l.wantMode(s, point.Incremental, "")
			mustAbort(t, s)
		})
	}
}

// A name may be that of another VM, too, on a node that can't be asked: a backup
// says so, what changes the VM is refused. A GUID is one VM's alone.
func TestNameWithANodeUnseen(t *testing.T) {
	l := newClusterLab(t, 3)
	d := l.driver(0)
	dial := d.cluster.dial
	d.cluster.dial = func(node string) (*Driver, error) {
		if node == "HV03" {
			return nil, errors.New("no route to host")
		}
		return dial(node)
	}
	list, err := d.List(t.Context())
	var node *NodeError
	if len(list) != 1 || list[0].Name != "web01" || !errors.As(err, new(*hypervisor.PartialError)) || !errors.As(err, &node) || node.Node != "HV03" {
		t.Fatalf("the list: %+v, %v", list, err)
	}
	guid := list[0].UUID
	warns := func(name string, want bool) {
		t.Helper()
		s, err := d.Begin(t.Context(), name, hypervisor.Options{RepoID: ourRepo})
		if err != nil {
			t.Fatal(err)
		}
		if w := warnings(s); strings.Contains(w, "HV03") != want || strings.Contains(w, guid) != want {
			t.Errorf("%s: warnings %q", name, w)
		}
		mustAbort(t, s)
	}
	warns("web01", true)
	warns(guid, false)
	for name, do := range map[string]func(name string) error{
		"reset the tracking": func(name string) error { return d.ResetTracking(t.Context(), name, ourRepo) },
		"restore": func(name string) error {
			b, err := d.Replace(t.Context(), ReplaceOptions{VM: name, RepoID: ourRepo, Disks: []vm.DiskID{"scsi0:0"}, PowerOff: true})
			if err == nil {
				err = b.Abort(t.Context())
			}
			return err
		},
	} {
		var unseen *UnseenError
		if err := do("web01"); !errors.As(err, &unseen) || unseen.GUID != guid || !errors.As(err, &node) {
			t.Errorf("%s, by its name: %v", name, err)
		}
		if err := do(guid); err != nil {
			t.Errorf("%s, by its GUID: %v", name, err)
		}
	}
	moved := false
	d.management = watching{d.management, func(wql string) {
		if !moved && strings.Contains(wql, "Msvm_SnapshotOfVirtualSystem") {
			moved = true
			l.move(1)
		}
	}}
	warns("web01", true)
	if !moved {
		t.Error("it did not move while its backup began")
	}
}

// A run that died is cleaned up after on whichever node the VM is by then, by
// its own next backup or by another VM's.
func TestReapAfterAMove(t *testing.T) {
	for name, by := range map[string]func(*clusterLab, *Driver) string{
		"by its own backup": func(*clusterLab, *Driver) string { return "web01" },
		"by another VM's":   func(l *clusterLab, _ *Driver) string { return l.add(0, "other") },
	} {
		t.Run(name, func(t *testing.T) {
			l := newClusterLab(t, 2)
			d := l.driver(0)
			kill(l.begin(d, nil))
			l.wantLeft(1, 0)
			l.move(1)
			vm := by(l, d)
			s, err := d.Begin(t.Context(), vm, hypervisor.Options{RepoID: ourRepo})
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(warnings(s), "cleaned up after it") {
				t.Errorf("warnings %q", warnings(s))
			}
			mustAbort(t, s)
			if vm == "web01" {
				l.wantLeft(0, 0)
			} else {
				l.wantLeft(0, 1) // its restore point may be durable
			}
		})
	}
}

// A node that goes down with a backup under way leaves nothing that the next
// backup, on another node, does not clean up.
func TestNodeGoesDown(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a host that does not answer")
	}
	l := newClusterLab(t, 2)
	d := l.driver(0)
	l.write(0, "one")
	s := l.begin(d, nil)
	l.wantLeft(1, 0)
	if err := l.ends[0].Close(); err != nil {
		t.Fatal(err)
	}
	l.ends[0] = nil
	if err := l.Fail("HV01"); err != nil {
		t.Fatal(err)
	}
	mustAbort(t, s)
	l.wantLeft(0, 0)
	s = l.begin(l.driver(1), nil)
	l.wantRead(s, l.disk)
	mustCommit(t, s)
	l.wantLeft(0, 1)
}

// Between the look and the checkpoint the VM moves: the backup begins again
// where it is.
func TestVMMovesWhileTheBackupBegins(t *testing.T) {
	for _, at := range []string{"Msvm_SettingsDefineState", "Msvm_VirtualSystemReferencePointService", "Msvm_VssComponent", "Msvm_SnapshotOfVirtualSystem"} {
		t.Run(at, func(t *testing.T) {
			l := newClusterLab(t, 2)
			l.write(0, "one")
			d := l.driver(0)
			moved := false
			d.management = watching{d.management, func(wql string) {
				if !moved && strings.Contains(wql, at) {
					moved = true
					l.move(1)
				}
			}}
			s := l.begin(d, nil)
			if m := s.Machine(); m.Host != "HV02" || !moved {
				t.Errorf("it is on %s, moved: %t", m.Host, moved)
			}
			l.wantRead(s, l.disk)
			mustCommit(t, s)
			l.wantLeft(0, 1)
			wantNothingOpen(t, d, 1)
		})
	}
}

// Names are looked for on all nodes, VMs are listed once, and of a cluster that
// may not be asked its own host's are enough.
func TestNamesOfACluster(t *testing.T) {
	l := newClusterLab(t, 3)
	d := l.driver(1)
	names := func(d *Driver) string {
		t.Helper()
		list, err := d.Machines(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, m := range list {
			out = append(out, m.Name+"@"+m.Host)
		}
		return strings.Join(out, " ")
	}
	l.add(2, "db01")
	if got := names(d); got != "web01@HV01 db01@HV03" {
		t.Errorf("%s", got)
	}
	twin := l.add(2, "web01")
	var several *AmbiguousError
	if _, err := l.driver(0).Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); !errors.As(err, &several) {
		t.Errorf("two of one name on two nodes: %v", err)
	}
	s, err := d.Begin(t.Context(), twin, hypervisor.Options{RepoID: ourRepo})
	if err != nil {
		t.Fatal(err)
	}
	if m := s.Machine(); m.Host != "HV03" {
		t.Errorf("it is on %s", m.Host)
	}
	mustAbort(t, s)
	l.Deny(true)
	if got := names(l.driver(0)); got != "web01@HV01" {
		t.Errorf("where the cluster may not be asked: %s", got)
	}
	if _, err := l.driver(1).Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("where the cluster may not be asked: %v", err)
	}
}

// A VM that no node has is one clear message.
func TestNoVMOfACluster(t *testing.T) {
	l := newClusterLab(t, 2)
	d := l.driver(0)
	if _, err := d.Begin(t.Context(), "nobody", hypervisor.Options{RepoID: ourRepo}); !errors.Is(err, fault.ErrNotFound) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
}

// watching calls back before each query.
type watching struct {
	management
	before func(wql string)
}

func (w watching) Query(ctx context.Context, wql string) iter.Seq2[*wsman.Instance, error] {
	w.before(wql)
	return w.management.Query(ctx, wql)
}

// wantNothingOpen fails if the journal has more than so many reference points.
func wantNothingOpen(t *testing.T, d *Driver, references int) {
	t.Helper()
	j, err := d.openJournal()
	if err != nil {
		t.Fatal(err)
	}
	machines, err := j.Machines()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range machines {
		runs, err := j.Runs(m)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range runs {
			for _, e := range r.Open() {
				if references--; e.Kind != kindReference || references < 0 {
					t.Errorf("the journal has %+v", e)
				}
			}
		}
	}
}

// A new VM that an interrupted restore left, and that somebody moved to another
// node, keeps its disks; so does one that may be on a node that does not answer.
func TestInterruptedRestoreMoved(t *testing.T) {
	l := newClusterLab(t, 2)
	d := l.driver(0)
	restore := func() (b *Building, name string) {
		o := newOptions("web02")
		o.Folder = `C:\ClusterStorage\Volume1`
		b, err := d.NewVM(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeDisks(t.Context(), b, "scsi0:0", "scsi1:5"); err != nil {
			t.Fatal(err)
		}
		name = "backstay-" + b.id
		if err := b.run.Note(b.entry(kindNewVM, name)); err != nil {
			t.Fatal(err)
		}
		e := b.entry(kindNewVM, name)
		e.Data[dataID] = l.add(0, name)
		if err := b.run.Note(e); err != nil {
			t.Fatal(err)
		}
		if err := l.Move(name, "HV02"); err != nil {
			t.Fatal(err)
		}
		return b, name
	}
	there := func(b *Building) {
		t.Helper()
		for _, file := range b.names {
			if _, err := os.Stat(l.nodes[0].Local(file)); err != nil {
				t.Error(err)
			}
		}
	}
	b, name := restore()
	if err := b.Abort(t.Context()); err == nil || !strings.Contains(err.Error(), "on node HV02") {
		t.Errorf("abort: %v", err)
	}
	there(b)
	_, list, err := d.systems(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// HV02 does not answer: nobody knows.
	if err := l.ends[1].Close(); err != nil {
		t.Fatal(err)
	}
	d.at("HV02")
	said := d.reapRestores(t.Context(), "HV01", list, "")
	if len(said) != 1 || !strings.Contains(said[0], "node HV02 of the cluster") {
		t.Errorf("a node that does not answer: %q", said)
	}
	there(b)
	if l.ends[1], err = sim.Serve(l.nodes[1], "", sim.Options{User: "backup", Password: "secret", HTTP: true}); err != nil {
		t.Fatal(err)
	}
	d = l.driver(0)
	said = d.reapRestores(t.Context(), "HV01", list, "")
	if len(said) != 1 || !strings.Contains(said[0], "nothing of it is taken back") || !strings.Contains(said[0], name) || !strings.Contains(said[0], "on node HV02") {
		t.Errorf("%q", said)
	}
	there(b)
}

// failingQueries is a namespace that is too busy to answer, so many times.
type failingQueries struct {
	management
	times int
}

func (f *failingQueries) Query(ctx context.Context, wql string) iter.Seq2[*wsman.Instance, error] {
	if f.times--; f.times < 0 {
		return f.management.Query(ctx, wql)
	}
	return func(yield func(*wsman.Instance, error) bool) {
		yield(nil, &wsman.ConnectionError{Host: "node", Err: errors.New("the provider is busy")})
	}
}

// A cluster that does not answer for a moment is asked again; one that goes on
// so is not taken for no cluster: what may be elsewhere is said, and nothing is
// changed that is named by its name alone.
func TestClusterThatCannotBeAsked(t *testing.T) {
	l := newClusterLab(t, 2)
	guid := l.add(1, "db01")
	driver := func(times int) *Driver {
		d := l.driver(0)
		d.members.management = &failingQueries{d.members.management, times}
		return d
	}
	begin := func(d *Driver, name string) (string, error) {
		t.Helper()
		s, err := d.Begin(t.Context(), name, hypervisor.Options{RepoID: ourRepo})
		if err != nil {
			return "", err
		}
		mustAbort(t, s)
		return warnings(s), nil
	}
	if w, err := begin(driver(2), "db01"); err != nil || w != "" {
		t.Errorf("for a moment: %q, %v", w, err)
	}
	const forGood = 1000
	var cluster *ClusterError
	if _, err := begin(driver(forGood), "db01"); !errors.Is(err, fault.ErrNotFound) || !errors.As(err, &cluster) {
		t.Errorf("one that is on another node: %v", err)
	}
	if _, err := begin(driver(forGood), guid); !errors.As(err, &cluster) {
		t.Errorf("the same, by its GUID: %v", err)
	}
	if w, err := begin(driver(forGood), "web01"); err != nil || !strings.Contains(w, "does not say whether it is in a cluster") {
		t.Errorf("one that is here: %q, %v", w, err)
	}
	list, err := driver(forGood).List(t.Context())
	if len(list) != 1 || !errors.As(err, new(*hypervisor.PartialError)) || !errors.As(err, &cluster) {
		t.Errorf("the list: %v, %v", list, err)
	}
	d := driver(forGood)
	if err := d.ResetTracking(t.Context(), "web01", ourRepo); !errors.As(err, new(*UnseenError)) {
		t.Errorf("reset the tracking: %v", err)
	}
	if err := d.ResetTracking(t.Context(), list[0].UUID, ourRepo); err != nil {
		t.Errorf("reset the tracking, by its GUID: %v", err)
	}
}

// A new VM on a node is no role of the cluster, and whoever made it is told so,
// and how it becomes one.
func TestNewVMIsNoRole(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	l := newClusterLab(t, 2)
	notes := func(d *Driver, name, folder string) string {
		t.Helper()
		o := newOptions(name)
		o.Folder = folder
		b, err := d.NewVM(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeDisks(t.Context(), b, "scsi0:0", "scsi1:5"); err != nil {
			t.Fatal(err)
		}
		done, err := b.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(done.Notes, "\n")
	}
	const how = "Add-ClusterVirtualMachineRole -VMName 'web of ''ours'''"
	if got := notes(l.driver(0), "web of 'ours'", `C:\ClusterStorage\Volume1`); !strings.Contains(got, how) || strings.Contains(got, "shared volume") {
		t.Errorf("on a shared volume: %s", got)
	}
	if got := notes(l.driver(0), "web03", ""); !strings.Contains(got, `\web03 is on no shared volume`) || !strings.Contains(got, "-VMName 'web03'") {
		t.Errorf("on a disk of the node: %s", got)
	}
	d := l.driver(0)
	d.members.management = &failingQueries{d.members.management, 1000}
	if got := notes(d, "web04", `C:\ClusterStorage\Volume1`); !strings.Contains(got, "does not say whether it is in a cluster") {
		t.Errorf("where nobody knows: %s", got)
	}
	l.Deny(true)
	if got := notes(l.driver(0), "web05", ""); strings.Contains(got, "role") {
		t.Errorf("on a host of no cluster: %s", got)
	}
}
