package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/reposerver"
)

const (
	manyChunks = 40
	manyShared = manyChunks * 3 / 10 // first
)

func manyContent(seed uint64) []byte {
	var b []byte
	for i := range uint64(manyChunks) {
		n := 50_000 + i
		if i >= manyShared {
			n += (1 + seed) * 1000
		}
		b = append(b, noise(n, testChunk)...)
	}
	return b
}

// duplicates are the bytes of records that lie in packs a second time, and of
// all.
func duplicates(t testing.TB, st blob.Store) (twice, all int64) {
	t.Helper()
	r := mustOpen(t, st)
	seen := map[index.Key]bool{}
	for o, err := range st.List(bg, packPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		id, _ := parsePackName(o.Name)
		entries, err := r.readEntries(bg, heldPack{id: id, bytes: o.Bytes})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all += e.Bytes()
			if seen[index.KeyOf(e.ID)] {
				twice += e.Bytes()
			}
			seen[index.KeyOf(e.ID)] = true
		}
	}
	return twice, all
}

// served runs a repository server with one repository in it, and gives what
// opens it once more, over connections of its own.
func served(t *testing.T) (open func() blob.Store) {
	t.Helper()
	dir := t.TempDir()
	srv, err := reposerver.Open(bg, reposerver.Options{Dir: dir, ImmutableFor: -1, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(bg)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(ctx, l); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		srv.Close()
	})
	tokens, err := reposerver.OpenTokens(bg, dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer tokens.Close()
	tok, err := tokens.Add(bg, "admin", reposerver.Admin, []string{"r"})
	if err != nil {
		t.Fatal(err)
	}
	at := remote.Location{Host: l.Addr().String(), Repo: "r"}
	first, err := remote.Create(bg, at, tok)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Close() })
	mustInit(t, first)
	return func() blob.Store {
		st, err := remote.Open(bg, at, tok)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { st.Close() })
		return retry.Wrap(st, retry.Options{First: time.Millisecond})
	}
}

// impatience sets how long sessions wait for others, until the test ends.
func impatience(t *testing.T, patience, poll time.Duration) {
	p, q, a := claimPatience, claimPoll, claimAnswer
	claimPatience, claimPoll, claimAnswer = patience, poll, max(patience, a)
	t.Cleanup(func() { claimPatience, claimPoll, claimAnswer = p, q, a })
}

// writeTogether lets writers store what manyContent gives for each at the same
// moment, each with a repository of its own.
func writeTogether(t *testing.T, writers int, open func() blob.Store) {
	t.Helper()
	var wg sync.WaitGroup
	start := make(chan struct{})
	for n := range writers {
		r := mustOpen(t, open())
		s, err := r.Begin(bg, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer s.Abort(bg)
			<-start
			content := manyContent(uint64(n))
			w, err := s.Disk(bg, int64(len(content)), "")
			if err != nil {
				t.Error(err)
				return
			}
			for i := range int64(manyChunks) {
				if i == manyShared/2 {
					// The common part lies in two packs, the later one with what
					// is the writer's own.
					if err := s.flush(bg); err != nil {
						t.Error(err)
						return
					}
				}
				if _, err := w.Put(bg, i, cut(content, i)); err != nil {
					t.Error(err)
					return
				}
			}
			m, err := w.Finish(bg)
			if err == nil {
				err = s.Commit(bg, newPoint(fmt.Sprintf("m%d", n), m, int64(len(content))))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	close(start)
	wg.Wait()
	r := mustOpen(t, open())
	points, err := r.Points(bg)
	if err != nil || len(points) != writers {
		t.Fatalf("%d points: %v", len(points), err)
	}
	for _, p := range points {
		var n uint64
		_, _ = fmt.Sscanf(p.VM, "m%d", &n)
		if got, err := readDisk(r, p); err != nil || !bytes.Equal(got, manyContent(n)) {
			t.Errorf("%s is lost: %v", p.Ref(), err)
		}
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
}

func mostlyOnce(t *testing.T, st blob.Store) {
	t.Helper()
	twice, all := duplicates(t, st)
	t.Logf("%d of %d bytes are there twice (%.2f %%)", twice, all, 100*float64(twice)/float64(all))
	if twice*1000 >= all {
		t.Errorf("%d of %d bytes are there twice", twice, all)
	}
}

// Sixteen writers that store the same at the same moment, through a repository
// server, store it once.
func TestWritersThroughAServer(t *testing.T) {
	impatience(t, 10*time.Minute, 20*time.Millisecond) // also on a busy machine
	realBeats(t)
	writers := 16
	if testing.Short() {
		writers = 3
	}
	open := served(t)
	writeTogether(t, writers, open)
	mostlyOnce(t, open())
}

// A writer that begins later goes fast over what another one has stored, catches
// up with it in the middle of what they have in common, and from there on both
// have the same at hand, pack by pack.
func TestAWriterCatchesUp(t *testing.T) {
	impatience(t, 10*time.Minute, 10*time.Millisecond)
	realBeats(t)
	const chunks, perPack, ahead = 48, 4, 20
	open := inDirectory(t)
	content := noise(81, chunks*testChunk)
	write := func(s *Session, w *DiskWriter, from, to int64) error {
		for i := from; i < to; i++ {
			if _, err := w.Put(bg, i, cut(content, i)); err != nil {
				return err
			}
			if i%perPack == perPack-1 {
				if err := s.flush(bg); err != nil {
					return err
				}
			}
		}
		return nil
	}
	begin := func() (*Session, *DiskWriter) {
		s, err := mustOpen(t, open()).Begin(bg, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Disk(bg, int64(len(content)), "")
		if err != nil {
			t.Fatal(err)
		}
		return s, w
	}
	end := func(s *Session, w *DiskWriter, name string) error {
		m, err := w.Finish(bg)
		if err != nil {
			return err
		}
		return s.Commit(bg, newPoint(name, m, int64(len(content))))
	}
	s1, w1 := begin()
	defer s1.Abort(bg)
	if err := write(s1, w1, 0, ahead); err != nil {
		t.Fatal(err)
	}
	if err := s1.writeIndex(bg); err != nil {
		t.Fatal(err)
	}
	s2, w2 := begin()
	defer s2.Abort(bg)
	everyoneDies() // as if they were two processes
	if err := write(s2, w2, 0, ahead); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, x := range []struct {
		s    *Session
		w    *DiskWriter
		name string
	}{{s1, w1, "web01"}, {s2, w2, "web02"}} {
		wg.Go(func() {
			err := write(x.s, x.w, ahead, chunks)
			if err == nil {
				err = end(x.s, x.w, x.name)
			}
			if err != nil {
				t.Errorf("%s: %v", x.name, err)
			}
		})
	}
	wg.Wait()
	mostlyOnce(t, open())
	r := mustOpen(t, open())
	points, err := r.Points(bg)
	if err != nil || len(points) != 2 {
		t.Fatalf("%d points: %v", len(points), err)
	}
	for _, p := range points {
		if got, err := readDisk(r, p); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s is lost: %v", p.Ref(), err)
		}
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
}

// sharedKeys are the keys of what all writers have in common.
func sharedKeys(t *testing.T, st blob.Store) (keys []blob.ClaimKey) {
	t.Helper()
	r := mustOpen(t, st)
	w := r.worker(1)
	defer r.idle(1, w)
	content := manyContent(0)
	for i := range int64(manyShared) {
		keys = append(keys, blob.ClaimKey(index.KeyOf(w.ID(cut(content, i)))))
	}
	return keys
}

// inDirectory makes a repository in a directory, and gives what opens it once
// more, as another process does.
func inDirectory(t *testing.T) (open func() blob.Store) {
	t.Helper()
	dir := t.TempDir()
	open = func() blob.Store {
		st, err := file.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { st.Close() })
		return st
	}
	mustInit(t, open())
	return open
}

// claimShared claims what all writers have in common, for st.
func claimShared(t *testing.T, st blob.Store, others ...blob.Store) {
	t.Helper()
	keys := sharedKeys(t, st)
	if busy, in, err := st.(blob.Claimer).Claim(bg, blob.Ticket{1}, keys); busy > 0 || len(in) > 0 || err != nil {
		t.Fatal(busy, in, err)
	}
	for _, other := range others {
		if busy, _, err := other.(blob.Claimer).Claim(bg, blob.Ticket{2}, keys); busy != len(keys) || err != nil {
			t.Fatalf("%d of %d keys are claimed: %v", busy, len(keys), err)
		}
	}
}

// When somebody dies who has claimed what all need, the others go on at once, and
// store it once.
func TestAClaimantDies(t *testing.T) {
	impatience(t, 10*time.Minute, 20*time.Millisecond) // in vain it would be too long
	realBeats(t)
	for where, create := range map[string]func(*testing.T) func() blob.Store{"through a server": served, "in a directory": inDirectory} {
		t.Run(where, func(t *testing.T) {
			open := create(t)
			claimant := open()
			claimShared(t, claimant, open())
			timer := time.AfterFunc(100*time.Millisecond, func() { claimant.Close() }) // its connections, or locks
			defer timer.Stop()
			writeTogether(t, 2, open)
			mostlyOnce(t, open())
		})
	}
}

// When somebody is stopped who has claimed what all need, the others wait for
// him once, and not for ever.
func TestAClaimantIsStopped(t *testing.T) {
	impatience(t, 100*time.Millisecond, 20*time.Millisecond)
	realBeats(t)
	open := inDirectory(t)
	claimShared(t, open(), open())
	writeTogether(t, 2, open)
}

// Whatever is wrong with the place for claims, backups go on without.
func TestNoPlaceForClaims(t *testing.T) {
	for _, op := range []string{"share", "sharelock", "sharesize", "shareread", "sharewrite", "sharetruncate"} {
		for _, with := range []error{syscall.ENOSPC, syscall.EIO, syscall.EACCES} {
			for _, first := range []int64{1, 4} {
				disk := filetest.New()
				open := func() blob.Store { return file.OpenFS(disk, "disk") }
				mustInit(t, open())
				var n atomic.Int64
				disk.Hook(func(o, _ string) error {
					if o == op && n.Add(1) >= first {
						return with
					}
					return nil
				})
				content := noise(75, 3*testChunk)
				p := mustBackup(t, mustOpen(t, open()), "web01", content, nil, nil)
				r := mustOpen(t, open())
				if got, err := readDisk(r, p); err != nil || !bytes.Equal(got, content) {
					t.Errorf("%s: %v: it is lost: %v", op, with, err)
				}
				mustCheck(t, r, CheckOptions{ReadData: true})
				if first == 1 && n.Load() == 0 && op != "sharetruncate" {
					t.Errorf("nobody asked for %s", op)
				}
			}
		}
	}
}

// A claimer makes answers for a store that keeps no claims.
type claimer struct {
	blob.Store
	mu     sync.Mutex
	asked  int
	ended  int
	answer func(keys []blob.ClaimKey) (int, map[int][32]byte, error)
}

func (c *claimer) Claim(_ context.Context, _ blob.Ticket, keys []blob.ClaimKey) (int, map[int][32]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	return c.answer(keys)
}

func (c *claimer) Settle(context.Context, blob.Ticket, *[32]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended++
	return nil
}

// backUpThrough backs up four packs through c, and makes sure that nothing is
// missing. It gives how often claims were asked for, for each pack.
func backUpThrough(t *testing.T, c *claimer) (asked []int) {
	t.Helper()
	r := mustOpen(t, c)
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(bg)
	content := noise(71, 4*testChunk)
	w, err := s.Disk(bg, int64(len(content)), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(4) {
		before := c.asked
		if _, err := w.Put(bg, i, cut(content, i)); err != nil {
			t.Fatal(err)
		}
		if err := s.flush(bg); err != nil {
			t.Fatal(err)
		}
		asked = append(asked, c.asked-before)
	}
	m, err := w.Finish(bg)
	if err == nil {
		err = s.Commit(bg, newPoint("web01", m, int64(len(content))))
	}
	if err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, c.Store)
	points, err := r.Points(bg)
	if err != nil || len(points) != 1 {
		t.Fatalf("%d points: %v", len(points), err)
	}
	if got, err := readDisk(r, points[0]); err != nil || !bytes.Equal(got, content) {
		t.Errorf("it is lost: %v", err)
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
	return asked
}

// Who claims everything and stores nothing holds up a backup once.
func TestAClaimantThatStoresNothing(t *testing.T) {
	impatience(t, 50*time.Millisecond, time.Millisecond)
	st, _ := newRepo(t)
	c := &claimer{Store: st, answer: func(keys []blob.ClaimKey) (int, map[int][32]byte, error) { return len(keys), nil, nil }}
	if asked := backUpThrough(t, c); asked[1] != 1 || asked[2] != 1 || asked[3] != 1 {
		t.Errorf("it asked %d times for claims on each pack", asked)
	}
	if c.ended > 0 {
		t.Errorf("it ended %d claims that it never had", c.ended)
	}
}

// Whatever is said of claims, a session relies on nothing that is not there.
func TestWhatClaimsSayIsNoPromise(t *testing.T) {
	impatience(t, 50*time.Millisecond, time.Millisecond)
	nowhere := [32]byte{1, 2, 3}
	in := func(pack [32]byte) func(keys []blob.ClaimKey) (int, map[int][32]byte, error) {
		return func(keys []blob.ClaimKey) (int, map[int][32]byte, error) {
			m := map[int][32]byte{}
			for i := range keys {
				m[i] = pack
			}
			return 0, m, nil
		}
	}
	t.Run("a pack that is not there", func(t *testing.T) {
		st, _ := newRepo(t)
		backUpThrough(t, &claimer{Store: st, answer: in(nowhere)})
	})
	t.Run("a pack that holds something else", func(t *testing.T) {
		st, r := newRepo(t)
		s, err := r.Begin(bg, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		other := storedPack(t, st, s, noise(72, testChunk))
		backUpThrough(t, &claimer{Store: st, answer: in(other)})
	})
	t.Run("an object that is no pack", func(t *testing.T) {
		st, _ := newRepo(t)
		if err := put(bg, st, packName(nowhere), []byte("this is no pack")); err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, st)
		h, err := r.held(bg)
		if err != nil {
			t.Fatal(err)
		}
		r.learnStored(bg, newHoldings(), nowhere)
		if _, ok := h.storesFresh([32]byte{}); ok {
			t.Error("it is taken for one")
		}
	})
	t.Run("trouble", func(t *testing.T) {
		st, _ := newRepo(t)
		asked := backUpThrough(t, &claimer{Store: st, answer: func([]blob.ClaimKey) (int, map[int][32]byte, error) { return 0, nil, errors.New("reset") }})
		for _, n := range asked {
			if n > claimTries {
				t.Errorf("it asked %d times for claims on each pack", asked)
			}
		}
	})
	t.Run("no claims kept", func(t *testing.T) {
		st, _ := newRepo(t)
		asked := backUpThrough(t, &claimer{Store: st, answer: func([]blob.ClaimKey) (int, map[int][32]byte, error) { return 0, nil, fault.ErrUnsupported }})
		if asked[0] != 1 || asked[1]+asked[2]+asked[3] != 0 {
			t.Errorf("it asked %d times for claims on each pack", asked)
		}
	})
}

// storedPack stores data as a pack of s that no index object names.
func storedPack(t *testing.T, st *mem.Store, s *Session, data []byte) (id [32]byte) {
	t.Helper()
	sl := s.openSlot(nil)
	w := s.r.worker(s.level)
	defer s.r.idle(s.level, w)
	if _, _, err := s.store(bg, sl, w, w.ID(data), data); err != nil {
		t.Fatal(err)
	}
	if err := s.flush(bg); err != nil {
		t.Fatal(err)
	}
	for o, err := range st.List(bg, packPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		id, _ = parsePackName(o.Name)
	}
	return id
}

// A pack that others have stored, and that a vacuum has condemned, is absent for
// a session that knows; one on which it relied before stays.
func TestAClaimedPackIsCondemned(t *testing.T) {
	for _, before := range []bool{false, true} {
		t.Run(map[bool]string{false: "new", true: "relied on"}[before], func(t *testing.T) {
			st, r1 := newRepo(t)
			s1, err := r1.Begin(bg, SessionOptions{})
			if err != nil {
				t.Fatal(err)
			}
			content := noise(73, testChunk)
			id := [32]byte{}
			c := &claimer{Store: st, answer: func(keys []blob.ClaimKey) (int, map[int][32]byte, error) { return 0, map[int][32]byte{0: id}, nil }}
			s2, err := mustOpen(t, c).Begin(bg, SessionOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer s2.Abort(bg)
			id = storedPack(t, st, s1, content)
			w, err := s2.Disk(bg, testChunk, "")
			if err != nil {
				t.Fatal(err)
			}
			write := func() {
				t.Helper()
				if _, err := w.Put(bg, 0, content); err != nil {
					t.Fatal(err)
				}
				if err := s2.flush(bg); err != nil {
					t.Fatal(err)
				}
			}
			if before {
				write()
			}
			if err := s1.Abort(bg); err != nil {
				t.Fatal(err)
			}
			// Its writer is gone, and no point needs it.
			finish(t, st)
			if _, err := st.Size(bg, packName(id)); (err == nil) != before {
				t.Errorf("after the vacuum the pack is there: %v", err)
			}
			if !before {
				write()
			}
			m, err := w.Finish(bg)
			if err == nil {
				err = s2.Commit(bg, newPoint("web01", m, testChunk))
			}
			if err != nil {
				t.Fatal(err)
			}
			if twice, all := duplicates(t, st); twice > 0 || all == 0 {
				t.Errorf("%d of %d bytes are there twice", twice, all)
			}
			r := mustOpen(t, st)
			points, err := r.Points(bg)
			if err != nil || len(points) != 1 {
				t.Fatalf("%d points: %v", len(points), err)
			}
			if got, err := readDisk(r, points[0]); err != nil || !bytes.Equal(got, content) {
				t.Errorf("it is lost: %v", err)
			}
			mustCheck(t, r, CheckOptions{ReadData: true})
			finish(t, st)
			mustCheck(t, mustOpen(t, st), CheckOptions{ReadData: true})
		})
	}
}

// The same while the condemned pack is still there.
func TestACondemnedPackCountsForNothing(t *testing.T) {
	st, r1 := newRepo(t)
	s1, err := r1.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s1.Abort(bg)
	var id [32]byte
	c := &claimer{Store: st, answer: func([]blob.ClaimKey) (int, map[int][32]byte, error) { return 0, map[int][32]byte{0: id}, nil }}
	s2, err := mustOpen(t, c).Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s2.Abort(bg)
	content := noise(74, testChunk)
	id = storedPack(t, st, s1, content)
	s2.seen.mu.Lock()
	s2.seen.condemned = append(s2.seen.condemned, &epoch{n: 1, packs: map[[32]byte]struct{}{id: {}}})
	s2.seen.mu.Unlock()
	storedPack(t, st, s2, content)
	if twice, all := duplicates(t, st); twice*2 != all {
		t.Errorf("%d of %d bytes are there twice", twice, all)
	}
}
