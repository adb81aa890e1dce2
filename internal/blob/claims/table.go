// Package claims keeps what writers are storing right now, and what they stored
// a moment ago, so that no two store the same: in memory, for who serves all of
// them, or in a file that they share.
//
// Nothing may rely on it. What is lost of it costs space until the next vacuum.
package claims

import (
	"container/list"
	"iter"
	"time"
)

const (
	// OpenFor is how long somebody may take to store what he claimed, by the
	// monotonic clock; longer than anybody waits for him.
	OpenFor = 2 * time.Minute
	// SettledFor is how long it is remembered what lies in which pack: until
	// others have seen the index object that says so.
	SettledFor = 10 * time.Minute
)

// Limits bound a Table.
type Limits struct {
	Keys     int // of all claims
	PerShare int // of those of one share
	Each     int // that each claim counts as, beside its own
}

// A Table is claims on keys K, under tickets T, of owners with whom what they are
// storing ends. Each belongs to a share, which bounds what is kept. It is not
// safe for concurrent use.
type Table[K, T, O comparable] struct {
	limits Limits
	now    func() time.Duration

	keys   map[K]*claim[K, T, O]
	open   map[T]*claim[K, T, O]
	owners map[O]map[*claim[K, T, O]]bool
	shares map[string]*share
	kept   int // keys of all shares, as they count
}

// A claim is open until it is settled, its time is over, or its owner is gone.
type claim[K, T, O comparable] struct {
	of      T
	by      O
	keys    []K
	pack    [32]byte
	settled bool
	until   time.Duration
	share   string
	queue   *list.List // of its share
	place   *list.Element
}

type share struct {
	kept          int
	open, settled list.List // oldest first
}

// State is what is known of a key.
type State int

// The states.
const (
	Free State = iota
	Busy       // somebody is storing it
	In         // somebody has stored it
)

// NewTable makes an empty table. Now is the time, from any beginning.
func NewTable[K, T, O comparable](l Limits, now func() time.Duration) *Table[K, T, O] {
	return &Table[K, T, O]{
		limits: l, now: now,
		keys: map[K]*claim[K, T, O]{}, open: map[T]*claim[K, T, O]{}, owners: map[O]map[*claim[K, T, O]]bool{}, shares: map[string]*share{},
	}
}

// Get says what is known of a key: whose claim it is, and in which pack it lies.
func (t *Table[K, T, O]) Get(k K) (s State, by O, pack [32]byte) {
	switch c := t.keys[k]; {
	case c == nil:
		return Free, by, pack
	case c.settled:
		return In, c.by, c.pack
	default:
		return Busy, c.by, pack
	}
}

// Begin gives keys to a ticket that has none, whosever they were; a key that is
// named twice counts once. It keeps nothing, and says so, where there is no room.
func (t *Table[K, T, O]) Begin(of T, by O, in string, keys []K) bool {
	if len(keys) == 0 || !t.room(in, len(keys)+t.limits.Each) {
		return false
	}
	c := &claim[K, T, O]{of: of, by: by, share: in, until: t.now() + OpenFor}
	for _, k := range keys {
		if t.keys[k] != c {
			t.keys[k] = c
			c.keys = append(c.keys, k)
		}
	}
	s := t.shares[in]
	if s == nil {
		s = &share{}
		t.shares[in] = s
	}
	s.kept += t.cost(c)
	t.kept += t.cost(c)
	t.open[of] = c
	if t.owners[by] == nil {
		t.owners[by] = map[*claim[K, T, O]]bool{}
	}
	t.owners[by][c] = true
	c.queue = &s.open
	c.place = c.queue.PushBack(c)
	return true
}

func (t *Table[K, T, O]) cost(c *claim[K, T, O]) int { return len(c.keys) + t.limits.Each }

// room makes room for n keys of a share, at the cost of what it settled longest
// ago. Where there is none a claim is not kept, and others store the same.
func (t *Table[K, T, O]) room(in string, n int) bool {
	s := t.shares[in]
	for s != nil && (s.kept+n > t.limits.PerShare || t.kept+n > t.limits.Keys) {
		oldest := s.settled.Front()
		if oldest == nil {
			break
		}
		t.drop(oldest.Value.(*claim[K, T, O]))
		s = t.shares[in]
	}
	return n <= t.limits.PerShare && t.kept+n <= t.limits.Keys && (s == nil || s.kept+n <= t.limits.PerShare)
}

// Settle moves a claim to those that say where something lies. It says whether
// there was one.
func (t *Table[K, T, O]) Settle(of T, pack [32]byte) bool {
	c := t.open[of]
	if c == nil {
		return false
	}
	t.shut(c)
	c.pack, c.settled = pack, true
	c.until = t.now() + SettledFor
	c.queue.Remove(c.place)
	c.queue = &t.shares[c.share].settled
	c.place = c.queue.PushBack(c)
	return true
}

// End forgets an open claim. It says whether there was one.
func (t *Table[K, T, O]) End(of T) bool {
	c := t.open[of]
	if c == nil {
		return false
	}
	t.drop(c)
	return true
}

// HangUp ends the open claims of an owner who is gone.
func (t *Table[K, T, O]) HangUp(by O) {
	for c := range t.owners[by] {
		t.drop(c)
	}
}

// Expire forgets what is too old.
func (t *Table[K, T, O]) Expire() {
	now := t.now()
	for _, s := range t.shares {
		for _, queue := range []*list.List{&s.open, &s.settled} {
			for e := queue.Front(); e != nil && e.Value.(*claim[K, T, O]).until <= now; e = queue.Front() {
				t.drop(e.Value.(*claim[K, T, O]))
			}
		}
	}
}

// shut makes c no longer open.
func (t *Table[K, T, O]) shut(c *claim[K, T, O]) {
	delete(t.open, c.of)
	delete(t.owners[c.by], c)
	if len(t.owners[c.by]) == 0 {
		delete(t.owners, c.by)
	}
	var gone O
	c.by = gone // it may be large
}

func (t *Table[K, T, O]) drop(c *claim[K, T, O]) {
	if !c.settled {
		t.shut(c)
	}
	for _, k := range c.keys {
		if t.keys[k] == c { // nobody has it since
			delete(t.keys, k)
		}
	}
	s := t.shares[c.share]
	c.queue.Remove(c.place)
	t.kept -= t.cost(c)
	if s.kept -= t.cost(c); s.open.Len() == 0 && s.settled.Len() == 0 {
		delete(t.shares, c.share)
	}
}

// Len counts what is kept: keys, as they count in the limits, and open claims.
func (t *Table[K, T, O]) Len() (keys, open int) { return t.kept, len(t.open) }

// A Kept is one claim of a Table.
type Kept[K, T any] struct {
	Of   T
	Keys []K       // that nobody has claimed since
	In   *[32]byte // the pack, of a settled one
}

// All are the claims, in each share the settled ones first, and the oldest first.
func (t *Table[K, T, O]) All() iter.Seq[Kept[K, T]] {
	return func(yield func(Kept[K, T]) bool) {
		for _, s := range t.shares {
			for _, queue := range []*list.List{&s.settled, &s.open} {
				for e := queue.Front(); e != nil; e = e.Next() {
					c := e.Value.(*claim[K, T, O])
					k := Kept[K, T]{Of: c.of}
					if c.settled {
						k.In = &c.pack
					}
					for _, key := range c.keys {
						if t.keys[key] == c {
							k.Keys = append(k.Keys, key)
						}
					}
					if !yield(k) {
						return
					}
				}
			}
		}
	}
}
