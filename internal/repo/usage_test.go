package repo

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// copyOf is a store with the same objects.
func copyOf(t testing.TB, st blob.Store) *mem.Store {
	t.Helper()
	out := mem.New()
	for o, err := range st.List(bg, "") {
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, o.Bytes)
		if _, err := st.ReadAt(bg, o.Name, b, 0); err != nil {
			t.Fatal(err)
		}
		if err := put(bg, out, o.Name, b); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// deadBytes is what a vacuum finds dead, with the frames of packs.
func deadBytes(t testing.TB, st blob.Store) int64 {
	t.Helper()
	rep, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	return rep.FreedBytes + rep.KeptWasteBytes
}

// near says whether the frames and entries of packs explain the difference.
func near(got, want int64) bool {
	d := got - want
	return d >= -8<<10 && d <= 16<<10+want/200
}

// What usage says that a point or a VM would free is what a vacuum finds dead
// once it is deleted: with chunks shared among disks, points and VMs, and with
// differentials.
func TestWhatUsageSaysIsWhatVacuumFrees(t *testing.T) {
	st, r := newRepo(t)
	rng := rand.New(rand.NewPCG(1, 2))
	const chunks = 4*manifest.Positions + 3 // five pages, so that one changed page is a differential
	newest := map[string]*point.RestorePoint{}
	content := map[string][]byte{}
	for round := range 3 {
		for _, name := range []string{"db01", "web01", "web02"} {
			old := content[name]
			now := make([]byte, chunks*testChunk)
			copy(now, old)
			first, of := int64(0), int64(chunks)
			if round > 0 {
				first, of = manifest.Positions, manifest.Positions // one page
			}
			for range 4 {
				at := (first + rng.Int64N(of)) * testChunk
				copy(now[at:at+testChunk], noise(rng.Uint64N(20), testChunk)) // one of 20: shared by chance
			}
			at := (manifest.Positions + int64(round)) * testChunk
			copy(now[at:at+testChunk], noise(rng.Uint64(), testChunk))
			newest[name] = mustBackup(t, r, name, now, newest[name], old)
			content[name] = now
		}
	}
	u, err := r.Usage(bg)
	if err != nil {
		t.Fatal(err)
	}
	before := deadBytes(t, st)
	var added int64
	differentials := 0
	for _, v := range u.VMs {
		for _, p := range v.Points {
			added += p.NewBytes
			other := copyOf(t, st)
			r := mustOpen(t, other)
			if err := r.DeletePoint(bg, v.VM, p.ID); err != nil {
				t.Fatal(err)
			}
			if got := deadBytes(t, other) - before; !near(got, p.FreesBytes) {
				t.Errorf("%s/%s frees %d, said %d", v.VM, p.ID, got, p.FreesBytes)
			}
		}
		other := copyOf(t, st)
		r := mustOpen(t, other)
		points, err := r.Points(bg)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range points {
			if p.VM != v.VM {
				continue
			}
			d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
			if err != nil {
				t.Fatal(err)
			}
			if d.base != nil {
				differentials++
			}
			if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
				t.Fatal(err)
			}
		}
		if got := deadBytes(t, other) - before; !near(got, v.FreesBytes) {
			t.Errorf("%s frees %d, said %d", v.VM, got, v.FreesBytes)
		}
		if v.NeededBytes != v.FreesBytes+v.SharedBytes || v.SharedBytes == 0 || len(v.SharedWith) != 2 {
			t.Errorf("%+v does not add up", v)
		}
	}
	if added != u.NeededBytes || u.Missing != 0 {
		t.Errorf("points added %d, needed are %d, %d missing", added, u.NeededBytes, u.Missing)
	}
	if differentials == 0 {
		t.Error("there was no differential")
	}
	// The same through a temporary file.
	again := usageThroughFile(t, r)
	if !reflect.DeepEqual(u, again) {
		t.Errorf("through a temporary file %+v, want %+v", again, u)
	}
}

func usageThroughFile(t *testing.T, r *Repository) Usage {
	t.Helper()
	defer func(n int) { referencesLimit = n }(referencesLimit)
	referencesLimit = 7 * referenceBytes
	u, err := r.Usage(bg)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Three points of two VMs whose sizes can be worked out by hand.
func TestUsageByHand(t *testing.T) {
	_, r := newRepo(t)
	one := noise(1, testChunk)
	a := bytes.Clone(one)
	p := mustBackup(t, r, "a", a, nil, nil)
	b := append(bytes.Clone(one), noise(2, testChunk)...)
	mustBackup(t, r, "b", b, nil, nil)
	a2 := noise(3, testChunk)
	mustBackup(t, r, "a", a2, p, a)
	u, err := r.Usage(bg)
	if err != nil {
		t.Fatal(err)
	}
	const rec = testChunk + 92 // a record of noise
	xml := func(name string) int64 { return int64(len("<domain>"+name+"</domain>")) + 92 }
	va, vb := u.VMs[0], u.VMs[1]
	if va.SizeBytes != testChunk || va.NeededBytes != 2*rec+xml("a") || va.FreesBytes != rec+xml("a") || va.SharedBytes != rec || va.SharedWith[0] != (VMShare{"b", rec}) {
		t.Errorf("a: %+v", va)
	}
	if vb.FreesBytes != rec+xml("b") || vb.SharedBytes != rec || vb.Points[0].NewBytes != rec+xml("b") || vb.Points[0].FreesBytes != rec+xml("b") {
		t.Errorf("b: %+v", vb)
	}
	// a's first point has one chunk that b needs too, and a file that a's second
	// point needs too: alone it frees nothing.
	if p := va.Points[0]; p.NewBytes != rec+xml("a") || p.FreesBytes != 0 {
		t.Errorf("a's first: %+v", p)
	}
	if p := va.Points[1]; p.NewBytes != rec || p.FreesBytes != rec {
		t.Errorf("a's second: %+v", p)
	}
}

// Nobody can say what is shared while a manifest cannot be read.
func TestUsageDoesNotGuess(t *testing.T) {
	st, r := newRepo(t)
	p := mustBackup(t, r, "a", noise(1, testChunk), nil, nil)
	if u, err := r.Usage(bg); err != nil || len(u.VMs) != 1 {
		t.Fatalf("%+v, %v", u, err)
	}
	keyless, err := OpenKeyless(bg, st)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyless.Usage(bg); !errors.Is(err, fault.ErrKey) {
		t.Errorf("without a key: %v", err)
	}
	name := manifestName(p.Disks[0].Manifest)
	b, err := readObject(bg, st, name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := put(bg, st, name, b); err != nil {
		t.Fatal(err)
	}
	if _, err := mustOpen(t, st).Usage(bg); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("with a damaged manifest: %v", err)
	}
}

// Classes of points are one of a kind, however they were joined.
func TestClassesJoin(t *testing.T) {
	c := newClasses()
	var all []uint32
	for i := range uint32(6) {
		all = append(all, c.point(i, i/2))
	}
	for range 200 {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		n := uint32(0)
		for _, k := range all {
			n = c.join(n, k)
			if c.join(n, k) != n || c.join(k, n) != n {
				t.Fatal("joining twice changes it")
			}
		}
		if got := c.all[n]; got.first != 0 || got.only != manyPoints || len(c.vms[got.vms]) != 3 {
			t.Fatalf("%+v", got)
		}
	}
	same := c.join(c.point(0, 0), c.point(1, 0))
	if got := c.all[same]; got.only != manyPoints || len(c.vms[got.vms]) != 1 {
		t.Errorf("two points of one VM: %+v", got)
	}
}
