package repo

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// runRepo is a repository whose index a vacuum made one run.
func runRepo(t testing.TB) (*mem.Store, *point.RestorePoint, []byte) {
	st, r := newRepo(t)
	content := noise(1, 40*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	gone := mustBackup(t, r, "web02", noise(2, 40*testChunk), nil, nil)
	if err := r.DeletePoint(bg, "web02", gone.ID); err != nil {
		t.Fatal(err)
	}
	mustVacuum(t, r)
	return st, p, content
}

func mustVacuum(t testing.TB, r *Repository) {
	t.Helper()
	if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
		t.Fatal(err)
	}
}

func mustNames(t testing.TB, st blob.Store, prefix string) []string {
	t.Helper()
	names, err := blobtest.Names(bg, st, prefix)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// A vacuum joins the index into one run, which serves readers and writers as
// the flat objects did.
func TestVacuumWritesARun(t *testing.T) {
	st, p, content := runRepo(t)
	if flat, runs := mustNames(t, st, indexPrefix), mustNames(t, st, runPrefix); len(flat) != 0 || len(runs) != 2 {
		t.Fatalf("%v and %v, want a run of one part", flat, runs)
	}
	r := mustOpen(t, st)
	mustRead(t, r, p, content)
	packs := len(mustNames(t, st, packPrefix))
	mustBackup(t, r, "web03", content, nil, nil)
	if n := len(mustNames(t, st, packPrefix)); n != packs+1 { // its domain.xml
		t.Errorf("%d packs, want %d: what a run knows was stored again", n, packs+1)
	}
	// The next one joins the run and what came since.
	q := mustBackup(t, r, "web04", noise(3, 20*testChunk), nil, nil)
	if err := r.DeletePoint(bg, "web04", q.ID); err != nil {
		t.Fatal(err)
	}
	mustVacuum(t, r)
	if flat, runs := mustNames(t, st, indexPrefix), mustNames(t, st, runPrefix); len(flat) != 0 || len(runs) != 2 {
		t.Errorf("%v and %v after the next vacuum", flat, runs)
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
	mustRead(t, mustOpen(t, st), p, content)
}

// Whatever happens to a run or a part of it: points are read, nothing is stored
// twice, a check names the object, and the next vacuum makes it good. With
// -short, which runs under the race detector, it is in use.
func TestDamagedRunsAreDoneWithout(t *testing.T) {
	whole, p, content := runRepo(t)
	for _, name := range mustNames(t, whole, runPrefix) {
		kind := "run"
		if strings.Contains(name, "-") {
			kind = "part"
		}
		size, err := whole.Size(bg, name)
		if err != nil {
			t.Fatal(err)
		}
		damage := map[string]func(b []byte) []byte{
			"begins otherwise": func(b []byte) []byte { b[0] ^= 1; return b },
			"flip in the middle": func(b []byte) []byte {
				b[len(b)*2/3] ^= 1
				return b
			},
			"flip near the end": func(b []byte) []byte { b[len(b)-40] ^= 1; return b },
			"cut off":           func(b []byte) []byte { return b[:len(b)-1] },
			"empty":             func(b []byte) []byte { return nil },
			"zeros":             func(b []byte) []byte { return make([]byte, size) },
			"longer":            func(b []byte) []byte { return append(b, 0) },
			"gone":              nil,
		}
		for what, fn := range damage {
			for _, late := range []bool{false, true} {
				if testing.Short() && !late {
					continue
				}
				test := kind + " " + what
				if late {
					test += " while it is in use"
				}
				t.Run(test, func(t *testing.T) {
					st := whole.Clone()
					r := mustOpen(t, st)
					if late {
						if _, err := r.Info(bg); err != nil {
							t.Fatal(err)
						}
					}
					if fn == nil {
						st.Delete(bg, name)
					} else if err := st.Damage(name, fn); err != nil {
						t.Fatal(err)
					}
					packs := len(mustNames(t, st, packPrefix))
					mustBackup(t, r, "web03", content, nil, nil)
					if n := len(mustNames(t, st, packPrefix)); n != packs+1 {
						t.Errorf("%d packs, want %d", n, packs+1)
					}
					mustRead(t, r, p, content)
					// A run that is gone whole is as if it had never been: its parts are nothing's.
					// The header of a part is for those who find it alone.
					report, err := r.Check(bg, CheckOptions{Scrub: true})
					if err != nil {
						t.Fatal(err)
					}
					named := false
					for _, f := range report.Findings {
						named = named || f.Object == name
					}
					if named != (kind == "part" || what != "gone") {
						t.Errorf("findings: %v", report.Findings)
					}
					r = mustOpen(t, st)
					mustRead(t, r, p, content)
					mustVacuum(t, r)
					mustCheck(t, r, CheckOptions{ReadData: true})
					mustRead(t, mustOpen(t, st), p, content)
				})
			}
		}
	}
}

// A reader that loaded a run before a vacuum of another process replaced it
// finds everything nevertheless, and a writer stores nothing twice.
func TestRunsAreReplacedUnderReaders(t *testing.T) {
	st, p, content := runRepo(t)
	reader := mustOpen(t, st)
	mustRead(t, reader, p, content)
	other := mustOpen(t, st)
	q := mustBackup(t, other, "web04", noise(3, 20*testChunk), nil, nil)
	if err := other.DeletePoint(bg, "web04", q.ID); err != nil {
		t.Fatal(err)
	}
	before := mustNames(t, st, runPrefix)
	mustVacuum(t, other)
	if after := mustNames(t, st, runPrefix); after[0] == before[0] {
		t.Fatal("the run was not replaced")
	}
	mustRead(t, reader, p, content)
	packs := len(mustNames(t, st, packPrefix))
	mustBackup(t, reader, "web03", content, nil, nil)
	if n := len(mustNames(t, st, packPrefix)); n != packs+1 {
		t.Errorf("%d packs, want %d", n, packs+1)
	}
}

// tellLies replaces the index by one, flat or a run, that says of each chunk what
// fn does.
func tellLies(t *testing.T, st *mem.Store, flat bool, fn func(i int, k index.Key, p index.Place) (index.Place, bool)) {
	r := mustOpen(t, st)
	h, err := r.held(bg)
	if err != nil {
		t.Fatal(err)
	}
	packs := make([]index.Pack, len(h.packs))
	order := make([]index.RunPack, len(h.packs))
	for i, p := range h.packs {
		packs[i] = index.Pack{ID: p.id, Bytes: uint32(p.bytes)}
		order[i] = index.RunPack{ID: p.id, Bytes: uint32(p.bytes)}
	}
	id, bin, err := newID()
	if err != nil {
		t.Fatal(err)
	}
	w, err := index.NewRunWriter(index.RunOptions{
		Repo: r.id, ID: bin, Generation: 9, Packs: order,
		Spool: func() index.Spool { return manifest.NewSpool() },
		Put: func(n int, body io.ReaderAt, size int64) error {
			name := runPrefix + id
			if n >= 0 {
				name = index.PartName(name, n)
			}
			return st.Put(bg, name, body, size)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	old := append(mustNames(t, st, indexPrefix), mustNames(t, st, runPrefix)...)
	i := 0
	err = h.table.Merge(bg, h.table.Runs(), h.rank, func(k index.Key, p index.Place) error {
		p, said := fn(i, k, p)
		i++
		if !said {
			return nil
		}
		if flat {
			in := &packs[p.Pack]
			in.Entries = append(in.Entries, index.Entry{Key: k, Off: p.Off, CLen: p.CLen})
			return nil
		}
		return w.Add(k, p.Pack, p.Off, p.CLen)
	})
	if err == nil && flat {
		err = put(bg, st, indexPrefix+id+"-000000", index.Encode(r.id, packs))
	} else if err == nil {
		err = w.Finish()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range old {
		st.Delete(bg, name)
	}
}

// An index whose checksums are right and that is wrong: points are read, and a
// vacuum takes nothing that they need. With -short it is a run.
func TestALyingIndexIsNotBelieved(t *testing.T) {
	lies := map[string]func(i int, p index.Place) index.Place{
		"another offset":             func(_ int, p index.Place) index.Place { p.Off += 7; return p },
		"behind the end of the pack": func(_ int, p index.Place) index.Place { p.Off = 1 << 30; return p },
		"a length nobody has":        func(_ int, p index.Place) index.Place { p.CLen = 1<<24 - 1; return p },
		"too short":                  func(_ int, p index.Place) index.Place { p.CLen -= 3; return p },
		"another pack":               func(_ int, p index.Place) index.Place { p.Pack = 1 - p.Pack; return p },
		"all in one place":           func(int, index.Place) index.Place { return index.Place{Pack: 0, Off: 64, CLen: 1000} },
		"every third elsewhere": func(i int, p index.Place) index.Place {
			if i%3 == 0 {
				p.Pack = 1 - p.Pack
			}
			return p
		},
	}
	for what, fn := range lies {
		for _, flat := range []bool{false, true} {
			if testing.Short() && flat {
				continue
			}
			kind := "a run, "
			if flat {
				kind = "flat, "
			}
			t.Run(kind+what, func(t *testing.T) {
				st, r := newRepo(t)
				a, b := noise(1, 40*testChunk), noise(2, 40*testChunk)
				p, q := mustBackup(t, r, "web01", a, nil, nil), mustBackup(t, r, "web02", b, nil, nil)
				tellLies(t, st, flat, func(i int, _ index.Key, p index.Place) (index.Place, bool) { return fn(i, p), true })
				r = mustOpen(t, st)
				mustRead(t, r, p, a)
				mustRead(t, r, q, b)
				if err := r.DeletePoint(bg, "web02", q.ID); err != nil {
					t.Fatal(err)
				}
				r = mustOpen(t, st) // that has heard no lie
				mustVacuum(t, r)
				r = mustOpen(t, st)
				mustRead(t, r, p, a)
				mustVacuum(t, r)
				mustRead(t, mustOpen(t, st), p, a)
				mustCheck(t, mustOpen(t, st), CheckOptions{ReadData: true})
			})
		}
	}
}

// Chunks that an index keeps to itself are not taken for garbage.
func TestAnIndexThatKeepsSilent(t *testing.T) {
	for _, flat := range []bool{false, true} {
		st, r := newRepo(t)
		a := noise(1, 40*testChunk)
		p := mustBackup(t, r, "web01", a, nil, nil)
		tellLies(t, st, flat, func(i int, _ index.Key, p index.Place) (index.Place, bool) { return p, i%2 == 0 })
		whole := mustNames(t, st, packPrefix)
		r = mustOpen(t, st)
		for range 2 {
			mustVacuum(t, r)
		}
		if left := mustNames(t, st, packPrefix); len(left) < len(whole) {
			t.Errorf("%v left of %v", left, whole)
		}
		for _, name := range append(mustNames(t, st, indexPrefix), mustNames(t, st, runPrefix)...) {
			st.Delete(bg, name)
		}
		mustRead(t, mustOpen(t, st), p, a)
	}
}

// With copies of the index on the local disk a store far away is asked for each
// of its objects once; damaged copies are made anew and are nobody's finding.
func TestIndexOfAStoreFarAway(t *testing.T) {
	whole, p, content := runRepo(t)
	dir := t.TempDir()
	for _, damage := range []bool{false, true} {
		if damage {
			filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
				if err == nil && info.Mode().IsRegular() {
					b, _ := os.ReadFile(path)
					for i := range b {
						b[i] ^= 1
					}
					err = os.WriteFile(path, b, 0o600)
				}
				return err
			})
		}
		var mu sync.Mutex
		reads := map[string]int{}
		far := blobtest.Faulty(whole, func(c blobtest.Call) error {
			mu.Lock()
			defer mu.Unlock()
			if c.Op == blobtest.OpReadAt {
				reads[c.Name]++
			}
			return nil
		})
		r := mustOpen(t, far)
		r.KeepIndex(dir, 1<<30)
		packs := len(mustNames(t, whole, packPrefix))
		mustRead(t, r, p, content)
		vm, most := "web05", 1
		if damage {
			vm, most = "web06", 2 // where a part is doubted its run is too
		}
		mustBackup(t, r, vm, content, nil, nil)
		if n := len(mustNames(t, whole, packPrefix)); n != packs+1 {
			t.Errorf("%d packs, want %d", n, packs+1)
		}
		for name, n := range reads {
			if strings.HasPrefix(name, runPrefix) && n > most {
				t.Errorf("%s was read %d times", name, n)
			}
		}
		mustCheck(t, r, CheckOptions{})
		r.Close()
	}
}

// joinAt lets an index be joined that has so many entries in memory.
func joinAt(t testing.TB, entries int) {
	was := looseEntries
	looseEntries = entries
	t.Cleanup(func() { looseEntries = was })
}

// After a backup the index is joined where it has become large in memory, and
// left alone where it has not, where a vacuum is under way, and where this
// client may not delete.
func TestJoinIndex(t *testing.T) {
	joinAt(t, 60)
	st, r := newRepo(t)
	content := noise(1, 40*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	if joined, err := r.JoinIndex(bg); joined || err != nil {
		t.Errorf("40 chunks: %v, %v", joined, err)
	}
	mustBackup(t, r, "web02", noise(2, 40*testChunk), nil, nil)

	refusing := blobtest.Faulty(st, func(c blobtest.Call) error {
		if c.Op.Mutates() && strings.HasPrefix(c.Name, vacuumPrefix) {
			return fault.ErrDenied
		}
		return nil
	})
	other := mustOpen(t, refusing)
	if _, err := other.held(bg); err != nil {
		t.Fatal(err)
	}
	if joined, err := other.JoinIndex(bg); joined || err != nil {
		t.Errorf("a client that may not: %v, %v", joined, err)
	}
	v := &vacuum{r: r, o: VacuumOptions{Patience: patience}, sight: newSight(r, patience)}
	if err := v.announce(bg); err != nil {
		t.Fatal(err)
	}
	if joined, err := r.JoinIndex(bg); joined || err != nil {
		t.Errorf("beside a vacuum: %v, %v", joined, err)
	}
	if err := v.leave(bg, fault.ErrLocked); err != nil {
		t.Fatal(err)
	}

	if joined, err := r.JoinIndex(bg); !joined || err != nil {
		t.Fatalf("80 chunks: %v, %v", joined, err)
	}
	if flat, runs := mustNames(t, st, indexPrefix), mustNames(t, st, runPrefix); len(flat) != 0 || len(runs) != 2 {
		t.Errorf("%v and %v, want a run of one part", flat, runs)
	}
	for _, prefix := range []string{vacuumPrefix, beatPrefix, epochPrefix} {
		if names := mustNames(t, st, prefix); len(names) > 0 {
			t.Errorf("%v are left", names)
		}
	}
	h, err := r.held(bg)
	if err != nil || h.table.FreshLen() != 0 {
		t.Errorf("%d entries are in memory, %v", h.table.FreshLen(), err)
	}
	mustRead(t, r, p, content)
}

// A vacuum that finds somebody joining the index waits for it.
func TestVacuumWaitsForAJoin(t *testing.T) {
	st, r := newRepo(t)
	mustBackup(t, r, "web01", noise(1, 4*testChunk), nil, nil)
	join := &vacuum{r: r, brief: true, o: VacuumOptions{Patience: patience}, sight: newSight(r, patience)}
	if err := join.announce(bg); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := mustOpen(t, st).Vacuum(bg, VacuumOptions{})
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("vacuum did not wait: %v", err)
	case <-time.After(20 * beatEvery):
	}
	if _, err := join.joinOnly(bg); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, prefix := range []string{vacuumPrefix, beatPrefix, outcomePrefix} {
		if names := mustNames(t, st, prefix); len(names) > map[string]int{outcomePrefix: 1}[prefix] {
			t.Errorf("%v are left", names)
		}
	}
}

// However far a join got, nothing is lost, and a vacuum takes away what it left.
func TestJoinIndexSurvivesCrash(t *testing.T) {
	joinAt(t, 1)
	base, r := newRepo(t)
	content := noise(1, 20*testChunk)
	p := mustBackup(t, r, "web01", content, nil, nil)
	for _, crashAfter := range []func(int, blob.Store) *blobtest.Crash{crashAfter, crashAfterApplied} {
		for n := 0; ; n++ {
			st := base.Clone()
			crash := crashAfter(n, st)
			r := mustOpen(t, crash)
			if _, err := r.held(bg); err != nil {
				t.Fatal(err)
			}
			_, err := r.JoinIndex(bg)
			everyoneDies()
			crashed := crash.Crashed()
			if !crashed && err != nil {
				t.Fatal(err)
			}
			r = mustOpen(t, st)
			mustRead(t, r, p, content)
			mustVacuum(t, r)
			mustRead(t, mustOpen(t, st), p, content)
			for _, prefix := range []string{vacuumPrefix, beatPrefix} {
				if names := mustNames(t, st, prefix); len(names) > 0 {
					t.Errorf("crash after %d: %v are left", n, names)
				}
			}
			if !crashed {
				break
			}
		}
	}
}
