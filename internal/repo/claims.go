package repo

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// Where the store keeps claims, writers that come to the same data at the same
// moment store it once: each claims the records of a pack before it stores it,
// all or none of them, and waits while others store some. So nobody waits who
// holds a claim, and no two wait for each other.
//
// A claim says nothing that anybody relies on. What somebody stored counts when
// its pack is there, as if an index object had named it; and after a wait in
// vain a session stores what it has.
var (
	// claimPatience is how long a session waits for others: for one pack, and in
	// vain altogether.
	claimPatience = 30 * time.Second
	// claimPoll is how often it asks again meanwhile.
	claimPoll = 200 * time.Millisecond
	// claimBytes is what others have to store in a second so that a wait for it
	// is not in vain.
	claimBytes int64 = 1 << 20
	// claimTries is how often it asks for one pack without an answer.
	claimTries = 3
	// claimAnswer is how long the store may take to answer.
	claimAnswer = 10 * time.Second
)

// A claimWait is what one pack claims, and how it waits for others.
type claimWait struct {
	ticket blob.Ticket
	open   bool      // something may be claimed
	stored *[32]byte // the pack, when it is there
	begun  time.Time // to wait; zero before
	came   int64     // bytes that others have stored since
	failed int       // times that nobody answered
}

// claimPack takes out of b what others have stored, and claims what is left. It
// says whether to wait, since others are storing some of it.
func (s *Session) claimPack(ctx context.Context, w *claimWait, b *pack.Builder) (wait bool) {
	c, ok := s.r.st.(blob.Claimer)
	h := s.r.current()
	if !ok || h == nil || s.r.noClaims.Load() {
		return false
	}
	var keys []blob.ClaimKey
	for _, e := range b.Entries() {
		if k := index.KeyOf(e.ID); len(keys) < blob.MaxClaims && s.spare(k) {
			keys = append(keys, blob.ClaimKey(k))
		}
	}
	if len(keys) == 0 {
		return s.waited(w)
	}
	if w.ticket == (blob.Ticket{}) {
		_, _ = rand.Read(w.ticket[:])
	}
	asked := time.Now()
	answer, cancel := context.WithTimeout(ctx, claimAnswer)
	w.open = true
	busy, in, err := c.Claim(answer, w.ticket, keys)
	cancel()
	if errors.Is(err, fault.ErrUnsupported) {
		s.r.noClaims.Store(true)
		w.open = false
		return s.waited(w)
	}
	wait = busy > 0
	if err != nil {
		// A server that has too much to do may answer next time. What it claimed
		// nobody knows.
		w.failed++
		wait = w.failed < claimTries
	}
	if len(in) > 0 {
		looked := map[[32]byte]bool{}
		for _, id := range in {
			if !looked[id] {
				looked[id] = true
				s.r.learnStored(ctx, h, id)
			}
		}
		w.came += s.dropStored(ctx, h, b)
	}
	if err == nil {
		w.open = !wait && b.Len() > 0
	}
	if !wait {
		return s.waited(w)
	}
	if w.begun.IsZero() {
		w.begun, w.came = asked, 0
	}
	s.mu.Lock()
	left := claimPatience - s.vain
	s.mu.Unlock()
	if time.Since(w.begun) >= left {
		return s.waited(w)
	}
	return true
}

// waited ends a wait. What it took beyond a second for each MiB that others
// stored was in vain: who only claims can't hold up a session for longer than
// its patience, however often he does it.
func (s *Session) waited(w *claimWait) (wait bool) {
	if w.begun.IsZero() {
		return false
	}
	worth := time.Duration(float64(w.came) / float64(claimBytes) * float64(time.Second))
	s.mu.Lock()
	s.vain += max(0, time.Since(w.begun)-worth)
	s.mu.Unlock()
	w.begun = time.Time{}
	return false
}

// settle says what became of what w claimed.
func (s *Session) settle(w *claimWait) {
	if !w.open {
		return
	}
	w.open = false
	// Also after ^C, for the others.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), claimAnswer)
	defer cancel()
	if c, ok := s.r.st.(blob.Claimer); ok {
		_ = c.Settle(ctx, w.ticket, w.stored) // otherwise it ends by itself
	}
}

// learnStored takes in a pack that somebody says to have stored, and that no
// index object names yet. Only what is there counts: so it is read.
func (r *Repository) learnStored(ctx context.Context, h *holdings, id [32]byte) {
	// A look that comes upon the same pack has all of it in the table, or nothing.
	h.lookMu.Lock()
	defer h.lookMu.Unlock()
	h.mu.RLock()
	_, known := h.number(id)
	h.mu.RUnlock()
	if known {
		return
	}
	size, err := r.st.Size(ctx, packName(id))
	if err != nil {
		return
	}
	entries, err := pack.ReadEntries(&storeReader{ctx, r.st, packName(id)}, size)
	if err != nil {
		return // a check will say
	}
	h.take(indexPack(id, size, entries))
}
