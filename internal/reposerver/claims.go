package reposerver

import (
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
	"github.com/backstay/backstay/internal/blob/claims"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// connKey is where a request's context has its connection.
type connKey struct{}

// claimed is what clients are storing right now, and what they stored a moment
// ago, so that two do not store the same. It is in memory alone, and apart from
// what writers in the repository's directory claim.
type claimed struct {
	mu    sync.Mutex
	table *claims.Table[claimKey, ticketKey, net.Conn]
}

type claimKey struct {
	repo string
	key  blob.ClaimKey
}

type ticketKey struct {
	repo, token string
	ticket      blob.Ticket
}

func newClaims(l limits, since func(time.Time) time.Duration) *claimed {
	begun := time.Now()
	return &claimed{table: claims.NewTable[claimKey, ticketKey, net.Conn](
		claims.Limits{Keys: l.claims, PerShare: l.claimsPerName},
		func() time.Duration { return since(begun) },
	)}
}

// claim answers what each key is, and gives those that are free to the ticket if
// nobody is storing any of them.
func (c *claimed) claim(of ticketKey, keys []blob.ClaimKey, conn net.Conn) *remote.Claimed {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.table.Expire()
	c.table.End(of)
	answer := &remote.Claimed{}
	busy := false
	free := make([]claimKey, 0, len(keys))
	for _, k := range keys {
		at := claimKey{of.repo, k}
		switch state, _, pack := c.table.Get(at); state {
		case claims.Free:
			answer.Free()
			free = append(free, at)
		case claims.In:
			answer.In(pack)
		case claims.Busy:
			answer.Busy()
			busy = true
		}
	}
	if !busy {
		c.table.Begin(of, conn, of.token, free)
	}
	return answer
}

// settle moves a claim to those that say where something lies, if pack is not
// nil, and otherwise ends it. One that is over is no error.
func (c *claimed) settle(of ticketKey, pack *[32]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.table.Expire()
	if pack == nil {
		c.table.End(of)
		return
	}
	c.table.Settle(of, *pack)
}

// hangUp ends what was claimed over a connection that is gone.
func (c *claimed) hangUp(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.table.HangUp(conn)
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
