// Package drivertest holds the conformance suite that every driver passes.
package drivertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A Subject is a driver with one VM that the suite may write to. The VM has a
// disk of at least 4 MiB and is not backed up by anybody else.
type Subject struct {
	Driver hypervisor.Driver
	Name   string
	Disk   vm.DiskID

	// Write writes as the guest does: before a snapshot, and, unless Still is
	// set, while one is held. Nil where nobody but the guest itself can: what it
	// writes of its own is then all that the suite has to look at.
	Write func(off int64, data []byte)
	Still bool

	// Tracks says that the driver has change tracking, LoseTracking makes the
	// hypervisor lose it; nil where that can't be done.
	Tracks       bool
	LoseTracking func()
}

const (
	repoID  = "00112233445566778899aabbccddeeff"
	another = "ffeeddccbbaa99887766554433221100"
	mib     = 1 << 20
)

// Run runs the suite; create makes a Subject for each part of it and cleans up
// with t.
func Run(t *testing.T, create func(t *testing.T) Subject) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, *harness)
	}{
		{"machines", machines},
		{"a VM that does not exist", noSuchVM},
		{"a first backup is full and reads what is there", firstBackup},
		{"a snapshot stands still", standsStill},
		{"reads at the end of a disk", endOfDisk},
		{"a second session is refused", secondSession},
		{"changed is never too little", incremental},
		{"abort keeps the older change id", abortKeeps},
		{"a lost checkpoint is never an incremental", trackingLost},
		{"two repositories do not disturb each other", twoRepositories},
		{"an unknown change id is never believed", unknownChangeID},
		{"an excluded disk is named", excluded},
		{"a cancelled begin leaves nothing", cancelledBegin},
		{"abort works when the run is over", abortAfterCancel},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			c.run(t, &harness{T: t, Subject: create(t)})
		})
	}
}

type harness struct {
	*testing.T
	Subject
	prev map[vm.DiskID]hypervisor.PreviousDisk
}

func (h *harness) write(off int64, data []byte) {
	if h.Write != nil {
		h.Write(off, data)
	}
}

func (h *harness) begin(repo string) hypervisor.Session {
	h.Helper()
	s, err := h.Driver.Begin(h.Context(), h.Name, hypervisor.Options{RepoID: repo, Consistency: vm.Crash, Previous: h.prev})
	if err != nil {
		h.Fatalf("begin: %v", err)
	}
	if s.Machine().Name != h.Name {
		h.Errorf("the machine of session is %q", s.Machine().Name)
	}
	if s.Taken().IsZero() || s.Grade() == "" {
		h.Errorf("taken %v with grade %q", s.Taken(), s.Grade())
	}
	return s
}

func (h *harness) disk(s hypervisor.Session) hypervisor.Disk {
	h.Helper()
	for _, d := range s.Disks() {
		if d.Info().ID == h.Disk {
			return d
		}
	}
	h.Fatalf("session has no disk %s", h.Disk)
	return nil
}

// read reads the whole disk, holes included.
func (h *harness) read(d hypervisor.Disk) []byte {
	h.Helper()
	p := make([]byte, d.Info().SizeBytes)
	for off := 0; off < len(p); off += mib {
		part := p[off:min(off+mib, len(p))]
		if n, err := d.ReadAt(part, int64(off)); n != len(part) || err != nil && !errors.Is(err, io.EOF) {
			h.Fatalf("read at %d: %d, %v", off, n, err)
		}
	}
	return p
}

func (h *harness) commit(s hypervisor.Session) {
	h.Helper()
	if err := s.Commit(h.Context()); err != nil {
		h.Fatalf("commit: %v", err)
	}
	h.prev = map[vm.DiskID]hypervisor.PreviousDisk{}
	for _, d := range s.Disks() {
		h.prev[d.Info().ID] = hypervisor.PreviousDisk{SizeBytes: d.Info().SizeBytes, ChangeID: d.ChangeID()}
	}
}

func (h *harness) abort(s hypervisor.Session) {
	h.Helper()
	if err := s.Abort(h.Context()); err != nil {
		h.Fatalf("abort: %v", err)
	}
}

// backUp reads the disk whole in a session that is committed.
func (h *harness) backUp(repo string) []byte {
	h.Helper()
	s := h.begin(repo)
	p := h.read(h.disk(s))
	h.commit(s)
	return p
}

func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = seed + byte(i*31) | 1
	}
	return p
}

func whole(d hypervisor.Disk) extent.Extent { return extent.Extent{Len: d.Info().SizeBytes} }

// wantMode checks a mode, which is incremental exactly if reason is empty.
func (h *harness) wantMode(d hypervisor.Disk, modes ...point.Mode) {
	h.Helper()
	mode, reason := d.Mode()
	if !slices.Contains(modes, mode) {
		h.Errorf("mode %s (%s), want one of %s", mode, reason, modes)
	}
	if (reason == "") != (mode == point.Incremental) {
		h.Errorf("mode %s with reason %q", mode, reason)
	}
}

func machines(t *testing.T, h *harness) {
	list, err := h.Driver.Machines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list {
		if m.Name != h.Name {
			continue
		}
		if m.Hypervisor == "" {
			t.Error("it does not say on which hypervisor")
		}
		if !slices.ContainsFunc(m.Disks, func(d vm.Disk) bool { return d.ID == h.Disk }) {
			t.Errorf("VM %s is listed without disk %s: %+v", h.Name, h.Disk, m.Disks)
		}
		return
	}
	t.Errorf("VM %s is not listed", h.Name)
}

func noSuchVM(t *testing.T, h *harness) {
	_, err := h.Driver.Begin(t.Context(), h.Name+"-which-is-not-there", hypervisor.Options{RepoID: repoID, Consistency: vm.Crash})
	if !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("%v, want fault.ErrNotFound", err)
	}
}

func firstBackup(t *testing.T, h *harness) {
	h.write(mib, pattern(1, mib))
	s := h.begin(repoID)
	d := h.disk(s)
	h.wantMode(d, point.Full)
	if h.Tracks != (d.ChangeID() != "") {
		t.Errorf("tracks is %v, and the change id is %q", h.Tracks, d.ChangeID())
	}
	p := h.read(d)
	if h.Write != nil && !bytes.Equal(p[mib:2*mib], pattern(1, mib)) {
		t.Error("what was written is not read")
	}
	data, err := d.Data(t.Context(), whole(d))
	if err != nil {
		t.Fatal(err)
	}
	for _, gap := range extent.NewSet(whole(d)).Subtract(data).List() {
		for off := gap.Off; off < gap.End(); off++ {
			if p[off] != 0 {
				t.Fatalf("byte %d is %d, and Data leaves it out", off, p[off])
			}
		}
	}
	part := extent.Extent{Off: mib + 4096, Len: 8192}
	if some, err := d.Data(t.Context(), part); err != nil || h.Write != nil && !some.Contains(part) {
		t.Errorf("data within %v: %v, %v", part, some.List(), err)
	}
	h.commit(s)
}

func standsStill(t *testing.T, h *harness) {
	if h.Still {
		t.Skip("its source must not be written to while it is read")
	}
	if h.Write == nil {
		t.Skip("nobody here can write as the guest does")
	}
	h.write(0, pattern(1, mib))
	s := h.begin(repoID)
	h.write(0, pattern(2, mib))
	if p := h.read(h.disk(s)); !bytes.Equal(p[:mib], pattern(1, mib)) {
		t.Error("a write after the snapshot is seen in it")
	}
	h.abort(s)
	s = h.begin(repoID)
	if p := h.read(h.disk(s)); !bytes.Equal(p[:mib], pattern(2, mib)) {
		t.Error("a write during a session was lost")
	}
	h.abort(s)
}

func endOfDisk(t *testing.T, h *harness) {
	s := h.begin(repoID)
	defer h.abort(s)
	d := h.disk(s)
	size := d.Info().SizeBytes
	p := make([]byte, 1000)
	if n, err := d.ReadAt(p, size-1000); n != 1000 || err != nil && err != io.EOF {
		t.Errorf("the last bytes: %d, %v", n, err)
	}
	if n, err := d.ReadAt(p, size-400); n != 400 || err == nil {
		t.Errorf("across the end: %d, %v; want 400 and an error", n, err)
	}
}

func secondSession(t *testing.T, h *harness) {
	s := h.begin(repoID)
	if _, err := h.Driver.Begin(t.Context(), h.Name, hypervisor.Options{RepoID: repoID, Consistency: vm.Crash}); !errors.Is(err, fault.ErrLocked) {
		t.Errorf("second session: %v, want fault.ErrLocked", err)
	}
	h.read(h.disk(s)) // the first goes on
	h.abort(s)
	h.abort(h.begin(repoID))
}

// mustApply checks that what Changed names, put over the previous bytes, makes
// the present ones, and gives those.
func (h *harness) mustApply(d hypervisor.Disk, before []byte) []byte {
	h.Helper()
	h.wantMode(d, point.Incremental)
	changed, err := d.Changed(h.Context(), whole(d))
	if err != nil {
		h.Fatalf("changed: %v", err)
	}
	now := h.read(d)
	patched := make([]byte, len(now))
	copy(patched, before)
	for _, e := range changed.List() {
		copy(patched[e.Off:e.End()], now[e.Off:e.End()])
	}
	if !bytes.Equal(patched, now) {
		h.Error("bytes changed that Changed does not name")
	}
	half := extent.Extent{Off: d.Info().SizeBytes / 4, Len: d.Info().SizeBytes / 2}
	if part, err := d.Changed(h.Context(), half); err != nil || part.Bytes() < changed.Within(half).Bytes() {
		h.Errorf("asked for a part, changed names %d bytes of %d, %v", part.Bytes(), changed.Within(half).Bytes(), err)
	}
	return now
}

func incremental(t *testing.T, h *harness) {
	if !h.Tracks {
		h.backUp(repoID)
		s := h.begin(repoID)
		defer h.abort(s)
		h.wantMode(h.disk(s), point.Compared)
		if _, err := h.disk(s).Changed(t.Context(), whole(h.disk(s))); !errors.Is(err, hypervisor.ErrTrackingLost) {
			t.Errorf("changed without tracking: %v", err)
		}
		return
	}
	h.write(0, pattern(1, 2*mib))
	before := h.backUp(repoID)
	for i := range 3 {
		h.write(int64(i)*mib+12345, pattern(byte(i+7), 70000))
		s := h.begin(repoID)
		before = h.mustApply(h.disk(s), before)
		h.commit(s)
	}
	s := h.begin(repoID)
	h.mustApply(h.disk(s), before)
	h.abort(s)
}

func abortKeeps(t *testing.T, h *harness) {
	if !h.Tracks {
		t.Skip("it has no change tracking")
	}
	before := h.backUp(repoID)
	h.write(mib, pattern(3, 100000))
	s := h.begin(repoID)
	if h.disk(s).ChangeID() == h.prev[h.Disk].ChangeID {
		t.Error("the change id is that of the previous session")
	}
	h.abort(s)
	h.write(2*mib, pattern(4, 100000))
	s = h.begin(repoID)
	h.mustApply(h.disk(s), before) // both writes
	h.commit(s)
}

func trackingLost(t *testing.T, h *harness) {
	if !h.Tracks || h.LoseTracking == nil {
		t.Skip("there is no tracking to lose")
	}
	h.backUp(repoID)
	h.LoseTracking()
	h.write(0, pattern(5, 100000))
	s := h.begin(repoID)
	h.wantMode(h.disk(s), point.Full, point.Compared)
	if _, err := h.disk(s).Changed(t.Context(), whole(h.disk(s))); !errors.Is(err, hypervisor.ErrTrackingLost) {
		t.Errorf("changed: %v, want ErrTrackingLost", err)
	}
	before := h.read(h.disk(s))
	h.commit(s)
	h.write(mib, pattern(6, 100000))
	s = h.begin(repoID) // and it recovers
	h.mustApply(h.disk(s), before)
	h.commit(s)
}

func twoRepositories(t *testing.T, h *harness) {
	if !h.Tracks {
		t.Skip("it has no change tracking")
	}
	before := h.backUp(repoID)
	mine := h.prev
	h.write(0, pattern(1, 100000))
	h.prev = nil
	h.backUp(another)
	theirs := h.prev
	h.write(mib, pattern(2, 100000))
	h.backUp(another)
	h.prev = mine
	s := h.begin(repoID)
	h.mustApply(h.disk(s), before) // both writes, whatever the other did
	h.abort(s)
	h.prev = theirs // of the other repository: its checkpoints are not ours
	s = h.begin(repoID)
	h.wantMode(h.disk(s), point.Full, point.Compared)
	h.abort(s)
}

func unknownChangeID(t *testing.T, h *harness) {
	size := int64(0)
	s := h.begin(repoID)
	size = h.disk(s).Info().SizeBytes
	h.commit(s)
	for _, id := range []string{"", "nonsense", h.prev[h.Disk].ChangeID + "x", `{"v":99}`} {
		h.prev = map[vm.DiskID]hypervisor.PreviousDisk{h.Disk: {SizeBytes: size, ChangeID: id}}
		s := h.begin(repoID)
		h.wantMode(h.disk(s), point.Full, point.Compared)
		h.abort(s)
	}
}

func excluded(t *testing.T, h *harness) {
	s, err := h.Driver.Begin(t.Context(), h.Name, hypervisor.Options{RepoID: repoID, Consistency: vm.Crash, Exclude: []vm.DiskID{h.Disk}})
	if err != nil {
		t.Logf("a VM whose disks are all excluded is refused: %v", err)
		return
	}
	defer h.abort(s)
	for _, d := range s.Disks() {
		if d.Info().ID == h.Disk {
			t.Error("an excluded disk is among those to read")
		}
	}
	for _, d := range s.Machine().Disks {
		if d.ID == h.Disk {
			if d.Excluded == "" {
				t.Error("an excluded disk is not marked in the machine")
			}
			return
		}
	}
	t.Error("an excluded disk is missing from the machine")
}

func cancelledBegin(t *testing.T, h *harness) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := h.Driver.Begin(ctx, h.Name, hypervisor.Options{RepoID: repoID, Consistency: vm.Crash}); err == nil {
		t.Error("began although the context is cancelled")
		h.abort(s)
	}
	h.abort(h.begin(repoID))
}

func abortAfterCancel(t *testing.T, h *harness) {
	ctx, cancel := context.WithCancel(t.Context())
	s, err := h.Driver.Begin(ctx, h.Name, hypervisor.Options{RepoID: repoID, Consistency: vm.Crash})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := s.Abort(ctx); err != nil {
		t.Errorf("abort with a cancelled context: %v", err)
	}
	h.abort(h.begin(repoID))
}

// Repositories are the ids of those that the suite backs up for, so that its
// caller can clean up after them.
func Repositories() []string { return []string{repoID, another} }
