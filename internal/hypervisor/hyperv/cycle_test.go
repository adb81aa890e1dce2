package hyperv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

const (
	ourRepo   = "00112233445566778899aabbccddeeff"
	otherRepo = "ffeeddccbbaa99887766554433221100"
)

func mustBegin(t *testing.T, d *Driver, o hypervisor.Options) hypervisor.Session {
	t.Helper()
	if o.RepoID == "" {
		o.RepoID = ourRepo
	}
	s, err := d.Begin(t.Context(), "web01", o)
	if err != nil {
		t.Fatalf("begin: %v", err)
	}
	return s
}

func previous(s hypervisor.Session) map[vm.DiskID]hypervisor.PreviousDisk {
	out := map[vm.DiskID]hypervisor.PreviousDisk{}
	for _, d := range s.Disks() {
		out[d.Info().ID] = hypervisor.PreviousDisk{SizeBytes: d.Info().SizeBytes, ChangeID: d.ChangeID()}
	}
	return out
}

func mustCommit(t *testing.T, s hypervisor.Session) map[vm.DiskID]hypervisor.PreviousDisk {
	t.Helper()
	if err := s.Commit(t.Context()); err != nil {
		t.Fatalf("commit: %v", err)
	}
	return previous(s)
}

func mustAbort(t *testing.T, s hypervisor.Session) {
	t.Helper()
	if err := s.Abort(t.Context()); err != nil {
		t.Fatalf("abort: %v", err)
	}
}

// kill ends a session as kill -9 does: nothing is undone, and locks are free.
func kill(s hypervisor.Session) {
	our := s.(*session)
	our.watching()
	<-our.watched
	our.beginning.close()
}

func wantLeft(t *testing.T, h *fakeHost, checkpoints, references int) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.snapshots) != checkpoints || len(h.references) != references {
		t.Errorf("the host has %d checkpoints and %d reference points, want %d and %d", len(h.snapshots), len(h.references), checkpoints, references)
	}
}

// failJobs makes the jobs of a method end in an exception.
func failJobs(h *fakeHost, method string, when func(args map[string]wsman.Value) bool) {
	h.invoke = func(m string, args map[string]wsman.Value) (*wsman.Instance, error) {
		if m != method || !when(args) {
			return nil, nil
		}
		return h.begin(1, func() (wsman.Ref, string) { return wsman.Ref{}, "it did not work" }), nil
	}
}

func asksApplication(args map[string]wsman.Value) bool {
	settings, err := wsman.Prop[*wsman.Instance](wsman.NewInstance("").Set("x", args["SnapshotSettings"]), "x")
	if err != nil {
		return false
	}
	level, _ := wsman.Prop[uint8](settings, "ConsistencyLevel")
	return level == levelApplication
}

// What the guest can do and what policy asks make the grade, or an error
// before anything is left on the host.
func TestGrades(t *testing.T) {
	for _, c := range []struct {
		name   string
		policy vm.Consistency
		host   func(*fakeHost)
		grade  vm.Grade
		warns  string
		err    error
	}{
		{"windows", vm.PreferApplication, func(*fakeHost) {}, vm.GradeApplication, "", nil},
		{"windows, required", vm.RequireApplication, func(*fakeHost) {}, vm.GradeApplication, "", nil},
		{"linux", vm.PreferApplication, func(h *fakeHost) { h.osName = "Debian" }, vm.GradeFilesystem, "not Windows", nil},
		{"linux, file systems", vm.Filesystem, func(h *fakeHost) { h.osName = "Debian" }, vm.GradeFilesystem, "", nil},
		{"linux, applications required", vm.RequireApplication, func(h *fakeHost) { h.osName = "Debian" }, "", "", fault.ErrConsistency},
		{"no service", vm.PreferApplication, func(h *fakeHost) { h.vss = nil }, vm.GradeCrash, "switched off", nil},
		{"no contact", vm.Filesystem, func(h *fakeHost) { h.vss = []uint16{12} }, "", "", fault.ErrConsistency},
		{"another version of the service", vm.PreferApplication, func(h *fakeHost) { h.vss = []uint16{3, 32775} }, vm.GradeApplication, "degraded", nil},
		{"crash is enough", vm.Crash, func(h *fakeHost) { h.vss = nil }, vm.GradeCrash, "", nil},
		{"off", vm.PreferApplication, func(h *fakeHost) { h.state = stateOff }, vm.GradeCrash, "shut off", nil},
		{"writers fail", vm.PreferApplication, func(h *fakeHost) { failJobs(h, "CreateSnapshot", asksApplication) }, vm.GradeCrash, "the writers did not answer", nil},
		{"writers fail, required", vm.RequireApplication, func(h *fakeHost) { failJobs(h, "CreateSnapshot", asksApplication) }, "", "", fault.ErrConsistency},
		{"no checkpoint at all", vm.PreferApplication, func(h *fakeHost) {
			failJobs(h, "CreateSnapshot", func(map[string]wsman.Value) bool { return true })
		}, "", "", &JobError{}},
		{"an old host", vm.Crash, func(h *fakeHost) { h.modern = false }, "", "", ErrOnlySavedState},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			h := newFakeHost(t)
			c.host(h)
			d := h.driver(imagetest.MemoryDir(t), Options{})
			s, err := d.Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo, Consistency: c.policy})
			var job *JobError
			if c.err != nil {
				if !errors.Is(err, c.err) && !(errors.As(c.err, &job) && errors.As(err, &job)) {
					t.Errorf("%v, want %v", err, c.err)
				}
				wantLeft(t, h, 0, 0)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			warnings := strings.Join(s.Warnings(), "\n")
			if s.Grade() != c.grade || !strings.Contains(warnings, c.warns) || (c.warns == "") != (warnings == "") {
				t.Errorf("grade %s with %q; want %s with %q", s.Grade(), warnings, c.grade, c.warns)
			}
			mustAbort(t, s)
			wantLeft(t, h, 0, 0)
		})
	}
}

// A job that ends with warnings held the guest less still than it was asked to.
func TestWarningsLowerTheGrade(t *testing.T) {
	h := newFakeHost(t)
	h.get = func(ref wsman.Ref) (*wsman.Instance, error) {
		j := h.jobs[ref.Key("InstanceID")]
		if ref.Class != "Msvm_ConcreteJob" || j == nil || j.ended {
			return nil, nil
		}
		j.ended, j.state, j.errText = true, jobWithWarnings, "a writer is ill"
		j.made, _ = j.end()
		return wsman.NewInstance(ref.Class).Set("JobState", wsman.Of(j.state)).Set("ErrorDescription", wsman.Of(j.errText)), nil
	}
	s := mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{}), hypervisor.Options{})
	if s.Grade() != vm.GradeCrash || !strings.Contains(strings.Join(s.Warnings(), "\n"), "a writer is ill") {
		t.Errorf("grade %s, %q", s.Grade(), s.Warnings())
	}
	mustAbort(t, s)
	wantLeft(t, h, 0, 0)
}

// Where a host has no checkpoints for backups, one with the guest's memory may
// be allowed; nothing tracks changes then.
func TestSavedState(t *testing.T) {
	h := newFakeHost(t)
	h.modern = false
	d := h.driver(imagetest.MemoryDir(t), Options{AllowSavedState: true})
	user := &fakeSnapshot{id: "Microsoft:USER", kind: typeCheckpoint, name: "before the update", file: "web01.vhdx"}
	h.snapshots = append(h.snapshots, user)
	h.write(0, []byte("one"))
	s := mustBegin(t, d, hypervisor.Options{})
	if s.Grade() != vm.GradeSavedState || s.Disks()[0].ChangeID() != "" {
		t.Errorf("grade %s, change id %q", s.Grade(), s.Disks()[0].ChangeID())
	}
	prev := mustCommit(t, s)
	wantLeft(t, h, 1, 0)
	s = mustBegin(t, d, hypervisor.Options{Previous: prev})
	if mode, reason := s.Disks()[0].Mode(); mode != point.Compared {
		t.Errorf("%s, %s", mode, reason)
	}
	mustAbort(t, s)
	if len(h.snapshots) != 1 || h.snapshots[0] != user {
		t.Error("a checkpoint of the user's was touched")
	}
}

// However a run dies, the next one leaves nothing of it on the host, and what
// is not ours stays.
func TestReap(t *testing.T) {
	theirs := &fakeSnapshot{id: "Microsoft:THEIRS", kind: typeRecovery, name: "another product's", file: "web01.vhdx"}
	for _, c := range []struct {
		name       string
		die        func(*testing.T, *fakeHost, hypervisor.Session)
		durable    bool // the restore point was committed
		repo       string
		mode       point.Mode
		warns      string
		references int // when the next run is over
	}{
		{"while it read", func(*testing.T, *fakeHost, hypervisor.Session) {}, false, ourRepo, point.Full, "destroyed checkpoint backstay-00112233-", 1},
		{"after the commit", func(*testing.T, *fakeHost, hypervisor.Session) {}, true, ourRepo, point.Incremental, "into a reference point", 1},
		{"while it converted", func(t *testing.T, h *fakeHost, s hypervisor.Session) {
			ctx, cancel := context.WithCancel(t.Context())
			h.invoke = func(m string, _ map[string]wsman.Value) (*wsman.Instance, error) {
				if m == "ConvertToReferencePoint" {
					cancel()
				}
				return nil, nil
			}
			our := s.(*session)
			if _, err := our.target().convert(ctx, our.entry); !errors.Is(err, context.Canceled) {
				t.Errorf("convert: %v", err)
			}
			h.invoke = nil
		}, true, ourRepo, point.Incremental, "into a reference point", 1},
		{"of another repository", func(*testing.T, *fakeHost, hypervisor.Session) {}, false, otherRepo, point.Full, "into a reference point", 2},
		{"its checkpoint was deleted", func(_ *testing.T, h *fakeHost, _ hypervisor.Session) {
			h.snapshots = h.snapshots[:1]
		}, false, ourRepo, point.Full, "", 1},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			h := newFakeHost(t)
			h.snapshots = append(h.snapshots, theirs)
			d := h.driver(imagetest.MemoryDir(t), Options{})
			h.write(0, []byte("one"))
			s := mustBegin(t, d, hypervisor.Options{RepoID: c.repo})
			c.die(t, h, s)
			kill(s)
			var prev map[vm.DiskID]hypervisor.PreviousDisk
			if c.durable {
				prev = previous(s)
			}
			h.write(10, []byte("two"))
			s = mustBegin(t, d, hypervisor.Options{Previous: prev})
			warnings := strings.Join(s.Warnings(), "\n")
			if !strings.Contains(warnings, c.warns) || (c.warns == "") != (warnings == "") {
				t.Errorf("warnings %q, want %q", warnings, c.warns)
			}
			if mode, reason := s.Disks()[0].Mode(); mode != c.mode {
				t.Errorf("%s (%s), want %s", mode, reason, c.mode)
			}
			mustCommit(t, s)
			wantLeft(t, h, 1, c.references)
			if h.snapshots[0] != theirs {
				t.Error("a checkpoint that is not ours was touched")
			}
		})
	}
}

// A host that does not say what our job made is not guessed at where another
// product may have made it.
func TestUnknownCheckpoint(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	h.invoke = func(m string, _ map[string]wsman.Value) (*wsman.Instance, error) {
		if m != "CreateSnapshot" {
			return nil, nil
		}
		h.snapshots = append(h.snapshots, &fakeSnapshot{id: "Microsoft:WHOSE", kind: typeRecovery, file: "web01.vhdx"})
		return nil, &wsman.ConnectionError{Host: "hv01", Sent: true, Err: errors.New("reset")}
	}
	_, err := d.Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo})
	var unknown *UnknownError
	if !errors.As(err, &unknown) || len(unknown.IDs) != 1 {
		t.Errorf("%v", err)
	}
	wantLeft(t, h, 1, 0)
	h.invoke = nil
	s := mustBegin(t, d, hypervisor.Options{})
	if w := strings.Join(s.Warnings(), "\n"); !strings.Contains(w, "Microsoft:WHOSE") {
		t.Errorf("the next run does not name it: %q", w)
	}
	mustAbort(t, s)
	wantLeft(t, h, 1, 0)
	h.snapshots = nil // somebody deleted it
	s = mustBegin(t, d, hypervisor.Options{})
	if len(s.Warnings()) > 0 {
		t.Errorf("%q", s.Warnings())
	}
	mustAbort(t, s)
}

// A checkpoint that the host says we made, and that somebody deleted, is not
// taken for the one that another product made since.
func TestDeletedWhileAnotherProductMadeOne(t *testing.T) {
	h := newFakeHost(t)
	s := mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{}), hypervisor.Options{})
	our := s.(*session)
	e := our.entry
	e.Data = maps.Clone(e.Data)
	delete(e.Data, dataID) // as a run leaves it that died while the job ran
	h.mu.Lock()
	h.snapshots = []*fakeSnapshot{{id: "Microsoft:THEIRS", kind: typeRecovery, name: "another product's", file: "web01.vhdx"}}
	h.mu.Unlock()
	var unknown *UnknownError
	if got, err := our.target().settle(t.Context(), e); !errors.As(err, &unknown) {
		t.Errorf("found %q, %v", got.id, err)
	}
	mustAbort(t, s)
	wantLeft(t, h, 1, 0)
}

// Without a row of effects the one checkpoint that is new is ours, and the one
// reference point.
func TestNoRowsOfEffects(t *testing.T) {
	h := newFakeHost(t)
	h.rows = false
	d := h.driver(imagetest.MemoryDir(t), Options{})
	h.references = append(h.references, &fakeReference{id: "Microsoft:THEIRS"})
	prev := mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	s := mustBegin(t, d, hypervisor.Options{Previous: prev})
	if mode, reason := s.Disks()[0].Mode(); mode != point.Incremental {
		t.Errorf("%s, %s", mode, reason)
	}
	mustCommit(t, s)
	wantLeft(t, h, 0, 2)
}

// What the host answers of changes is believed only if it can be.
func TestChangedDistrusts(t *testing.T) {
	good := func() *wsman.Instance {
		return done(0).Set("ProcessedByteLength", wsman.Of(uint64(diskSize))).Set("ChangedByteOffsets", wsman.List(uint64(0))).Set("ChangedByteLengths", wsman.List(uint64(65536)))
	}
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	prev := mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	for _, c := range []struct {
		name   string
		answer *wsman.Instance
		err    error
		mode   point.Mode
		reason string
	}{
		{"a good answer", good(), nil, point.Incremental, ""},
		{"nothing changed", done(0).Set("ProcessedByteLength", wsman.Of(uint64(diskSize))), nil, point.Incremental, ""},
		{"arrays of different length", good().Set("ChangedByteLengths", wsman.List(uint64(1), uint64(2))), nil, point.Full, "1 offsets and 2 lengths"},
		{"no progress", good().Set("ProcessedByteLength", wsman.Of(uint64(0))), nil, point.Full, "looked at 0 of"},
		{"no length", done(0), nil, point.Full, "not complete"},
		{"a range behind the disk", good().Set("ChangedByteOffsets", wsman.List(uint64(diskSize))), nil, point.Full, "the host names"},
		{"an empty range", good().Set("ChangedByteLengths", wsman.List(uint64(0))), nil, point.Full, "a range of 0 bytes"},
		{"a range that wraps", good().Set("ChangedByteLengths", wsman.List(uint64(1)<<63-1)).Set("ChangedByteOffsets", wsman.List(uint64(1)<<62)), nil, point.Full, "a range of"},
		{"a number that is none", good().Set("ChangedByteOffsets", wsman.List("x")), nil, point.Full, "not complete"},
		{"a job beside it", good().Set("ReturnValue", wsman.Of(uint32(4096))).Set("Job", wsman.Of(wsman.NewRef("Msvm_StorageJob", "InstanceID", "any"))), nil, point.Full, "with a job instead"},
		{"an unknown id", done(32773), nil, point.Full, "invalid parameter"},
		{"an answer too long for the least window", nil, fmt.Errorf("%w", wsman.ErrEnvelope), point.Full, "envelope"},
	} {
		h.invoke = func(m string, _ map[string]wsman.Value) (*wsman.Instance, error) {
			if m == "GetVirtualDiskChanges" {
				return c.answer, c.err
			}
			return nil, nil
		}
		s := mustBegin(t, d, hypervisor.Options{Previous: prev})
		mode, reason := s.Disks()[0].Mode()
		if mode != c.mode || !strings.Contains(reason, c.reason) {
			t.Errorf("%s: %s, %q; want %s, %q", c.name, mode, reason, c.mode, c.reason)
		}
		mustAbort(t, s)
	}
}

// An answer too long for an envelope is asked for in parts, and so is one that
// the host breaks off; a lost connection costs a question more.
func TestChangedInParts(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	prev := mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	want := extent.NewSet()
	for off := int64(0); off < diskSize; off += 300_000 {
		h.write(off, []byte("x"))
		want.Add(extent.Extent{Off: off, Len: 1})
	}
	asked := 0
	h.invoke = func(m string, args map[string]wsman.Value) (*wsman.Instance, error) {
		if m != "GetVirtualDiskChanges" {
			return nil, nil
		}
		asked++
		in := wsman.NewInstance("")
		for name, v := range args {
			in.Set(name, v)
		}
		n, _ := wsman.Prop[uint64](in, "ByteLength")
		switch {
		case asked == 2:
			return nil, &wsman.ConnectionError{Host: "hv01", Sent: true, Err: errors.New("reset")}
		case n > leastWindow:
			return nil, fmt.Errorf("%w", wsman.ErrEnvelope)
		case asked%2 == 0:
			in.Set("ByteLength", wsman.Of(n/2)) // the host does less than asked
			return h.changes(in), nil
		}
		return nil, nil
	}
	s := mustBegin(t, d, hypervisor.Options{Previous: prev})
	defer mustAbort(t, s)
	got, err := s.Disks()[0].Changed(t.Context(), extent.Extent{Len: diskSize})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got.List()) != fmt.Sprint(want.List()) {
		t.Errorf("changed %v, want %v", got.List(), want.List())
	}
}

// A host that is out of reach for a moment goes on with its job.
func TestFailedPollsAreTolerated(t *testing.T) {
	h := newFakeHost(t)
	polls := 0
	h.get = func(ref wsman.Ref) (*wsman.Instance, error) {
		if polls++; ref.Class == "Msvm_ConcreteJob" && polls%2 == 1 {
			return nil, &wsman.ConnectionError{Host: "hv01", Err: errors.New("no route")}
		}
		return nil, nil
	}
	d := h.driver(imagetest.MemoryDir(t), Options{})
	d.patience = time.Minute
	mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	wantLeft(t, h, 0, 1)
}

// A job that is cancelled while it goes on is waited for and undone.
func TestCancelWhileTheJobRuns(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	ctx, cancel := context.WithCancel(t.Context())
	h.get = func(ref wsman.Ref) (*wsman.Instance, error) {
		if ref.Class == "Msvm_ConcreteJob" {
			cancel()
		}
		return nil, nil
	}
	if _, err := d.Begin(ctx, "web01", hypervisor.Options{RepoID: ourRepo}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	wantLeft(t, h, 0, 0)
	if j, err := journal.Open(filepath.Join(d.stateDir, "hyperv", "journal")); err != nil {
		t.Error(err)
	} else if left, err := j.Machines(); err != nil || len(left) > 0 {
		t.Errorf("the journal has %v, %v", left, err)
	}
}

// A host that goes on being busy with the VM is a lock that others hold.
func TestBusyHost(t *testing.T) {
	h := newFakeHost(t)
	h.invoke = func(m string, _ map[string]wsman.Value) (*wsman.Instance, error) {
		if m == "CreateSnapshot" {
			return done(32775), nil
		}
		return nil, nil
	}
	if _, err := h.driver(imagetest.MemoryDir(t), Options{}).Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); !errors.Is(err, fault.ErrLocked) {
		t.Errorf("%v", err)
	}
}

// The guest pays nothing for a slow backup but what --max-delta allows, and the
// host keeps room.
func TestWatchEndsTheReading(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*fakeHost)
		want   error
	}{
		"the delta grows": {func(h *fakeHost) { h.delta = 2 << 20 }, ErrDelta},
		"the host fills":  {func(h *fakeHost) { h.free = 1 << 30 }, ErrHostSpace},
	} {
		h := newFakeHost(t)
		s := mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{}), hypervisor.Options{ScratchLimit: 1 << 20})
		d := s.Disks()[0]
		if _, err := d.ReadAt(make([]byte, 10), 0); err != nil {
			t.Fatal(err)
		}
		h.mu.Lock()
		c.change(h)
		h.mu.Unlock()
		var err error
		for until := time.Now().Add(time.Minute); err == nil && time.Now().Before(until); time.Sleep(time.Millisecond) {
			_, err = d.ReadAt(make([]byte, 10), 0)
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.(hypervisor.Checker).Check(t.Context()); !errors.Is(err, c.want) {
			t.Errorf("%s: check: %v", name, err)
		}
		mustAbort(t, s)
		wantLeft(t, h, 0, 0)
	}
	h := newFakeHost(t)
	h.free = 1 << 30
	if _, err := h.driver(imagetest.MemoryDir(t), Options{}).Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); !errors.Is(err, ErrHostSpace) {
		t.Errorf("begin on a full host: %v", err)
	}
	wantLeft(t, h, 0, 0)
}

// What was read is one moment only as long as the checkpoint is there.
func TestCheck(t *testing.T) {
	h := newFakeHost(t)
	s := mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{}), hypervisor.Options{})
	check := s.(hypervisor.Checker)
	if err := check.Check(t.Context()); err != nil {
		t.Error(err)
	}
	h.snapshots = nil
	if err := check.Check(t.Context()); !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), "somebody deleted its checkpoint") {
		t.Errorf("%v", err)
	}
	h.gone = true
	if err := check.Check(t.Context()); !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), "was deleted, or moved") {
		t.Errorf("%v", err)
	}
	mustAbort(t, s)
}

func TestNamesThatSeveralHave(t *testing.T) {
	h := newFakeHost(t)
	h.twins = 1
	d := h.driver(imagetest.MemoryDir(t), Options{})
	var several *AmbiguousError
	if _, err := d.Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); !errors.As(err, &several) || len(several.GUIDs) != 2 {
		t.Errorf("%v", err)
	}
	for _, name := range []string{vmGUID, "{" + strings.ToUpper(vmGUID) + "}"} {
		s, err := d.Begin(t.Context(), name, hypervisor.Options{RepoID: ourRepo})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if m := s.Machine(); m.UUID != vmGUID || m.Name != "web01" || m.Host != "HV01" {
			t.Errorf("%s: %+v", name, m)
		}
		mustAbort(t, s)
	}
}

func TestResetTracking(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	h.references = append(h.references, &fakeReference{id: "Microsoft:THEIRS"})
	prev := mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	mustCommit(t, mustBegin(t, d, hypervisor.Options{RepoID: otherRepo}))
	wantLeft(t, h, 0, 3)
	if err := d.ResetTracking(t.Context(), "web01", ourRepo); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, h, 0, 2) // another product's, and another repository's
	s := mustBegin(t, d, hypervisor.Options{Previous: prev})
	if mode, reason := s.Disks()[0].Mode(); mode != point.Full || !strings.Contains(reason, "is known here") {
		t.Errorf("%s, %s", mode, reason)
	}
	mustAbort(t, s)
	if err := d.ResetTracking(t.Context(), "nobody", ourRepo); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// A checkpoint that the host will not convert is kept for the next run to try
// again; the older reference point stays until then.
func TestConvertFails(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	failJobs(h, "ConvertToReferencePoint", func(map[string]wsman.Value) bool { return true })
	s := mustBegin(t, d, hypervisor.Options{})
	if err := s.Commit(t.Context()); err == nil {
		t.Fatal("commit says that all is well")
	}
	wantLeft(t, h, 1, 1)
	h.invoke = nil
	next := mustBegin(t, d, hypervisor.Options{Previous: previous(s)})
	if mode, reason := next.Disks()[0].Mode(); mode != point.Incremental {
		t.Errorf("%s, %s", mode, reason)
	}
	mustCommit(t, next)
	wantLeft(t, h, 0, 1)
}

// The name of a parent comes from a file that may be anybody's.
func TestParents(t *testing.T) {
	const child = `C:\VMs\web01\a.avhdx`
	for name, want := range map[string]string{
		`.\base.vhdx`: `C:\VMs\web01\base.vhdx`, `..\gold\base.vhdx`: `C:\VMs\gold\base.vhdx`, `\\?\C:\gold\base.vhdx`: `C:\gold\base.vhdx`,
		`D:\x.vhdx`: `D:\x.vhdx`, `\\fs\gold\x.vhdx`: `\\fs\gold\x.vhdx`,
		`..\..\..\x.vhdx`: "", `\x.vhdx`: "", `C:x.vhdx`: "", `.\x.vhdx:stream`: "", `\\.\PhysicalDrive0`: "", `.\NUL`: "",
		``: "", `.\CON.vhdx`: "", `json:{}`: "", "base.vhdx\x00": "", `/etc/passwd`: "", `\\?\GLOBALROOT\Device\x`: "",
	} {
		got, err := from(child, name)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	h := newFakeHost(t)
	r := parents{ctx: t.Context(), fs: fakeFiles{h}, shares: map[string]bool{"D$": true}, child: child}
	if _, err := r.Resolve(`.\web01.vhdx`); err == nil || !strings.Contains(err.Error(), "where the VM has no disk") {
		t.Errorf("a share that the VM has no disk in: %v", err)
	}
}

// vm.json is enough to make such a VM elsewhere.
func TestDefinition(t *testing.T) {
	h := newFakeHost(t)
	s := mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{}), hypervisor.Options{})
	defer mustAbort(t, s)
	files := s.Config()
	if len(files) != 1 || files[0].Name != "vm.json" {
		t.Fatalf("%+v", files)
	}
	for _, want := range []string{`"processors": 4`, `"memory_bytes": 2147483648`, `"memory_max_bytes": 8589934592`, `"guest": "windows"`, `"firmware": "uefi"`, `"secure_boot": true`, `"bus": "scsi"`, `"id": "scsi0:0"`} {
		if !bytes.Contains(files[0].Data, []byte(want)) {
			t.Errorf("no %s in %s", want, files[0].Data)
		}
	}
}
