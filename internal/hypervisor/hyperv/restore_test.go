package hyperv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// A restoreLab is a simulated host behind its real protocol, whose files are
// reached where they lie, and which goes out of reach on cue.
type restoreLab struct {
	t     *testing.T
	host  *host.Host
	dir   string
	state string
	wmi   *wsman.Client // one for all drivers: signing in takes longest

	mu   sync.Mutex
	n    int      // requests and file operations so far
	at   int      // the one to break, from 1 on; 0 for none
	word string   // instead of at: the first request for it
	late bool     // the host does it, and its answer is lost
	trip func()   // instead of an error: called before that request
	then func()   // called once something broke, to break more; has mu
	log  []string // what was asked
	dies bool     // after what breaks, all does: the program was killed
	dead bool
}

func newRestoreLab(t *testing.T) *restoreLab {
	l := &restoreLab{t: t, dir: imagetest.MemoryDir(t), state: imagetest.MemoryDir(t)}
	h, err := host.New(host.Options{Dir: l.dir, JobTime: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := h.AddVM(host.Spec{Name: "web01", Off: true, Disks: []host.DiskSpec{{Bytes: 4 << 20}, {Bytes: 4 << 20}}}); err != nil {
		t.Fatal(err)
	}
	l.host = h
	end, err := sim.Serve(h, "HV01", sim.Options{User: "backup", Password: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end.Close() })
	pin, err := wsman.ParseFingerprint(end.Fingerprint)
	if err != nil {
		t.Fatal(err)
	}
	if l.wmi, err = wsman.New(wsman.Config{URL: end.URL, User: "backup", Password: secret.New([]byte("secret")), Pin: &pin}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.wmi.Close() })
	return l
}

// driver is a Driver of the lab's host.
func (l *restoreLab) driver() *Driver {
	d := newDriver(brittle{l, l.wmi}, brittleFiles{l, simFiles{l.host}}, Options{Host: &url.URL{Scheme: "hyperv", Host: "hv01"}, StateDir: l.state})
	d.poll, d.lookTime = time.Millisecond, time.Second
	return d
}

// broken counts a request. do says whether the host gets it.
func (l *restoreLab) broken(what string) (do bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n++
	l.log = append(l.log, what)
	if l.dead {
		return false, errKilled
	}
	if l.n != l.at && (l.word == "" || l.word != what) {
		return true, nil
	}
	l.word = ""
	if then := l.then; then != nil {
		l.then = nil
		defer then()
	}
	if l.dies {
		l.dead = true
		return false, errKilled
	}
	if l.trip != nil {
		l.trip()
		return true, nil
	}
	return l.late, &wsman.ConnectionError{Host: "hv01", Sent: l.late, Err: errors.New("the cable was pulled")}
}

// errKilled is of a class that is not tried again.
var errKilled = fmt.Errorf("killed: %w", fault.ErrDenied)

// arm breaks the n-th request from now on.
func (l *restoreLab) arm(n int, late bool, trip func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n, l.at, l.word, l.late, l.trip, l.log = 0, n, "", late, trip, nil
}

// brittle breaks requests to the host's classes.
type brittle struct {
	l *restoreLab
	m management
}

func (b brittle) Query(ctx context.Context, wql string) iter.Seq2[*wsman.Instance, error] {
	do, err := b.l.broken(wql)
	if err != nil || !do {
		return func(yield func(*wsman.Instance, error) bool) { yield(nil, err) }
	}
	return b.m.Query(ctx, wql)
}

func (b brittle) Get(ctx context.Context, ref wsman.Ref) (*wsman.Instance, error) {
	if _, err := b.l.broken("get " + ref.Class); err != nil {
		return nil, err
	}
	return b.m.Get(ctx, ref)
}

func (b brittle) Invoke(ctx context.Context, ref wsman.Ref, method string, args ...wsman.Argument) (*wsman.Instance, error) {
	do, err := b.l.broken(method)
	if do {
		in, e := b.m.Invoke(ctx, ref, method, args...)
		if err == nil {
			return in, e
		}
	}
	return nil, err
}

func (b brittle) Close() error { return b.m.Close() }

// brittleFiles breaks what is done with files.
type brittleFiles struct {
	l *restoreLab
	simFiles
}

func (b brittleFiles) op(what string, do func() error) error {
	may, err := b.l.broken(what)
	if err != nil {
		err = &FilesError{err}
	}
	if may {
		if e := do(); err == nil {
			return e
		}
	}
	return err
}

func (b brittleFiles) create(ctx context.Context, name string) (out image.Output, err error) {
	err = b.op("create", func() (err error) { out, err = b.simFiles.create(ctx, name); return err })
	if err != nil && out != nil {
		out.Close()
		out = nil
	}
	return out, err
}

func (b brittleFiles) mkdir(ctx context.Context, name string) error {
	return b.op("mkdir", func() error { return b.simFiles.mkdir(ctx, name) })
}

func (b brittleFiles) remove(ctx context.Context, name string) error {
	return b.op("remove", func() error { return b.simFiles.remove(ctx, name) })
}

func (b brittleFiles) rename(ctx context.Context, from, to string) error {
	return b.op("rename", func() error { return b.simFiles.rename(ctx, from, to) })
}

// files are all that lies on the host, and its VMs with their disks: what
// undoing has to bring back.
func (l *restoreLab) picture() string {
	l.t.Helper()
	var out []string
	err := filepath.WalkDir(l.dir, func(path string, e fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(l.dir, path)
		out = append(out, rel)
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.arm(0, false, nil)
	machines, err := l.driver().Machines(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	planned, err := l.driver().planned(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	for _, s := range planned {
		out = append(out, "planned "+s.name)
	}
	for _, m := range machines {
		out = append(out, fmt.Sprintf("%s %s %v", m.Name, m.State, m.Disks))
	}
	return strings.Join(out, "\n")
}

// content is what the disk n of a test has to hold.
func content(n int) []byte { return bytes.Repeat([]byte{byte(n + 1), 'x'}, 1<<20) }

// writeDisks writes the disks as restores do.
func writeDisks(ctx context.Context, b hypervisor.Builder, ids ...vm.DiskID) error {
	need := map[vm.DiskID]int64{}
	for _, id := range ids {
		need[id] = 2 << 20
	}
	if err := b.Room(ctx, need); err != nil {
		return err
	}
	for n, id := range ids {
		out, _, err := b.Create(ctx, id)
		if err != nil {
			return err
		}
		w, err := vhdx.NewWriter(out, image.CreateOptions{VirtualBytes: 4 << 20})
		if err != nil {
			return err
		}
		_, err = w.WriteAt(content(n), 1<<20)
		if err == nil {
			err = w.Finish()
		}
		w.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// restored makes a VM as a restore does, and aborts it if it comes to nothing.
func (l *restoreLab) restored(ctx context.Context, o NewVMOptions) (hypervisor.Built, error) {
	b, err := l.driver().NewVM(ctx, o)
	if err != nil {
		return hypervisor.Built{}, err
	}
	return finish(ctx, b, o.Disks)
}

func finish(ctx context.Context, b hypervisor.Builder, disks []vm.DiskID) (done hypervisor.Built, err error) {
	if err = writeDisks(ctx, b, disks...); err == nil {
		done, err = b.Commit(ctx)
	}
	if err != nil {
		return done, errors.Join(err, b.Abort(ctx))
	}
	return done, nil
}

// wantContent looks what a disk of the host holds.
func (l *restoreLab) wantContent(file string, want []byte) {
	l.t.Helper()
	f, err := image.OpenFile(l.host.Local(file))
	if err != nil {
		l.t.Fatal(err)
	}
	img, err := vhdx.Open(f, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want) {
		l.t.Errorf("%s holds something else (%v)", file, err)
	}
}

func newOptions(name string) NewVMOptions {
	return NewVMOptions{Name: name, RepoID: ourRepo, Known: true, Disks: []vm.DiskID{"scsi0:0", "scsi1:5"}, Folder: `C:\VMs`,
		Definition: vm.Definition{Version: 1, Name: "web01", Hypervisor: "hyperv", Processors: 3, MemoryBytes: 768 << 20, Firmware: "uefi", SecureBoot: true, Notes: "the shop",
			Disks: []vm.DiskPlace{{ID: "scsi0:0", Bus: "scsi"}, {ID: "scsi1:5", Bus: "scsi", Controller: 1, Slot: 5}},
			NICs:  []vm.NIC{{MAC: "00:15:5d:01:02:03", Network: "LAN", Model: "synthetic"}}}}
}

// A VM is made of a description: with its disks where they were, in files of
// its own, and on no network.
func TestNewVM(t *testing.T) {
	l := newRestoreLab(t)
	before, err := l.driver().Machines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o := newOptions("web02")
	o.Start = true
	done, err := l.restored(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !done.Running || done.How != "definition" || done.UUID == before[0].UUID || len(done.Warnings) > 0 || !strings.Contains(strings.Join(done.Notes, " "), "not connected (before: LAN)") {
		t.Errorf("%+v", done)
	}
	d := l.driver()
	_, list, err := d.systems(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := choose(list, "web02")
	if err != nil || s.state != stateRunning || s.guid != done.UUID {
		t.Fatalf("%+v, %v", s, err)
	}
	now, err := d.present(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(now.text("VirtualSystemSubType"), ":2") || !now.truth("SecureBootEnabled") || now.text("Notes") != "the shop" || now.text("ConfigurationDataRoot") != `C:\VMs\web02` {
		t.Errorf("%v", now)
	}
	m := &making{Building: &Building{d: d}, now: now}
	for class, want := range map[string]int64{"Msvm_ProcessorSettingData": 3, "Msvm_MemorySettingData": 768} {
		list, err := m.settings(t.Context(), class)
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		if n, _ := list[0].number("VirtualQuantity"); n != want {
			t.Errorf("%s: %d, want %d", class, n, want)
		}
	}
	drives, err := d.drives(t.Context(), now.ref)
	if err != nil || len(drives) != 2 {
		t.Fatal(drives, err)
	}
	slots := []string{string(drives[0].ID)[5:], string(drives[1].ID)[5:]}
	slices.Sort(slots)
	if !slices.Equal(slots, []string{":0", ":5"}) {
		t.Errorf("disks hang at %s and %s", drives[0].ID, drives[1].ID)
	}
	l.wantContent(`C:\VMs\web02\web02-scsi0-0.vhdx`, content(0))
	l.wantContent(`C:\VMs\web02\web02-scsi1-5.vhdx`, content(1))
	if cards, err := m.settings(t.Context(), classNIC); err != nil || len(cards) != 1 || cards[0].truth("StaticMacAddress") {
		t.Errorf("network cards: %v, %v", cards, err)
	}
	if links, err := m.settings(t.Context(), classLink); err != nil || len(links) > 0 {
		t.Errorf("connections: %v, %v", links, err)
	}
}

// A folder in which somebody made another is not ours any more: it is named
// once, and no later run comes back to it.
func TestFolderOfOthersStays(t *testing.T) {
	l := newRestoreLab(t)
	b, err := l.driver().NewVM(t.Context(), newOptions("web02"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(l.host.Local(`C:\VMs\web02\UndoLog Configuration`), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := b.Abort(t.Context()); !errors.As(err, new(*NotEmptyError)) {
		t.Errorf("abort: %v", err)
	}
	host, list, err := l.driver().systems(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if said := l.driver().reapRestores(t.Context(), host, list, ""); len(said) > 0 {
		t.Errorf("the next run: %q", said)
	}
}

// A VM of that name is not made twice, by whoever.
func TestNewVMNameTaken(t *testing.T) {
	l := newRestoreLab(t)
	for _, name := range []string{"web01", "WEB01"} {
		if _, err := l.restored(t.Context(), newOptions(name)); !errors.Is(err, fault.ErrExists) {
			t.Errorf("%s: %v", name, err)
		}
	}
	before := l.picture()
	b, err := l.driver().NewVM(t.Context(), newOptions("web02"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.driver().NewVM(t.Context(), newOptions("web02")); !errors.Is(err, fault.ErrLocked) {
		t.Errorf("a second restore of that name: %v", err)
	}
	if err := writeDisks(t.Context(), b, "scsi0:0", "scsi1:5"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.host.AddVM(host.Spec{Name: "web02"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Commit(t.Context()); !errors.Is(err, fault.ErrExists) {
		t.Errorf("a name that was taken meanwhile: %v", err)
	}
	if err := b.Abort(t.Context()); !errors.As(err, new(*NotEmptyError)) { // the other's files
		t.Errorf("abort: %v", err)
	}
	if after := l.picture(); strings.Count(after, ".vhdx") != strings.Count(before, ".vhdx") {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// everyRequest breaks one request after the other of what do does: lost on the
// way there, lost on the way back, and the user breaking off. Whatever breaks,
// do either works or leaves nothing, and if its own cleaning up is cut off the
// next run does it. All of it takes a minute; without BACKSTAY_SOAK some of the
// requests are taken, others in each run.
func everyRequest(t *testing.T, l *restoreLab, do func(ctx context.Context) error, undo func()) {
	every := 16
	if testing.Short() {
		every = 40
	}
	eachOf(t, l, every, do, undo)
}

// eachOf does so with one of every so many requests.
func eachOf(t *testing.T, l *restoreLab, every int, do func(ctx context.Context) error, undo func()) {
	l.arm(0, false, nil)
	if err := do(t.Context()); err != nil {
		t.Fatal(err)
	}
	total := l.n
	undo()
	before := l.picture()
	ways := []string{"lost", "late", "cancelled"}
	if os.Getenv("BACKSTAY_SOAK") != "" {
		every = 1
	}
	first := rand.IntN(every)
	t.Logf("from %d on every %d of %d requests", first, every, len(ways)*total)
	broke := 0
	for i := first; i < len(ways)*total; i += every {
		n, how := i/len(ways)+1, ways[i%len(ways)]
		ctx, cancel := context.WithCancel(t.Context())
		var trip func()
		if how == "cancelled" {
			trip = cancel
		}
		l.arm(n, how == "late", trip)
		err := do(ctx)
		cancel()
		what := "nothing"
		if len(l.log) >= n {
			what = l.log[n-1]
		}
		if err == nil {
			undo()
		} else {
			broke++
		}
		// What the host imported when its answer was lost, nobody knows for
		// ours: it is told, and left to a person.
		if left := (*UnknownImportError)(nil); errors.As(err, &left) {
			l.arm(0, false, nil)
			for _, guid := range left.GUIDs {
				if err := l.driver().destroySystem(t.Context(), plannedRef(guid)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if after := l.picture(); after != before {
			t.Fatalf("%s: request %d of %d, %s (%v)\nbefore:\n%s\nafter:\n%s", how, n, total, what, err, before, after)
		}
	}
	if broke == 0 && !testing.Short() {
		t.Error("nothing broke it")
	}
}

// However far the making of a VM gets before the host goes away for a moment,
// or the user breaks off, nothing of it stays.
func TestNewVMUndone(t *testing.T) {
	l := newRestoreLab(t)
	everyRequest(t, l, func(ctx context.Context) error {
		_, err := l.restored(ctx, newOptions("web02"))
		return err
	}, func() { l.takeAway("web02") })
}

// takeAway deletes a VM with its folder, as a person would.
func (l *restoreLab) takeAway(name string) {
	l.t.Helper()
	l.arm(0, false, nil)
	d := l.driver()
	_, list, err := d.systems(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	s, err := choose(list, name)
	if err == nil {
		err = d.destroySystem(l.t.Context(), s.ref)
	}
	if err == nil {
		err = os.RemoveAll(l.host.Local(`C:\VMs\` + name))
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// After kill -9 the next run to that host takes away what was made, and only
// that.
func TestNewVMKilled(t *testing.T) {
	l := newRestoreLab(t)
	before := l.picture()
	for _, how := range []string{"disks", "half a VM", "whole"} {
		d := l.driver()
		b, err := d.NewVM(t.Context(), newOptions("web02"))
		if err != nil {
			t.Fatal(err)
		}
		if err := writeDisks(t.Context(), b, "scsi0:0", "scsi1:5"); err != nil {
			t.Fatal(err)
		}
		switch how {
		case "half a VM":
			l.arm(0, true, nil)
			l.word = "AddResourceSettings"
			if err := b.commit(t.Context()); err == nil {
				t.Fatal("it was to break")
			}
		case "whole":
			if err := b.commit(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		// What lives is left alone.
		_, list, err := l.driver().systems(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if said := l.driver().reapRestores(t.Context(), "HV01", list, ""); len(said) > 0 {
			t.Errorf("%s: a restore that lives: %q", how, said)
		}
		for _, out := range b.outs { // as the kernel does
			out.Close()
		}
		b.run.Close()
		b.lock.Unlock()
		if said := l.driver().reapRestores(t.Context(), "hv02", list, ""); len(said) > 0 {
			t.Errorf("%s: another host: %q", how, said)
		}
		said := l.driver().reapRestores(t.Context(), "HV01", list, "")
		if how == "whole" { // it has its name, and people may have begun to use it
			if len(said) != 1 || !strings.Contains(said[0], "nothing of it is taken back") || !strings.Contains(l.picture(), "web02-scsi0-0.vhdx") {
				t.Errorf("%s: %q\n%s", how, said, l.picture())
			}
			if again := l.driver().reapRestores(t.Context(), "HV01", list, ""); len(again) > 0 {
				t.Errorf("%s, again: %q", how, again)
			}
			l.takeAway("web02")
			continue
		}
		if len(said) != 1 || !strings.Contains(said[0], "took away") {
			t.Errorf("%s: %q", how, said)
		}
		if after := l.picture(); after != before {
			t.Errorf("%s:\nbefore:\n%s\nafter:\n%s", how, before, after)
		}
	}
}

// imported are the options to restore web01 with its own definition.
func (l *restoreLab) imported(name string) NewVMOptions { return l.ownDefinition("web01", name) }

// ownDefinition are the options to restore a VM with its own definition, as a
// backup of it stores that.
func (l *restoreLab) ownDefinition(of, name string) NewVMOptions {
	l.t.Helper()
	s, err := l.driver().Begin(l.t.Context(), of, hypervisor.Options{RepoID: ourRepo, Consistency: vm.Crash})
	if err != nil {
		l.t.Fatal(err)
	}
	o := NewVMOptions{Name: name, RepoID: ourRepo, Known: true, Folder: `C:\VMs`, Files: map[string][]byte{}}
	for _, f := range s.Config() {
		if f.Name != "vm.json" {
			o.Files[f.Name] = f.Data
		} else if err := json.Unmarshal(f.Data, &o.Definition); err != nil {
			l.t.Fatal(err)
		}
	}
	for _, d := range s.Disks() {
		o.Disks = append(o.Disks, d.Info().ID)
	}
	if err := s.Abort(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
	return o
}

// A VM of Hyper-V is made of its own definition, in its restored disks and on
// no network.
func TestImport(t *testing.T) {
	l := newRestoreLab(t)
	o := l.imported("web02")
	done, err := l.restored(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if done.How != "import" || len(done.Warnings) > 0 || !strings.Contains(strings.Join(done.Notes, " "), "not connected (before: LAN)") {
		t.Errorf("%+v", done)
	}
	now := l.drivesOf("web02")
	if !maps.Equal(now, map[vm.DiskID]string{"scsi0:0": `C:\VMs\web02\web02-scsi0-0.vhdx`, "scsi0:1": `C:\VMs\web02\web02-scsi0-1.vhdx`}) {
		t.Errorf("%v", now)
	}
	l.wantContent(now["scsi0:1"], content(1))
	if strings.Contains(l.picture(), "import-") {
		t.Errorf("what was imported is left:\n%s", l.picture())
	}
	d := l.driver()
	if list, err := d.planned(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("planned: %v, %v", list, err)
	}
	_, list, err := d.systems(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := choose(list, "web02")
	if err == nil {
		err = d.setState(t.Context(), s, stateRunning)
	}
	if err != nil {
		t.Error(err)
	}
	if _, err := l.restored(t.Context(), o); !errors.Is(err, fault.ErrExists) {
		t.Errorf("again: %v", err)
	}
}

// settingsOf are a VM's settings of one class.
func (l *restoreLab) settingsOf(name, class string) []object {
	l.t.Helper()
	d := l.driver()
	at, err := d.find(l.t.Context(), name)
	var now settings
	if err == nil {
		now, err = d.present(l.t.Context(), at.sys)
	}
	var list []object
	if err == nil {
		list, err = d.query(l.t.Context(), associated(now.ref, classComponent, class))
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return list
}

// No copy keeps the address of the original's network card, whoever chose it,
// unless that was asked for; and a host that does not let go of it is told of.
func TestImportNewAddress(t *testing.T) {
	l := newRestoreLab(t)
	card := l.settingsOf("web01", classNIC)[0]
	had := card.text("Address")
	if none(had) {
		t.Fatal("the original has no address")
	}
	address := func() string { return l.settingsOf("web02", classNIC)[0].text("Address") }
	for _, c := range []struct {
		name         string
		static, keep bool
		refuse       bool
		warnings     int
	}{
		{name: "chosen by the host"},
		{name: "chosen by the host, which keeps it", refuse: true, warnings: 1},
		{name: "static", static: true},
		{name: "static, and to be kept", static: true, keep: true},
		{name: "chosen by the host, and to be kept", keep: true},
	} {
		err := l.driver().modifyResource(t.Context(), wsman.NewInstance(classNIC).Set("InstanceID", wsman.Of(card.text("InstanceID"))).Set("StaticMacAddress", wsman.Of(c.static)))
		if err != nil {
			t.Fatal(err)
		}
		o := l.imported("web02")
		o.ConnectNICs, o.KeepMACs = true, c.keep
		l.host.SetTrouble(func(x *host.Trouble) { x.KeepAddresses = c.refuse })
		done, err := l.restored(t.Context(), o)
		l.host.SetTrouble(func(x *host.Trouble) { x.KeepAddresses = false })
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if stays := strings.EqualFold(address(), had); done.How != "import" || stays != (c.keep || c.refuse) || len(done.Warnings) != c.warnings {
			t.Errorf("%s: address %s, the original's is %s; %+v", c.name, address(), had, done)
		}
		if c.warnings > 0 && !strings.Contains(done.Warnings[0], "still has the address "+macText(had)) {
			t.Errorf("%s: %q", c.name, done.Warnings)
		}
		if static := l.settingsOf("web02", classNIC)[0].truth("StaticMacAddress"); static != c.keep {
			t.Errorf("%s: static: %t", c.name, static)
		}
		l.takeAway("web02")
	}
}

// A disk of the host that the original has for itself stays its own: the new VM
// is made without it. So does its way to disks by Fibre Channel.
func TestImportLeavesPassThrough(t *testing.T) {
	l := newRestoreLab(t)
	if _, err := l.host.AddVM(host.Spec{Name: "db01", Off: true, Disks: []host.DiskSpec{{Bytes: 4 << 20}}, PassThrough: 1, Fibre: true}); err != nil {
		t.Fatal(err)
	}
	done, err := l.restored(t.Context(), l.ownDefinition("db01", "db02"))
	if err != nil {
		t.Fatal(err)
	}
	if now := l.drivesOf("db02"); done.How != "import" || len(now) != 1 || len(done.Warnings) != 2 || !strings.Contains(done.Warnings[0], "scsi0:1 is not in the restore point") ||
		!strings.Contains(done.Warnings[1], "Fibre Channel adapter is left out") || len(l.settingsOf("db02", classFibre)) != 0 {
		t.Errorf("%+v, disks %v", done, now)
	}
	if now := l.drivesOf("db01"); len(now) != 2 || len(l.settingsOf("db01", classFibre)) != 1 {
		t.Errorf("the original has %v", now)
	}
}

// What size a disk's sectors have is in the description, or the guest would not
// find its partitions on the restored one.
func TestDefinitionKnowsSectors(t *testing.T) {
	l := newRestoreLab(t)
	if _, err := l.host.AddVM(host.Spec{Name: "db01", Off: true, Disks: []host.DiskSpec{{Bytes: 4 << 20}, {Bytes: 4 << 20, SectorBytes: 4096}}}); err != nil {
		t.Fatal(err)
	}
	disks := l.ownDefinition("db01", "db02").Definition.Disks
	if len(disks) != 2 || disks[0].SectorBytes != 0 || disks[1].SectorBytes != 4096 {
		t.Errorf("%+v", disks)
	}
}

// A definition that the host does not take makes way for ours, and leaves
// nothing.
func TestImportRefused(t *testing.T) {
	l := newRestoreLab(t)
	for name, spoil := range map[string]func(*NewVMOptions){
		"damaged": func(o *NewVMOptions) {
			for name, data := range o.Files {
				o.Files[name] = data[:len(data)/2]
			}
		},
		"refused": func(*NewVMOptions) {
			l.host.SetTrouble(func(x *host.Trouble) { x.FailJob = map[string]string{"RealizePlannedSystem": "no"} })
		},
		"of other disks": func(o *NewVMOptions) { o.Disks = append(o.Disks, "scsi3:3") },
	} {
		o := l.imported("web02")
		spoil(&o)
		done, err := l.restored(t.Context(), o)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if done.How != "definition" || len(done.Warnings) != 1 || !strings.Contains(done.Warnings[0], "does not take the VM's own definition") {
			t.Errorf("%s: %+v", name, done)
		}
		if list, err := l.driver().planned(t.Context()); err != nil || len(list) > 0 || strings.Contains(l.picture(), "import-") {
			t.Errorf("%s: planned %v, %v\n%s", name, list, err, l.picture())
		}
		l.takeAway("web02")
	}
}

// However far an import gets, nothing of it stays.
func TestImportUndone(t *testing.T) {
	l := newRestoreLab(t)
	o := l.imported("web02")
	everyRequest(t, l, func(ctx context.Context) error {
		_, err := l.restored(ctx, o)
		return err
	}, func() { l.takeAway("web02") })
}

// A host that was told to make a VM of what was imported may do so at any moment,
// also between two looks of who takes it back.
func TestRealizedWhileItIsTakenBack(t *testing.T) {
	l := newRestoreLab(t)
	o := l.imported("web02")
	before := l.picture()
	realized := 0
	l.arm(0, false, nil)
	l.word = "RealizePlannedSystem"
	l.then = func() {
		l.word = "SELECT * FROM " + classPlanned
		l.trip = func() {
			d := newDriver(l.wmi, simFiles{l.host}, Options{Host: &url.URL{Scheme: "hyperv", Host: "hv01"}, StateDir: l.state})
			list, err := d.planned(t.Context())
			if err != nil {
				t.Error(err)
			}
			for _, s := range list {
				if _, err := d.manage(t.Context(), "RealizePlannedSystem", wsman.Arg("PlannedSystem", wsman.Of(s.ref))); err != nil {
					t.Error(err)
				}
				realized++
			}
		}
	}
	if _, err := l.restored(t.Context(), o); err == nil {
		t.Fatal("it was restored without an answer")
	}
	if realized != 1 {
		t.Fatalf("%d realized", realized)
	}
	if after := l.picture(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// replaced gives web01 other disks as a restore over the original does.
func (l *restoreLab) replaced(ctx context.Context, o ReplaceOptions) (hypervisor.Built, error) {
	b, err := l.driver().Replace(ctx, o)
	if err != nil {
		return hypervisor.Built{}, err
	}
	return finish(ctx, b, o.Disks)
}

// drivesOf are a VM's disks and the files that they are in.
func (l *restoreLab) drivesOf(name string) map[vm.DiskID]string {
	l.t.Helper()
	machines, err := l.driver().Machines(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	out := map[vm.DiskID]string{}
	for _, m := range machines {
		for _, d := range m.Disks {
			if m.Name == name {
				out[d.ID] = d.Source
			}
		}
	}
	return out
}

// A VM gets its disks back; those that it had stay beside, under a name that
// says so, or go if that was asked for. What was not restored stays.
func TestReplace(t *testing.T) {
	l := newRestoreLab(t)
	first := l.drivesOf("web01")
	o := ReplaceOptions{VM: "web01", RepoID: ourRepo, Disks: []vm.DiskID{"scsi0:1"}, Start: true}
	done, err := l.replaced(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	now := l.drivesOf("web01")
	if !done.Running || len(done.Warnings) > 0 || len(done.Kept) != 1 || !strings.Contains(done.Kept[0].Path, "-before-") || !strings.Contains(now["scsi0:1"], "-restored-") {
		t.Errorf("%+v, %v", done, now)
	}
	if now["scsi0:0"] != first["scsi0:0"] {
		t.Errorf("the other disk is in %s", now["scsi0:0"])
	}
	l.wantContent(now["scsi0:1"], content(0))
	if _, err := os.Stat(l.host.Local(done.Kept[0].Path)); err != nil {
		t.Error(err)
	}
	if _, err := l.replaced(t.Context(), o); !errors.Is(err, ErrRunning) {
		t.Errorf("a VM that runs: %v", err)
	}
	o.PowerOff, o.RemoveOld, o.Start = true, true, false
	o.Disks = []vm.DiskID{"scsi0:0", "scsi0:1"}
	if done, err = l.replaced(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if done.Running || len(done.Kept) != 2 || done.Kept[1].Path != "" {
		t.Errorf("%+v", done)
	}
	for _, old := range []string{first["scsi0:0"], now["scsi0:1"]} {
		if _, err := os.Stat(l.host.Local(old)); err == nil {
			t.Errorf("%s is still there", old)
		}
	}
	l.wantContent(l.drivesOf("web01")["scsi0:1"], content(1))
	o.Disks = []vm.DiskID{"scsi0:7"}
	if _, err := l.replaced(t.Context(), o); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("a disk that the VM has not: %v", err)
	}
}

// Disks of another VM are given to one that is named for it, and cost it nothing
// of its own.
func TestReplaceByAnother(t *testing.T) {
	l := newRestoreLab(t)
	o := ReplaceOptions{VM: "web01", RepoID: ourRepo, Disks: []vm.DiskID{"scsi0:0"}, Of: "00000000-1111-2222-3333-444444444444", RemoveOld: true}
	if _, err := l.replaced(t.Context(), o); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("removing its own: %v", err)
	}
	o.RemoveOld = false
	done, err := l.replaced(t.Context(), o)
	if err != nil || len(done.Warnings) != 1 || !strings.Contains(done.Warnings[0], "another VM") {
		t.Errorf("%+v, %v", done, err)
	}
}

// A swap that does not succeed with all disks is undone: the VM has its own
// again, and runs if it ran.
func TestReplaceUndone(t *testing.T) {
	l := newRestoreLab(t)
	// Only what comes before the point of no return is undone; afterwards the
	// VM has its restored disks, and nobody takes them away.
	everyRequest(t, l, func(ctx context.Context) error {
		b, err := l.driver().Replace(ctx, ReplaceOptions{VM: "web01", RepoID: ourRepo, Disks: []vm.DiskID{"scsi0:0", "scsi0:1"}})
		if err != nil {
			return err
		}
		err = writeDisks(ctx, b, "scsi0:0", "scsi0:1")
		if err == nil {
			err = b.commit(ctx)
		}
		if err == nil {
			err = errors.New("the last step fails")
		}
		if e := b.Abort(ctx); e != nil {
			return e
		}
		if strings.Contains(err.Error(), "the last step fails") {
			return nil
		}
		return err
	}, func() {})
}

// killedReplace swaps both disks of web01 and dies before it has said so; it
// gives what had got that far.
func (l *restoreLab) killedReplace() *Building {
	l.t.Helper()
	b, err := l.driver().Replace(l.t.Context(), ReplaceOptions{VM: "web01", RepoID: ourRepo, Disks: []vm.DiskID{"scsi0:0", "scsi0:1"}})
	if err != nil {
		l.t.Fatal(err)
	}
	if err := writeDisks(l.t.Context(), b, "scsi0:0", "scsi0:1"); err != nil {
		l.t.Fatal(err)
	}
	if err := b.commit(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
	b.run.Close()
	b.lock.Unlock()
	return b
}

// After kill -9 between two swaps the next run to the host puts the disks back.
func TestReplaceKilled(t *testing.T) {
	l := newRestoreLab(t)
	before := l.drivesOf("web01")
	l.killedReplace()
	s, err := l.driver().Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo, Consistency: vm.Crash})
	if err != nil {
		t.Fatal(err)
	}
	if w := strings.Join(s.Warnings(), "\n"); !strings.Contains(w, "took away what it had made") {
		t.Errorf("%q", w)
	}
	if err := s.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := l.drivesOf("web01")
	if !maps.Equal(before, after) || strings.Contains(l.picture(), "-restored-") {
		t.Errorf("before %v, after %v\n%s", before, after, l.picture())
	}
}

// After kill -9 somebody may use the VM with the disks that it has by then. What
// it wrote since is nowhere else: nothing is swapped back, nothing removed.
func TestReplaceKilledAndUsed(t *testing.T) {
	power := func(l *restoreLab, s system, states ...int64) {
		for _, state := range states {
			if err := l.driver().setState(t.Context(), s, state); err != nil {
				t.Fatal(err)
			}
		}
	}
	for what, use := range map[string]func(*restoreLab, system){
		"it runs": func(l *restoreLab, s system) { power(l, s, stateRunning) },
		"it ran":  func(l *restoreLab, s system) { power(l, s, stateRunning, stateOff) },
		"a checkpoint was taken": func(l *restoreLab, s system) {
			if _, err := l.driver().do(t.Context(), familyMsvm, service(classSnapshots), "CreateSnapshot", wsman.Arg("AffectedSystem", wsman.Of(s.ref)),
				wsman.Arg("SnapshotSettings", wsman.Of("")), wsman.Arg("SnapshotType", wsman.Of(uint16(2)))); err != nil {
				t.Fatal(err)
			}
		},
	} {
		l := newRestoreLab(t)
		b := l.killedReplace()
		host, list, err := l.driver().systems(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		use(l, list[0])
		before, restored := l.drivesOf("web01"), b.names
		for n := range 2 { // said once
			said := l.driver().reapRestores(t.Context(), host, list, "")
			if n == 0 && (len(said) != 1 || !strings.Contains(said[0], "nothing of it is taken back")) || n == 1 && len(said) > 0 {
				t.Errorf("%s: %q", what, said)
			}
		}
		if after := l.drivesOf("web01"); !maps.Equal(before, after) {
			t.Errorf("%s: before %v, after %v", what, before, after)
		}
		for _, file := range restored {
			if _, err := os.Stat(l.host.Local(file)); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

// A VM with checkpoints keeps its disks: they are what the checkpoints are of.
func TestReplaceWithCheckpoints(t *testing.T) {
	l := newRestoreLab(t)
	s, err := l.driver().Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo, Consistency: vm.Crash})
	if err != nil {
		t.Fatal(err)
	}
	o := ReplaceOptions{VM: "web01", RepoID: ourRepo, Disks: []vm.DiskID{"scsi0:0"}}
	if _, err := l.replaced(t.Context(), o); !errors.Is(err, fault.ErrLocked) {
		t.Errorf("while it is backed up: %v", err)
	}
	kill(s)
	if _, err := l.replaced(t.Context(), o); !errors.Is(err, ErrCheckpoints) {
		t.Errorf("%v", err)
	}
}
