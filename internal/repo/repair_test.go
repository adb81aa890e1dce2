package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/parity"
)

// wreckedRepo is a repository with two points, and its largest pack.
func wreckedRepo(t *testing.T) (*mem.Store, *history, string) {
	st, r := newRepo(t)
	h := &history{}
	a := noise(1, 41*testChunk)
	b := bytes.Clone(a)
	copy(b[7*testChunk:], noise(2, 3*testChunk))
	p := mustBackup(t, r, "web01", a, nil, nil)
	h.add(p, a)
	h.add(mustBackup(t, r, "web01", b, p, a), b)
	return st, h, largest(t, st)
}

func mustRepair(t *testing.T, st blob.Store, keyless bool, o RepairOptions) RepairReport {
	t.Helper()
	r, err := OpenKeyless(bg, st)
	if !keyless {
		r, err = Open(bg, st, testKey)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	rep, err := r.Repair(bg, o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// mustBeClean wants nothing to be damaged after a vacuum.
func mustBeClean(t *testing.T, st blob.Store, h *history) {
	t.Helper()
	r := mustBeWhole(t, st, h, h.points...)
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
	r = mustBeWhole(t, st, h, h.points...)
	rep := mustCheck(t, r, CheckOptions{Scrub: true})
	if len(rep.Unneeded) > 0 || rep.Parity.Lacking > 0 {
		t.Fatalf("%+v", rep)
	}
}

// Whatever a disk does to a pack, as long as it is what parity is for: runs,
// sectors of zeros, bits here and there, a lost end. With keys and without.
func TestRepairHealsPacks(t *testing.T) {
	base, h, pack := wreckedRepo(t)
	size, _ := base.Size(bg, pack)
	run := parity.HealsRun(size)
	row := (run + 4095) / 2
	const records = 41 * fullRecord // behind the header; what comes after them is no loss
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, c := range []struct {
		name string
		hurt func(b []byte) []byte
	}{
		{"one bit", func(b []byte) []byte { b[64+rng.Int64N(records)] ^= 1 << rng.IntN(8); return b }},
		{"a run of noise", func(b []byte) []byte { copy(b[rng.Int64N(size-run+1):], noise(seed, run)); return b }},
		{"a run of zeros over the header", func(b []byte) []byte { clear(b[:run]); return b }},
		{"a lost end", func(b []byte) []byte { return b[:64+records-1-rng.Int64N(run-(size-64-records))] }},
		{"two sectors of each column", func(b []byte) []byte {
			for c := int64(0); c < row; c += 4096 {
				for range 2 {
					if at := rng.Int64N(64)*row + c; at < size {
						clear(b[at:min(at+4096, size)])
					}
				}
			}
			return b
		}},
		{"entries and footer", func(b []byte) []byte { clear(b[size-1000:]); return b }},
	} {
		for _, keyless := range []bool{true, false} {
			st := base.Clone()
			if err := st.Damage(pack, c.hurt); err != nil {
				t.Fatal(err)
			}
			before := st.Clone()
			if rep := mustRepair(t, st, keyless, RepairOptions{Scrub: true, DryRun: true}); len(rep.Left.Findings) > 0 || len(rep.Mended) != 1 || rep.Mended[0].Err != nil {
				t.Fatalf("%s: a dry run leaves %+v of %+v", c.name, rep.Left.Findings, rep.Mended)
			}
			mustBeSame(t, before, st)
			rep := mustRepair(t, st, keyless, RepairOptions{Scrub: true})
			if len(rep.Left.Findings) > 0 || len(rep.Mended) != 1 || rep.Mended[0].Object != pack || rep.Mended[0].Err != nil || rep.Mended[0].Lost > 0 {
				t.Fatalf("%s: left %+v of %+v", c.name, rep.Left.Findings, rep.Mended)
			}
			if m := rep.Mended[0]; c.name != "entries and footer" && (m.Healed == 0 || len(m.By) != 1 || m.By[0] != ByParity) {
				t.Errorf("%s: %+v", c.name, m)
			}
			if b, _ := readObject(bg, st, pack); bytes.Equal(b, mustReadObject(t, base, pack)) {
				t.Errorf("%s: the pack was overwritten", c.name)
			}
			mustBeClean(t, st, h)
		}
	}
}

func mustReadObject(t *testing.T, st blob.Store, name string) []byte {
	t.Helper()
	b, err := readObject(bg, st, name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustBeSame(t *testing.T, a, b blob.Store) {
	t.Helper()
	x, err := blobtest.Names(bg, a, "")
	y, err2 := blobtest.Names(bg, b, "")
	if err != nil || err2 != nil || strings.Join(x, "\n") != strings.Join(y, "\n") {
		t.Fatalf("objects %v and %v", x, y)
	}
	for _, name := range x {
		if !bytes.Equal(mustReadObject(t, a, name), mustReadObject(t, b, name)) {
			t.Fatalf("%s changed", name)
		}
	}
}

// What is damaged beyond parity is named to the byte, and the rest healed. A
// copy of the repository heals that too.
func TestRepairBeyondParity(t *testing.T) {
	base, h, pack := wreckedRepo(t)
	size, _ := base.Size(bg, pack)
	row := (parity.HealsRun(size) + 4095) / 2
	st := base.Clone()
	// In one column three rows, in the middle of records 10, 20 and 30; in others
	// what heals.
	const col = 8192
	hit := map[int64]bool{}
	if err := st.Damage(pack, func(b []byte) []byte {
		for _, i := range []int64{15, 30, 45} {
			at := i*row + col
			clear(b[at : at+4096])
			hit[(at-64)/fullRecord], hit[(at+4095-64)/fullRecord] = true, true
		}
		clear(b[50*row+20480:][:100])
		return b
	}); err != nil {
		t.Fatal(err)
	}
	wrecked := st.Clone()
	rep := mustRepair(t, st, false, RepairOptions{Scrub: true})
	if len(rep.Mended) != 1 || rep.Mended[0].Lost != len(hit) || rep.Mended[0].Healed == 0 || rep.Mended[0].Err == nil {
		t.Fatalf("%+v, %d lost", rep.Mended, len(hit))
	}
	if len(rep.Left.Findings) != 1 {
		t.Fatalf("%+v", rep.Left.Findings)
	}
	got := map[string]map[int64]bool{}
	for _, x := range rep.Left.Findings[0].Hits {
		if x.VM != "web01" || x.Disk != "vda" {
			t.Errorf("hit %+v", x)
		}
		if got[string(x.Point)] == nil {
			got[string(x.Point)] = map[int64]bool{}
		}
		for off := x.Range.Off; off < x.Range.End(); off += testChunk {
			got[string(x.Point)][off/testChunk] = true
		}
	}
	for _, p := range h.points {
		if len(got[string(p.ID)]) != len(hit) {
			t.Errorf("%s: hit in %v, want %v", p.Ref(), got[string(p.ID)], hit)
		}
		for i := range hit {
			if !got[string(p.ID)][i] {
				t.Errorf("%s: chunk %d is not named", p.Ref(), i)
			}
		}
	}
	// Nothing was deleted, and a second run finds nothing more to do.
	if b := mustReadObject(t, st, pack); int64(len(b)) != size {
		t.Errorf("the damaged pack has %d bytes", len(b))
	}
	packs := count(t, st, packPrefix)
	if rep = mustRepair(t, st, false, RepairOptions{}); len(rep.Left.Findings) != 1 || rep.Mended[0].Lost != len(hit) {
		t.Errorf("a second run: %+v", rep)
	}
	if n := count(t, st, packPrefix); n > packs+1 {
		t.Errorf("a second run stored %d packs", n-packs)
	}

	for _, keyless := range []bool{true, false} {
		st := wrecked.Clone()
		from := mustOpen(t, base)
		rep := mustRepair(t, st, keyless, RepairOptions{Scrub: true, From: from})
		if len(rep.Left.Findings) > 0 || len(rep.Mended[0].By) != 2 {
			t.Fatalf("with a copy: %+v", rep)
		}
		mustBeClean(t, st, h)
	}
}

// A pack that is gone comes back from a copy, but not from another repository.
func TestRepairFromACopy(t *testing.T) {
	base, h, pack := wreckedRepo(t)
	st := base.Clone()
	st.Delete(bg, pack)
	rep := mustRepair(t, st, true, RepairOptions{})
	if len(rep.Left.Findings) == 0 || len(rep.Left.Findings[0].Hits) == 0 {
		t.Fatalf("%+v", rep)
	}
	other, _ := newRepo(t)
	from, err := OpenKeyless(bg, other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mustOpen(t, st).Repair(bg, RepairOptions{From: from}); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("from another repository: %v", err)
	}
	if from, err = OpenKeyless(bg, base); err != nil {
		t.Fatal(err)
	}
	rep = mustRepair(t, st, true, RepairOptions{From: from})
	if len(rep.Left.Findings) > 0 || rep.Mended[0].By[0] != ByCopy {
		t.Fatalf("%+v", rep)
	}
	mustBeWhole(t, st, h, h.points...)
}

// The objects that name others are healed in place, byte for byte.
func TestRepairHealsSmallObjects(t *testing.T) {
	base, h, _ := wreckedRepo(t)
	for _, prefix := range []string{manifestPrefix, pointPrefix, outcomePrefix} {
		names, err := blobtest.Names(bg, base, prefix)
		if err != nil || len(names) == 0 {
			t.Fatal(prefix, err)
		}
		for _, name := range names {
			want := mustReadObject(t, base, name)
			for _, hurt := range []func([]byte) []byte{
				func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
				func(b []byte) []byte { return b[:len(b)/3] },
				func(b []byte) []byte { clear(b); return b },
			} {
				st := base.Clone()
				if err := st.Damage(name, hurt); err != nil {
					t.Fatal(err)
				}
				rep := mustRepair(t, st, true, RepairOptions{})
				if len(rep.Mended) != 1 || rep.Mended[0].Object != name || rep.Mended[0].Err != nil || len(rep.Left.Findings) > 0 {
					t.Fatalf("%s: %+v", name, rep)
				}
				if !bytes.Equal(mustReadObject(t, st, name), want) {
					t.Errorf("%s is not as it was", name)
				}
				mustBeWhole(t, st, h, h.points...)
			}
		}
	}
	// All at once: what is behind the first is seen only when that is healed.
	st := base.Clone()
	names, _ := blobtest.Names(bg, st, "")
	for _, name := range names {
		for _, prefix := range []string{manifestPrefix, pointPrefix, outcomePrefix} {
			if strings.HasPrefix(name, prefix) {
				st.Damage(name, func(b []byte) []byte { b[50] ^= 1; return b })
			}
		}
	}
	if rep := mustRepair(t, st, false, RepairOptions{}); len(rep.Left.Findings) > 0 {
		t.Fatalf("%+v", rep.Left.Findings)
	}
	mustBeWhole(t, st, h, h.points...)
}

// What is gone may have been deleted: only a manifest that a point needs comes
// back.
func TestRepairBringsNoPointBack(t *testing.T) {
	base, h, _ := wreckedRepo(t)
	for _, prefix := range []string{pointPrefix, outcomePrefix} {
		st := base.Clone()
		names, _ := blobtest.Names(bg, st, prefix)
		st.Delete(bg, names[0])
		mustRepair(t, st, true, RepairOptions{Scrub: true})
		if _, err := st.Size(bg, names[0]); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("%s is back", names[0])
		}
	}
	st := base.Clone()
	names, _ := blobtest.Names(bg, st, manifestPrefix)
	st.Delete(bg, names[0])
	if rep := mustRepair(t, st, true, RepairOptions{}); len(rep.Left.Findings) > 0 {
		t.Fatalf("%+v", rep.Left.Findings)
	}
	mustBeWhole(t, st, h, h.points...)
}

func TestMendConfig(t *testing.T) {
	st, h, _ := wreckedRepo(t)
	want := mustReadObject(t, st, configName)
	if done, err := MendConfig(bg, st, false); done || err != nil {
		t.Errorf("a sound one: %v, %v", done, err)
	}
	st.Damage(configName, func(b []byte) []byte { b[20] ^= 1; return b })
	if done, err := MendConfig(bg, st, true); !done || err != nil || bytes.Equal(mustReadObject(t, st, configName), want) {
		t.Errorf("a dry run: %v, %v", done, err)
	}
	if done, err := MendConfig(bg, st, false); !done || err != nil || !bytes.Equal(mustReadObject(t, st, configName), want) {
		t.Errorf("%v, %v", done, err)
	}
	mustBeWhole(t, st, h, h.points...)
	st.Damage(configName, func(b []byte) []byte { b[20] ^= 1; return b })
	st.Damage(parityPrefix+configName, func(b []byte) []byte { clear(b); return b })
	if done, err := MendConfig(bg, st, false); done || !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("without parity: %v, %v", done, err)
	}
}

// Parity that is missing or damaged is made again, the very same.
func TestRepairMakesParity(t *testing.T) {
	base, _, _ := wreckedRepo(t)
	st := base.Clone()
	names, _ := blobtest.Names(bg, st, parityPrefix)
	for i, name := range names {
		if i%2 == 0 {
			st.Delete(bg, name)
		} else {
			st.Damage(name, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}
	}
	rep := mustRepair(t, st, true, RepairOptions{Scrub: true, DryRun: true})
	if rep.ParityMade != int64(len(names)) || rep.ParityBytes == 0 {
		t.Errorf("a dry run: %+v, want %d", rep, len(names))
	}
	if rep = mustRepair(t, st, true, RepairOptions{Scrub: true}); rep.ParityMade != int64(len(names)) || len(rep.Left.Findings) > 0 {
		t.Errorf("%+v, want %d", rep, len(names))
	}
	notes, _ := blobtest.Names(bg, st, scrubPrefix)
	for _, name := range notes {
		st.Delete(bg, name)
	}
	mustBeSame(t, base, st)
	// Where a vacuum takes the object, a backup's parity is no finding.
	if rep = mustRepair(t, st, true, RepairOptions{Scrub: true}); rep.ParityMade > 0 || len(rep.Mended) > 0 {
		t.Errorf("nothing was to do: %+v", rep)
	}
}

// A note about a record that is as it was stored is not cleared by copying it:
// only who has the keys can say that it is sound.
func TestRepairDoesNotCopyWhatWasStoredWrong(t *testing.T) {
	base, h, pack := wreckedRepo(t)
	id, _ := parsePackName(pack)
	quarantineByHand(t, base, id, 64)
	st := base.Clone()
	rep := mustRepair(t, st, true, RepairOptions{})
	if len(rep.Left.Findings) != 1 || rep.Mended[0].Lost != 1 || !strings.Contains(rep.Mended[0].Err.Error(), "keys") {
		t.Errorf("without keys: %+v", rep)
	}
	st = base.Clone()
	if rep = mustRepair(t, st, false, RepairOptions{}); len(rep.Left.Findings) > 0 || rep.Mended[0].Lost > 0 {
		t.Errorf("with keys: %+v", rep)
	}
	mustBeClean(t, st, h)
}

// badDisk fails reads of one object where its sectors are bad.
type badDisk struct {
	blob.Store
	name string
	bad  []extent.Extent
}

func (d badDisk) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if name == d.name {
		for _, b := range d.bad {
			if b.Intersect(extent.Extent{Off: off, Len: int64(len(p))}).Len > 0 {
				return 0, syscall.EIO
			}
		}
	}
	return d.Store.ReadAt(ctx, name, p, off)
}

// Sectors that cannot be read are holes, and the rest of the pack is used.
func TestRepairReadsAroundBadSectors(t *testing.T) {
	st, h, pack := wreckedRepo(t)
	bad := badDisk{st, pack, []extent.Extent{{Off: 300_000, Len: 512}, {Off: 1_000_000, Len: 9000}}}
	if rep := mustRepair(t, bad, true, RepairOptions{Scrub: true}); len(rep.Left.Findings) > 0 || rep.Mended[0].Healed == 0 || rep.Mended[0].Sound == 0 {
		t.Fatalf("%+v", rep)
	}
	r := mustOpen(t, bad)
	for _, p := range h.points {
		mustRead(t, r, p, h.content[p.ID])
	}
}

// However far a repair got before the power went, nothing is lost by it, and
// the next one finishes.
func TestRepairSurvivesCrash(t *testing.T) {
	base, h, pack := wreckedRepo(t)
	base.Damage(pack, func(b []byte) []byte { clear(b[70_000:140_000]); return b })
	names, _ := blobtest.Names(bg, base, manifestPrefix)
	base.Damage(names[0], func(b []byte) []byte { b[20] ^= 1; return b })
	for n := 0; ; n += stride() {
		st := base.Clone()
		r, err := OpenKeyless(bg, crashAfter(n, st))
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Repair(bg, RepairOptions{Scrub: true})
		if rep := mustRepair(t, st, true, RepairOptions{Scrub: true}); len(rep.Left.Findings) > 0 {
			t.Fatalf("crash after %d: %+v", n, rep.Left.Findings)
		}
		mustBeClean(t, st, h)
		if err == nil {
			return
		}
		if n > 50 {
			t.Fatal("it never ends")
		}
	}
}
