package reposerver

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// keysOf gives n keys of that series.
func keysOf(series uint32, n int) []blob.ClaimKey {
	keys := make([]blob.ClaimKey, n)
	for i := range keys {
		binary.LittleEndian.PutUint32(keys[i][:], series)
		binary.LittleEndian.PutUint32(keys[i][4:], uint32(i))
	}
	return keys
}

// claimAs makes a claim and says how many keys others are storing, and have
// stored.
func claimAs(t *testing.T, st *remote.Store, ticket byte, keys []blob.ClaimKey) (busy, in int) {
	t.Helper()
	busy, packs, err := st.Claim(t.Context(), blob.Ticket{ticket}, keys)
	if err != nil {
		t.Fatal(err)
	}
	return busy, len(packs)
}

func wantClaim(t *testing.T, st *remote.Store, ticket byte, keys []blob.ClaimKey, busy, in int) {
	t.Helper()
	if gotBusy, gotIn := claimAs(t, st, ticket, keys); gotBusy != busy || gotIn != in {
		t.Errorf("of %d keys others store %d and have stored %d, want %d and %d", len(keys), gotBusy, gotIn, busy, in)
	}
}

func settleAs(t *testing.T, st *remote.Store, ticket byte, in *[32]byte) {
	t.Helper()
	if err := st.Settle(t.Context(), blob.Ticket{ticket}, in); err != nil {
		t.Fatal(err)
	}
}

// nothingKept fails if any part of the claims has something left.
func nothingKept(t *testing.T, c *claims) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.keys)+len(c.open)+len(c.conns)+len(c.shares)+c.kept > 0 {
		t.Errorf("%d keys, %d tickets, %d connections, %d shares, %d counted are left", len(c.keys), len(c.open), len(c.conns), len(c.shares), c.kept)
	}
}

func TestClaims(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	web, db := g.open("web01", Backup, "r"), g.open("db01", Backup, "r")
	elsewhere := g.open("mail01", Backup, "s")
	keys := keysOf(1, 10)
	wantClaim(t, web, 1, keys[:5], 0, 0)
	wantClaim(t, elsewhere, 1, keys, 0, 0) // another repository
	wantClaim(t, db, 1, keys[3:], 2, 0)    // nothing is claimed
	wantClaim(t, web, 2, keys[5:], 0, 0)   // by the other one
	wantClaim(t, web, 1, keys[:5], 0, 0)   // once more: its answer was lost
	wantClaim(t, web, 3, keys[:1], 1, 0)   // of another session of the same token
	settleAs(t, db, 1, nil)                // what it never had, under the name of the other's ticket
	wantClaim(t, db, 1, keys, 10, 0)       // changed nothing
	if err := putIn(t, web, hashed("data/", "a pack"), "a pack"); err != nil {
		t.Fatal(err)
	}
	sum := blake3.Sum256([]byte("a pack"))
	settleAs(t, web, 1, &sum)
	_, in, err := db.Claim(t.Context(), blob.Ticket{1}, keys[:5])
	if err != nil || len(in) != 5 || in[4] != sum {
		t.Errorf("stored in %x, %v", in, err)
	}
	settleAs(t, web, 2, &[32]byte{9}) // which is not there
	wantClaim(t, db, 1, keys, 0, 5)
	wantClaim(t, web, 2, keys, 5, 5)
	settleAs(t, db, 1, nil) // it gives up
	settleAs(t, db, 1, nil)
	wantClaim(t, web, 2, append(keys[5:], keys[5:]...), 0, 0) // each twice
	settleAs(t, web, 2, nil)
	settleAs(t, elsewhere, 1, nil)
	g.srv.claims.mu.Lock()
	if c := g.srv.claims; c.kept != 5 || len(c.keys) != 5 || len(c.open) != 0 {
		t.Errorf("%d keys are left, %d counted, %d tickets", len(c.keys), c.kept, len(c.open))
	}
	g.srv.claims.mu.Unlock()

	reader := g.openAs(g.token("reader", Restore, "r"), "r")
	if _, _, err := reader.Claim(t.Context(), blob.Ticket{1}, keys); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a reader's claim: %v, want fault.ErrDenied", err)
	}
	if err := reader.Settle(t.Context(), blob.Ticket{1}, nil); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("a reader settles: %v, want fault.ErrDenied", err)
	}
}

// A claim ends with its client's connection, also if the client did not say so,
// and what it had stored stays known.
func TestAClientThatIsGone(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	web, db := g.open("web01", Backup, "r"), g.open("db01", Backup, "r")
	keys := keysOf(1, 10)
	wantClaim(t, web, 1, keys[:5], 0, 0)
	if err := putIn(t, web, hashed("data/", "a pack"), "a pack"); err != nil {
		t.Fatal(err)
	}
	sum := blake3.Sum256([]byte("a pack"))
	settleAs(t, web, 1, &sum)
	wantClaim(t, web, 2, keys[5:], 0, 0)
	wantClaim(t, db, 1, keys, 5, 5)
	web.Close()
	waitFor(t, "the claim to end", func() bool {
		busy, in := claimAs(t, db, 1, keys)
		return busy == 0 && in == 5
	})
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
	ran.Add(int64(claimFor - 1))
	wantClaim(t, db, 1, keys, 5, 5)
	ran.Add(1)
	wantClaim(t, db, 1, keys, 0, 5)
	settleAs(t, web, 2, &sum) // too late
	wantClaim(t, web, 3, keys, 5, 5)
	ran.Add(int64(settledFor))
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

// Of all that claim the same, and whatever else, at once, one at a time has it.
func TestOneClaimant(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	st := g.open("web01", Backup, "r")
	var holders atomic.Int32
	var wg sync.WaitGroup
	for n := range byte(8) {
		wg.Go(func() {
			// The common keys lie elsewhere in each one's claim.
			keys := append(append(keysOf(2+uint32(n), int(n)), keysOf(1, 20)...), keysOf(100+uint32(n), 3)...)
			for range 20 {
				busy, in, err := st.Claim(t.Context(), blob.Ticket{n}, keys)
				if err != nil || len(in) > 0 || busy != 0 && busy != 20 {
					t.Errorf("%d busy, %d stored, %v", busy, len(in), err)
					return
				}
				if busy > 0 {
					continue
				}
				if holders.Add(1) > 1 {
					t.Error("two have it")
				}
				time.Sleep(time.Millisecond)
				holders.Add(-1)
				if err := st.Settle(t.Context(), blob.Ticket{n}, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	nothingKept(t, g.srv.claims)
}
