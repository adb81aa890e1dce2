package reposerver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/fault"
)

// A rig is a server that runs, with what its log says.
type rig struct {
	t    testing.TB
	dir  string
	o    Options
	srv  *Server
	addr string
	stop func()

	mu  sync.Mutex
	log bytes.Buffer
}

func (g *rig) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.log.Write(p)
}

func (g *rig) logged() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.log.String()
}

// serve starts a server on a directory of its own.
func serve(t testing.TB, o Options) *rig {
	t.Helper()
	g := &rig{t: t, dir: t.TempDir(), o: o, addr: "127.0.0.1:0"}
	g.o.Dir = g.dir
	g.o.Log = slog.New(slog.NewTextHandler(g, &slog.HandlerOptions{Level: slog.LevelDebug}))
	g.start()
	t.Cleanup(func() { g.stop() })
	return g
}

func (g *rig) start() {
	g.t.Helper()
	srv, err := Open(context.Background(), g.o)
	if err != nil {
		g.t.Fatal(err)
	}
	l, err := net.Listen("tcp", g.addr)
	if err != nil {
		g.t.Fatal(err)
	}
	g.srv, g.addr = srv, l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	g.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			g.t.Errorf("serve: %v", err)
		}
		if err := srv.Close(); err != nil {
			g.t.Errorf("close: %v", err)
		}
	})
}

func (g *rig) token(name string, role Role, repos ...string) remote.Token {
	g.t.Helper()
	t, err := g.srv.tokens.Add(g.t.Context(), name, role, repos)
	if err != nil {
		g.t.Fatal(err)
	}
	return t
}

func (g *rig) at(repo string) remote.Location { return remote.Location{Host: g.addr, Repo: repo} }

// open opens a repository, which it makes, with a new token of that role.
func (g *rig) open(name string, role Role, repo string) *remote.Store {
	g.t.Helper()
	if err := g.srv.makeRepository(repo); err != nil {
		g.t.Fatal(err)
	}
	return g.openAs(g.token(name, role, repo), repo)
}

func (g *rig) openAs(tok remote.Token, repo string) *remote.Store {
	g.t.Helper()
	st, err := remote.Open(g.t.Context(), g.at(repo), tok)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { st.Close() })
	return st
}

func TestConformance(t *testing.T) {
	t.Run("claims", func(t *testing.T) {
		blobtest.RunClaimer(t, func(t *testing.T) func() blob.Store {
			g, n := serve(t, Options{ImmutableFor: -1}), 0
			return func() blob.Store {
				n++
				return g.open(fmt.Sprintf("client%d", n), Backup, "r")
			}
		})
	})
	t.Run("as it is", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store {
			return serve(t, Options{ImmutableFor: -1}).open("a", Admin, "r")
		})
	})
	t.Run("pages of three", func(t *testing.T) {
		few := usual
		few.page = 3
		blobtest.Run(t, func(t *testing.T) blob.Store {
			return serve(t, Options{ImmutableFor: -1, limit: few}).open("a", Admin, "r")
		})
	})
	t.Run("tried again", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store {
			return retry.Wrap(serve(t, Options{ImmutableFor: -1}).open("a", Admin, "r"), retry.Options{First: time.Millisecond})
		})
	})
}

func TestTheServersPeopleOnly(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	if err := g.srv.makeRepository("r"); err != nil {
		t.Fatal(err)
	}
	good := g.token("web01", Backup, "r")
	stranger, err := remote.NewToken("web01", good.Pin) // the right name, another secret
	if err != nil {
		t.Fatal(err)
	}
	nobody, err := remote.NewToken("web02", good.Pin)
	if err != nil {
		t.Fatal(err)
	}
	impostor := good
	impostor.Pin[0] ^= 1
	wrongPin := impostor.Pin
	for name, c := range map[string]struct {
		at  remote.Location
		tok remote.Token
		err error
		say string
	}{
		"good":                      {g.at("r"), good, nil, ""},
		"another secret":            {g.at("r"), stranger, fault.ErrDenied, "no token, or none that this server knows"},
		"an unknown name":           {g.at("r"), nobody, fault.ErrDenied, "no token, or none that this server knows"},
		"another server's key":      {g.at("r"), impostor, fault.ErrDenied, "the server has the key " + good.Pin.String()},
		"another key in the URL":    {remote.Location{Host: g.addr, Repo: "r", Pin: &wrongPin}, good, fault.ErrDenied, "the server has the key"},
		"the right key in the URL":  {remote.Location{Host: g.addr, Repo: "r", Pin: &good.Pin}, impostor, nil, ""},
		"another repository":        {g.at("s"), good, fault.ErrDenied, "this token is not for repository s"},
		"the server's own state":    {remote.Location{Host: g.addr, Repo: StateDir}, good, fault.ErrUnsupported, "repository name"},
		"a path instead of a name":  {remote.Location{Host: g.addr, Repo: ".."}, good, fault.ErrUnsupported, "repository name"},
		"a longer path than a name": {remote.Location{Host: g.addr, Repo: "r/../s"}, good, nil, ""},
	} {
		st, err := remote.Open(t.Context(), c.at, c.tok)
		if name == "a longer path than a name" {
			if err == nil {
				t.Errorf("%s: it was opened", name)
			}
			continue
		}
		if !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.err, c.say)
		}
		if st != nil {
			st.Close()
		}
	}
	for _, tok := range []remote.Token{good, stranger, nobody} {
		if secret := strings.Split(tok.Reveal(), ".")[2]; strings.Contains(g.logged(), secret) {
			t.Error("the log has a secret in it")
		}
	}
	if !strings.Contains(g.logged(), "msg=denied") || strings.Contains(g.logged(), "token=web02") {
		t.Errorf("the log says\n%s", g.logged())
	}
}

// A token that was removed is refused by the next request, also on a connection
// that it opened.
func TestARemovedToken(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	st := g.open("web01", Restore, "r")
	if _, err := blobtest.Names(t.Context(), st, ""); err != nil {
		t.Fatal(err)
	}
	// By another process, as the command does it.
	other, err := OpenTokens(t.Context(), g.dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if other.Pin() != g.srv.Pin() {
		t.Error("the other process sees another key")
	}
	if err := other.Remove(t.Context(), "web01"); err != nil {
		t.Fatal(err)
	}
	if _, err := blobtest.Names(t.Context(), st, ""); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("list: %v, want fault.ErrDenied", err)
	}
	if err := other.Remove(t.Context(), "web01"); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestOneServerForADirectory(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	if s, err := Open(t.Context(), g.o); !errors.Is(err, fault.ErrLocked) {
		t.Errorf("a second server: %v, want fault.ErrLocked", err)
		s.Close()
	}
}

// A store on a server that is stopped, and started again some time later, does
// not notice more than time passing.
func TestAServerThatIsStartedAgain(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	st := retry.Wrap(g.open("web01", Admin, "r"), retry.Options{First: time.Millisecond, Longest: 20 * time.Millisecond})
	put := func(name string) {
		t.Helper()
		r, n := blobtest.Body([]byte(name))
		if err := st.Create(t.Context(), name, r, n); err != nil {
			t.Fatal(err)
		}
	}
	put("a")
	pin := g.srv.Pin()
	g.stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(50 * time.Millisecond)
		g.start()
	}()
	put("b")
	<-done
	if g.srv.Pin() != pin {
		t.Error("the server has another key")
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) != 2 {
		t.Errorf("%q, %v", names, err)
	}
}

// The secret is nowhere on the server's disk, and what is secret there only its
// owner may read.
func TestWhatTheServerKeeps(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	tok := g.token("web01", Backup, "r")
	secret := strings.Split(tok.Reveal(), ".")[2]
	err := filepath.WalkDir(g.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if path != g.dir && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if d.IsDir() {
			return nil
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(secret)) || bytes.Contains(b, tok.Secret.Reveal()) {
			t.Errorf("%s holds the secret", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
