package blobtest_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
)

// Wrappers that do nothing on cue are stores like any other.
func TestWrappersConform(t *testing.T) {
	t.Run("faulty", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store {
			return blobtest.Faulty(mem.New(), func(blobtest.Call) error { return nil })
		})
	})
	t.Run("count", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store { st, _ := blobtest.Count(mem.New()); return st })
	})
	t.Run("crash", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store { return blobtest.CrashAfter(1<<30, mem.New()) })
	})
}

func TestCrashAfter(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(int, blob.Store) *blobtest.Crash
		want []string
	}{
		{"not applied", blobtest.CrashAfter, []string{"a0", "a1"}},
		{"applied", blobtest.CrashAfterApplied, []string{"a0", "a1", "a2"}},
	} {
		disk := mem.New()
		st := c.make(2, disk)
		if _, err := st.Lock(t.Context(), "w", true); err != nil {
			t.Fatal(err)
		}
		for i := range 5 {
			r, n := blobtest.Body([]byte("x"))
			err := st.Create(t.Context(), fmt.Sprintf("a%d", i), r, n)
			if want := i >= 2; errors.Is(err, blobtest.ErrCrashed) != want {
				t.Errorf("%s: create %d: %v", c.name, i, err)
			}
		}
		if !st.Crashed() {
			t.Errorf("%s: not crashed", c.name)
		}
		if _, err := st.Size(t.Context(), "a0"); !errors.Is(err, blobtest.ErrCrashed) {
			t.Errorf("%s: a dead process reads: %v", c.name, err)
		}
		if names, err := blobtest.Names(t.Context(), disk, ""); err != nil || !slices.Equal(names, c.want) {
			t.Errorf("%s: left %q, %v; want %q", c.name, names, err, c.want)
		}
		if _, err := disk.Lock(t.Context(), "w", true); err != nil {
			t.Errorf("%s: a dead process holds its lock: %v", c.name, err)
		}
	}
}

// What comes by the clock does not bring the crash nearer.
func TestCrashUncounted(t *testing.T) {
	st := blobtest.CrashAfter(1, mem.New()).Uncounted("beat/")
	for i, c := range []struct {
		name string
		dead bool
	}{{"beat/1", false}, {"a", false}, {"beat/2", false}, {"beats", true}, {"beat/3", true}} {
		r, n := blobtest.Body([]byte("x"))
		if err := st.Create(t.Context(), c.name, r, n); errors.Is(err, blobtest.ErrCrashed) != c.dead {
			t.Errorf("call %d, %s: %v", i, c.name, err)
		}
	}
}

func TestFaultyAndCount(t *testing.T) {
	disk, counter := blobtest.Count(mem.New())
	st := blobtest.Faulty(disk, func(c blobtest.Call) error {
		switch {
		case c.Op == blobtest.OpPut && c.Nth == 1:
			return fault.ErrNoSpace
		case c.Op == blobtest.OpPut && c.Nth == 2:
			return blobtest.ErrLostReply
		}
		return nil
	})
	for i, want := range []error{nil, fault.ErrNoSpace, blobtest.ErrLostReply, nil} {
		r, n := blobtest.Body([]byte("abc"))
		if err := st.Put(t.Context(), fmt.Sprintf("a%d", i), r, n); !errors.Is(err, want) {
			t.Errorf("put %d: %v, want %v", i, err, want)
		}
	}
	if names, _ := blobtest.Names(t.Context(), st, ""); !slices.Equal(names, []string{"a0", "a2", "a3"}) {
		t.Errorf("left %q", names)
	}
	if got := counter.Calls(blobtest.OpPut); got != 3 {
		t.Errorf("counted %d puts, want 3", got)
	}
	if put, _ := counter.Bytes(); put != 9 {
		t.Errorf("counted %d bytes, want 9", put)
	}
}
