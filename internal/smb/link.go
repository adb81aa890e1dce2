package smb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/cloudsoda/go-smb2"
)

// A link is one connection with its session, from sign-in to its end.
//
// The library may be called with a context that ends only when the link does:
// it keeps a request's buffer for the next one as soon as the context of the
// first ends, while that may still be on its way out.
type link struct {
	gate    *gate
	session *smb2.Session
	ctx     context.Context
	cancel  context.CancelFunc

	mu     sync.Mutex
	shares map[string]*smb2.Share
}

// dial makes a link within ctx.
func dial(ctx context.Context, t Target) (*link, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", t.address())
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("no answer: %w", context.Cause(ctx))
		}
		return nil, &lostError{err, false}
	}
	g := newGate(conn, t)
	l := &link{gate: g, shares: map[string]*smb2.Share{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, func() { l.fail(&lostError{fmt.Errorf("no answer: %w", context.Cause(ctx)), false}) })
	domain, user := t.account()
	dialer := smb2.Dialer{
		MaxCreditBalance: credits,
		Negotiator:       smb2.Negotiator{RequireMessageSigning: t.Protection == SignedOnly},
		Initiator:        &smb2.NTLMInitiator{Domain: domain, User: user, Password: string(t.Password.Reveal()), TargetSPN: "cifs/" + t.Host},
	}
	err = l.guard(func() error {
		l.session, err = dialer.DialConn(l.ctx, g, t.Host)
		return err
	})
	if !stop() && err == nil {
		err = g.failed()
	}
	if err == nil && !g.up.Load() {
		err = senseless("a session without a setup")
	}
	if err != nil {
		l.fail(err)
		if t.User != "" {
			err = fmt.Errorf("sign in as %q: %w", t.User, err)
		}
		return nil, err
	}
	l.session = l.session.WithContext(l.ctx)
	return l, nil
}

// fail ends the link for the reason err.
func (l *link) fail(err error) {
	l.gate.fail(err)
	l.cancel()
}

// guard runs f, a call of the library, and gives its error in our terms. The
// library's decoders are many, and what they read is the server's: a panic in
// one of them is the server's doing and ends the connection.
func (l *link) guard(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = senseless("an answer that makes no sense (%v)", r)
			l.fail(err)
		}
	}()
	err = f()
	if err == nil {
		return nil
	}
	if gone := l.gate.failed(); gone != nil {
		l.cancel() // the gate closes itself and knows of no context
		if lost := (*lostError)(nil); errors.As(gone, &lost) || errors.Is(err, context.Canceled) || isTransport(err) {
			return gone
		}
	}
	err = classify(err)
	if lost := (*lostError)(nil); errors.As(err, &lost) {
		l.fail(err)
	}
	return err
}

// call is guard for one request, which the host must answer within the
// patience; while it is busy sending, it has ten times that.
func (l *link) call(f func() error) error {
	var t *time.Timer
	begun := time.Now()
	patience := l.gate.patience
	var mu sync.Mutex // t is set before the timer's func looks at it
	mu.Lock()
	t = time.AfterFunc(patience, func() {
		mu.Lock()
		defer mu.Unlock()
		quiet := time.Since(time.Unix(0, l.gate.last.Load()))
		if quiet < patience && time.Since(begun) < 10*patience {
			t.Reset(patience - quiet + time.Millisecond)
			return
		}
		l.fail(&lostError{fmt.Errorf("no answer for %v", time.Since(begun).Round(time.Millisecond)), false})
	})
	mu.Unlock()
	defer t.Stop()
	return l.guard(f)
}

// share gives the share of that name, which is connected on first use.
func (l *link) share(name string) (*smb2.Share, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.shares[name]; s != nil {
		return s, nil
	}
	var s *smb2.Share
	err := l.call(func() (err error) {
		s, err = l.session.Mount(name)
		return err
	})
	if err != nil {
		return nil, err
	}
	s = s.WithContext(l.ctx)
	l.shares[name] = s
	return s, nil
}

// forget keeps a handle of a link that is gone from being closed when it is
// collected, which would wait for an answer in the collector's own thread.
func forget(f *smb2.File) {
	if f != nil {
		runtime.SetFinalizer(f, nil)
	}
}
