package hyperv

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// Two nodes, the shared volume of each served by a Samba of its own, and a VM on
// the first, whose name the source has.
type failing struct {
	*testing.T
	*host.Cluster
	nodes  []*host.Host
	ends   []*sim.Endpoint
	sambas []*smbtest.Server
	csv    string
	vm     string
	guid   string
	disk   []byte
	driver *Driver
}

func newFailing(t *testing.T) *failing {
	t.Helper()
	dir := imagetest.MemoryDir(t)
	l := &failing{T: t, vm: fmt.Sprintf("web%02d", sites.Add(1)), csv: filepath.Join(dir, "csv"), disk: make([]byte, 16<<20)}
	for _, name := range []string{"HV01", "HV02"} {
		h, err := host.New(host.Options{Dir: filepath.Join(dir, name), Shared: l.csv, Name: name, JobTime: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		l.nodes = append(l.nodes, h)
		l.sambas = append(l.sambas, smbtest.Run(t, smbtest.Options{Dir: l.csv}))
	}
	l.Cluster = host.NewCluster("HVC", l.nodes...)
	t.Cleanup(func() {
		for _, e := range l.ends {
			if e != nil {
				e.Close()
			}
		}
	})
	var err error
	if l.guid, err = l.nodes[0].AddVM(host.Spec{Name: l.vm, Root: `C:\ClusterStorage\Volume1\` + l.vm, Disks: []host.DiskSpec{{Bytes: int64(len(l.disk))}}}); err != nil {
		t.Fatal(err)
	}
	random := rand.NewChaCha8([32]byte{1})
	random.Read(l.disk)
	if err := l.nodes[0].WriteBytes(l.vm, 0, 0, l.disk); err != nil {
		t.Fatal(err)
	}
	query := url.Values{"smb": {l.sambas[0].Addr(), "HV02=" + l.sambas[1].Addr()}, "share": {`C:\ClusterStorage=` + smbtest.Share}}
	var at []*url.URL
	for _, h := range l.nodes {
		e, err := sim.Serve(h, "", sim.Options{User: smbtest.User, Password: smbtest.Password})
		if err != nil {
			t.Fatal(err)
		}
		l.ends = append(l.ends, e)
		u, err := url.Parse(e.URL)
		if err != nil {
			t.Fatal(err)
		}
		at = append(at, u)
		query.Add("fingerprint", "sha256:"+e.Fingerprint)
	}
	query.Add("node", "HV02="+at[1].Host)
	u, _, err := ParseSource(fmt.Sprintf("hyperv://%s@%s?%s", smbtest.User, at[0].Host, query.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	l.driver, err = Open(t.Context(), Options{Host: u, Password: secret.New([]byte(smbtest.Password)), StateDir: imagetest.MemoryDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.driver.Close() })
	quick := func(d *Driver) {
		d.poll, d.nodeOutage = 20*time.Millisecond, time.Second
	}
	quick(l.driver)
	dial := l.driver.cluster.dial
	l.driver.cluster.dial = func(node string) (*Driver, error) {
		d, err := dial(node)
		if err == nil {
			quick(d)
		}
		return d, err
	}
	return l
}

// powerCut takes the first node away, with its share and its WinRM; its VMs
// start on the other one.
func (l *failing) powerCut() {
	l.Helper()
	l.sambas[0].Kill()
	if err := l.ends[0].Close(); err != nil {
		l.Error(err)
	}
	l.ends[0] = nil
	if err := l.Fail("HV01"); err != nil {
		l.Error(err)
	}
}

// dismount takes the shared volume from the first node, which goes on to answer.
func (l *failing) dismount() {
	l.Helper()
	conf, err := os.ReadFile(l.sambas[0].Config())
	if err != nil {
		l.Fatal(err)
	}
	conf = bytes.ReplaceAll(conf, []byte("path = "+l.csv+"\n"), []byte("path = "+l.TempDir()+"\n"))
	if err := os.WriteFile(l.sambas[0].Config(), conf, 0o600); err != nil {
		l.Fatal(err)
	}
	l.sambas[0].Kill()
	if err := l.sambas[0].Run(l.Context()); err != nil {
		l.Fatal(err)
	}
}

func (l *failing) begin(name string) hypervisor.Session {
	l.Helper()
	s, err := l.driver.Begin(l.Context(), name, hypervisor.Options{RepoID: ourRepo})
	if err != nil {
		l.Fatal(err)
	}
	return s
}

// wantLeft fails unless the VM has no checkpoint, so many reference points, and
// no file of a checkpoint.
func (l *failing) wantLeft(references int) {
	l.Helper()
	h := l.Owner(l.vm)
	frozen := len(h.Instances("root/virtualization/v2", "Msvm_SnapshotOfVirtualSystem"))
	points := len(h.Instances("root/virtualization/v2", classReference))
	files, err := filepath.Glob(filepath.Join(l.csv, "Volume1", l.vm, "*", "*.avhdx"))
	if frozen != 0 || points != references || len(files) > 0 || err != nil {
		l.Errorf("the VM has %d checkpoints, %d reference points (want %d), files %v, %v", frozen, points, references, files, err)
	}
}

// The node that has the VM and serves its files loses its power while it is
// read. The same session reads on through the other node and ends there.
func TestNodeGoesDownWhileItIsRead(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	for _, c := range []struct {
		name  string
		by    func(*failing) string
		cut   func(*failing)
		moved bool
	}{
		{"all of it, the VM by its name", func(l *failing) string { return l.vm }, (*failing).powerCut, true},
		{"all of it, the VM by its GUID", func(l *failing) string { return l.guid }, (*failing).powerCut, true},
		{"its share alone", func(l *failing) string { return l.vm }, func(l *failing) { l.sambas[0].Kill() }, false},
		{"its volume alone", func(l *failing) string { return l.vm }, (*failing).dismount, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newFailing(t)
			s := l.begin(c.by(l))
			got := make([]byte, len(l.disk))
			half := len(got) / 2
			if _, err := s.Disks()[0].ReadAt(got[:half], 0); err != nil {
				t.Fatal(err)
			}
			c.cut(l)
			var all sync.WaitGroup
			const piece = 1 << 20
			for off := half; off < len(got); off += piece {
				all.Go(func() {
					if _, err := s.Disks()[0].ReadAt(got[off:off+piece], int64(off)); err != nil && err != io.EOF {
						t.Error(err)
					}
				})
			}
			all.Wait()
			if !bytes.Equal(got, l.disk) {
				t.Error("what is read is not what the guest wrote")
			}
			if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
				t.Errorf("check: %v", err)
			}
			if w := warnings(s); strings.Count(w, "went away") != 1 || !strings.Contains(w, "HV01") || !strings.Contains(w, "HV02") {
				t.Errorf("warnings %q", w)
			}
			prev := mustCommit(t, s)
			l.wantLeft(1)
			if !c.moved {
				return // its own share is still away
			}
			s, err := l.driver.Begin(t.Context(), l.guid, hypervisor.Options{RepoID: ourRepo, Previous: prev})
			if err != nil {
				t.Fatal(err)
			}
			if _, why := s.Disks()[0].Mode(); !strings.Contains(why, "the VM moved from HV01 to HV02") {
				t.Errorf("the next one reads: %s", why)
			}
			mustAbort(t, s)
			l.wantLeft(1)
		})
	}
}

// A closing is a file that somebody closes while it is read.
type closing struct {
	image.File
	close func()
}

func (f closing) ReadAt([]byte, int64) (int, error) {
	f.close()
	return 0, os.ErrClosed
}

// Whoever reads a file that another reader moves meanwhile reads on in the new
// one, whatever the old one says for being closed.
func TestMovedUnderAReader(t *testing.T) {
	m := &movable{r: &roamer{b: &beginning{reading: t.Context()}}}
	m.f = closing{close: func() {
		m.f, m.turn = imagetest.Bytes("new", []byte("data")), 1
	}}
	got := make([]byte, 4)
	if n, err := m.ReadAt(got, 0); n != 4 || err != nil && err != io.EOF || string(got) != "data" {
		t.Errorf("%q, %v", got[:n], err)
	}
	m.f = closing{close: func() {}}
	if _, err := m.ReadAt(got, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("nobody moved it: %v", err)
	}
}

// What changed is not asked of a node that got the VM while it was read: who lost
// it may have lost what it knew of it.
func TestTrackingGoesWithItsNode(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	l := newFailing(t)
	prev := mustCommit(t, l.begin(l.vm))
	s, err := l.driver.Begin(t.Context(), l.vm, hypervisor.Options{RepoID: ourRepo, Previous: prev})
	if err != nil {
		t.Fatal(err)
	}
	d := s.Disks()[0].(*disk)
	whole := extent.Extent{Len: d.info.SizeBytes}
	if _, err := d.Changed(t.Context(), whole); err != nil {
		t.Fatal(err)
	}
	d.known = extent.Extent{} // as if the disk were larger than what one answer is about
	l.powerCut()
	if _, err := d.ReadAt(make([]byte, 8<<20), 4<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Changed(t.Context(), whole); !errors.Is(err, hypervisor.ErrTrackingLost) || !strings.Contains(err.Error(), "moved from HV01 to HV02") {
		t.Errorf("what changed: %v", err)
	}
	mustAbort(t, s)
}

// An atByte does something once so many bytes were read.
type atByte struct {
	at   int64
	done atomic.Int64
	once sync.Once
	do   func()
}

func (p *atByte) Total(int64) {}
func (p *atByte) Add(n int64) {
	if p.done.Add(n) >= p.at {
		p.once.Do(p.do)
	}
}

// Where the checkpoint did not outlive its node, what was read is worth nothing:
// the same run backs the VM up once more on its new owner, and says so.
func TestCheckpointGoesWithItsNode(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	l := newFailing(t)
	store := mem.New()
	err := repo.Init(t.Context(), store, repo.InitOptions{ChunkBytes: 256 << 10, Passphrase: password, KDF: repo.KDF{Passes: 1, MemoryKiB: 64, Threads: 1}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(t.Context(), store, repo.Key{Passphrase: password})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	want := bytes.Clone(l.disk)
	cut := &atByte{at: 4 << 20, do: func() {
		l.powerCut()
		l.mergeAll(1)
		copy(want[1000:], "after it")
		if err := l.nodes[1].WriteBytes(l.vm, 0, 1000, []byte("after it")); err != nil {
			t.Error(err)
		}
	}}
	res := backup.Run(t.Context(), backup.Options{Repo: r, Progress: cut, Audit: -1}, []backup.Job{{Driver: l.driver, Name: l.vm, Consistency: vm.Crash}})[0]
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	if w := strings.Join(res.Warnings, "\n"); !strings.Contains(w, "begun anew") {
		t.Errorf("warnings %q", w)
	}
	if res.Point.Machine.Host != "HV02" {
		t.Errorf("the restore point is of host %s", res.Point.Machine.Host)
	}
	points, err := r.Points(t.Context())
	if err != nil || len(points) != 1 {
		t.Fatalf("%d restore points, %v", len(points), err)
	}
	d, err := r.OpenDisk(t.Context(), points[0].Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, len(want))
	if n, err := d.ReadAt(got, 0); n < len(got) {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the restore point is not what the guest had written")
	}
	l.wantLeft(1)
}

// mergeAll destroys all checkpoints on a node, as a host might that starts a VM
// which another one lost.
func (l *failing) mergeAll(node int) {
	l.Helper()
	pin, err := wsman.ParseFingerprint(l.ends[node].Fingerprint)
	if err != nil {
		l.Error(err)
		return
	}
	c, err := wsman.New(wsman.Config{URL: l.ends[node].URL, User: smbtest.User, Password: secret.New([]byte(smbtest.Password)), Pin: &pin})
	if err != nil {
		l.Error(err)
		return
	}
	defer c.Close()
	for _, i := range l.nodes[node].Instances("root/virtualization/v2", classSettings) {
		if i.Get("VirtualSystemType").String() != typeRecovery {
			continue
		}
		to := &client{c, time.Millisecond, time.Minute}
		if _, err := to.do(l.Context(), familyCIM, service(classSnapshots), "DestroySnapshot",
			wsman.Arg("AffectedSnapshot", wsman.Of(instance(classSettings, i.Get("InstanceID").String())))); err != nil {
			l.Error(err)
		}
	}
}

// Where no other node reaches the files either, that is one clear message, and
// the checkpoint goes all the same.
func TestNoNodeReachesTheFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	t.Parallel() // they mostly wait
	l := newFailing(t)
	l.driver.roamTime, l.driver.openTime = 0, 2*time.Second
	s := l.begin(l.vm)
	for _, samba := range l.sambas {
		samba.Kill()
	}
	_, err := s.Disks()[0].ReadAt(make([]byte, 8<<20), 4<<20)
	var again *hypervisor.RetryError
	var node *NodeError
	if !errors.As(err, &again) || !errors.As(err, &node) || node.Node != "HV02" || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
	mustAbort(t, s)
	l.wantLeft(0)
}
