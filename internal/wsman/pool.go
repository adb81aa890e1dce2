package wsman

import (
	"context"
	"sync"
	"time"
)

// A pool lends connections, each to one request at a time: what NTLM knows of
// a connection would not survive two.
type pool struct {
	places chan struct{} // one in it for each connection lent

	mu     sync.Mutex
	idle   []*conn // the last used is last
	closed bool
	in     bool  // somebody signed in once
	denied error // nobody ever did, and this is why
}

// borrow waits for a place and gives an idle connection, or nil for the caller
// to make one.
func (p *pool) borrow(ctx context.Context) (*conn, error) {
	select {
	case p.places <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for {
		p.mu.Lock()
		if p.closed || p.denied != nil {
			err := p.denied
			if p.closed {
				err = errClosed
			}
			p.mu.Unlock()
			<-p.places
			return nil, err
		}
		last := len(p.idle) - 1
		if last < 0 {
			p.mu.Unlock()
			return nil, nil
		}
		c := p.idle[last]
		p.idle = p.idle[:last]
		p.mu.Unlock()
		if c.alive(time.Now()) {
			return c, nil
		}
		c.close()
	}
}

// give takes a connection back, nil if there is none.
func (p *pool) give(c *conn) {
	if c != nil {
		p.mu.Lock()
		keep := !c.broken && !p.closed
		if keep {
			p.idle = append(p.idle, c)
		}
		p.mu.Unlock()
		if !keep {
			c.close()
		}
	}
	<-p.places
}

// signedIn remembers how a sign-in ended. A refusal before anybody was let in
// is final: a further try with the same wrong password brings the account
// nearer to being locked.
func (p *pool) signedIn(refused error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if refused == nil {
		p.in = true
	} else if !p.in {
		p.denied = refused
	}
}

func (p *pool) close() {
	p.mu.Lock()
	idle := p.idle
	p.idle, p.closed = nil, true
	p.mu.Unlock()
	for _, c := range idle {
		c.close()
	}
}
