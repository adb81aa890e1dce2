package reposerver

import (
	"container/list"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

const (
	// claimFor is how long somebody may take to store what he claimed, by the
	// monotonic clock; longer than anybody waits for him.
	claimFor = 2 * time.Minute
	// settledFor is how long it is remembered what lies in which pack: until
	// clients have seen the index object that says so.
	settledFor = 10 * time.Minute
)

// connKey is where a request's context has its connection.
type connKey struct{}

// claims is what clients are storing right now, and what they stored a moment
// ago, so that two do not store the same. It is in memory alone: nothing may
// rely on it.
type claims struct {
	max, perName int
	since        func(time.Time) time.Duration
	begun        time.Time

	mu     sync.Mutex
	keys   map[claimKey]*claim
	open   map[ticketKey]*claim
	conns  map[net.Conn]map[*claim]bool
	shares map[string]*share // by token
	kept   int               // keys of all shares
}

type claimKey struct {
	repo string
	key  blob.ClaimKey
}

type ticketKey struct {
	repo, token string
	ticket      blob.Ticket
}

// A claim is open until it is settled, its time is over, or its connection is
// gone.
type claim struct {
	of      ticketKey
	keys    []blob.ClaimKey
	conn    net.Conn
	pack    [32]byte
	settled bool
	until   time.Duration
	queue   *list.List // of its share
	place   *list.Element
}

// A share is what one token's clients keep.
type share struct {
	keys          int
	open, settled list.List // oldest first
}

func newClaims(l limits, since func(time.Time) time.Duration) *claims {
	return &claims{
		max: l.claims, perName: l.claimsPerName, since: since, begun: time.Now(),
		keys: map[claimKey]*claim{}, open: map[ticketKey]*claim{}, conns: map[net.Conn]map[*claim]bool{}, shares: map[string]*share{},
	}
}

// claim answers what each key is, and gives those that are free to the ticket if
// nobody is storing any of them.
func (c *claims) claim(of ticketKey, keys []blob.ClaimKey, conn net.Conn) *remote.Claimed {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire()
	if was := c.open[of]; was != nil {
		c.drop(was)
	}
	answer := &remote.Claimed{}
	busy := false
	free := make([]blob.ClaimKey, 0, len(keys))
	for _, k := range keys {
		switch has := c.keys[claimKey{of.repo, k}]; {
		case has == nil:
			answer.Free()
			free = append(free, k)
		case has.settled:
			answer.In(has.pack)
		default:
			answer.Busy()
			busy = true
		}
	}
	if !busy && len(free) > 0 && c.room(of.token, len(free)) {
		c.keep(&claim{of: of, keys: free, conn: conn})
	}
	return answer
}

// room makes room for n keys of a token, at the cost of what it settled longest
// ago. Where there is none a claim is not kept, and others store the same.
func (c *claims) room(token string, n int) bool {
	s := c.shares[token]
	for s != nil && (s.keys+n > c.perName || c.kept+n > c.max) {
		oldest := s.settled.Front()
		if oldest == nil {
			break
		}
		c.drop(oldest.Value.(*claim))
		s = c.shares[token]
	}
	return n <= c.perName && c.kept+n <= c.max && (s == nil || s.keys+n <= c.perName)
}

func (c *claims) keep(cl *claim) {
	s := c.shares[cl.of.token]
	if s == nil {
		s = &share{}
		c.shares[cl.of.token] = s
	}
	// A key that is named twice counts once.
	mine := cl.keys[:0]
	for _, k := range cl.keys {
		if at := (claimKey{cl.of.repo, k}); c.keys[at] == nil {
			c.keys[at] = cl
			mine = append(mine, k)
		}
	}
	cl.keys = mine
	s.keys += len(mine)
	c.kept += len(mine)
	c.open[cl.of] = cl
	if c.conns[cl.conn] == nil {
		c.conns[cl.conn] = map[*claim]bool{}
	}
	c.conns[cl.conn][cl] = true
	cl.until = c.since(c.begun) + claimFor
	cl.queue = &s.open
	cl.place = cl.queue.PushBack(cl)
}

// settle moves a claim to those that say where something lies, if pack is not
// nil, and otherwise ends it. One that is over is no error.
func (c *claims) settle(of ticketKey, pack *[32]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire()
	cl := c.open[of]
	if cl == nil {
		return
	}
	if pack == nil {
		c.drop(cl)
		return
	}
	c.shut(cl)
	cl.pack, cl.settled = *pack, true
	cl.until = c.since(c.begun) + settledFor
	cl.queue.Remove(cl.place)
	cl.queue = &c.shares[of.token].settled
	cl.place = cl.queue.PushBack(cl)
}

// shut makes cl no longer open.
func (c *claims) shut(cl *claim) {
	delete(c.open, cl.of)
	delete(c.conns[cl.conn], cl)
	if len(c.conns[cl.conn]) == 0 {
		delete(c.conns, cl.conn)
	}
	cl.conn = nil
}

// drop forgets cl.
func (c *claims) drop(cl *claim) {
	if !cl.settled {
		c.shut(cl)
	}
	for _, k := range cl.keys {
		delete(c.keys, claimKey{cl.of.repo, k})
	}
	s := c.shares[cl.of.token]
	cl.queue.Remove(cl.place)
	c.kept -= len(cl.keys)
	if s.keys -= len(cl.keys); s.open.Len() == 0 && s.settled.Len() == 0 {
		delete(c.shares, cl.of.token)
	}
}

// expire drops what is too old.
func (c *claims) expire() {
	now := c.since(c.begun)
	for _, s := range c.shares {
		for _, queue := range []*list.List{&s.open, &s.settled} {
			for e := queue.Front(); e != nil && e.Value.(*claim).until <= now; e = queue.Front() {
				c.drop(e.Value.(*claim))
			}
		}
	}
}

// hangUp ends what was claimed over a connection that is gone.
func (c *claims) hangUp(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for cl := range c.conns[conn] {
		c.drop(cl)
	}
}

// packName is the name of the pack with that hash, as in
// docs/format/repository.md.
func packName(sum [32]byte) string {
	h := hex.EncodeToString(sum[:])
	return "data/" + h[:2] + "/" + h
}

// smallBody reads the body of a request about claims, of at most so many bytes.
func (x *exchange) smallBody(most int64) ([]byte, error) {
	if x.grant.Role != Admin && x.grant.Role != Backup {
		return nil, fmt.Errorf("a token of role %s may not claim: %w", x.grant.Role, fault.ErrDenied)
	}
	size := x.r.ContentLength
	switch {
	case size < 0:
		return nil, refuse(http.StatusLengthRequired, "the length of the body must be said before")
	case size > most:
		return nil, refuse(http.StatusRequestEntityTooLarge, "%d bytes are too many: at most %d", size, most)
	}
	b := make([]byte, 0, min(size, smallBuffer))
	for int64(len(b)) < size {
		// What is allocated grows with what arrives.
		if err := x.rc.SetReadDeadline(time.Now().Add(x.s.limit.stall)); err != nil {
			return nil, err
		}
		at := len(b)
		b = append(b, make([]byte, min(size-int64(at), smallBuffer))...)
		if _, err := io.ReadFull(x.r.Body, b[at:]); err != nil {
			return nil, refuse(http.StatusRequestTimeout, "the body did not arrive: %v", err)
		}
	}
	return b, nil
}

// claimKeys answers a claim.
func (x *exchange) claimKeys() error {
	b, err := x.smallBody(remote.MaxClaimBytes)
	if err != nil {
		return err
	}
	ticket, keys, err := remote.ParseClaim(b)
	if err != nil {
		return refuse(http.StatusBadRequest, "%v", err)
	}
	conn, _ := x.r.Context().Value(connKey{}).(net.Conn)
	answer := x.s.claims.claim(ticketKey{x.to.Repo, x.grant.Name, ticket}, keys, conn).Append(nil)
	x.w.Header().Set("Content-Type", "application/octet-stream")
	x.w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	x.sent = true
	return x.write(answer)
}

// settle ends a claim. A pack that is not there was not stored.
func (x *exchange) settle() error {
	b, err := x.smallBody(remote.MaxClaimBytes)
	if err != nil {
		return err
	}
	ticket, pack, err := remote.ParseSettle(b)
	if err != nil {
		return refuse(http.StatusBadRequest, "%v", err)
	}
	if pack != nil {
		switch _, err := x.store.Size(x.r.Context(), packName(*pack)); {
		case errors.Is(err, fault.ErrNotFound):
			pack = nil
		case err != nil:
			return err
		}
	}
	x.s.claims.settle(ticketKey{x.to.Repo, x.grant.Name, ticket}, pack)
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}
