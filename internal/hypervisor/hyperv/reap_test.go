package hyperv

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/wsman"
)

// entries counts what the journal has of the VM, by kind.
func entries(t *testing.T, d *Driver) map[string]int {
	t.Helper()
	j, err := d.openJournal()
	if err != nil {
		t.Fatal(err)
	}
	runs, err := j.Runs(vmGUID)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, r := range runs {
		for _, e := range r.Open() {
			out[e.Kind]++
		}
	}
	return out
}

func wantEntries(t *testing.T, d *Driver, checkpoints, references int) {
	t.Helper()
	if got := entries(t, d); got[kindCheckpoint] != checkpoints || got[kindReference] != references {
		t.Errorf("the journal has %v, want %d checkpoints and %d reference points", got, checkpoints, references)
	}
}

func warnings(s hypervisor.Session) string { return strings.Join(s.Warnings(), "\n") }

// A host that was named by its name and is now by its address is the same one.
func TestReapUnderAnotherName(t *testing.T) {
	h := newFakeHost(t)
	state := imagetest.MemoryDir(t)
	prev := mustCommit(t, mustBegin(t, h.driver(state, Options{}), hypervisor.Options{}))
	kill(mustBegin(t, h.driver(state, Options{}), hypervisor.Options{Previous: prev}))
	wantLeft(t, h, 1, 1)
	d := h.driver(state, Options{})
	d.host = &url.URL{Scheme: "hyperv", Host: "192.0.2.7"}
	s := mustBegin(t, d, hypervisor.Options{Previous: prev})
	if !strings.Contains(warnings(s), "destroyed checkpoint") {
		t.Errorf("warnings %q", warnings(s))
	}
	if mode, reason := s.Disks()[0].Mode(); mode != point.Incremental {
		t.Errorf("%s, %s", mode, reason)
	}
	mustCommit(t, s)
	wantLeft(t, h, 0, 1)
	wantEntries(t, d, 0, 1)
}

// Two hosts may have a VM of one GUID: one is the other's replica, or it moved
// there. What is not on the one is not struck off for the other.
func TestReapOnAnotherHost(t *testing.T) {
	for name, moved := range map[string]bool{"a replica": false, "moved with its checkpoint": true} {
		t.Run(name, func(t *testing.T) {
			old, now := newFakeHost(t), newFakeHost(t)
			now.node = "HV02"
			state := imagetest.MemoryDir(t)
			there := now.driver(state, Options{})
			there.host = &url.URL{Scheme: "hyperv", Host: "hv02"}
			here := old.driver(state, Options{})
			prev := mustCommit(t, mustBegin(t, here, hypervisor.Options{}))
			kill(mustBegin(t, here, hypervisor.Options{Previous: prev}))
			if moved {
				now.snapshots, old.snapshots = old.snapshots, nil
				now.references, old.references = old.references, nil
			}
			s := mustBegin(t, there, hypervisor.Options{RepoID: otherRepo})
			mustAbort(t, s)
			if moved {
				wantLeft(t, now, 0, 2) // another repository's was converted
				wantEntries(t, there, 0, 2)
				return
			}
			wantLeft(t, old, 1, 1)
			wantEntries(t, here, 1, 1)
			if err := there.ResetTracking(t.Context(), "web01", ourRepo); err != nil {
				t.Error(err)
			}
			wantEntries(t, here, 1, 1)
			mustCommit(t, mustBegin(t, here, hypervisor.Options{Previous: prev}))
			wantLeft(t, old, 0, 1)
			wantEntries(t, here, 0, 1)
		})
	}
}

// A VM that is not on the host any more may be on another: what is in the
// journal of it stays, and is told once.
func TestReapOfAVMThatWentAway(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	kill(mustBegin(t, d, hypervisor.Options{}))
	h.twins, h.gone = 1, true
	other := "4c5b8d2a-1111-2222-3333-000000000000"
	for again := range 2 {
		s, err := d.Begin(t.Context(), other, hypervisor.Options{RepoID: otherRepo})
		if err != nil {
			t.Fatal(err)
		}
		if told := strings.Contains(warnings(s), "is not on this host any more"); told != (again == 0) {
			t.Errorf("run %d: %q", again, warnings(s))
		}
		mustAbort(t, s)
		wantEntries(t, d, 1, 0)
	}
	h.twins, h.gone = 0, false
	mustAbort(t, mustBegin(t, d, hypervisor.Options{}))
	wantLeft(t, h, 0, 0)
	wantEntries(t, d, 0, 0)
}

// A run that died when its job was over, on a host that does not say what jobs
// made: what is new since then may be anybody's, and is named.
func TestReapWithoutRows(t *testing.T) {
	t.Run("a checkpoint", func(t *testing.T) {
		h := newFakeHost(t)
		h.rows = false
		d := h.driver(imagetest.MemoryDir(t), Options{})
		s := mustBegin(t, d, hypervisor.Options{})
		our := s.(*session)
		e := our.entry
		e.Data = maps.Clone(e.Data)
		delete(e.Data, dataID)
		if err := our.run.Note(e); err != nil {
			t.Fatal(err)
		}
		kill(s)
		h.snapshots[0].id, h.snapshots[0].name = "Microsoft:THEIRS", "another product's"
		s = mustBegin(t, d, hypervisor.Options{})
		if !strings.Contains(warnings(s), "left alone: Microsoft:THEIRS") {
			t.Errorf("warnings %q", warnings(s))
		}
		mustAbort(t, s)
		wantLeft(t, h, 1, 0)
	})
	t.Run("a reference point", func(t *testing.T) {
		h := newFakeHost(t)
		h.rows = false
		d := h.driver(imagetest.MemoryDir(t), Options{})
		s := mustBegin(t, d, hypervisor.Options{})
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
		prev := previous(s)
		kill(s)
		s = mustBegin(t, d, hypervisor.Options{Previous: prev})
		if !strings.Contains(warnings(s), "left alone: Microsoft:RP-") {
			t.Errorf("warnings %q", warnings(s))
		}
		if mode, reason := s.Disks()[0].Mode(); mode != point.Full {
			t.Errorf("%s, %s", mode, reason)
		}
		mustAbort(t, s)
		wantLeft(t, h, 0, 1)
		wantEntries(t, d, 0, 0)
	})
}

func TestNeverBegan(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want bool
	}{
		{"nothing went wrong", nil, false},
		{"not reached", &wsman.ConnectionError{Err: errors.New("no route")}, true},
		{"no answer", &wsman.ConnectionError{Sent: true, Err: errors.New("reset")}, false},
		{"not signed in", &wsman.SignInError{}, true},
		{"access denied", &wsman.Fault{Subcode: "AccessDenied"}, true},
		{"WMI denies access", &wsman.Fault{Subcode: "InternalError", WMI: 0x80041003}, true},
		{"a parameter that the class has not", &wsman.Fault{Subcode: "SchemaValidationError"}, true},
		{"no such service", &wsman.Fault{Subcode: "InvalidSelectors"}, true},
		{"an error in the middle", &wsman.Fault{Subcode: "InternalError", WMI: 0x80041001}, false},
		{"a provider that died", &wsman.Fault{Subcode: "InternalError", WMI: 0x8004100a}, false},
		{"the answer was too large", &wsman.Fault{Subcode: "EncodingLimit", Code: 0x80338048}, false},
		{"too slow", &wsman.Fault{Subcode: "TimedOut"}, false},
		{"invalid parameter", &ReturnError{Code: 32773}, true},
		{"busy", &ReturnError{Code: 32775}, true},
		{"failed", &ReturnError{Code: 32768}, false},
		{"failed, of CIM", &ReturnError{Code: 2}, false},
		{"timed out", &ReturnError{Code: 3}, false},
	} {
		if got := neverBegan(c.err); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}

// A host that fails in the middle of CreateSnapshot may make the checkpoint
// later; the next run sees it.
func TestCheckpointAfterAnError(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	h.invoke = func(m string, _ map[string]wsman.Value) (*wsman.Instance, error) {
		if m == "CreateSnapshot" {
			return nil, &wsman.Fault{Subcode: "InternalError", Reason: "the provider died"}
		}
		return nil, nil
	}
	if _, err := d.Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); err == nil || !strings.Contains(err.Error(), "the provider died") {
		t.Errorf("%v", err)
	}
	wantEntries(t, d, 1, 0)
	h.invoke = nil
	h.snapshots = append(h.snapshots, &fakeSnapshot{id: "Microsoft:LATE", kind: typeRecovery, file: "web01.vhdx"})
	s := mustBegin(t, d, hypervisor.Options{})
	if !strings.Contains(warnings(s), "Microsoft:LATE") {
		t.Errorf("warnings %q", warnings(s))
	}
	mustAbort(t, s)
	wantLeft(t, h, 1, 0)
	h.snapshots = nil
	mustAbort(t, mustBegin(t, d, hypervisor.Options{}))
	wantEntries(t, d, 0, 0)
}

// A host whose management restarts has no classes, no VMs and no checkpoints:
// that is no word on what it will have a moment later.
func TestReapWhileTheHostRestarts(t *testing.T) {
	noClass := &wsman.Fault{Subcode: "DestinationUnreachable", WMI: 0x8004100e}
	nothing := fmt.Errorf("%w", fault.ErrNotFound)
	for name, answer := range map[string]error{"no class": noClass, "nothing at all": nothing} {
		t.Run(name, func(t *testing.T) {
			h := newFakeHost(t)
			d := h.driver(imagetest.MemoryDir(t), Options{})
			mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
			s := mustBegin(t, d, hypervisor.Options{})
			h.invoke = func(m string, _ map[string]wsman.Value) (*wsman.Instance, error) { return nil, noClass }
			h.get = func(ref wsman.Ref) (*wsman.Instance, error) { return nil, answer }
			if err := s.(hypervisor.Checker).Check(t.Context()); err == nil || strings.Contains(err.Error(), "somebody deleted its checkpoint") {
				t.Errorf("check: %v", err)
			}
			if err := s.Abort(t.Context()); err == nil {
				t.Error("abort says that the checkpoint is gone")
			}
			wantEntries(t, d, 1, 1)
			if err := d.ResetTracking(t.Context(), "web01", ourRepo); err == nil {
				t.Error("reset says that the reference point is gone")
			}
			wantEntries(t, d, 1, 1)
			h.invoke, h.get = nil, nil
			mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
			wantLeft(t, h, 0, 1)
			wantEntries(t, d, 0, 1)
		})
	}
	h := newFakeHost(t)
	h.query = func(wql string) error {
		if strings.Contains(wql, classReferences) || strings.Contains(wql, classSnapshots) {
			return noClass
		}
		return nil
	}
	if _, err := h.driver(imagetest.MemoryDir(t), Options{}).Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo}); err == nil || errors.Is(err, ErrOnlySavedState) {
		t.Errorf("a host that restarts is taken for an old one: %v", err)
	}
}

// Without the state directory our reference points are nobody's. They are
// named, and destroyed one by one on a person's word.
func TestReferencePointsOfALostJournal(t *testing.T) {
	h := newFakeHost(t)
	h.references = append(h.references, &fakeReference{id: "Microsoft:THEIRS"})
	mustCommit(t, mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{}), hypervisor.Options{}))
	lost := h.references[1].id
	d := h.driver(imagetest.MemoryDir(t), Options{})
	mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	known := h.references[2].id
	if got, err := d.UnknownReferencePoints(t.Context(), "web01"); err != nil || strings.Join(got, " ") != "Microsoft:THEIRS "+lost {
		t.Errorf("%v, %v", got, err)
	}
	if err := d.DestroyReferencePoint(t.Context(), "web01", lost); err != nil {
		t.Error(err)
	}
	if err := d.DestroyReferencePoint(t.Context(), "web01", lost); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("a second time: %v", err)
	}
	if err := d.DestroyReferencePoint(t.Context(), "web01", known); !errors.Is(err, fault.ErrExists) {
		t.Errorf("one in the journal: %v", err)
	}
	wantLeft(t, h, 0, 2)
}

// asRehearsal makes the checkpoint of a session, which is killed, one that an
// interrupted recording left.
func asRehearsal(t *testing.T, s hypervisor.Session, change func(map[string]string)) {
	t.Helper()
	our := s.(*session)
	e := our.entry
	e.Data = maps.Clone(e.Data)
	e.Data[dataRepo] = rehearsal
	change(e.Data)
	if err := our.run.Note(e); err != nil {
		t.Fatal(err)
	}
	kill(s)
}

// What an interrupted recording left goes with the VM's next backup, and
// becomes no reference point that nobody drops.
func TestReapOfARecording(t *testing.T) {
	h := newFakeHost(t)
	d := h.driver(imagetest.MemoryDir(t), Options{})
	asRehearsal(t, mustBegin(t, d, hypervisor.Options{}), func(map[string]string) {})
	s := mustBegin(t, d, hypervisor.Options{})
	wantLeft(t, h, 1, 0)
	mustAbort(t, s)
	wantLeft(t, h, 0, 0)
	wantEntries(t, d, 0, 0)

	// It died while its checkpoint became a reference point.
	s = mustBegin(t, d, hypervisor.Options{})
	asRehearsal(t, s, func(data map[string]string) { data[dataRefBefore] = "" })
	mustAbort(t, mustBegin(t, d, hypervisor.Options{}))
	wantLeft(t, h, 0, 0)
	wantEntries(t, d, 0, 0)
}

// The next recording takes away what is surely a dead one's, and nothing else,
// by whatever name the host is called now.
func TestRecordingAfterADeadOne(t *testing.T) {
	for name, theirs := range map[string]bool{"ours": false, "another product's": true} {
		t.Run(name, func(t *testing.T) {
			h := newFakeHost(t)
			h.rows = false
			d := h.driver(imagetest.MemoryDir(t), Options{})
			asRehearsal(t, mustBegin(t, d, hypervisor.Options{}), func(data map[string]string) {
				if theirs {
					delete(data, dataID)
				}
			})
			if theirs {
				h.snapshots[0].id, h.snapshots[0].name = "Microsoft:THEIRS", "another product's"
			}
			d.host = &url.URL{Scheme: "hyperv", Host: "192.0.2.7"}
			at, err := d.find(t.Context(), "web01")
			if err != nil {
				t.Fatal(err)
			}
			j, err := d.openJournal()
			if err != nil {
				t.Fatal(err)
			}
			err = d.clearRehearsals(t.Context(), j, at.sys, "")
			var unknown *UnknownError
			if errors.As(err, &unknown) != theirs || err != nil && !theirs {
				t.Errorf("%v", err)
			}
			if theirs {
				wantLeft(t, h, 1, 0)
				return
			}
			wantLeft(t, h, 0, 0)
			wantEntries(t, d, 0, 0)
		})
	}
}
