package reposerver

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

const (
	mine   = "01arz3ndektsv4rrffq69g5fav" // a session begun by "web01"
	theirs = "01brz3ndektsv4rrffq69g5fav" // one begun by "db01"
	local  = "01crz3ndektsv4rrffq69g5fav" // one begun on the server itself
)

func hashed(prefix, body string) string {
	sum := blake3.Sum256([]byte(body))
	h := hex.EncodeToString(sum[:])
	return prefix + h[:2] + "/" + h
}

func putIn(t *testing.T, st blob.Store, name, body string) error {
	t.Helper()
	r, n := blobtest.Body([]byte(body))
	return st.Put(t.Context(), name, r, n)
}

func createIn(t *testing.T, st blob.Store, name, body string) error {
	t.Helper()
	r, n := blobtest.Body([]byte(body))
	return st.Create(t.Context(), name, r, n)
}

// What each verb gives each role, for each kind of name, in a repository that
// has been founded. "ok" is done, "exists" is fault.ErrExists, "no" is
// fault.ErrDenied; that a refusal changed nothing is looked at each time.
func TestRoles(t *testing.T) {
	const body, other = "the bytes", "other bytes"
	// What is there, and by what verb: a new name; the same bytes again; other
	// bytes over it; create where it is; delete.
	type outcome struct{ fresh, again, over, createOver, remove string }
	readOnly := outcome{"no", "no", "no", "no", "no"}
	all := outcome{"ok", "ok", "ok", "exists", "ok"}
	createOnly := outcome{"ok", "ok", "exists", "exists", "no"}
	owned := outcome{"ok", "ok", "ok", "exists", "ok"}
	for _, c := range []struct {
		name   string
		backup outcome
	}{
		{"repo.json", outcome{"-", "ok", "exists", "exists", "no"}}, // is there
		{"keys/0123456789abcdef", readOnly},
		{hashed("data/", body), outcome{"ok", "ok", "no", "exists", "no"}},
		{"data/ab/" + strings.Repeat("ab", 32), outcome{"no", "no", "no", "no", "no"}}, // the name of other bytes
		{"data/x", outcome{"no", "no", "no", "no", "no"}},
		{"par/ab/" + strings.Repeat("ab", 32), createOnly},
		{"idx/l0/" + mine + "-000001", createOnly},
		{"idx/l0/" + theirs + "-000001", readOnly},
		{"idx/l0/" + local + "-000001", readOnly},
		{"idx/l0/nothing", readOnly},
		{"idx/l1/" + mine + "-000001", readOnly},
		{"man/ab/" + strings.Repeat("ab", 32), createOnly},
		{"rp/" + mine + "-000001", createOnly},
		{"rp/" + theirs + "-000001", readOnly},
		{"session/" + mine, owned},
		{"session/" + theirs, readOnly},
		{"session/" + local, outcome{"-", "no", "no", "no", "no"}}, // is there, and nobody's
		{"session/short", readOnly},
		{"outcome/" + mine, createOnly},
		{"outcome/" + theirs, readOnly},
		{"outcome/" + local, readOnly},
		{"suspect/" + theirs + "-000001", createOnly},
		{"protect/" + theirs + "-000001", createOnly},
		{"going/" + theirs + "-000001-" + mine, readOnly},
		{"scrub/" + mine, createOnly},
		{"quarantine/" + mine, readOnly},
		{"epoch/0000000001", readOnly},
		{"vacuum/" + mine, readOnly},
		{"repo.jsonx", readOnly},
		{"something/else", readOnly},
	} {
		for _, role := range []Role{Backup, Restore, Admin} {
			want := map[Role]outcome{Backup: c.backup, Restore: readOnly, Admin: all}[role]
			t.Run(fmt.Sprintf("%s/%s", role, strings.ReplaceAll(c.name, "/", "-")), func(t *testing.T) {
				g := serve(t, Options{ImmutableFor: -1})
				root := g.open("root", Admin, "r")
				st := g.openAs(g.token("web01", role, "r"), "r")
				if c.name != "repo.json" {
					if err := putIn(t, root, "repo.json", "{}"); err != nil {
						t.Fatal(err)
					}
				}
				// Whose session is whose is settled before.
				for session, tok := range map[string]string{mine: "web01", theirs: "db01"} {
					r, n := blobtest.Body([]byte(tok))
					if err := g.srv.state.Create(t.Context(), ownerPrefix+"r/"+session, r, n); err != nil {
						t.Fatal(err)
					}
				}
				mustGive := func(what, want string, err error) {
					t.Helper()
					got := "ok"
					switch {
					case errors.Is(err, fault.ErrDenied):
						got = "no"
					case errors.Is(err, fault.ErrExists):
						got = "exists"
					case err != nil:
						got = err.Error()
					}
					if want != got {
						t.Errorf("%s: %s (%v), want %s", what, got, err, want)
					}
				}
				mustHold := func(what, want string) {
					t.Helper()
					b, err := blobtest.Read(t.Context(), root, c.name)
					if err != nil || string(b) != want {
						t.Errorf("after %s it holds %q, %v; want %q", what, b, err, want)
					}
				}
				if want.fresh != "-" {
					mustGive("a new name", want.fresh, putIn(t, st, c.name, body))
					if want.fresh != "ok" {
						if _, err := root.Size(t.Context(), c.name); !errors.Is(err, fault.ErrNotFound) {
							t.Errorf("it is there nevertheless: %v", err)
						}
					}
				}
				if err := putIn(t, root, c.name, body); err != nil {
					t.Fatal(err)
				}
				mustGive("the same bytes", want.again, putIn(t, st, c.name, body))
				mustHold("the same bytes", body)
				mustGive("create", want.createOver, createIn(t, st, c.name, body))
				mustGive("other bytes", want.over, putIn(t, st, c.name, other))
				if want.over == "ok" {
					mustHold("other bytes", other)
				} else {
					mustHold("other bytes", body)
				}
				if b, err := blobtest.Read(t.Context(), st, c.name); err != nil || len(b) == 0 {
					t.Errorf("read: %q, %v", b, err)
				}
				if names, err := blobtest.Names(t.Context(), st, c.name); err != nil || len(names) != 1 {
					t.Errorf("list: %q, %v", names, err)
				}
				mustGive("delete", want.remove, st.Delete(t.Context(), c.name))
				if want.remove != "ok" {
					if _, err := root.Size(t.Context(), c.name); err != nil {
						t.Errorf("after a delete that was refused: %v", err)
					}
				}
			})
		}
	}
}

// A backup client makes its repository where none is, and then may not add keys
// or be the one who says what repository this is.
func TestFounding(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	tok := g.token("web01", Backup, "r")
	if _, err := remote.Open(t.Context(), g.at("r"), tok); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("open before there is one: %v", err)
	}
	for name, tok := range map[string]remote.Token{
		"of a restore client":                   g.token("reader", Restore, "r"),
		"of a backup client for all, unnamed":   g.token("every", Backup, AllRepositories),
		"of a backup client for another":        g.token("other", Backup, "s"),
		"of a restore client for all, nameless": g.token("all", Restore, AllRepositories),
	} {
		if _, err := remote.Create(t.Context(), g.at("r"), tok); !errors.Is(err, fault.ErrDenied) {
			t.Errorf("create with a token %s: %v, want fault.ErrDenied", name, err)
		}
	}
	var st *remote.Store
	for range 2 {
		var err error
		if st, err = remote.Create(t.Context(), g.at("r"), tok); err != nil {
			t.Fatal(err)
		}
		defer st.Close()
	}
	for _, name := range []string{"keys/0000000000000001", "keys/0000000000000002", "repo.json"} {
		if err := createIn(t, st, name, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := createIn(t, st, "keys/0000000000000003", "x"); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a key afterwards: %v, want fault.ErrDenied", err)
	}
	if err := putIn(t, st, "repo.json", "x"); !errors.Is(err, fault.ErrExists) {
		t.Errorf("repo.json again: %v, want fault.ErrExists", err)
	}
}

// A session belongs to the token that began it, from its first moment to after
// its end, also for a server that was started again.
func TestWhoseSessionItIs(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	web := g.open("web01", Backup, "r")
	dbTok := g.token("db01", Backup, "r")
	admin := g.openAs(g.token("root", Admin, "r"), "r")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	denied := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, fault.ErrDenied) {
			t.Errorf("%s: %v, want fault.ErrDenied", what, err)
		}
	}
	must(createIn(t, web, "session/"+mine, "1"))
	must(putIn(t, web, "session/"+mine, "2"))
	g.stop()
	g.start()
	// A token of the same name with a new secret is the same client's.
	web = g.openAs(tokenAgain(t, g, "web01"), "r")
	db := g.openAs(dbTok, "r")
	denied("another's session", putIn(t, db, "session/"+mine, "x"))
	denied("another's session created", createIn(t, db, "session/"+mine, "x"))
	denied("another's outcome", createIn(t, db, "outcome/"+mine, "revoked"))
	denied("another's record", createIn(t, db, "rp/"+mine+"-000001", "x"))
	denied("another's session deleted", db.Delete(t.Context(), "session/"+mine))
	denied("an outcome without a session", createIn(t, db, "outcome/"+theirs, "x"))
	must(putIn(t, web, "session/"+mine, "3"))
	must(createIn(t, web, "rp/"+mine+"-000001", "x"))

	// A vacuum took the session away, and revoked it.
	must(createIn(t, admin, "outcome/"+mine, "revoked"))
	must(admin.Delete(t.Context(), "session/"+mine))
	denied("a session that is over", createIn(t, db, "session/"+mine, "x"))
	if err := createIn(t, web, "outcome/"+mine, "committed"); !errors.Is(err, fault.ErrExists) {
		t.Errorf("an outcome that is taken: %v, want fault.ErrExists", err)
	}
	for range 2 { // the second is one whose first reply was lost
		must(web.Delete(t.Context(), "session/"+mine))
	}
	denied("its name again", createIn(t, db, "session/"+mine, "x"))
	denied("its name again, by its owner", createIn(t, web, "session/"+mine, "x"))

	// One that was begun on the server itself is nobody's.
	must(createIn(t, admin, "session/"+local, "x"))
	denied("a local session", putIn(t, db, "session/"+local, "y"))
}

// tokenAgain gives a client a new secret.
func tokenAgain(t *testing.T, g *rig, name string) remote.Token {
	t.Helper()
	if err := g.srv.tokens.Remove(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	return g.token(name, Backup, "r")
}

// Held objects are as old as the server has run since they were stored, and
// nothing that happens to the machine's clock makes them older.
func TestImmutable(t *testing.T) {
	const day = 24 * time.Hour
	wall := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	var ran atomic.Int64 // since the server was started, by the monotonic clock
	g := serve(t, Options{
		ImmutableFor: 14 * day,
		now:          func() time.Time { return wall },
		since:        func(time.Time) time.Duration { return time.Duration(ran.Load()) },
	})
	tok := g.token("root", Admin, "r")
	st, err := remote.Create(t.Context(), g.at("r"), tok)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { st.Close() }()
	// Two that were made on the server itself, by a clock that was wrong.
	for name, at := range map[string]time.Time{"man/aa/old": wall.Add(-1000 * day), "man/aa/new": wall.Add(30 * day)} {
		if err := putIn(t, st, name, "x"); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(g.dir, "r", name), at, at); err != nil {
			t.Fatal(err)
		}
	}
	ran.Store(int64(day))
	free := []string{"idx/l0/" + mine + "-000001", "session/" + mine, "suspect/" + mine + "-000001"}
	for _, name := range append(free, "man/aa/x", "data/aa/x", "rp/"+mine+"-000001", "outcome/"+mine, "keys/0000000000000001", "repo.json", "later/x") {
		if err := putIn(t, st, name, "x"); err != nil {
			t.Fatal(err)
		}
	}
	held := func(name string) {
		t.Helper()
		over, remove := putIn(t, st, name, "overwritten"), st.Delete(t.Context(), name)
		if !errors.Is(over, fault.ErrDenied) || !errors.Is(remove, fault.ErrHeld) || !strings.Contains(remove.Error(), "immutable for another") {
			t.Errorf("%s: overwrite %v, delete %v, want fault.ErrDenied and fault.ErrHeld", name, over, remove)
		}
		if err := createIn(t, st, name, "x"); !errors.Is(err, fault.ErrExists) {
			t.Errorf("create of %s: %v, want fault.ErrExists", name, err)
		}
		if err := putIn(t, st, name, "x"); err != nil {
			t.Errorf("the same bytes again for %s: %v", name, err)
		}
	}
	for _, name := range free {
		if err := putIn(t, st, name, "y"); err != nil {
			t.Errorf("overwrite of %s: %v", name, err)
		}
		if err := st.Delete(t.Context(), name); err != nil {
			t.Errorf("delete of %s: %v", name, err)
		}
	}
	all := func() {
		t.Helper()
		for _, name := range []string{"man/aa/x", "data/aa/x", "rp/" + mine + "-000001", "outcome/" + mine, "keys/0000000000000001", "repo.json", "later/x", "man/aa/old", "man/aa/new"} {
			held(name)
		}
	}
	all()
	// The machine's clock jumps past the lock, and back before all of it, while
	// the server runs and while it does not.
	for _, jump := range []time.Duration{1000 * day, -2000 * day} {
		wall = wall.Add(jump)
		all()
		g.stop()
		ran.Store(0)
		g.start()
		if st, err = remote.Open(t.Context(), g.at("r"), tok); err != nil {
			t.Fatal(err)
		}
		all()
	}
	// When the server was stopped it had run for a day, since which all but two
	// are there. What was made before, by whatever clock, counts from the
	// server's beginning at the earliest.
	ran.Store(int64(13*day - time.Minute))
	all()
	ran.Store(int64(13*day + time.Minute))
	held("man/aa/x")
	if err := putIn(t, st, "man/aa/old", "y"); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("overwrite of what may be deleted: %v, want fault.ErrDenied", err)
	}
	if err := st.Delete(t.Context(), "man/aa/old"); err != nil {
		t.Errorf("delete after all: %v", err)
	}
	if err := putIn(t, st, "man/aa/old", "y"); err != nil {
		t.Errorf("the name again: %v", err)
	}
	if err := st.Delete(t.Context(), "man/aa/old"); !errors.Is(err, fault.ErrHeld) {
		t.Errorf("delete of what is young again: %v, want fault.ErrHeld", err)
	}
	ran.Store(int64(14*day + time.Minute))
	for _, name := range []string{"man/aa/x", "rp/" + mine + "-000001", "keys/0000000000000001"} {
		if err := st.Delete(t.Context(), name); err != nil {
			t.Errorf("delete after all: %v", err)
		}
	}
	held("man/aa/new")

	// What was deleted is still on the server's disk, for as long again.
	aside := func(name string) int {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(g.dir, "r", ".aside", "*", name))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	for at, want := range map[time.Duration]int{14*day + time.Minute: 1, 27 * day: 1} {
		ran.Store(int64(at))
		g.srv.forgetAside(t.Context())
		for _, name := range []string{"man/aa/old", "man/aa/x", "keys/0000000000000001"} {
			if n := aside(name); n != want {
				t.Errorf("after %s %s is aside %d times, want %d", at, name, n, want)
			}
		}
		if names, err := blobtest.Names(t.Context(), st, ""); err != nil || slices.Contains(names, "man/aa/x") {
			t.Errorf("list: %q, %v", names, err)
		}
	}
	ran.Store(int64(27*day + 3*time.Hour))
	g.srv.forgetAside(t.Context())
	if old, x := aside("man/aa/old"), aside("man/aa/x"); old != 0 || x != 1 {
		t.Errorf("man/aa/old is aside %d times, man/aa/x %d times", old, x)
	}
	ran.Store(int64(28*day + 3*time.Hour))
	g.srv.forgetAside(t.Context())
	if entries, err := os.ReadDir(filepath.Join(g.dir, "r", ".aside")); err != nil || len(entries) > 0 {
		t.Errorf("aside there is %v, %v", entries, err)
	}
}

// What was promised stays promised until somebody says otherwise, twice.
func TestImmutabilityOutlivesAStartWithoutTheFlag(t *testing.T) {
	g := serve(t, Options{ImmutableFor: 14 * 24 * time.Hour})
	again := func(d time.Duration, shorten bool) (time.Duration, error) {
		g.stop()
		o := g.o
		o.ImmutableFor, o.Shorten = d, shorten
		s, err := Open(t.Context(), o)
		if err != nil {
			return 0, err
		}
		defer s.Close()
		return s.ImmutableFor(), nil
	}
	for _, c := range []struct {
		d       time.Duration
		shorten bool
		want    time.Duration
		refused bool
	}{
		{-1, false, 14 * 24 * time.Hour, false},
		{0, false, 0, true},
		{time.Hour, false, 0, true},
		{20 * 24 * time.Hour, false, 20 * 24 * time.Hour, false},
		{-1, false, 20 * 24 * time.Hour, false},
		{time.Hour, true, time.Hour, false},
		{-1, false, time.Hour, false},
	} {
		got, err := again(c.d, c.shorten)
		var shorter *ShorterError
		if errors.As(err, &shorter) != c.refused || !c.refused && (err != nil || got != c.want) {
			t.Errorf("%s, shorten %v: %s, %v", c.d, c.shorten, got, err)
		}
	}
}
