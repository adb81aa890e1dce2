// Package index knows which pack holds which chunk: as sorted runs in the store
// with filters in memory, and as a table in memory of what is in no run yet.
//
// A chunk in a run takes 1.2 bytes of memory and 28.4 of the store. The table
// takes 28 bytes a slot and is kept from 65 to 85 % full: 33 to 43 bytes for a
// chunk. It holds no pointers, so the garbage collector never looks into it.
//
// docs/format/index.md is the specification of the objects.
package index

import (
	"encoding/binary"
	"iter"
	"math/bits"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
)

// A Key is the first half of a chunk's id.
type Key [16]byte

// KeyOf is the key of id.
func KeyOf(id chunk.ID) Key { return Key(id[:16]) }

// A Place says where a chunk's record lies.
type Place struct {
	Pack uint32 // the caller's number of the pack
	Off  uint32 // of the record in the pack, bytes
	CLen uint32 // ciphertext in the record, bytes
}

// A slot is empty if pack is 0: it holds the pack's number plus one.
type slot struct {
	key          Key
	pack         uint32
	off, ciphers uint32
}

const shards = 256

// A Table maps keys to places. It is safe for concurrent use.
type Table struct {
	shard [shards]shard
}

type shard struct {
	mu    sync.RWMutex
	slots []slot
	n     int
	first int64 // ordinal of slots[0], once the table is frozen
}

// at is where a search for k begins in a shard of n slots. Ids are uniformly
// random, so no further hashing is needed: byte 0 chooses the shard and bytes
// 8 to 15 the slot.
func (k *Key) at(n int) int {
	hi, _ := bits.Mul64(binary.LittleEndian.Uint64(k[8:]), uint64(n))
	return int(hi)
}

// find gives the index of k's slot, or of the empty slot where it would go.
func (s *shard) find(k *Key) int {
	i := k.at(len(s.slots))
	for s.slots[i].pack != 0 && s.slots[i].key != *k {
		if i++; i == len(s.slots) {
			i = 0
		}
	}
	return i
}

func (s *shard) grow() {
	old := s.slots
	s.slots = make([]slot, max(16, len(old)+len(old)*3/10))
	for i := range old {
		if old[i].pack != 0 {
			s.slots[s.find(&old[i].key)] = old[i]
		}
	}
}

// Lookup finds the place of k.
func (t *Table) Lookup(k Key) (Place, bool) {
	f, ok := t.lookup(&k)
	if !ok {
		return Place{}, false
	}
	return f.at, true
}

// Insert notes the place of k. If there is one already, replace decides
// whether the new one takes over.
func (t *Table) Insert(k Key, p Place, replace func(old Place) bool) {
	s := &t.shard[k[0]]
	s.mu.Lock()
	defer s.mu.Unlock()
	if (s.n+1)*100 > len(s.slots)*85 {
		s.grow()
	}
	e := &s.slots[s.find(&k)]
	if e.pack == 0 {
		s.n++
	} else if !replace(Place{e.pack - 1, e.off, e.ciphers}) {
		return
	}
	*e = slot{k, p.Pack + 1, p.Off, p.CLen}
}

// Len is how many chunks the table knows.
func (t *Table) Len() (n int64) {
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.RLock()
		n += int64(s.n)
		s.mu.RUnlock()
	}
	return n
}

// Bytes is the memory that the table takes.
func (t *Table) Bytes() (n int64) {
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.RLock()
		n += int64(cap(s.slots)) * 28
		s.mu.RUnlock()
	}
	return n
}

// All walks the table. Whoever walks must not insert.
func (t *Table) All() iter.Seq2[Key, Place] {
	return func(yield func(Key, Place) bool) {
		for i := range t.shard {
			if !t.shard[i].all(yield) {
				return
			}
		}
	}
}

func (s *shard) all(yield func(Key, Place) bool) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, e := range s.slots {
		if e.pack != 0 && !yield(e.key, Place{e.pack - 1, e.off, e.ciphers}) {
			return false
		}
	}
	return true
}

// freeze numbers the slots and says how many there are. From then on the table
// must not change, or the numbers of its slots do.
func (t *Table) freeze() (n int64) {
	for i := range t.shard {
		t.shard[i].first = n
		n += int64(len(t.shard[i].slots))
	}
	return n
}

// slots is how many slots there are.
func (t *Table) slots() (n int64) {
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.RLock()
		n += int64(len(s.slots))
		s.mu.RUnlock()
	}
	return n
}

// lookup is Lookup, with the number of the slot.
func (t *Table) lookup(k *Key) (f found, ok bool) {
	s := &t.shard[k[0]]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(s.slots) == 0 {
		return f, false
	}
	i := s.find(k)
	e := &s.slots[i]
	return found{Place{e.pack - 1, e.off, e.ciphers}, s.first + int64(i)}, e.pack != 0
}

// sorted gives the entries of shard i by key.
func (t *Table) sorted(i int, into []Located) []Located {
	into = into[:0]
	t.shard[i].all(func(k Key, p Place) bool {
		into = append(into, Located{k, p})
		return true
	})
	slices.SortFunc(into, func(a, b Located) int { return a.Key.Compare(&b.Key) })
	return into
}
