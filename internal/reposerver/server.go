// Package reposerver lets other machines keep repositories in a directory of
// this one, without being able to take away what is there.
//
// It shows each repository as a blob.Store, over HTTP and TLS, to whoever has a
// token for it. Policy.go says what a token's role may do with which names;
// docs/design/serve.md is the specification of what is said on the wire, and
// says what an attacker can do who has which secret.
package reposerver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// Options say what to serve. Dir is needed.
type Options struct {
	// Dir holds a directory for each repository, and the server's own.
	Dir string
	// ImmutableFor is how long nobody may delete or overwrite, over the
	// network, what restore points are made of. Negative keeps what was in
	// force the last time; a shorter time than that is refused with a
	// ShorterError, unless Shorten is set.
	ImmutableFor time.Duration
	Shorten      bool
	// Quota is how many bytes backup clients may store in each repository, 0 for
	// no bound. It holds for as long as this server runs.
	Quota int64
	// Log hears of what was refused, and of what went wrong.
	Log *slog.Logger
	// Grace is how long requests under way may take to end when the server is
	// told to stop: 30 seconds by default.
	Grace time.Duration

	// tests:
	now   func() time.Time              // the machine's clock
	since func(time.Time) time.Duration // its monotonic clock
	limit limits
}

// limits bound what clients may use up.
type limits struct {
	conns, connsPerHost       int
	requests, requestsPerName int
	stall                     time.Duration // for a piece of a body to arrive or to leave
	page                      int           // of a listing, in objects
	claims, claimsPerName     int           // keys that are kept
}

var usual = limits{
	conns: 1024, connsPerHost: 256, requests: 256, requestsPerName: 64, stall: time.Minute, page: 10_000,
	claims: 1 << 20, claimsPerName: 1 << 18,
}

// A Server serves one directory. Only one may do so at a time.
type Server struct {
	dir     string
	state   *file.Store
	tokens  *Tokens
	cert    tls.Certificate
	clock   *clock
	held    time.Duration
	log     *slog.Logger
	grace   time.Duration
	limit   limits
	release func()
	noise   quiet
	quota   quotas
	claims  *claimed

	mu    sync.Mutex
	repos map[string]*file.Store
	busy  map[string]int // requests under way by token
	total int
}

// Open prepares to serve a directory, which it makes if need be. It gives
// fault.ErrLocked if another server does.
func Open(ctx context.Context, o Options) (*Server, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, log: o.Log, grace: o.Grace, limit: o.limit, repos: map[string]*file.Store{}, busy: map[string]int{}, quota: quotas{max: o.Quota}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.grace <= 0 {
		s.grace = 30 * time.Second
	}
	if s.limit == (limits{}) {
		s.limit = usual
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.since == nil {
		o.since = time.Since
	}
	s.claims = newClaims(s.limit, o.since)
	if s.state, err = openState(dir); err != nil {
		return nil, err
	}
	if err := s.open(ctx, o); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) open(ctx context.Context, o Options) (err error) {
	if s.release, err = s.state.Lock(ctx, "server", true); err != nil {
		return fmt.Errorf("another server serves %s: %w", s.dir, err)
	}
	if s.cert, err = certificate(ctx, s.state); err != nil {
		return err
	}
	s.tokens = &Tokens{s.state, remote.PinOf(s.cert.Leaf)}
	if s.clock, err = openClock(ctx, s.state, o.now(), o.since); err != nil {
		return err
	}
	if s.held, err = settlePolicy(ctx, s.state, o.ImmutableFor, o.Shorten); err != nil {
		return err
	}
	return s.forgetSessions(ctx)
}

// Pin is by what clients know this server.
func (s *Server) Pin() remote.Pin { return s.tokens.pin }

// ImmutableFor is what is in force.
func (s *Server) ImmutableFor() time.Duration { return s.held }

// Serve answers on l until ctx ends, then lets requests under way end, for as
// long as the grace lasts, and returns nil. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler: s,
		TLSConfig: &tls.Config{
			MinVersion:   tls.VersionTLS13,
			Certificates: []tls.Certificate{s.cert},
			NextProtos:   []string{"http/1.1"},
		},
		// Handlers move the two deadlines on while a body makes progress.
		ReadTimeout:       s.limit.stall,
		WriteTimeout:      s.limit.stall,
		ReadHeaderTimeout: min(10*time.Second, s.limit.stall),
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          log.New(serverNoise{s}, "", 0),
		// What a client claims ends with its connection.
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				s.claims.hangUp(c)
			}
		},
		// HTTP/1.1 only: see docs/design/serve.md.
		Protocols: new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(true)
	behindCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	var behind sync.WaitGroup
	behind.Go(func() {
		s.clock.run(behindCtx, func(err error) { s.log.Error("the server's clock could not be saved", "error", err) })
	})
	behind.Go(func() { s.sweep(behindCtx) })
	ended := make(chan error, 1)
	go func() { ended <- srv.ServeTLS(limitListener(l, s.limit.conns, s.limit.connsPerHost), "", "") }()
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.grace)
		if shutErr := srv.Shutdown(grace); shutErr != nil {
			s.log.Warn("requests did not end in time and were cut off", "after", s.grace)
			srv.Close()
		}
		cancel()
		<-ended
	}
	stop()
	behind.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, s.clock.save(context.WithoutCancel(ctx)))
}

// Close lets go of the directory. It belongs behind Serve.
func (s *Server) Close() error {
	var errs []error
	for _, st := range s.repos {
		errs = append(errs, st.Close())
	}
	if s.release != nil {
		s.release()
	}
	return errors.Join(append(errs, s.state.Close())...)
}

// repository gives the store of one repository, whose directory must exist.
func (s *Server) repository(name string) (*file.Store, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.repos[name]; st != nil {
		return st, nil
	}
	st, err := file.OpenStamped(filepath.Join(s.dir, name), s.clock.now)
	if errors.Is(err, fault.ErrNotFound) {
		return nil, errNoRepository
	}
	if err != nil {
		return nil, err
	}
	s.repos[name] = st
	return st, nil
}

var errNoRepository = fmt.Errorf("no such repository on this server: %w", fault.ErrNotFound)

// makeRepository makes the directory of a repository.
func (s *Server) makeRepository(name string) error {
	st, err := file.Create(filepath.Join(s.dir, name))
	if err != nil {
		return err
	}
	return st.Close()
}

// enter counts a request of a token in, or says that there are too many.
func (s *Server) enter(token string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= s.limit.requests || s.busy[token] >= s.limit.requestsPerName {
		return false
	}
	s.total++
	s.busy[token]++
	return true
}

func (s *Server) leave(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.busy[token]--; s.busy[token] == 0 {
		delete(s.busy, token)
	}
}

// serverNoise takes what net/http has to say: handshakes that strangers broke
// off, mostly.
type serverNoise struct{ s *Server }

func (n serverNoise) Write(p []byte) (int, error) {
	if n.s.noise.may() {
		n.s.log.Debug("connection", "error", strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

// Repositories are the names of the directories that are served.
func (s *Server) Repositories() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if remote.CheckRepo(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
