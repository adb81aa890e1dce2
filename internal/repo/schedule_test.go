package repo

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

func TestScrubNoteVectors(t *testing.T) {
	repo := [16]byte(vectors.Fill(0, 16))
	entries := []scrubEntry{{[32]byte(vectors.Fill(0x10, 32)), lastRead{29_000_000, 0}}, {[32]byte(vectors.Fill(0x20, 32)), lastRead{29_000_001, 29_000_001}}}
	v := struct{ Repo, Note vectors.Hex }{repo[:], encodeScrub(repo, entries)}
	vectors.Load(t, "scrub", &v)
	if got := encodeScrub(repo, entries); !bytes.Equal(got, v.Note) {
		t.Errorf("%x", got)
	}
	got, err := decodeScrub(repo, v.Note)
	if err != nil || len(got) != 2 || got[0] != entries[0] || got[1] != entries[1] {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range v.Note {
		bad := bytes.Clone(v.Note)
		bad[i] ^= 2
		if _, err := decodeScrub(repo, bad); err == nil {
			t.Fatalf("a flip at %d is not found", i)
		}
	}
}

// Budgets go round: every pack is read once before any is read again, whoever
// reads, and notes do not pile up.
func TestScrubGoesRound(t *testing.T) {
	st, r := newRepo(t)
	const packs = 12
	for i := range uint64(packs) {
		mustBackup(t, r, "web01", noise(i, testChunk), nil, nil)
	}
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	reads := map[string]int{}
	seen := blobtest.Faulty(st, func(c blobtest.Call) error {
		if _, ok := parsePackName(c.Name); ok && c.Op == blobtest.OpReadAt {
			reads[c.Name]++
		}
		return nil
	})
	round := func(o CheckOptions) CheckReport {
		t.Helper()
		clear(reads)
		o.Scrub, o.Now = true, func() time.Time { return now }
		r, err := OpenKeyless(bg, seen)
		if err != nil {
			t.Fatal(err)
		}
		rep, err := r.Check(bg, o)
		if err != nil || rep.Unkept != nil || len(rep.Findings) > 0 {
			t.Fatalf("%+v, %v", rep, err)
		}
		now = now.Add(24 * time.Hour)
		return rep
	}
	all := map[string]bool{}
	for i := range packs / 2 { // each budget suffices for two
		rep := round(CheckOptions{Budget: testChunk + 30_000})
		if len(reads) != 2 || rep.Verified.Never != int64(packs-2*(i+1)) {
			t.Fatalf("round %d read %d packs: %+v", i, len(reads), rep.Verified)
		}
		for name := range reads {
			if all[name] {
				t.Errorf("%s is read again before others", name)
			}
			all[name] = true
		}
	}
	first := now.Add(-packs / 2 * 24 * time.Hour)
	rep := round(CheckOptions{Budget: 1})
	if len(reads) != 1 || !rep.Verified.Oldest.Equal(first) || rep.Verified.RecentBytes != rep.Verified.Bytes {
		t.Errorf("%d packs were read: %+v", len(reads), rep.Verified)
	}
	for range 2 * manyScrubs {
		rep = round(CheckOptions{Budget: 1})
	}
	if n := count(t, st, scrubPrefix); n > manyScrubs+1 {
		t.Errorf("%d notes", n)
	}
	// Time passes, and what was read becomes long ago.
	now = now.Add(2 * recently)
	if rep = round(CheckOptions{Budget: 1}); rep.Verified.RecentBytes == 0 || rep.Verified.RecentBytes > rep.Verified.Bytes/4 || rep.Verified.Never != 0 {
		t.Errorf("%+v", rep.Verified)
	}
	// A clock that was wrong does not keep packs from being read for ever.
	now = now.Add(-200 * 24 * time.Hour)
	if rep = round(CheckOptions{Budget: 1}); rep.Verified.Never == 0 {
		t.Errorf("a clock set back: %+v", rep.Verified)
	}
	if rep = round(CheckOptions{}); len(reads) != packs || rep.Verified.Never != 0 {
		t.Errorf("without a budget %d packs were read: %+v", len(reads), rep.Verified)
	}
}

// What an interrupted check read and found is not lost.
func TestAnInterruptedScrubKeepsWhatItRead(t *testing.T) {
	st, r := newRepo(t)
	for i := range uint64(40) {
		mustBackup(t, r, "web01", noise(i, testChunk), nil, nil)
	}
	names, _ := blobtest.Names(bg, st, packPrefix)
	flipIn(t, st, names[0], 0)
	// One worker: what it reads after the damaged pack it reads when that is
	// known to be damaged.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	ctx, cancel := context.WithCancel(bg)
	defer cancel()
	tries := 0
	interrupted := blobtest.Faulty(st, func(c blobtest.Call) error {
		switch {
		case c.Op != blobtest.OpReadAt || !strings.HasPrefix(c.Name, packPrefix):
		case c.Name == names[0]:
			tries++
		case tries > 1:
			cancel()
		}
		return nil
	})
	keyless, err := OpenKeyless(bg, ctxStore{interrupted})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyless.Check(ctx, CheckOptions{Scrub: true}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if count(t, st, scrubPrefix) != 1 || count(t, st, quarantinePrefix) != 1 {
		t.Errorf("%d notes of what was read, %d of what was found", count(t, st, scrubPrefix), count(t, st, quarantinePrefix))
	}
	// A budget that does not reach the damaged pack still speaks of it.
	rep, err := mustOpen(t, st).Check(bg, CheckOptions{Scrub: true, Budget: 1})
	if err != nil || len(rep.Findings) != 1 || rep.Findings[0].Object != names[0] {
		t.Errorf("%+v, %v", rep.Findings, err)
	}
}

// ctxStore fails every read once the context is over, as real stores do.
type ctxStore struct{ blob.Store }

func (s ctxStore) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	n, err := s.Store.ReadAt(ctx, name, p, off)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return n, err
}

// Notes come from stores that nobody trusts.
func FuzzScrubNote(f *testing.F) {
	repo := [16]byte{1}
	b := encodeScrub(repo, []scrubEntry{{[32]byte{1}, lastRead{5, 6}}})
	f.Add(b, false)
	f.Add(b[:len(b)-32], true)
	f.Fuzz(func(t *testing.T, data []byte, mend bool) {
		if mend {
			sum := seal.Hash(data)
			data = append(bytes.Clone(data), sum[:]...)
		}
		if entries, err := decodeScrub(repo, data); err == nil && len(entries)*scrubEntryBytes > len(data) {
			t.Error("more entries than bytes")
		}
	})
}
