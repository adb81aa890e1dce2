package file

import (
	"bytes"
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"time"
)

// openings counts the files that a file system opens and that are open.
type openings struct {
	FS
	opened, open atomic.Int64
}

type countedFile struct {
	File
	of *openings
}

func (o *openings) Open(name string) (File, error) {
	f, err := o.FS.Open(name)
	if err != nil {
		return nil, err
	}
	o.opened.Add(1)
	o.open.Add(1)
	return countedFile{f, o}, nil
}

func (f countedFile) Close() error {
	f.of.open.Add(-1)
	return f.File.Close()
}

// counted is a store of n small objects.
func counted(t *testing.T, n int) (*Store, *openings, func(from, to int)) {
	t.Helper()
	if !handlesMayStay {
		t.Skip("no file stays open here")
	}
	st, err := Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	for i := range n {
		if err := st.Put(t.Context(), fmt.Sprintf("idx/%04d", i), bytes.NewReader([]byte("x")), 1); err != nil {
			t.Fatal(err)
		}
	}
	o := &openings{FS: st.fs}
	st.open.fs = o
	return st, o, func(from, to int) {
		t.Helper()
		for i := from; i < to; i++ {
			if _, err := st.ReadAt(t.Context(), fmt.Sprintf("idx/%04d", i), make([]byte, 1), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func withBudget(t *testing.T, n int64) {
	was := handleBudget
	handleBudget = func() int64 { return n }
	t.Cleanup(func() { handleBudget = was })
}

func TestBudgetOfOpenFiles(t *testing.T) {
	for _, c := range []struct {
		limit uint64
		want  int64
	}{{0, 64}, {200, 64}, {1024, 256}, {4096, 1024}, {1 << 20, 1024}, {math.MaxUint64, 1024}} {
		if got := budgetFor(c.limit); got != c.want {
			t.Errorf("of %d: %d, want %d", c.limit, got, c.want)
		}
	}
}

// An index of as many parts as the budget allows is opened once, and never are
// more open than that, in all stores together.
func TestFilesStayOpenWithinABudget(t *testing.T) {
	withBudget(t, 100)
	_, o, read := counted(t, 150)
	for range 3 {
		read(0, 100)
	}
	if n := o.opened.Load(); n != 100 {
		t.Errorf("100 objects were opened %d times", n)
	}
	read(100, 150)
	if n := o.open.Load(); n != 100 {
		t.Errorf("%d are open, want 100", n)
	}
	_, p, readOther := counted(t, 60)
	readOther(0, 60)
	if n := p.open.Load(); n != ownHandles {
		t.Errorf("a second store has %d open, want %d", n, ownHandles)
	}
	read(0, 50)
	if n := o.open.Load() + p.open.Load(); n > 100+ownHandles {
		t.Errorf("%d are open in two stores", n)
	}
}

// What nobody reads any more is closed, and so is everything with the store.
func TestIdleFilesAreClosed(t *testing.T) {
	was := idleFor
	idleFor = time.Millisecond
	defer func() { idleFor = was }()
	before := kept.Load()
	st, o, read := counted(t, 10)
	read(0, 10)
	for o.open.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
	read(0, 10)
	if err := st.Close(); err != nil {
		t.Error(err)
	}
	if n := o.open.Load(); n != 0 || kept.Load() != before {
		t.Errorf("%d are open after the end, %d counted", n, kept.Load()-before)
	}
}
