package claims_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/claims"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/fault"
)

const name = "claims"

func newLog(t testing.TB, disk *filetest.Disk) *claims.Log {
	l := claims.NewLog(func() (claims.File, error) { return disk.Share(name) }, func() error { return disk.Remove(name) })
	t.Cleanup(func() { l.Close() })
	return l
}

func wantClaim(t testing.TB, l *claims.Log, ticket byte, keys []blob.ClaimKey, busy, in int) {
	t.Helper()
	gotBusy, packs, err := l.Claim(t.Context(), blob.Ticket{ticket}, keys)
	if err != nil {
		t.Fatal(err)
	}
	if gotBusy != busy || len(packs) != in {
		t.Errorf("of %d keys others store %d and have stored %d, want %d and %d", len(keys), gotBusy, len(packs), busy, in)
	}
}

func settle(t testing.TB, l *claims.Log, ticket byte, in *[32]byte) {
	t.Helper()
	if err := l.Settle(t.Context(), blob.Ticket{ticket}, in); err != nil {
		t.Fatal(err)
	}
}

// content is what the file holds.
func content(t testing.TB, disk *filetest.Disk) []byte {
	t.Helper()
	f, err := disk.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	e, err := disk.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, e.Bytes)
	if _, err := f.ReadAt(b, 0); err != nil && len(b) > 0 {
		t.Fatal(err)
	}
	return b
}

// fill makes the file hold b.
func fill(t testing.TB, disk *filetest.Disk, b []byte) {
	t.Helper()
	f, err := disk.Share(name)
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// One who is stopped while he reads and writes holds up the others for a moment,
// and when he goes on nobody reads what he writes.
func TestAStoppedOwnerOfTheLock(t *testing.T) {
	was := claims.StuckAfter(50 * time.Millisecond)
	defer claims.StuckAfter(was)
	disk := filetest.New()
	stopped, others := newLog(t, disk), []*claims.Log{newLog(t, disk), newLog(t, disk)}
	keys := blobtest.ClaimKeys(1, 5)
	wantClaim(t, stopped, 1, keys, 0, 0)
	wantClaim(t, others[0], 1, keys, 5, 0)

	var stop atomic.Bool
	inside, goOn := make(chan struct{}), make(chan struct{})
	disk.Hook(func(op, _ string) error {
		if op == "sharewrite" && stop.CompareAndSwap(true, false) {
			close(inside)
			<-goOn
		}
		return nil
	})
	stop.Store(true)
	done := make(chan error)
	go func() { done <- stopped.Settle(t.Context(), blob.Ticket{1}, &[32]byte{1}) }()
	<-inside
	wantClaim(t, others[0], 1, keys, 0, 0) // what was in the file is forgotten
	wantClaim(t, others[1], 1, keys, 5, 0)
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
	wantClaim(t, others[1], 1, keys, 5, 0)
	wantClaim(t, stopped, 2, keys, 5, 0) // with the others again
	settle(t, others[0], 1, &[32]byte{2})
	wantClaim(t, stopped, 2, keys, 0, 5)
}

// Who waits for the file waits no longer than his context.
func TestWaitingForTheFileEnds(t *testing.T) {
	disk := filetest.New()
	l := newLog(t, disk)
	wantClaim(t, l, 1, blobtest.ClaimKeys(1, 1), 0, 0)
	f, err := disk.Share(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Lock(claims.WriteAt); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, _, err := l.Claim(ctx, blob.Ticket{1}, blobtest.ClaimKeys(1, 1)); err == nil || errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("%v, want the end of the context, and another try", err)
	}
	if err := f.Unlock(claims.WriteAt); err != nil {
		t.Fatal(err)
	}
	wantClaim(t, l, 1, blobtest.ClaimKeys(1, 1), 0, 0)
}

// A file does not grow for ever, and who did not look for long finds his way.
func TestALogIsWrittenAnew(t *testing.T) {
	disk := filetest.New()
	writer, seldom := newLog(t, disk), newLog(t, disk)
	wantClaim(t, seldom, 1, blobtest.ClaimKeys(1, 5), 0, 0)
	const each = 4000
	rounds := 2 * uint32(claims.SharedKeys/each)
	if testing.Short() {
		rounds /= 4
	}
	var most int64
	for i := range rounds {
		wantClaim(t, writer, 1, blobtest.ClaimKeys(100+i, each), 0, 0)
		settle(t, writer, 1, &[32]byte{byte(i)})
		e, err := disk.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, e.Bytes)
	}
	if most > claims.MostBytes || most < claims.AnewAt {
		t.Errorf("the file had %d bytes", most)
	}
	wantClaim(t, writer, 2, blobtest.ClaimKeys(1, 5), 5, 0) // it is still open
	wantClaim(t, seldom, 2, blobtest.ClaimKeys(100+rounds-1, each), 0, each)
	wantClaim(t, newLog(t, disk), 2, blobtest.ClaimKeys(1, 5), 5, 0)
	if n := writer.Counted(); n > claims.SharedKeys {
		t.Errorf("%d keys are kept", n)
	}
}

// Time ends what one who is stopped was storing, by each one's own clock.
func TestAStoppedClaimant(t *testing.T) {
	disk := filetest.New()
	stopped, other := newLog(t, disk), newLog(t, disk)
	var clock time.Duration
	other.SetNow(func() time.Duration { return clock })
	keys := blobtest.ClaimKeys(1, 5)
	wantClaim(t, stopped, 1, keys, 0, 0)
	clock = time.Hour
	wantClaim(t, other, 1, keys, 5, 0) // for him it began now
	clock += claims.OpenFor - 1
	wantClaim(t, other, 1, keys, 5, 0)
	clock++
	wantClaim(t, other, 1, keys, 0, 0)
	wantClaim(t, stopped, 2, keys, 5, 0) // he goes on, and knows
	settle(t, stopped, 1, &[32]byte{1})
	settle(t, other, 1, &[32]byte{2})
	_, in, err := stopped.Claim(t.Context(), blob.Ticket{2}, keys)
	if err != nil || len(in) != 5 || in[0] != [32]byte{2} {
		t.Errorf("they are in %x: %v", in, err)
	}
}

// What dead processes left counts for nothing if all of them are dead.
func TestNobodyLives(t *testing.T) {
	disk := filetest.New()
	a, b := newLog(t, disk), newLog(t, disk)
	keys := blobtest.ClaimKeys(1, 5)
	wantClaim(t, a, 1, keys, 0, 0)
	settle(t, a, 1, &[32]byte{1})
	wantClaim(t, b, 1, blobtest.ClaimKeys(2, 5), 0, 0)
	a.Close()
	wantClaim(t, newLog(t, disk), 1, keys, 0, 5) // somebody does
	b.Close()
	disk = disk.Reboot(rand.New(rand.NewPCG(1, 0)))
	wantClaim(t, newLog(t, disk), 1, keys, 0, 0)
}

// Whatever happens to the file, with the next claim it is one again.
func TestAFileThatMakesNoSense(t *testing.T) {
	keys := blobtest.ClaimKeys(1, 5)
	disk := filetest.New()
	l := newLog(t, disk)
	wantClaim(t, l, 1, keys, 0, 0)
	good := content(t, disk)
	for _, c := range []struct {
		name string
		b    []byte
		busy int // of those that l had claimed
	}{
		{"empty", nil, 0},
		{"half a head", good[:9], 0},
		{"no head", bytes.Repeat([]byte{0xff}, 100), 0},
		{"of another version", slices.Concat([]byte("bstclm02"), good[8:]), 0},
		{"half a record", slices.Concat(good, good[16:40]), 5},
		{"a changed byte", slices.Concat(good[:len(good)-1], []byte{good[len(good)-1] ^ 1}), 0},
		{"noise behind it", slices.Concat(good, bytes.Repeat([]byte{7}, 1000)), 5},
		{"a length of 4 GiB", slices.Concat(good, bytes.Repeat([]byte{0xff}, 8)), 5},
		{"too much of it", make([]byte, claims.MostBytes+1), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			fill(t, disk, c.b)
			a := newLog(t, disk)
			wantClaim(t, a, 1, keys, c.busy, 0)
			wantClaim(t, a, 1, blobtest.ClaimKeys(2, 5), 0, 0)
			wantClaim(t, newLog(t, disk), 1, blobtest.ClaimKeys(2, 5), 5, 0)
			if b := content(t, disk); len(b) > 2*len(good) {
				t.Errorf("it has %d bytes", len(b))
			}
			a.Close()
		})
	}
	if err := disk.Remove(name); err != nil {
		t.Fatal(err)
	}
	wantClaim(t, l, 1, keys, 0, 0)
	wantClaim(t, newLog(t, disk), 1, keys, 5, 0)
}

// Trouble with the file ends claims, and nobody waits for who had it.
func TestTroubleWithTheFile(t *testing.T) {
	broken := errors.New("input/output error")
	keys := blobtest.ClaimKeys(1, 5)
	for _, op := range []string{"share", "sharelock", "sharesize", "shareread", "sharewrite", "sharetruncate"} {
		t.Run(op, func(t *testing.T) {
			for at := 0; ; at++ {
				disk := filetest.New()
				other := newLog(t, disk)
				wantClaim(t, other, 9, blobtest.ClaimKeys(9, 1), 0, 0)
				l := newLog(t, disk)
				n, failed := 0, false
				disk.Hook(func(o, _ string) error {
					if o != op {
						return nil
					}
					if n++; n == at+1 {
						failed = true
						return broken
					}
					return nil
				})
				_, _, errClaim := l.Claim(t.Context(), blob.Ticket{1}, keys)
				_, _, errAgain := l.Claim(t.Context(), blob.Ticket{2}, keys)
				errSettle := l.Settle(t.Context(), blob.Ticket{1}, &[32]byte{1})
				disk.Hook(nil)
				if !failed {
					if at == 0 && op != "sharetruncate" {
						t.Error("it is never asked for")
					}
					return
				}
				for _, err := range []error{errClaim, errAgain, errSettle} {
					if err != nil && (!errors.Is(err, fault.ErrUnsupported) || !errors.Is(err, broken)) {
						t.Errorf("call %d: %v", at, err)
					}
				}
				if errSettle == nil && op != "sharelock" { // who can't say whether another lives is told no error
					t.Errorf("call %d: no error", at)
				}
				if errSettle != nil {
					wantFree(t, other, keys)
				}
			}
		})
	}
}

// wantFree fails if anybody is storing any of keys.
func wantFree(t *testing.T, l *claims.Log, keys []blob.ClaimKey) {
	t.Helper()
	if busy, _, err := l.Claim(t.Context(), blob.Ticket{8}, keys); busy > 0 || err != nil {
		t.Errorf("%d are being stored: %v", busy, err)
	}
}

// Whatever the file holds, a claim neither fails nor is lost.
func FuzzLog(f *testing.F) {
	disk := filetest.New()
	l := newLog(f, disk)
	ctx := f.Context()
	_, _, _ = l.Claim(ctx, blob.Ticket{1}, blobtest.ClaimKeys(1, 3))
	_ = l.Settle(ctx, blob.Ticket{1}, &[32]byte{1})
	_, _, _ = l.Claim(ctx, blob.Ticket{2}, blobtest.ClaimKeys(2, 3))
	_ = l.Settle(ctx, blob.Ticket{2}, nil)
	f.Add(content(f, disk))
	f.Fuzz(func(t *testing.T, b []byte) {
		disk := filetest.New()
		fill(t, disk, b)
		l := newLog(t, disk)
		keys := blobtest.ClaimKeys(1, 3)
		wantClaim(t, l, 1, keys, 0, 0) // whoever is named in there is dead
		wantClaim(t, newLog(t, disk), 1, keys, 3, 0)
	})
}
