package hyperv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
	simwsman "github.com/backstay/backstay/sim/hyperv/wsman"
)

// A site is a simulated host with one VM, reached over WinRM, and a repository.
type site struct {
	*testing.T
	host  *host.Host
	dir   string // of the host's volumes
	at    *sim.Endpoint
	state string
	repo  *repo.Repository
	disk  []byte            // what the guest has written
	want  map[string][]byte // by the points' refs
	name  string            // of the VM
	samba *smbtest.Server   // serves the host's files; nil for none
	files files             // instead of the host's; nil for those
	// outage is how long a share that went away is waited for; 0 for the usual.
	outage time.Duration

	mu    sync.Mutex
	asked []string // requests since the last backup began, by action
	spoil func(n int, action string) simwsman.Trouble
}

func newSite(t *testing.T) *site {
	t.Helper()
	return newSiteIn(t, imagetest.MemoryDir(t))
}

// newSiteIn makes one whose volumes are in dir.
func newSiteIn(t *testing.T, dir string) *site {
	t.Helper()
	s := &site{T: t, dir: dir, name: fmt.Sprintf("web%02d", sites.Add(1)), state: imagetest.MemoryDir(t), disk: make([]byte, 4<<20), want: map[string][]byte{}}
	var err error
	if s.host, err = host.New(host.Options{Dir: s.dir, JobTime: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.host.Close() })
	if _, err := s.host.AddVM(host.Spec{Name: s.name, Disks: []host.DiskSpec{{Bytes: int64(len(s.disk))}}}); err != nil {
		t.Fatal(err)
	}
	s.at, err = sim.Serve(s.host, "HV01", sim.Options{User: "backup", Password: "secret", HTTP: true, Fault: s.fault})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.at.Close() })
	store := mem.New()
	err = repo.Init(t.Context(), store, repo.InitOptions{ChunkBytes: 256 << 10, Passphrase: password, KDF: repo.KDF{Passes: 1, MemoryKiB: 64, Threads: 1}})
	if err == nil {
		s.repo, err = repo.Open(t.Context(), store, repo.Key{Passphrase: password})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.repo.Close() })
	return s
}

var sites atomic.Int32

var password = secret.New([]byte("correct horse"))

func (s *site) fault(action string) simwsman.Trouble {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, action[strings.LastIndexByte(action, '/')+1:])
	if s.spoil == nil {
		return simwsman.None
	}
	return s.spoil(len(s.asked)-1, s.asked[len(s.asked)-1])
}

func (s *site) write(off int64, p string) {
	s.Helper()
	copy(s.disk[off:], p)
	if err := s.host.WriteBytes(s.name, 0, off, []byte(p)); err != nil {
		s.Fatal(err)
	}
}

// backUp backs up by a connection of its own, while spoil spoils requests; nil
// for none.
func (s *site) backUp(spoil func(int, string) simwsman.Trouble) backup.Result {
	s.Helper()
	d := s.driver(Options{MergeWait: time.Minute})
	defer d.Close()
	s.mu.Lock()
	s.asked, s.spoil = nil, spoil
	s.mu.Unlock()
	res := backup.Run(s.Context(), backup.Options{Repo: s.repo, Audit: -1}, []backup.Job{{Driver: d, Name: s.name, Consistency: vm.Crash}})[0]
	s.mu.Lock()
	s.spoil = nil
	s.mu.Unlock()
	if res.Point != nil {
		s.want[res.Point.Ref()] = bytes.Clone(s.disk)
	}
	return res
}

// driver is a new one of the host.
func (s *site) driver(o Options) *Driver {
	s.Helper()
	c, err := wsman.New(wsman.Config{URL: s.at.URL, User: "backup", Password: secret.New([]byte("secret"))})
	if err != nil {
		s.Fatal(err)
	}
	var reached files = simFiles{s.host}
	if s.samba != nil {
		shares := smb.NewShares()
		if err := shares.Add(`C:\=` + smbtest.Share); err != nil {
			s.Fatal(err)
		}
		f, err := newShareFiles(address{smb: s.samba.Addr(), user: smbtest.User, shares: shares}, secret.New([]byte(smbtest.Password)))
		if err != nil {
			s.Fatal(err)
		}
		f.target.Outage = s.outage
		reached = f
	}
	if s.files != nil {
		reached = s.files
	}
	o.Host, o.StateDir = &url.URL{Scheme: "hyperv", Host: "hv01"}, s.state
	d := newDriver(c, reached, o)
	d.poll = time.Millisecond
	return d
}

// wantPoints compares all restore points with what the guest had written then.
func (s *site) wantPoints() {
	s.Helper()
	points, err := s.repo.Points(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	if len(points) != len(s.want) {
		s.Errorf("%d restore points, want %d", len(points), len(s.want))
	}
	for _, p := range points {
		d, err := s.repo.OpenDisk(s.Context(), p.Disks[0].Manifest)
		if err != nil {
			s.Fatal(err)
		}
		got := make([]byte, len(s.disk))
		if n, err := d.ReadAt(got, 0); n < len(got) {
			s.Fatal(err)
		}
		d.Close()
		if !bytes.Equal(got, s.want[p.Ref()]) {
			s.Errorf("%s is not what the guest had written", p.Ref())
		}
	}
}

// left is what there is on the host that a backup may have made.
type left struct {
	checkpoints, references []string
	files                   []string
}

func (s *site) left() (l left) {
	for _, i := range s.host.Instances(cim.Virtualization, classSettings) {
		if i.Get("VirtualSystemType").String() == typeRecovery {
			l.checkpoints = append(l.checkpoints, i.Get("InstanceID").String())
		}
	}
	for _, i := range s.host.Instances(cim.Virtualization, classReference) {
		l.references = append(l.references, i.Get("InstanceID").String())
	}
	err := filepath.WalkDir(s.dir, func(file string, e fs.DirEntry, err error) error {
		if err == nil && (strings.HasSuffix(file, ".avhdx") || strings.Contains(file, "Snapshots"+string(os.PathSeparator))) {
			l.files = append(l.files, file)
		}
		return err
	})
	if err != nil {
		s.Error(err)
	}
	return l
}

// noted are the ids that the journal has, by their kind.
func (s *site) noted() map[string][]string {
	s.Helper()
	out := map[string][]string{}
	j, err := journal.Open(filepath.Join(s.state, "hyperv", "journal"))
	if err != nil {
		s.Fatal(err)
	}
	machines, err := j.Machines()
	if err != nil {
		s.Fatal(err)
	}
	for _, m := range machines {
		runs, err := j.Runs(m)
		if err != nil {
			s.Fatal(err)
		}
		for _, r := range runs {
			for _, e := range r.Open() {
				out[e.Kind] = append(out[e.Kind], e.Name)
			}
			r.Close()
		}
	}
	return out
}

// wantTidy checks that the host has nothing of ours but so many reference points,
// which the journal knows.
func (s *site) wantTidy(references int) {
	s.Helper()
	l, noted := s.left(), s.noted()
	if len(l.checkpoints) > 0 || len(l.files) > 0 || len(noted[kindCheckpoint]) > 0 {
		s.Errorf("the host has %q, %q; the journal %q", l.checkpoints, l.files, noted)
	}
	slices.Sort(l.references)
	slices.Sort(noted[kindReference])
	if len(l.references) != references || fmt.Sprint(l.references) != fmt.Sprint(noted[kindReference]) {
		s.Errorf("the host has the reference points %q, the journal %q; want %d", l.references, noted[kindReference], references)
	}
}

// faults are what may become of one request, or of all from it on.
var faults = map[string]func(at int) func(n int, action string) simwsman.Trouble{
	"the connection ends": func(at int) func(int, string) simwsman.Trouble {
		return func(n int, _ string) simwsman.Trouble { return map[int]simwsman.Trouble{at: simwsman.Drop}[n] }
	},
	"the answer is lost": func(at int) func(int, string) simwsman.Trouble {
		return func(n int, _ string) simwsman.Trouble { return map[int]simwsman.Trouble{at: simwsman.DropAnswer}[n] }
	},
	"the sign-in is forgotten": func(at int) func(int, string) simwsman.Trouble {
		return func(n int, _ string) simwsman.Trouble { return map[int]simwsman.Trouble{at: simwsman.Unauthorized}[n] }
	},
	"a page of HTML": func(at int) func(int, string) simwsman.Trouble {
		return func(n int, _ string) simwsman.Trouble { return map[int]simwsman.Trouble{at: simwsman.HTML}[n] }
	},
	"the account is locked from then on": func(at int) func(int, string) simwsman.Trouble {
		return func(n int, _ string) simwsman.Trouble {
			if n >= at {
				return simwsman.Unauthorized
			}
			return simwsman.None
		}
	},
}

// Whichever request of a backup goes wrong, full or incremental, restore points
// are right, the next backup works, and after it nothing is left on the host
// but the reference point that the journal knows. What nobody can tell to be
// ours, because the answer was lost that says so, is named.
func TestFaultAtEveryRequest(t *testing.T) {
	stride := 17
	switch {
	case os.Getenv("BACKSTAY_SOAK") != "":
		stride = 1
	case testing.Short():
		t.Skip("takes some seconds")
	}
	// They mostly wait, for connections to be tried again.
	var all sync.WaitGroup
	defer all.Wait()
	places := make(chan struct{}, 12)
	for _, full := range []bool{true, false} {
		plain := newSite(t)
		if !full {
			plain.mustBackUp()
			plain.write(1<<20, "the second")
		}
		plain.mustBackUp()
		requests, offset := slices.Clone(plain.asked), 0
		for name, spoil := range faults {
			offset++
			for at, action := range requests {
				// Calls that change something on the host are worth more.
				if changes := action != "Get" && action != "Enumerate"; (at+offset)%stride != 0 && !(changes && name == "the answer is lost") {
					continue
				}
				places <- struct{}{}
				all.Go(func() {
					defer func() { <-places }()
					t.Run(fmt.Sprintf("full=%v/%s/%d", full, name, at), func(t *testing.T) {
						faultAt(t, full, spoil(at), func(asked []string) bool {
							// There may be fewer than the time before: jobs are polled.
							return name == "the answer is lost" && at < len(asked) && (asked[at] == "CreateSnapshot" || asked[at] == "ConvertToReferencePoint")
						})
					})
				})
			}
		}
	}
}

func (s *site) mustBackUp() backup.Result {
	s.Helper()
	res := s.backUp(nil)
	if res.Err != nil {
		s.Fatal(res.Err)
	}
	return res
}

// faultAt has a backup go wrong, and the next one not. stays says, by what was
// asked, that the host has made something and nobody knows whose.
func faultAt(t *testing.T, full bool, spoil func(int, string) simwsman.Trouble, stays func(asked []string) bool) {
	s := newSite(t)
	s.write(0, "the first")
	if !full {
		s.mustBackUp()
		s.write(1<<20, "the second")
	}
	res := s.backUp(spoil)
	made := stays(s.asked)
	if said := fmt.Sprint(res.Err, res.Warnings); strings.Contains(said, "secret") {
		t.Errorf("it says the password: %s", said)
	}
	s.write(2<<20, "the third")
	next := s.mustBackUp()
	s.wantPoints()
	if !made {
		s.wantTidy(1)
		return
	}
	l, noted := s.left(), s.noted()
	foreign := slices.DeleteFunc(append(l.checkpoints, l.references...), func(id string) bool { return slices.Contains(noted[kindReference], id) })
	if len(foreign) != 1 || !strings.Contains(strings.Join(next.Warnings, "\n"), foreign[0]) {
		t.Errorf("the host has besides %q, which the next backup does not name: %q", foreign, next.Warnings)
	}
}

// A page of a list that got lost would be missing without a word: all of it is
// asked for again.
func TestConnectionEndsBetweenPages(t *testing.T) {
	p := &pages{lose: 2}
	c := &client{management: p, poll: time.Millisecond}
	list, err := c.query(t.Context(), "SELECT * FROM Msvm_ComputerSystem")
	if err != nil || len(list) != 2 || p.asked != 3 {
		t.Errorf("%d instances after %d questions, %v", len(list), p.asked, err)
	}
	p = &pages{lose: 100}
	var cut *wsman.ConnectionError
	if _, err := (&client{management: p, poll: time.Millisecond}).query(t.Context(), ""); !errors.As(err, &cut) || p.asked != 3 {
		t.Errorf("after %d questions: %v", p.asked, err)
	}
}

// pages is a host whose connection ends in the middle of a list, so many times.
type pages struct {
	management
	lose, asked int
}

func (p *pages) Query(context.Context, string) iter.Seq2[*wsman.Instance, error] {
	return func(yield func(*wsman.Instance, error) bool) {
		p.asked++
		if !yield(wsman.NewInstance(classSystem), nil) {
			return
		}
		if p.asked <= p.lose {
			yield(nil, &wsman.ConnectionError{Host: "hv01", Sent: true, Err: io.ErrUnexpectedEOF})
			return
		}
		yield(wsman.NewInstance(classSystem), nil)
	}
}

// The share may go away for a moment at any time, which costs only time, or for
// long: then the backup fails, and its checkpoint goes all the same.
func TestShareGoesAway(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	dir := imagetest.MemoryDir(t)
	samba := smbtest.Run(t, smbtest.Options{Dir: filepath.Join(dir, "C")})
	for _, forLong := range []bool{false, true} {
		s := newSiteIn(t, dir)
		s.samba = samba
		if forLong {
			s.outage = time.Second
		}
		s.write(0, strings.Repeat("the first ", 100_000))
		s.mustBackUp()
		s.write(1<<20, "the second")
		var back sync.WaitGroup
		res := s.backUp(func(_ int, action string) simwsman.Trouble {
			if action == "GetVirtualDiskChanges" { // the disk is open then
				samba.Kill()
				if !forLong {
					back.Go(func() {
						time.Sleep(100 * time.Millisecond)
						if err := samba.Run(t.Context()); err != nil {
							t.Error(err)
						}
					})
				}
			}
			return simwsman.None
		})
		back.Wait()
		var files *FilesError
		switch {
		case !forLong && res.Err != nil:
			t.Errorf("away for a moment: %v", res.Err)
		case forLong:
			if res.Err == nil {
				t.Error("away for long, and the backup says that all is well")
			} else if !errors.As(res.Err, &files) {
				t.Errorf("away for long: %v", res.Err)
			}
			s.wantTidy(1)
			if err := samba.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		s.write(2<<20, "the third")
		if next := s.mustBackUp(); next.Point.Disks[0].Mode != point.Incremental {
			t.Errorf("%s, %s", next.Point.Disks[0].Mode, next.Point.Disks[0].Reason)
		}
		s.wantTidy(1)
		s.wantPoints()
	}
}
