package reposerver

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/claims"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// keysOf gives n keys of that series.
func keysOf(series uint32, n int) []blob.ClaimKey { return blobtest.ClaimKeys(series, n) }

func wantClaim(t *testing.T, st *remote.Store, ticket byte, keys []blob.ClaimKey, busy, in int) {
	t.Helper()
	blobtest.WantClaim(t, st, ticket, keys, busy, in)
}

func settleAs(t *testing.T, st *remote.Store, ticket byte, in *[32]byte) {
	t.Helper()
	if err := st.Settle(t.Context(), blob.Ticket{ticket}, in); err != nil {
		t.Fatal(err)
	}
}

// nothingKept fails if any claim is left.
func nothingKept(t *testing.T, c *claimed) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if keys, open := c.table.Len(); keys != 0 || open != 0 {
		t.Errorf("%d keys and %d open claims are left", keys, open)
	}
}

// What the suite of all claimers does not ask: repositories are apart, a pack
// counts only if it is there, and who may store nothing may claim nothing.
func TestClaims(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	web, db := g.open("web01", Backup, "r"), g.open("db01", Backup, "r")
	elsewhere := g.open("mail01", Backup, "s")
	keys := keysOf(1, 10)
	wantClaim(t, web, 1, keys, 0, 0)
	wantClaim(t, elsewhere, 1, keys, 0, 0)
	settleAs(t, web, 1, &[32]byte{9}) // which is not there
	wantClaim(t, db, 1, keys, 0, 0)
	settleAs(t, db, 1, nil)
	settleAs(t, elsewhere, 1, nil)
	nothingKept(t, g.srv.claims)

	reader := g.openAs(g.token("reader", Restore, "r"), "r")
	if _, _, err := reader.Claim(t.Context(), blob.Ticket{1}, keys); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a reader's claim: %v, want fault.ErrDenied", err)
	}
	if err := reader.Settle(t.Context(), blob.Ticket{1}, nil); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a reader settles: %v, want fault.ErrDenied", err)
	}
}

// Time ends what a client claimed, and later what is remembered of it. The
// machine's clock has no say.
func TestClaimsEnd(t *testing.T) {
	var ran atomic.Int64
	g := serve(t, Options{ImmutableFor: -1, since: func(time.Time) time.Duration { return time.Duration(ran.Load()) }})
	web, db := g.open("web01", Backup, "r"), g.open("db01", Backup, "r")
	keys := keysOf(1, 10)
	if err := putIn(t, web, hashed("data/", "a pack"), "a pack"); err != nil {
		t.Fatal(err)
	}
	sum := blake3.Sum256([]byte("a pack"))
	wantClaim(t, web, 1, keys[:5], 0, 0)
	settleAs(t, web, 1, &sum)
	wantClaim(t, web, 2, keys[5:], 0, 0)
	ran.Add(int64(claims.OpenFor - 1))
	wantClaim(t, db, 1, keys, 5, 5)
	ran.Add(1)
	wantClaim(t, db, 1, keys, 0, 5)
	settleAs(t, web, 2, &sum) // too late
	wantClaim(t, web, 3, keys, 5, 5)
	ran.Add(int64(claims.SettledFor))
	wantClaim(t, web, 3, keys, 0, 0)
	settleAs(t, web, 3, nil)
	nothingKept(t, g.srv.claims)
}

// One client cannot take all the room, and who finds none is told nothing worse
// than that he may store.
func TestRoomForClaims(t *testing.T) {
	few := usual
	few.claims, few.claimsPerName = 25, 10
	g := serve(t, Options{ImmutableFor: -1, limit: few})
	greedy, web, db := g.open("greedy", Backup, "r"), g.open("web01", Backup, "r"), g.open("db01", Backup, "r")
	if err := putIn(t, web, hashed("data/", "a pack"), "a pack"); err != nil {
		t.Fatal(err)
	}
	sum := blake3.Sum256([]byte("a pack"))
	wantClaim(t, greedy, 1, keysOf(1, 11), 0, 0) // too many
	wantClaim(t, greedy, 2, keysOf(1, 6), 0, 0)
	wantClaim(t, greedy, 3, keysOf(2, 5), 0, 0) // too many together
	wantClaim(t, web, 1, keysOf(2, 6), 0, 0)
	wantClaim(t, db, 1, keysOf(1, 7), 6, 0)
	settleAs(t, web, 1, &sum)
	wantClaim(t, db, 1, keysOf(2, 6), 0, 6)
	wantClaim(t, web, 2, keysOf(3, 10), 0, 0) // at the cost of what it has settled
	wantClaim(t, db, 1, keysOf(2, 6), 0, 0)
	wantClaim(t, greedy, 4, keysOf(4, 4), 0, 0) // the server is full
	wantClaim(t, web, 3, keysOf(4, 4), 0, 0)
	for i := range byte(5) {
		settleAs(t, greedy, i, nil)
		settleAs(t, web, i, nil)
		settleAs(t, db, i, nil)
	}
	nothingKept(t, g.srv.claims)
}

// A server that was started again knows of no claims, and no client minds.
func TestClaimsEndWithTheServer(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	web, db := g.open("web01", Backup, "r"), g.open("db01", Backup, "r")
	keys := keysOf(1, 10)
	wantClaim(t, web, 1, keys, 0, 0)
	wantClaim(t, db, 1, keys, 10, 0)
	web.Close() // so that nobody waits for idle connections
	db.Close()
	g.stop()
	g.start()
	wantClaim(t, db, 1, keys, 0, 0)
	settleAs(t, web, 1, &[32]byte{})
	wantClaim(t, web, 1, keys, 10, 0)
}
