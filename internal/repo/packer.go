package repo

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// indexEvery is after how many packs a session writes an index object, so that
// one that dies leaves few packs to adopt.
const indexEvery = 16

// A slot is where one stream's records go: its open pack, if it has one.
type slot struct {
	s  *Session
	mu sync.Mutex
	b  *pack.Builder

	counts *twice // of the stream whose slot this is; nil where nobody counts
}

// openSlot gives a slot to a new stream, with the tail of one that ended.
func (s *Session) openSlot(counts *twice) *slot {
	s.mu.Lock()
	sl := s.tail
	s.tail = nil
	if sl == nil {
		sl = &slot{s: s}
		if s.slots != nil {
			s.slots[sl] = struct{}{}
		}
	}
	s.mu.Unlock()
	sl.counts = counts
	s.r.slotMu.Lock()
	s.r.slots[sl] = struct{}{}
	s.r.slotMu.Unlock()
	return sl
}

func (r *Repository) unlist(sl *slot) {
	r.slotMu.Lock()
	defer r.slotMu.Unlock()
	delete(r.slots, sl)
}

// closeSlot ends a stream. Its open pack becomes the session's tail or part of
// it, so that several small disks share a pack.
func (s *Session) closeSlot(sl *slot) {
	s.mu.Lock()
	tail := s.tail
	if s.over || tail == nil {
		if !s.over {
			s.tail = sl
		}
		s.mu.Unlock()
		return
	}
	s.tail = nil // nobody else touches it now, but for takeLargest
	delete(s.slots, sl)
	s.mu.Unlock()

	s.r.unlist(sl)
	sl.mu.Lock()
	rest := sl.b
	sl.b = nil
	sl.mu.Unlock()
	if rest != nil && rest.Len() > 0 {
		tail.mu.Lock()
		switch {
		case tail.b == nil:
			tail.b, rest = rest, nil
		case !tail.b.Full(int(rest.Bytes())) && tail.b.Merge(rest) == nil:
			rest = nil
		case tail.b.Bytes() > rest.Bytes():
			tail.b, rest = rest, tail.b
		}
		tail.mu.Unlock()
		if rest != nil {
			s.send(rest)
		}
	}
	s.mu.Lock()
	if s.tail == nil && !s.over {
		s.tail = tail
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	// Two streams ended at once: this one's tail goes as it is.
	tail.mu.Lock()
	b := tail.b
	tail.b = nil
	tail.mu.Unlock()
	if b != nil {
		s.send(b)
	}
}

// store makes sure that chunk id is in a pack of this session or in the
// repository. Bytes is what it newly takes.
func (s *Session) store(ctx context.Context, sl *slot, w *pack.Worker, id chunk.ID, plain []byte) (fresh bool, bytes int64, err error) {
	h, err := s.r.held(ctx)
	if err != nil {
		return false, 0, err
	}
	if known, err := s.claim(ctx, h, id, sl.counts); known || err != nil {
		return false, 0, err
	}
	e, rec, err := w.Seal(id, plain, s.level > 0)
	if err == nil {
		err = s.append(ctx, sl, e, rec)
	}
	if err != nil {
		// Somebody may already rely on the claim.
		return false, 0, s.fail(err)
	}
	return true, e.Bytes(), nil
}

// append puts a record into the slot's pack. While all memory is in use it
// waits for a pack to become durable; if none is on its way, the largest open
// one is sent, so that nobody waits for somebody who waits.
func (s *Session) append(ctx context.Context, sl *slot, e pack.Entry, rec []byte) error {
	for {
		if err := s.broken(); err != nil {
			return err
		}
		back := s.r.mem.Returned()
		var full *pack.Builder
		sl.mu.Lock()
		if sl.b != nil && sl.b.Full(len(rec)) {
			full, sl.b = sl.b, nil
		}
		if sl.b == nil {
			sl.b = pack.NewBuilder(s.r.mem, s.r.id, s.bin)
		}
		_, err := sl.b.Append(e, rec)
		sl.mu.Unlock()
		if full != nil {
			s.send(full)
		}
		if !errors.Is(err, pack.ErrMemory) {
			return err
		}
		s.r.sendLargest()
		select {
		case <-back:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
	}
}

// sendLargest stores the largest open pack of any session, unless some pack is
// on its way already.
func (r *Repository) sendLargest() {
	if len(r.flight) > 0 {
		return
	}
	r.slotMu.Lock()
	defer r.slotMu.Unlock()
	var largest *slot
	var most int64
	for sl := range r.slots {
		sl.mu.Lock()
		if sl.b != nil && sl.b.Bytes() > most {
			largest, most = sl, sl.b.Bytes()
		}
		sl.mu.Unlock()
	}
	if largest == nil {
		return
	}
	largest.mu.Lock()
	b := largest.b
	largest.b = nil
	largest.mu.Unlock()
	if b != nil {
		largest.s.send(b)
	}
}

// send stores a pack in the background.
func (s *Session) send(b *pack.Builder) {
	s.mu.Lock()
	s.flying++
	s.mu.Unlock()
	go func() {
		err := s.storePack(b)
		if err != nil {
			s.fail(err)
		}
		s.mu.Lock()
		s.flying--
		s.quiet.Broadcast()
		s.mu.Unlock()
	}()
}

// storePack stores and frees b, but for what others store meanwhile.
func (s *Session) storePack(b *pack.Builder) error {
	defer b.Free()
	for w := (claimWait{}); ; {
		select {
		case s.r.flight <- struct{}{}:
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
		s.leaveOut(s.ctx, b)
		wait := s.claimPack(s.ctx, &w, b)
		if !wait {
			defer func() { <-s.r.flight }()
			defer s.settle(&w)
			if b.Len() == 0 {
				return nil
			}
			return s.storeClaimed(&w, b)
		}
		<-s.r.flight
		if err := sleep(s.ctx, claimPoll); err != nil {
			return err
		}
	}
}

// storeClaimed stores b, and says so to who waits for it.
func (s *Session) storeClaimed(w *claimWait, b *pack.Builder) error {
	entries := b.Entries()
	_, sum := b.Finish()
	s.seen.own(sum)
	if err := s.r.st.Put(s.ctx, packName(sum), b, b.Bytes()); err != nil {
		return fmt.Errorf("store %s: %w", packLabel(sum), err)
	}
	if err := s.r.guard(s.ctx, packName(sum), sum, b, b.Bytes()); err != nil {
		return fmt.Errorf("store parity of %s: %w", packLabel(sum), err)
	}
	w.stored = &sum
	s.settle(w)
	p := indexPack(sum, b.Bytes(), entries)
	s.r.publish(p)
	s.mu.Lock()
	for _, e := range p.Entries {
		delete(s.pending, e.Key)
	}
	s.stored = append(s.stored, p)
	var write []index.Pack
	name := ""
	if (len(s.stored) >= indexEvery || time.Since(s.indexed) >= indexAfter) && !s.over {
		write, s.stored = s.stored, nil
		s.indexed = time.Now()
		name = fmt.Sprintf("%s%s-%06d", indexPrefix, s.id, s.indexes)
		s.indexes++
	}
	s.mu.Unlock()
	if write == nil {
		return nil
	}
	if err := put(s.ctx, s.r.st, name, index.Encode(s.r.id, write)); err != nil {
		return fmt.Errorf("store index: %w", err)
	}
	return nil
}

// flush stores every open pack and waits until all are durable.
func (s *Session) flush(ctx context.Context) error {
	s.mu.Lock()
	slots := make([]*slot, 0, len(s.slots))
	for sl := range s.slots {
		slots = append(slots, sl)
	}
	s.mu.Unlock()
	for _, sl := range slots {
		sl.mu.Lock()
		b := sl.b
		sl.b = nil
		sl.mu.Unlock()
		if b != nil && b.Len() > 0 {
			s.send(b)
		}
	}
	stop := context.AfterFunc(ctx, func() { s.fail(context.Cause(ctx)) })
	defer stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.flying > 0 && s.err == nil {
		s.quiet.Wait()
	}
	return s.err
}
