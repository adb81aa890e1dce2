package repo

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// Writers that run at once, in other processes, tell each other what they stored
// by their index objects. A session looks for new ones before it stores a pack,
// and leaves out what somebody else has stored meanwhile. All of it only saves
// space: who sees nothing stores a chunk twice.
var (
	// lookEvery is how long a look at the index objects of others holds.
	lookEvery = 5 * time.Second
	// indexAfter is after how long a session names its packs in an index object,
	// however few they are: so others see them.
	indexAfter = 30 * time.Second
)

// lookForNews takes in the packs that other writers have named since the index
// was loaded. It says whether there was anything.
func (r *Repository) lookForNews(ctx context.Context, h *holdings) (news bool, err error) {
	h.lookMu.Lock()
	defer h.lookMu.Unlock()
	if time.Since(h.looked) < lookEvery || r.noFlat.Load() {
		return h.news, nil
	}
	h.looked = time.Now()
	if h.known == nil {
		h.known = map[string]bool{}
		for _, o := range h.indexes {
			h.known[o.Name] = true
		}
	}
	for o, err := range r.st.List(ctx, indexPrefix) {
		if err != nil {
			return h.news, err
		}
		if h.known[o.Name] {
			continue
		}
		session, _, _ := strings.Cut(strings.TrimPrefix(o.Name, indexPrefix), "-")
		living.Lock()
		ours := living.ids[session]
		living.Unlock()
		if ours {
			continue // it is in the table
		}
		b, err := readObject(ctx, r.st, o.Name)
		if err != nil && !errors.Is(err, fault.ErrNotFound) && !errors.Is(err, fault.ErrCorrupt) {
			return h.news, err
		}
		h.known[o.Name] = true
		if err != nil {
			continue // a vacuum was faster, or a check will say
		}
		var packs []index.Pack
		if index.Decode(r.id, b, func(p index.Pack) error {
			p.Entries = slices.Clone(p.Entries) // they are Decode's own
			packs = append(packs, p)
			return nil
		}) != nil {
			continue
		}
		for _, p := range packs {
			if err := r.learn(ctx, h, p); err != nil {
				return h.news, err
			}
		}
	}
	return h.news, nil
}

// learn takes in one pack. Its writer may have slept since a vacuum deleted it,
// so it is asked for.
func (r *Repository) learn(ctx context.Context, h *holdings, p index.Pack) error {
	h.mu.RLock()
	_, known := h.number(p.ID)
	h.mu.RUnlock()
	if known {
		return nil
	}
	size, err := r.st.Size(ctx, packName(p.ID))
	if errors.Is(err, fault.ErrNotFound) || err == nil && size != int64(p.Bytes) {
		return nil
	}
	if err != nil {
		return err
	}
	h.take(p)
	h.news = true
	return nil
}

// leaveOut takes the records out of b that somebody else has stored since this
// session claimed them; what is left may be nothing.
func (s *Session) leaveOut(ctx context.Context, b *pack.Builder) {
	h := s.r.current()
	if h == nil || s.ctx.Err() != nil {
		return
	}
	// Trouble with a look is no trouble: storing the pack will say if it lasts.
	if news, err := s.r.lookForNews(ctx, h); err != nil || !news {
		return
	}
	s.dropStored(ctx, h, b)
}

// spare says whether a record of this session need not be stored if somebody
// else has stored it.
func (s *Session) spare(k index.Key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.pending[k]
	return ok && !s.again[k]
}

// dropStored takes the records out of b that the repository has and that the
// session may rely on, and says how many bytes they had.
func (s *Session) dropStored(ctx context.Context, h *holdings, b *pack.Builder) (bytes int64) {
	drop := map[index.Key]bool{}
	for _, e := range b.Entries() {
		k := index.KeyOf(e.ID)
		if !s.spare(k) {
			continue
		}
		if in, known, err := s.r.stores(ctx, h, e.ID); err != nil {
			break
		} else if known && s.seen.rely(in) {
			drop[k] = true
		}
	}
	if len(drop) == 0 {
		return 0
	}
	before := b.Bytes()
	for _, e := range b.Entries() {
		if k := index.KeyOf(e.ID); drop[k] {
			s.storedTwice(k, e)
		}
	}
	b.Keep(func(e pack.Entry) bool { return !drop[index.KeyOf(e.ID)] })
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range drop {
		delete(s.pending, k)
	}
	return before - b.Bytes()
}
