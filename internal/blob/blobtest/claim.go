package blobtest

import (
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
)

// RunClaimer runs the suite of a blob.Claimer. Create makes an empty store for
// each part of it and gives what opens that as one writer more, and cleans up
// with t; close ends a writer, and gives an error only if that is a fault.
func RunClaimer(t *testing.T, create func(t *testing.T) (open func() blob.Store)) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, func() blob.Store)
	}{
		{"all keys or none", claimAllOrNone},
		{"a ticket that claims again", claimAgain},
		{"what is settled", claimSettled},
		{"who is gone", claimantGone},
		{"one claimant at a time", oneClaimant},
		{"no claim is an object", claimsAreNoObjects},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) { c.run(t, create(t)) })
	}
}

// ClaimKeys gives n keys of that series.
func ClaimKeys(series uint32, n int) []blob.ClaimKey {
	keys := make([]blob.ClaimKey, n)
	for i := range keys {
		binary.LittleEndian.PutUint32(keys[i][:], series)
		binary.LittleEndian.PutUint32(keys[i][4:], uint32(i))
	}
	return keys
}

// WantClaim makes a claim and fails unless that many keys others are storing,
// and have stored.
func WantClaim(t *testing.T, st blob.Store, ticket byte, keys []blob.ClaimKey, busy, in int) map[int][32]byte {
	t.Helper()
	gotBusy, packs, err := st.(blob.Claimer).Claim(t.Context(), blob.Ticket{ticket}, keys)
	if err != nil {
		t.Fatal(err)
	}
	if gotBusy != busy || len(packs) != in {
		t.Errorf("of %d keys others store %d and have stored %d, want %d and %d", len(keys), gotBusy, len(packs), busy, in)
	}
	return packs
}

func settle(t *testing.T, st blob.Store, ticket byte, in *[32]byte) {
	t.Helper()
	if err := st.(blob.Claimer).Settle(t.Context(), blob.Ticket{ticket}, in); err != nil {
		t.Fatal(err)
	}
}

// putPack stores an object named as packs are.
func putPack(t *testing.T, st blob.Store, data string) (sum [32]byte) {
	t.Helper()
	sum = blake3.Sum256([]byte(data))
	h := hex.EncodeToString(sum[:])
	mustPut(t, st, "data/"+h[:2]+"/"+h, []byte(data))
	return sum
}

func claimAllOrNone(t *testing.T, open func() blob.Store) {
	a, b := open(), open()
	keys := ClaimKeys(1, 10)
	WantClaim(t, a, 1, keys[:5], 0, 0)
	WantClaim(t, b, 1, keys[3:], 2, 0) // nothing is claimed
	WantClaim(t, a, 2, keys[5:], 0, 0) // by the other one
	WantClaim(t, a, 3, keys[:1], 1, 0) // of another ticket of the same writer
	WantClaim(t, b, 1, keys, 10, 0)
	for _, n := range []int{0, blob.MaxClaims + 1} {
		if _, _, err := a.(blob.Claimer).Claim(t.Context(), blob.Ticket{4}, ClaimKeys(2, n)); err == nil {
			t.Errorf("%d keys are no error", n)
		}
	}
	WantClaim(t, b, 4, ClaimKeys(2, blob.MaxClaims), 0, 0)
	WantClaim(t, a, 4, ClaimKeys(2, blob.MaxClaims)[blob.MaxClaims-1:], 1, 0)
}

func claimAgain(t *testing.T, open func() blob.Store) {
	a, b := open(), open()
	keys := ClaimKeys(1, 10)
	WantClaim(t, a, 1, keys[:5], 0, 0)
	WantClaim(t, a, 1, keys[:5], 0, 0) // its answer was lost
	WantClaim(t, b, 1, keys, 5, 0)
	WantClaim(t, a, 1, keys[3:], 0, 0)
	WantClaim(t, b, 1, keys[:3], 0, 0) // were let go
	WantClaim(t, a, 1, keys, 3, 0)     // lets go of all
	WantClaim(t, b, 2, keys[3:], 0, 0)
	settle(t, b, 1, nil)
	WantClaim(t, a, 1, append(keys[:3:3], keys[:3]...), 0, 0) // each twice
	WantClaim(t, b, 1, keys, 10, 0)
}

func claimSettled(t *testing.T, open func() blob.Store) {
	a, b := open(), open()
	keys := ClaimKeys(1, 10)
	one, two := putPack(t, a, "one pack"), putPack(t, a, "two pack")
	settle(t, b, 1, nil) // never had
	settle(t, b, 1, &one)
	WantClaim(t, a, 1, keys[:5], 0, 0)
	WantClaim(t, a, 2, keys[5:], 0, 0)
	settle(t, b, 1, nil) // under the name of the other's ticket
	settle(t, b, 1, &one)
	WantClaim(t, b, 1, keys, 10, 0) // changed nothing
	settle(t, a, 1, &one)
	settle(t, a, 1, &two)          // is over
	WantClaim(t, b, 1, keys, 5, 5) // and nothing claimed
	WantClaim(t, a, 2, keys, 0, 5) // the rest is its own
	WantClaim(t, b, 1, keys, 5, 5) // still
	settle(t, a, 2, &two)
	packs := WantClaim(t, b, 1, keys, 0, 10)
	if packs[0] != one || packs[4] != one || packs[5] != two || packs[9] != two {
		t.Errorf("they are in %x", packs)
	}
	WantClaim(t, open(), 1, keys, 0, 10) // also for who comes now
	more := ClaimKeys(2, 4)
	WantClaim(t, b, 1, append(keys[:5:5], more...), 0, 5) // the others are claimed
	WantClaim(t, a, 3, more, 4, 0)
	settle(t, b, 1, nil) // it gave up
	WantClaim(t, a, 3, more, 0, 0)
}

func claimantGone(t *testing.T, open func() blob.Store) {
	a, b := open(), open()
	keys := ClaimKeys(1, 10)
	pack := putPack(t, a, "a pack")
	WantClaim(t, b, 1, ClaimKeys(2, 1), 0, 0)
	WantClaim(t, a, 1, keys[:5], 0, 0)
	settle(t, a, 1, &pack)
	WantClaim(t, a, 2, keys[5:], 0, 0)
	WantClaim(t, b, 2, keys, 5, 5)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		busy, in, err := b.(blob.Claimer).Claim(t.Context(), blob.Ticket{2}, keys)
		if err != nil {
			t.Fatal(err)
		}
		if busy == 0 {
			if len(in) != 5 {
				t.Errorf("%d keys that were stored are known, want 5", len(in))
			}
			return
		}
		if time.Since(begun) > 5*time.Minute {
			t.Fatal("the claim of one who is gone goes on")
		}
	}
}

func oneClaimant(t *testing.T, open func() blob.Store) {
	var holders atomic.Int32
	var wg sync.WaitGroup
	stores := []blob.Store{open(), open(), open()}
	for n := range byte(9) {
		c := stores[int(n)%len(stores)].(blob.Claimer)
		wg.Go(func() {
			// The common keys lie elsewhere in each one's claim.
			keys := slices.Concat(ClaimKeys(2+uint32(n), int(n)), ClaimKeys(1, 20), ClaimKeys(100+uint32(n), 3))
			for range 20 {
				busy, in, err := c.Claim(t.Context(), blob.Ticket{n}, keys)
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
				if err := c.Settle(t.Context(), blob.Ticket{n}, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func claimsAreNoObjects(t *testing.T, open func() blob.Store) {
	a := open()
	WantClaim(t, a, 1, ClaimKeys(1, 10), 0, 0)
	if names, err := Names(t.Context(), a, ""); err != nil || len(names) > 0 {
		t.Errorf("claims are listed as objects: %q, %v", names, err)
	}
}
