package repo

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

// pour copies all objects of one store into another, where there is none of that
// name.
func pour(t *testing.T, from, into *mem.Store) {
	t.Helper()
	for _, name := range names(t, from, "") {
		b, err := blobtest.Read(bg, from, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := create(bg, into, name, b); err != nil && !errors.Is(err, fault.ErrExists) {
			t.Fatal(err)
		}
	}
}

// Two repositories with one passphrase were copied into one directory. What
// belongs to the one whose repo.json it is works, the other's objects are named
// as what they are, and nothing of either is deleted.
func TestTwoRepositoriesInOnePath(t *testing.T) {
	st, r := newRepo(t)
	a, b := disks()
	p := mustBackup(t, r, "web01", a, nil, nil)
	other, or := newRepo(t)
	q := mustBackup(t, or, "web01", b, nil, nil)
	pour(t, other, st)
	r = mustOpen(t, st)
	points, err := r.Points(bg)
	if len(points) != 1 || points[0].ID != p.ID {
		t.Errorf("points %v", points)
	}
	unread := UnreadRecords(err)
	if len(unread) != 1 || !strings.Contains(err.Error(), "of another repository") || !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	mustRead(t, r, p, a)
	if _, err := r.Vacuum(bg, VacuumOptions{}); err == nil || !strings.Contains(err.Error(), unread[0].Name) {
		t.Errorf("vacuum: %v", err)
	}
	mustRead(t, mustOpen(t, st), mustBackup(t, mustOpen(t, st), "web01", b, p, a), b)
	rep, err := r.Check(bg, CheckOptions{ReadData: true})
	if err != nil || len(rep.Findings) == 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	for _, f := range rep.Findings {
		if !strings.Contains(f.Err.Error(), "of another repository") && !strings.Contains(f.Err.Error(), "belongs to repository") {
			t.Errorf("%s: %v", f.Object, f.Err)
		}
	}
	// Taken apart again, both are what they were.
	back := mem.New()
	pour(t, other, back)
	mustRead(t, mustOpen(t, back), q, b)
}

// Two replicas that both went on, and were put together, are one repository.
func TestTwoReplicasInOnePath(t *testing.T) {
	st, r := newRepo(t)
	a, b := disks()
	p := mustBackup(t, r, "web01", a, nil, nil)
	there := st.Clone()
	c := noise(91, 7*testChunk)
	h := &history{}
	h.add(p, a)
	h.add(mustBackup(t, mustOpen(t, there), "web01", b, p, a), b)
	h.add(mustBackup(t, r, "db01", c, nil, nil), c)
	pour(t, there, st)
	mustBeWhole(t, st, h, h.points...)
	finish(t, st)
	mustBeWhole(t, st, h, h.points...)
}

// A manifest that names a chunk that is in no pack: what else is on the disk is
// read, the rest is named with the point, the disk and the place, and the next
// backup that has the chunk makes it whole.
func TestAManifestNamesAChunkThatIsNowhere(t *testing.T) {
	st, r := newRepo(t)
	a, _ := disks()
	p := mustBackup(t, r, "web01", a, nil, nil)
	keep := mustBackup(t, r, "db01", noise(8, 3*testChunk), nil, nil)
	for _, name := range names(t, st, packPrefix) {
		b, err := blobtest.Read(bg, st, name)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 6*testChunk { // the pack of web01, and everything that knows of it
			if err := st.Delete(bg, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, prefix := range []string{indexPrefix, runPrefix} {
		for _, name := range names(t, st, prefix) {
			if err := st.Delete(bg, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	r = mustOpen(t, st)
	if _, err := read(r, p); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "in no pack") {
		t.Errorf("%v", err)
	}
	mustRead(t, r, keep, noise(8, 3*testChunk))
	rep, err := r.Check(bg, CheckOptions{})
	if err != nil || len(rep.Findings) == 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	hit := false
	for _, f := range rep.Findings {
		for _, h := range f.Hits {
			hit = hit || h.VM == "web01" && h.Point == p.ID && h.Disk == "vda" && h.Range.Len > 0
			if h.VM == "db01" {
				t.Errorf("%s: hits %+v", f.Object, h)
			}
		}
	}
	if !hit {
		t.Errorf("%+v", rep.Findings)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Errorf("vacuum: %v", err)
	}
	mustBackup(t, mustOpen(t, st), "web01", a, nil, nil)
	mustRead(t, mustOpen(t, st), p, a)
	mustCheck(t, mustOpen(t, st), CheckOptions{ReadData: true})
}

// A pack under another name than its own is found by what is in it, until a
// scrub says that its name is wrong; nothing is lost.
func TestAPackWithAnotherName(t *testing.T) {
	st, r := newRepo(t)
	a, b := disks()
	p := mustBackup(t, r, "web01", a, nil, nil)
	all := names(t, st, packPrefix)
	body, err := blobtest.Read(bg, st, all[0])
	if err != nil {
		t.Fatal(err)
	}
	wrong := packName([32]byte{1, 2, 3})
	if err := put(bg, st, wrong, body); err != nil {
		t.Fatal(err)
	}
	if err := st.Delete(bg, all[0]); err != nil {
		t.Fatal(err)
	}
	mustRead(t, mustOpen(t, st), p, a)
	rep, err := mustOpen(t, st).Check(bg, CheckOptions{Scrub: true})
	if err != nil {
		t.Fatal(err)
	}
	named := false
	for _, f := range append(rep.Findings, rep.Unneeded...) {
		named = named || f.Object == wrong && strings.Contains(f.Err.Error(), "does not match its name")
	}
	if !named {
		t.Errorf("%+v, %+v", rep.Findings, rep.Unneeded)
	}
	mustRead(t, mustOpen(t, st), p, a)
	q := mustBackup(t, mustOpen(t, st), "web01", b, p, a)
	if _, err := mustOpen(t, st).Repair(bg, RepairOptions{}); err != nil {
		t.Errorf("repair: %v", err)
	}
	for range 2 {
		if _, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{}); err != nil {
			t.Errorf("vacuum: %v", err)
		}
	}
	mustRead(t, mustOpen(t, st), p, a)
	mustRead(t, mustOpen(t, st), q, b)
	mustCheck(t, mustOpen(t, st), CheckOptions{ReadData: true})
}

// A session of a machine that is gone holds up nobody: backups go on, a vacuum
// waits for its sign of life as long as it was told to, and then it is over.
func TestASessionOfAMachineThatIsGone(t *testing.T) {
	st, r := newRepo(t)
	a, b := disks()
	p := mustBackup(t, r, "web01", a, nil, nil)
	id, _, err := newID()
	if err != nil {
		t.Fatal(err)
	}
	o, err := object.Encode(sessionObject{
		Format: formatVersion, Session: id, Process: &process{Host: hex.EncodeToString(make([]byte, 8)), PID: 1, Start: 5},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := create(bg, st, sessionName(id, 0), o); err != nil {
		t.Fatal(err)
	}
	if err := r.beat(bg, id, 77); err != nil {
		t.Fatal(err)
	}
	q := mustBackup(t, r, "web01", b, p, a)
	if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
		t.Fatal(err)
	}
	rep, err := r.Vacuum(bg, VacuumOptions{Patience: 50 * time.Millisecond})
	if err != nil || rep.Revoked != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if out, err := r.outcomeOf(bg, id); err != nil || out.State != revoked {
		t.Errorf("%+v, %v", out, err)
	}
	finish(t, st)
	if left := append(names(t, st, sessionPrefix), names(t, st, beatPrefix)...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	mustRead(t, mustOpen(t, st), q, b)
}
