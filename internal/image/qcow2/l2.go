package qcow2

import (
	"container/list"
	"encoding/binary"
	"os"
	"slices"
	"sync"
)

// l2Tables are the L2 tables of an image that is being written. Those that
// were touched last are in memory; the others wait in the file, each at the
// place where it stays.
type l2Tables struct {
	file  *os.File
	bits  uint32
	space *space
	limit int // how many are in memory

	mu     sync.Mutex
	places []int64 // offset of each table, 0 for none yet
	loaded map[int64]*list.Element
	order  list.List // of *l2Table, the most recently used first
}

type l2Table struct {
	number int64
	p      []byte
}

// l2Bytes is the memory for tables. They map 1 TiB with usual clusters.
const l2Bytes = 128 << 20

func newL2Tables(f *os.File, bits uint32, count int64, s *space) *l2Tables {
	return &l2Tables{file: f, bits: bits, space: s, limit: l2Bytes >> bits,
		places: make([]int64, count), loaded: map[int64]*list.Element{}}
}

func (t *l2Tables) count() int { return len(t.places) }

// set sets the entry of a virtual cluster.
func (t *l2Tables) set(cluster int64, entry uint64) error {
	return t.setRun(cluster, 1, func(int64) uint64 { return entry })
}

// setRun sets the entries of n virtual clusters from first on.
func (t *l2Tables) setRun(first, n int64, entry func(i int64) uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	perTable := int64(1) << (t.bits - 3)
	for i := int64(0); i < n; {
		table, err := t.load((first + i) / perTable)
		if err != nil {
			return err
		}
		for at := (first + i) % perTable; at < perTable && i < n; at, i = at+1, i+1 {
			binary.BigEndian.PutUint64(table[at*8:], entry(i))
		}
	}
	return nil
}

// load gives table number n to be changed, until the next call.
func (t *l2Tables) load(n int64) ([]byte, error) {
	if el := t.loaded[n]; el != nil {
		t.order.MoveToFront(el)
		return el.Value.(*l2Table).p, nil
	}
	var p []byte
	if t.order.Len() >= t.limit {
		el := t.order.Back()
		old := el.Value.(*l2Table)
		if err := t.store(old); err != nil {
			return nil, err
		}
		t.order.Remove(el)
		delete(t.loaded, old.number)
		p = old.p
		clear(p)
	} else {
		p = make([]byte, 1<<t.bits)
	}
	if t.places[n] != 0 {
		if _, err := t.file.ReadAt(p, t.places[n]); err != nil {
			return nil, err
		}
	}
	t.loaded[n] = t.order.PushFront(&l2Table{n, p})
	return p, nil
}

func (t *l2Tables) store(table *l2Table) error {
	if t.places[table.number] == 0 {
		off, err := t.space.clusters(1)
		if err != nil {
			return err
		}
		t.places[table.number] = off
	}
	_, err := t.file.WriteAt(table.p, t.places[table.number])
	return err
}

// flush writes all tables and the L1 table, and gives the offset of that.
func (t *l2Tables) flush() (l1 int64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tables := make([]*l2Table, 0, len(t.loaded))
	for el := t.order.Front(); el != nil; el = el.Next() {
		tables = append(tables, el.Value.(*l2Table))
	}
	slices.SortFunc(tables, func(a, b *l2Table) int { return int(a.number - b.number) })
	for _, table := range tables {
		if err := t.store(table); err != nil {
			return 0, err
		}
	}
	n := (int64(len(t.places))*8 + 1<<t.bits - 1) >> t.bits
	if l1, err = t.space.clusters(n); err != nil {
		return 0, err
	}
	p := make([]byte, 0, len(t.places)*8)
	for _, off := range t.places {
		entry := uint64(0)
		if off != 0 {
			entry = uint64(off) | flagCopied
		}
		p = binary.BigEndian.AppendUint64(p, entry)
	}
	_, err = t.file.WriteAt(p, l1)
	return l1, err
}
