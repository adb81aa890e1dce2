package blobtest

import (
	"context"
	"errors"
	"io"
	"iter"
	"strings"
	"sync"

	"github.com/backstay/backstay/internal/blob"
)

// ErrCrashed is what every call gives once a store from CrashAfter is dead.
var ErrCrashed = errors.New("the process was killed here")

// A Crash is a store as a process sees it that is killed in the middle. The
// store that it was made from is what the next process finds.
type Crash struct {
	st      blob.Store
	applied bool
	free    string

	mu       sync.Mutex
	left     int
	dead     bool
	releases map[int]func()
	next     int
}

var (
	_ blob.Store  = (*Crash)(nil)
	_ blob.Locker = (*Crash)(nil)
)

// CrashAfter lets n mutating calls succeed. The next one is not applied; it
// and every call after it, of any kind, give ErrCrashed. Locks taken through
// it are let go at that moment. It is a blob.Locker even if st is none: then
// its locks are always free.
func CrashAfter(n int, st blob.Store) *Crash {
	return &Crash{st: st, left: n, releases: map[int]func(){}}
}

// CrashAfterApplied is CrashAfter, but the call in which the process dies is
// applied all the same: done, and nobody left to learn of it.
func CrashAfterApplied(n int, st blob.Store) *Crash {
	c := CrashAfter(n, st)
	c.applied = true
	return c
}

// Uncounted lets calls that change what is under prefix succeed without being
// one of the n, as long as the process lives: such as come by the clock, of
// which a busy machine sees more. It gives c.
func (c *Crash) Uncounted(prefix string) *Crash {
	c.free = prefix
	return c
}

// Crashed says whether it came to the crash.
func (c *Crash) Crashed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dead
}

// begin says whether the call is made, and whether its result is heard.
func (c *Crash) begin(counts bool) (apply bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return false, ErrCrashed
	}
	if counts {
		if c.left == 0 {
			c.dead = true
			for _, release := range c.releases {
				release()
			}
			return c.applied, ErrCrashed
		}
		c.left--
	}
	return true, nil
}

func (c *Crash) mutate(name string, call func() error) error {
	apply, err := c.begin(c.free == "" || !strings.HasPrefix(name, c.free))
	if !apply {
		return err
	}
	done := call()
	if err != nil {
		return err
	}
	return done
}

// Put implements blob.Store.
func (c *Crash) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return c.mutate(name, func() error { return c.st.Put(ctx, name, body, size) })
}

// Create implements blob.Store.
func (c *Crash) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return c.mutate(name, func() error { return c.st.Create(ctx, name, body, size) })
}

// Delete implements blob.Store.
func (c *Crash) Delete(ctx context.Context, name string) error {
	return c.mutate(name, func() error { return c.st.Delete(ctx, name) })
}

// ReadAt implements blob.Store.
func (c *Crash) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if _, err := c.begin(false); err != nil {
		return 0, err
	}
	return c.st.ReadAt(ctx, name, p, off)
}

// Size implements blob.Store.
func (c *Crash) Size(ctx context.Context, name string) (int64, error) {
	if _, err := c.begin(false); err != nil {
		return 0, err
	}
	return c.st.Size(ctx, name)
}

// List implements blob.Store.
func (c *Crash) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		for o, err := range c.st.List(ctx, prefix) {
			if _, dead := c.begin(false); dead != nil {
				o, err = blob.Object{}, dead
			}
			if !yield(o, err) || err != nil {
				return
			}
		}
		if _, dead := c.begin(false); dead != nil {
			yield(blob.Object{}, dead)
		}
	}
}

// Lock implements blob.Locker.
func (c *Crash) Lock(ctx context.Context, name string, exclusive bool) (func(), error) {
	if _, err := c.begin(false); err != nil {
		return nil, err
	}
	l, ok := c.st.(blob.Locker)
	if !ok {
		return func() {}, nil
	}
	release, err := l.Lock(ctx, name, exclusive)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		release()
		return nil, ErrCrashed
	}
	n := c.next
	c.next++
	c.releases[n] = release
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.releases, n)
		release()
	}, nil
}

func (c *Crash) String() string { return c.st.String() }

// Close keeps the store that it was made from open: the next process needs it.
func (c *Crash) Close() error { return nil }
