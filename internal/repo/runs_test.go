package repo

import (
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/point"
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
// twice, a check names the object, and the next vacuum makes it good.
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
