// Package index knows which pack holds which chunk: as a table in memory and
// as the objects that it is loaded from.
//
// The table takes 28 bytes a slot and is kept from 65 to 85 % full: 33 to 43
// bytes for a chunk, which is 65 to 85 MB for a terabyte of unique data in
// chunks of 512 KiB. It holds no pointers, so the garbage collector never
// looks into it.
//
// docs/format/index.md is the specification of the objects.
package index

import (
	"encoding/binary"
	"iter"
	"math/bits"
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
	s := &t.shard[k[0]]
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(s.slots) == 0 {
		return Place{}, false
	}
	e := &s.slots[s.find(&k)]
	if e.pack == 0 {
		return Place{}, false
	}
	return Place{e.pack - 1, e.off, e.ciphers}, true
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

// A Marks is a set of the chunks of a table that no longer changes, one bit a
// slot.
type Marks struct {
	t    *Table
	bits []uint64
}

// NewMarks makes an empty set over t. From then on t must not change.
func (t *Table) NewMarks() *Marks {
	var n int64
	for i := range t.shard {
		t.shard[i].first = n
		n += int64(len(t.shard[i].slots))
	}
	return &Marks{t, make([]uint64, (n+63)/64)}
}

// Mark puts k into the set. It says whether the table knows k at all, and
// whether it was not yet in the set.
func (m *Marks) Mark(k Key) (p Place, known, fresh bool) {
	s := &m.t.shard[k[0]]
	if len(s.slots) == 0 {
		return p, false, false
	}
	i := s.find(&k)
	e := &s.slots[i]
	if e.pack == 0 {
		return p, false, false
	}
	at := s.first + int64(i)
	fresh = m.bits[at/64]&(1<<(at%64)) == 0
	m.bits[at/64] |= 1 << (at % 64)
	return Place{e.pack - 1, e.off, e.ciphers}, true, fresh
}

// Has says whether k is in the set.
func (m *Marks) Has(k Key) bool {
	s := &m.t.shard[k[0]]
	if len(s.slots) == 0 {
		return false
	}
	i := s.find(&k)
	at := s.first + int64(i)
	return s.slots[i].pack != 0 && m.bits[at/64]&(1<<(at%64)) != 0
}
