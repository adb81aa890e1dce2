package repo

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

func quarantineByHand(t *testing.T, st blob.Store, pack [32]byte, records ...uint32) {
	t.Helper()
	b, err := object.Encode(quarantineNote{formatVersion, []quarantinePack{{hex.EncodeToString(pack[:]), records}}})
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := newID()
	if err == nil {
		err = create(bg, st, quarantinePrefix+id, b)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestQuarantineVectors(t *testing.T) {
	note := quarantineNote{formatVersion, []quarantinePack{
		{hex.EncodeToString(vectors.Fill(0x10, 32)), []uint32{64, 524380}},
		{hex.EncodeToString(vectors.Fill(0x20, 32)), []uint32{}},
	}}
	b, err := object.Encode(note)
	if err != nil {
		t.Fatal(err)
	}
	v := struct{ Name, File string }{"quarantine/01jd9x0000000000000000000000", string(b)}
	vectors.Load(t, "quarantine", &v)
	if v.File != string(b) {
		t.Errorf("written %s", b)
	}
	got, err := decodeQuarantine(v.Name, []byte(v.File))
	if err != nil || len(got.Packs) != 2 || got.Packs[0].Records[1] != 524380 || len(got.Packs[1].Records) != 0 {
		t.Errorf("read %+v, %v", got, err)
	}
}

// A record of testChunk incompressible bytes takes this much of a pack.
const fullRecord = testChunk + 92

// flipIn flips a bit of record i of a pack whose records are all full.
func flipIn(t *testing.T, st *mem.Store, pack string, i int) {
	t.Helper()
	if err := st.Damage(pack, func(b []byte) []byte { b[64+i*fullRecord+1000] ^= 1; return b }); err != nil {
		t.Fatal(err)
	}
}

// largest is the pack with the most bytes.
func largest(t *testing.T, st *mem.Store) (name string) {
	t.Helper()
	var most int64
	for o, err := range st.List(bg, packPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		if o.Bytes > most {
			name, most = o.Name, o.Bytes
		}
	}
	return name
}

// From a flipped bit to a repository that is green and clean again: a check
// finds it, the next backup stores the chunk again, vacuum takes the pack.
func TestQuarantineHeals(t *testing.T) {
	for _, keyless := range []bool{false, true} {
		st, r := newRepo(t)
		content := noise(1, 4*testChunk)
		p := mustBackup(t, r, "web01", content, nil, nil)
		pack := largest(t, st)
		flipIn(t, st, pack, 2)
		o := CheckOptions{ReadData: true}
		r = mustOpen(t, st)
		if keyless {
			var err error
			if r, err = OpenKeyless(bg, st); err != nil {
				t.Fatal(err)
			}
			o = CheckOptions{Scrub: true}
		}
		for range 2 { // the second finds nothing new to note
			rep, err := r.Check(bg, o)
			if err != nil || len(rep.Findings) != 1 || len(rep.Findings[0].Hits) != 1 || rep.Unnoted != nil {
				t.Fatalf("%+v, %v", rep, err)
			}
			if n := count(t, st, quarantinePrefix); n != 1 {
				t.Fatalf("%d notes", n)
			}
		}

		// A check that reads nothing remembers it.
		rep, err := mustOpen(t, st).Check(bg, CheckOptions{})
		if err != nil || len(rep.Findings) != 1 || rep.Findings[0].Hits[0].Range != (extent.Extent{Off: 2 * testChunk, Len: testChunk}) {
			t.Fatalf("%+v, %v", rep, err)
		}

		// A vacuum moves nothing that it can't move whole.
		if v, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{}); err != nil || v.DeletedPacks+v.RewrittenPacks > 0 || count(t, st, quarantinePrefix) != 1 {
			t.Fatalf("vacuum before it is healed: %+v, %v", v, err)
		}

		// The next backup, which builds on the point and is told that nothing
		// changed, learns what to read again.
		r = mustOpen(t, st)
		s, err := r.Begin(bg, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Disk(bg, int64(len(content)), p.Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		lost, err := w.Doubtful(bg, extent.Extent{Off: testChunk, Len: 2*testChunk - 5})
		if err != nil || len(lost.List()) != 1 || lost.List()[0] != (extent.Extent{Off: 2 * testChunk, Len: testChunk - 5}) {
			t.Fatalf("%v, %v", lost, err)
		}
		if put, err := w.Put(bg, 2, cut(content, 2)); err != nil || put.Kind != New {
			t.Fatalf("%+v, %v", put, err)
		}
		m, err := w.Finish(bg)
		if err != nil || m != p.Disks[0].Manifest {
			t.Fatalf("%s, %v", m, err)
		}
		q := newPoint("web01", m, int64(len(content)))
		q.Config = p.Config
		if err := s.Commit(bg, q); err != nil {
			t.Fatal(err)
		}

		// All is whole, and what is damaged is needed no more.
		r = mustOpen(t, st)
		mustRead(t, r, p, content)
		mustRead(t, r, q, content)
		rep, err = r.Check(bg, CheckOptions{ReadData: true})
		if err != nil || len(rep.Findings) != 0 || len(rep.Unneeded) != 1 || rep.Unneeded[0].Object != pack {
			t.Fatalf("%+v, %v", rep, err)
		}
		if rep, err = r.Check(bg, CheckOptions{}); err != nil || len(rep.Findings) != 0 {
			t.Fatalf("%+v, %v", rep, err)
		}
		if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.RewrittenPacks != 1 {
			t.Fatalf("%+v, %v", v, err)
		}
		if n := count(t, st, quarantinePrefix); n != 0 {
			t.Errorf("%d notes are left", n)
		}
		if _, err := st.Size(bg, pack); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("the damaged pack: %v", err)
		}
		r = mustOpen(t, st)
		rep, err = r.Check(bg, CheckOptions{ReadData: true})
		if err != nil || len(rep.Findings)+len(rep.Unneeded) != 0 {
			t.Errorf("%+v, %v", rep, err)
		}
		mustRead(t, r, p, content)
	}
}

// The order in which indexes are read does not bring a damaged record back:
// also where the index that names the good one is gone.
func TestQuarantineOutranksTheIndex(t *testing.T) {
	st, r := newRepo(t)
	content := noise(1, 3*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	flipIn(t, st, largest(t, st), 1)
	if _, err := r.Check(bg, CheckOptions{Scrub: true}); err != nil {
		t.Fatal(err)
	}
	// In the process that found it, too.
	q := mustBackup(t, r, "web02", content, nil, nil)
	mustRead(t, r, p, content)
	names, _ := blobtest.Names(bg, st, indexPrefix)
	for gone := range 1 << len(names) {
		some := st.Clone()
		for i, name := range names {
			if gone&(1<<i) != 0 {
				some.Delete(bg, name)
			}
		}
		r := mustOpen(t, some)
		mustRead(t, r, p, content)
		mustRead(t, r, q, content)
	}
}

// What was damaged and is needed by nobody any more goes with the next vacuum.
func TestDamageOfADeletedPoint(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "web01", noise(1, 4*testChunk), nil, nil)
	keep := noise(2, 4*testChunk)
	q := mustBackup(t, r, "web02", keep, nil, nil)
	names, _ := blobtest.Names(bg, st, packPrefix)
	for _, name := range names {
		other := st.Clone()
		flipIn(t, other, name, 1)
		rep, err := mustOpen(t, other).Check(bg, CheckOptions{ReadData: true})
		if err != nil || len(rep.Findings) != 1 {
			t.Fatalf("%+v, %v", rep, err)
		}
		if rep.Findings[0].Hits[0].VM != p.VM {
			continue
		}
		r := mustOpen(t, other)
		if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
			t.Fatal(err)
		}
		if rep, err = r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 0 || len(rep.Unneeded) != 1 {
			t.Errorf("%+v, %v", rep, err)
		}
		if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.DeletedPacks == 0 || count(t, other, quarantinePrefix) != 0 {
			t.Errorf("%+v, %v", v, err)
		}
		mustRead(t, mustOpen(t, other), q, keep)
		return
	}
	t.Error("no pack was web01's")
}

// While a chunk is in no pack at all, nobody knows what a damaged one holds.
func TestDamagedPacksStayWhileChunksAreMissing(t *testing.T) {
	st, r := newRepo(t)
	content := noise(1, 4*testChunk)
	mustBackup(t, r, "web01", content, nil, nil)
	pack := largest(t, st)
	idx, _ := blobtest.Names(bg, st, indexPrefix)
	for _, name := range idx {
		st.Delete(bg, name)
	}
	// Half of it is overwritten, and the trailer is lost.
	if err := st.Damage(pack, func(b []byte) []byte {
		clear(b[64+fullRecord/2 : 64+fullRecord+fullRecord/2])
		return b[:len(b)-10]
	}); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, st)
	if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) == 0 || len(rep.Unneeded) != 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.DeletedPacks+v.RewrittenPacks > 0 {
		t.Errorf("%+v, %v", v, err)
	}
	if _, err := st.Size(bg, pack); err != nil {
		t.Error(err)
	}
}

// A pack that somebody brought back from a copy is trusted again.
func TestQuarantineIsTakenBack(t *testing.T) {
	st, r := newRepo(t)
	content := noise(1, 3*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	pack := largest(t, st)
	flipIn(t, st, pack, 1)
	if _, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || count(t, st, quarantinePrefix) != 1 {
		t.Fatal(err)
	}
	flipIn(t, st, pack, 1)
	r = mustOpen(t, st)
	if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 0 || count(t, st, quarantinePrefix) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	r = mustOpen(t, st)
	mustRead(t, r, p, content)
	mustBackup(t, r, "web02", content, nil, nil)
	if size, err := st.Size(bg, largest(t, st)); err != nil || count(t, st, packPrefix) != 2 || size < 3*testChunk {
		t.Errorf("%d packs", count(t, st, packPrefix))
	}
}

// However far the check, the backup and the vacuum got that heal a repository,
// doing all three again heals it.
func TestHealingSurvivesCrash(t *testing.T) {
	base := mem.New()
	mustInit(t, base)
	a, b := disks()
	p := mustBackup(t, mustOpen(t, base), "web01", a, nil, nil)
	flipIn(t, base, largest(t, base), 5)
	heal := func(st blob.Store) error {
		r, err := Open(bg, st, testKey)
		if err != nil {
			return err
		}
		defer r.Close()
		rep, err := r.Check(bg, CheckOptions{ReadData: true})
		if err == nil {
			err = rep.Unnoted
		}
		if err != nil {
			return err
		}
		if _, err := backup(bg, r, "web02", b, nil, nil); err != nil {
			return err
		}
		if _, err := backup(bg, r, "web03", a, nil, nil); err != nil {
			return err
		}
		_, err = r.Vacuum(bg, VacuumOptions{})
		return err
	}
	for n := 0; ; n += stride() {
		disk := base.Clone()
		err := heal(crashAfter(n, disk))
		if err := heal(disk); err != nil {
			t.Fatalf("crash after %d: %v", n, err)
		}
		r := mustOpen(t, disk)
		if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings)+len(rep.Unneeded) != 0 {
			t.Fatalf("crash after %d: %+v, %v", n, rep, err)
		}
		mustRead(t, r, p, a)
		if err == nil {
			return // it needed only n writes
		}
		if n > 200 {
			t.Fatal("it never ends")
		}
	}
}

// A damaged record of a restore point stands in nobody's way for ever: it is
// given up by its name, and all else goes on.
func TestADamagedRecordIsGivenUp(t *testing.T) {
	for _, what := range []string{pointPrefix, outcomePrefix} {
		st, r := newRepo(t)
		a := noise(1, 2*testChunk)
		p := mustBackup(t, r, "web01", a, nil, nil)
		sessions, _ := blobtest.Names(bg, st, what)
		mustBackup(t, r, "web02", noise(2, 2*testChunk), nil, nil)
		all, _ := blobtest.Names(bg, st, what)
		victim := all[0]
		if victim == sessions[0] {
			victim = all[1]
		}
		if err := st.Damage(victim, func(d []byte) []byte { d[40] ^= 1; return d }); err != nil {
			t.Fatal(err)
		}
		r = mustOpen(t, st)
		_, err := r.Points(bg)
		unread := UnreadRecords(err)
		if len(unread) != 1 || !IsRecordName(unread[0].Name) {
			t.Fatalf("%v", err)
		}
		in, err := r.Info(bg)
		if in.Points != 1 || in.Unreadable != 1 || in.Packs != 2 || in.Chunks == 0 || in.Passphrases != 1 || !errors.Is(err, fault.ErrCorrupt) {
			t.Errorf("info %+v, %v", in, err)
		}
		name := unread[0].Name
		good, _ := blobtest.Names(bg, st, pointPrefix)
		for _, g := range good {
			if g != pointPrefix+name {
				if err := r.DeleteRecord(bg, g); err == nil {
					t.Error("a good record was deleted as if it were damaged")
				}
			}
		}
		if err := r.DeleteRecord(bg, "01jd9x00000000000000000000-000000"); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("no such record: %v", err)
		}
		if err := r.DeleteRecord(bg, pointPrefix+name); err != nil {
			t.Fatal(err)
		}
		r = mustOpen(t, st)
		if points, err := r.Points(bg); err != nil || len(points) != 1 {
			t.Errorf("%d points, %v", len(points), err)
		}
		if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.DeletedPacks != 1 {
			t.Errorf("%+v, %v", v, err)
		}
		r = mustOpen(t, st)
		if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 0 {
			t.Errorf("%+v, %v", rep, err)
		}
		mustRead(t, r, p, a)
	}
}

// The delete list of a vacuum that died is lost: backups go on, and the next
// vacuum settles it.
func TestADamagedOutcomeOfAVacuum(t *testing.T) {
	st, h, _ := garbageRepo(t)
	var name string
	crash := blobtest.Faulty(st, func(c blobtest.Call) error {
		if c.Op == blobtest.OpDelete && strings.HasPrefix(c.Name, packPrefix) || name != "" {
			return errors.New("power cut")
		}
		return nil
	})
	if _, err := mustOpen(t, crash).Vacuum(bg, VacuumOptions{}); err == nil {
		t.Fatal("the crash did not happen")
	}
	everyoneDies()
	vs, _ := blobtest.Names(bg, st, vacuumPrefix)
	if len(vs) != 1 {
		t.Fatal(vs)
	}
	name = outcomePrefix + vs[0][len(vacuumPrefix):]
	if err := st.Damage(name, func(d []byte) []byte { d[20] ^= 1; return d }); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, st)
	if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 1 || rep.Findings[0].Object != name || len(rep.Findings[0].Hits) > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	a := noise(9, 20*testChunk) // what the vacuum was deleting
	p := mustBackup(t, r, "web02", a, nil, nil)
	h.add(p, a)
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	mustBeWhole(t, st, h, h.points...)
	if n := count(t, st, vacuumPrefix); n != 0 {
		t.Errorf("%d vacuums are left", n)
	}
}

// While nobody can know what a vacuum deletes, no backup begins; the next vacuum
// ends that.
func TestADamagedEpoch(t *testing.T) {
	st, h, _ := garbageRepo(t)
	if _, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := st.Damage(epochName(1), func(d []byte) []byte { d[20] ^= 1; return d }); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, st)
	if _, err := r.Begin(bg, SessionOptions{}); !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), epochName(1)) {
		t.Errorf("a session in an epoch that nobody knows: %v", err)
	}
	if n := count(t, st, sessionPrefix); n != 0 {
		t.Errorf("%d session objects are left", n)
	}
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	a := noise(9, 20*testChunk)
	h.add(mustBackup(t, mustOpen(t, st), "web02", a, nil, nil), a)
	mustBeWhole(t, st, h, h.points...)
}

// However far a vacuum got that replaces damaged packs, every point stays
// whole, and a backup right after it builds on nothing that is damaged or goes.
func TestReplacingDamagedPacksSurvivesCrash(t *testing.T) {
	st := mem.New()
	mustInit(t, st)
	r := mustOpen(t, st)
	a, b := disks()
	h := &history{}
	h.add(mustBackup(t, r, "web01", a, nil, nil), a)
	h.add(mustBackup(t, r, "web02", b, nil, nil), b)
	flipIn(t, st, largest(t, st), 5)
	if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 1 {
		t.Fatalf("%+v, %v", rep, err)
	}
	h.add(mustBackup(t, r, "web03", a, nil, nil), a)
	for _, locks := range []bool{true, false} {
		for n := 0; ; n += stride() {
			disk := st.Clone()
			var view blob.Store = disk
			if !locks {
				view = noLocks{disk}
			}
			r, err := OpenKeyless(bg, crashAfter(n, view))
			if err != nil {
				t.Fatal(err)
			}
			v, err := r.Vacuum(bg, VacuumOptions{})
			mustBeWhole(t, view, h, h.points...)
			next := mustBackup(t, mustOpen(t, view), "web04", b, nil, nil)
			h.content[next.ID] = b
			finish(t, view)
			mustBeWhole(t, view, h, append(h.points[:len(h.points):len(h.points)], next)...)
			if left := count(t, disk, quarantinePrefix); left != 0 {
				t.Errorf("crash after %d: %d notes are left", n, left)
			}
			if err == nil {
				if v.RewrittenPacks != 1 {
					t.Errorf("%+v", v)
				}
				break // it needed only n writes
			}
			if n > 100 {
				t.Fatal("it never ends")
			}
		}
	}
}
