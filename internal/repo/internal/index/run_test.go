package index

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

var bg = context.Background()

// memory is a store of objects by name, and a spool that grows in memory.
type memory map[string][]byte

func (m memory) ReadAt(_ context.Context, name string, p []byte, off int64) (int, error) {
	b, ok := m[name]
	if !ok {
		return 0, errors.New("no such object")
	}
	return bytes.NewReader(b).ReadAt(p, off)
}

func (m memory) size(name string) (int64, bool) {
	b, ok := m[name]
	return int64(len(b)), ok
}

type spool struct{ bytes.Buffer }

func (s *spool) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(s.Bytes()).ReadAt(p, off)
}
func (s *spool) Size() int64  { return int64(s.Len()) }
func (s *spool) Close() error { return nil }

// options are those of a run that goes into m under the name "run<id>".
func (m memory) options(id byte, packs []RunPack, partEntries int) (RunOptions, string) {
	name := fmt.Sprintf("run%d", id)
	return RunOptions{
		Repo: testRepo, ID: [16]byte{id}, Generation: uint64(id), Packs: packs, partEntries: partEntries,
		Spool: func() Spool { return new(spool) },
		Put: func(n int, body io.ReaderAt, size int64) error {
			b := make([]byte, size)
			if k, err := body.ReadAt(b, 0); int64(k) < size {
				return fmt.Errorf("%d bytes of %d: %w", k, size, err)
			}
			if n < 0 {
				m[name] = b
			} else {
				m[PartName(name, n)] = b
			}
			return nil
		},
	}, name
}

var testRepo = [16]byte{7}

// write makes a run of the places in want, whose packs are numbered as in the
// run.
func (m memory) write(t interface{ Fatal(...any) }, id byte, partEntries int, want map[Key]Place) string {
	var packs []RunPack
	for n := range 10 {
		packs = append(packs, RunPack{[32]byte{byte(n)}, uint32(1000 + n)})
	}
	o, name := m.options(id, packs, partEntries)
	w, err := NewRunWriter(o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, k := range slices.SortedFunc(maps.Keys(want), func(a, b Key) int { return bytes.Compare(a[:], b[:]) }) {
		if err := w.Add(k, want[k].Pack, want[k].Off, want[k].CLen); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return name
}

func (m memory) open(name string, id byte) (*Run, error) {
	return OpenRun(bg, m, name, OpenOptions{Repo: testRepo, ID: [16]byte{id}, Size: m.size, Number: func(p RunPack) uint32 { return uint32(p.ID[0]) }})
}

func randomPlaces(n int, seed uint64) map[Key]Place {
	r := rand.New(rand.NewPCG(seed, 0))
	out := map[Key]Place{}
	for range n {
		var k Key
		be.PutUint64(k[:], r.Uint64())
		be.PutUint64(k[8:], r.Uint64())
		out[k] = Place{uint32(r.IntN(10)), r.Uint32(), uint32(r.IntN(1 << 24))}
	}
	return out
}

func TestRunVectors(t *testing.T) {
	in := struct {
		Repo, Run  vectors.Hex
		Generation uint64
		Packs      []RunPack
		Entries    []Located
		Parts      []vectors.Hex
		Object     vectors.Hex
	}{Repo: vectors.Fill(0, 16), Run: vectors.Fill(0x80, 16), Generation: 3, Packs: []RunPack{
		{ID: [32]byte(vectors.Fill(0x10, 32)), Bytes: 4711}, {ID: [32]byte(vectors.Fill(0x20, 32)), Bytes: 96},
	}}
	for i := range byte(5) {
		in.Entries = append(in.Entries, Located{Key(vectors.Fill(0x10*i, 16)), Place{uint32(i % 2), 64 + 1000*uint32(i), 1<<24 - 1 - uint32(i)}})
	}
	m := memory{}
	o, name := m.options(1, in.Packs, 3)
	o.Repo, o.ID, o.Generation = [16]byte(in.Repo), [16]byte(in.Run), in.Generation
	w, err := NewRunWriter(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range in.Entries {
		if err := w.Add(e.Key, e.Place.Pack, e.Place.Off, e.Place.CLen); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	in.Object, in.Parts = m[name], []vectors.Hex{m[PartName(name, 0)], m[PartName(name, 1)]}
	vectors.Load(t, "run", &in)
	if !bytes.Equal(in.Object, m[name]) || !bytes.Equal(in.Parts[0], m[PartName(name, 0)]) || !bytes.Equal(in.Parts[1], m[PartName(name, 1)]) {
		t.Error("not what the vector says")
	}
}

// However chunks came in, moved and were joined, each is where a map says.
func TestSetAgreesWithAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := memory{}
		// Packs 8 and 9 are not to be relied on, 7 is gone.
		rank := func(p Place) uint8 { return uint8(max(p.Pack, 7) - 7) }
		set := NewSet(rank)
		model := []map[Key]Place{{}} // what is in memory and in each run, the newest first
		keys := rapid.SliceOfNDistinct(rapid.Custom(func(t *rapid.T) (k Key) {
			// Starts that collide, and few in all.
			k[0], k[7], k[15] = rapid.SampledFrom([]byte{0, 1, 255}).Draw(t, "first"), rapid.ByteRange(0, 3).Draw(t, "eighth"), rapid.Byte().Draw(t, "last")
			return k
		}), 1, 300, func(k Key) Key { return k }).Draw(t, "keys")
		best := func(k Key, levels []map[Key]Place) (p Place, ok bool) {
			for _, l := range levels {
				if q, in := l[k]; in && (!ok || rank(q) < rank(p)) {
					p, ok = q, true
				}
			}
			return p, ok
		}
		id := byte(0)
		add := func(want map[Key]Place) {
			id++
			name := m.write(t, id, 16, want)
			r, err := OpenRun(bg, m, name, OpenOptions{Repo: testRepo, ID: [16]byte{id}, Size: m.size, Number: func(p RunPack) uint32 {
				if p.ID[0] == 7 {
					return Gone
				}
				return uint32(p.ID[0])
			}})
			if err != nil {
				t.Fatal(err)
			}
			set.AddRun(r)
		}
		t.Repeat(map[string]func(*rapid.T){
			"insert": func(t *rapid.T) {
				for _, k := range rapid.SliceOf(rapid.SampledFrom(keys)).Draw(t, "which") {
					p := Place{rapid.SampledFrom([]uint32{0, 1, 2, 8, 9}).Draw(t, "pack"), rapid.Uint32Range(0, 99).Draw(t, "off"), 1}
					set.Insert(k, p, func(old Place) bool { return rank(p) <= rank(old) })
					if old, had := model[0][k]; !had || rank(p) <= rank(old) {
						model[0][k] = p
					}
				}
			},
			"compact": func(t *rapid.T) {
				runs := set.Runs()
				n := rapid.IntRange(0, len(runs)).Draw(t, "runs")
				all, want := map[Key]Place{}, map[Key]Place{}
				for _, k := range keys {
					if p, ok := best(k, model[:n+1]); ok {
						want[k] = p
					}
				}
				var last Key
				err := set.Merge(bg, runs[:n], rank, func(k Key, p Place) error {
					if len(all) > 0 && last.Compare(&k) >= 0 {
						t.Fatal("not in order")
					}
					last = k
					all[k] = p
					return nil
				})
				if err != nil || !maps.Equal(all, want) {
					t.Fatalf("%v joined, want %v: %v", all, want, err)
				}
				set = NewSet(rank)
				add(all)
				for _, r := range runs[n:] {
					set.AddRun(r)
				}
				model = slices.Concat([]map[Key]Place{{}, all}, model[n+1:])
			},
			"a run of packs that are gone": func(t *rapid.T) {
				all := map[Key]Place{}
				for _, k := range rapid.SliceOf(rapid.SampledFrom(keys)).Draw(t, "which") {
					all[k] = Place{7, 1, 1}
				}
				add(all)
				model = slices.Concat(model[:1:1], []map[Key]Place{{}}, model[1:])
			},
			"": func(t *rapid.T) {
				sorted := SortKeys(slices.Clone(keys))
				res, err := set.Resolve(bg, sorted)
				if err != nil {
					t.Fatal(err)
				}
				for i, k := range sorted {
					want, known := best(k, model)
					got, ok, err := set.Lookup(bg, k)
					if err != nil || ok != known || got != want {
						t.Fatalf("%x is at %v %v %v, want %v %v", k, got, ok, err, want, known)
					}
					if res[i].OK != known || res[i].Place != want {
						t.Fatalf("in a batch %x is at %v %v, want %v %v", k, res[i].Place, res[i].OK, want, known)
					}
				}
				seen := map[Key]bool{}
				if err := set.Each(bg, func(k Key, p Place) error {
					if want, ok := best(k, model); !ok || p != want || seen[k] {
						t.Fatalf("Each gives %x at %v, want %v", k, p, want)
					}
					seen[k] = true
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				some := keys[:len(keys)/2]
				known, fresh := 0, 0
				marks := set.NewMarks(func(k Key, p Place, in, new bool) error {
					if want, ok := best(k, model); ok != in || p != want {
						t.Fatalf("%x is marked at %v, want %v", k, p, want)
					}
					if in {
						known++
					}
					if new {
						fresh++
					}
					return nil
				})
				for range 2 {
					for _, k := range some {
						marks.Mark(bg, k)
					}
					if err := marks.Flush(bg); err != nil {
						t.Fatal(err)
					}
				}
				if known != 2*fresh {
					t.Fatalf("%d fresh of %d known in two rounds", fresh, known)
				}
				marked, err := marks.Marked(bg, keys)
				if err != nil {
					t.Fatal(err)
				}
				for i, k := range keys {
					want, ok := best(k, model)
					if got, in := marked[k]; in != (ok && i < len(some)) || in && got != want {
						t.Fatalf("%x is marked: %v %v", k, got, in)
					}
				}
				if len(seen) > int(set.Len()) {
					t.Fatalf("%d chunks in a set of %d", len(seen), set.Len())
				}
			},
		})
	})
}

// Whichever bit is flipped: no lookup gives a wrong place, and scrubbing the
// object finds it.
func TestDamagedRunsSayNothingWrong(t *testing.T) {
	want := randomPlaces(700, 1)
	whole := memory{}
	name := whole.write(t, 1, 300, want)
	for object, b := range whole {
		for i := 0; i < len(b); i += 1 + len(b)/100 {
			bad := maps.Clone(whole)
			bad[object] = bytes.Clone(b)
			bad[object][i] ^= 16
			verifies := VerifyRun(bg, bad, name, int64(len(bad[name])), testRepo, [16]byte{1})
			for n := range 3 {
				p := PartName(name, n)
				verifies = errors.Join(verifies, VerifyPart(bg, bad, p, int64(len(bad[p])), testRepo, [16]byte{1}, uint32(n)))
			}
			if verifies == nil || !Damaged(verifies) {
				t.Fatalf("%s: a flip at %d is not found", object, i)
			}
			r, err := bad.open(name, 1)
			if err != nil {
				if !Damaged(err) {
					t.Fatalf("%s, flip at %d: %v", object, i, err)
				}
				continue
			}
			set := NewSet(func(Place) uint8 { return 0 })
			set.AddRun(r)
			tried := 0
			for k, p := range want {
				if tried++; tried > 100 { // others at each flip
					break
				}
				got, ok, err := set.Lookup(bg, k)
				if ok && got != p {
					t.Fatalf("%s, flip at %d: %x is at %v, want %v", object, i, k, got, p)
				}
				if e := (*PartError)(nil); errors.As(err, &e) {
					_, keys, ours := set.Lost(e)
					if !ours || !keys.Has(&k) || !Damaged(err) {
						t.Fatalf("%s, flip at %d: %v loses %v", object, i, err, keys)
					}
				} else if !ok && !slices.ContainsFunc(r.LostParts(), func(l LostPart) bool { return l.Has(&k) }) {
					t.Fatalf("%s, flip at %d: %x is not found and nothing is lost", object, i, k)
				}
			}
		}
	}
}

// A run or a part that is cut off is not believed at any length.
func TestTruncatedRuns(t *testing.T) {
	want := randomPlaces(400, 2)
	whole := memory{}
	name := whole.write(t, 1, 300, want)
	for n := range len(whole[name]) {
		bad := maps.Clone(whole)
		bad[name] = whole[name][:n]
		if _, err := bad.open(name, 1); err == nil || !Damaged(err) {
			t.Fatalf("opened with %d bytes: %v", n, err)
		}
	}
	for _, cut := range []int{0, 1, blockBytes - 1, blockBytes, 2*blockBytes - 1} {
		bad := maps.Clone(whole)
		bad[PartName(name, 1)] = whole[PartName(name, 1)][:cut]
		r, err := bad.open(name, 1)
		if err != nil {
			t.Fatal(err)
		}
		if lost := r.LostParts(); len(lost) != 1 || lost[0].Object != PartName(name, 1) || !lost[0].NoEnd {
			t.Fatalf("cut to %d: %v", cut, lost)
		}
	}
	other := maps.Clone(whole)
	other["run2"] = whole[name]
	if _, err := other.open("run2", 2); err == nil || !Damaged(err) {
		t.Fatalf("opened under another name: %v", err)
	}
}

// The memory and the bytes of a chunk in a run: docs/design/repository.md
// promises them.
func TestBytesForAChunkInARun(t *testing.T) {
	const n = 1_000_000
	m := memory{}
	name := m.write(t, 1, PartEntries, randomPlaces(n, 3))
	r, err := m.open(name, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadFilters(bg); err != nil {
		t.Fatal(err)
	}
	if per := float64(r.Bytes()) / n; per > 1.25 {
		t.Errorf("%.2f bytes of memory for a chunk", per)
	}
	stored := len(m[name]) + len(m[PartName(name, 0)])
	if per := float64(stored) / n; per > 28.5 {
		t.Errorf("%.2f bytes of the store for a chunk", per)
	}
}

// Runs come from stores that nobody trusts. Whatever they say, nothing panics
// or allocates more than they are long; sums are mended so that it comes to
// the parsers behind them.
func FuzzRun(f *testing.F) {
	m := memory{}
	name := m.write(f, 1, 160, randomPlaces(320, 4))
	parts := slices.Concat(m[PartName(name, 0)], m[PartName(name, 1)])
	f.Add(m[name], parts, true)
	f.Add(m[name], parts, false)
	f.Add(m[name][:len(m[name])-1], parts, true)
	keys := slices.Collect(maps.Keys(randomPlaces(320, 4)))
	f.Fuzz(func(t *testing.T, run, parts []byte, mend bool) {
		if mend {
			run, parts = mendRun(bytes.Clone(run)), mendParts(bytes.Clone(parts))
		}
		half := min(3*blockBytes, len(parts))
		m := memory{"run1": run, PartName("run1", 0): parts[:half], PartName("run1", 1): parts[half:]}
		VerifyRun(bg, m, "run1", int64(len(run)), testRepo, [16]byte{1})
		VerifyPart(bg, m, PartName("run1", 0), int64(half), testRepo, [16]byte{1}, 0)
		r, err := m.open("run1", 1)
		if err != nil {
			return
		}
		set := NewSet(func(Place) uint8 { return 0 })
		set.AddRun(r)
		for _, k := range keys[:20] {
			set.Lookup(bg, k)
		}
		set.Resolve(bg, SortKeys(slices.Clone(keys)))
		n := int64(0)
		set.Each(bg, func(Key, Place) error { n++; return nil })
		if n*recordBytes > int64(len(parts)) {
			t.Errorf("%d entries in %d bytes", n, len(parts))
		}
	})
}

// mendRun makes the hashes of a run right, as far as its lengths allow.
func mendRun(b []byte) []byte {
	at := 0
	section := func(n int64) bool {
		if n < 0 || n > int64(len(b)-at)-sumBytes {
			return false
		}
		sum := seal.Hash(b[at : at+int(n)])
		copy(b[at+int(n):], sum[:])
		at += int(n) + sumBytes
		return true
	}
	if !section(runHeaderBytes - sumBytes) {
		return b
	}
	packs, parts := int64(le.Uint32(b[56:])), int64(le.Uint32(b[60:]))
	if !section(packs * runPackBytes) {
		return b
	}
	table := b[at:]
	if !section(parts * runPartBytes) {
		return b
	}
	for i := range parts {
		p := table[i*runPartBytes:]
		shape := filterShape{0, le.Uint32(p[20:]), le.Uint32(p[24:])}
		if !section(blocks(le.Uint32(p[16:]))*fenceBytes) || !section(shape.bytes()) {
			return b
		}
	}
	return b
}

func mendParts(b []byte) []byte {
	sum := newSummer()
	for i := 0; (i+1)*blockBytes <= len(b); i++ {
		sum.seal([16]byte{1}, uint32(i/3), uint32(i%3), b[i*blockBytes:(i+1)*blockBytes])
	}
	return b
}

func (k Key) String() string { return hex.EncodeToString(k[:]) }
