// Package mem is a store in memory, for tests and for trying things out.
package mem

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// A Store is a blob.Store and a blob.Locker. It lives as long as the process;
// Close keeps its objects.
type Store struct {
	mu      sync.RWMutex
	objects map[string][]byte // a value is replaced and never changed
	locks   map[string]int    // shared holders, or -1 for an exclusive one
}

var (
	_ blob.Store  = (*Store)(nil)
	_ blob.Locker = (*Store)(nil)
)

// New makes an empty store.
func New() *Store {
	return &Store{objects: map[string][]byte{}, locks: map[string]int{}}
}

// Clone is a store with the same objects and nobody's locks: what another
// machine would find if this one lost its power now.
func (s *Store) Clone() *Store {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := New()
	for name, data := range s.objects {
		c.objects[name] = data
	}
	return c
}

// Damage calls change with a copy of the object's bytes and keeps what it
// returns: rot that no caller of the Store could cause.
func (s *Store) Damage(name string, change func([]byte) []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, ok := s.objects[name]
	if !ok {
		return fmt.Errorf("%s: %w", name, fault.ErrNotFound)
	}
	s.objects[name] = change(slices.Clone(data))
	return nil
}

// Put implements blob.Store.
func (s *Store) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.store(ctx, name, body, size, true)
}

// Create implements blob.Store.
func (s *Store) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.store(ctx, name, body, size, false)
}

func (s *Store) store(ctx context.Context, name string, body io.ReaderAt, size int64, replace bool) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%s: size %d", name, size)
	}
	data := make([]byte, size)
	if n, err := body.ReadAt(data, 0); int64(n) < size {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%s: body: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[name]; ok && !replace {
		return fmt.Errorf("%s: %w", name, fault.ErrExists)
	}
	s.objects[name] = data
	return nil
}

// ReadAt implements blob.Store.
func (s *Store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	data, err := s.get(ctx, name)
	if err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: offset %d", name, off)
	}
	n := 0
	if off < int64(len(data)) {
		n = copy(p, data[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Size implements blob.Store.
func (s *Store) Size(ctx context.Context, name string) (int64, error) {
	data, err := s.get(ctx, name)
	return int64(len(data)), err
}

func (s *Store) get(ctx context.Context, name string) ([]byte, error) {
	if err := check(ctx, name); err != nil {
		return nil, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	data, ok := s.objects[name]
	if !ok {
		return nil, fmt.Errorf("%s: %w", name, fault.ErrNotFound)
	}
	return data, nil
}

// List implements blob.Store. It shows the objects of one moment.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		var list []blob.Object
		s.mu.RLock()
		for name, data := range s.objects {
			if strings.HasPrefix(name, prefix) {
				list = append(list, blob.Object{Name: name, Bytes: int64(len(data))})
			}
		}
		s.mu.RUnlock()
		slices.SortFunc(list, func(a, b blob.Object) int { return strings.Compare(a.Name, b.Name) })
		for _, o := range list {
			if err := ctx.Err(); err != nil {
				yield(blob.Object{}, err)
				return
			}
			if !yield(o, nil) {
				return
			}
		}
	}
}

// Delete implements blob.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, name)
	return nil
}

// Lock implements blob.Locker. Locks of a lost process would be held for ever
// here; blobtest.CrashAfter lets go of those that were taken through it.
func (s *Store) Lock(ctx context.Context, name string, exclusive bool) (func(), error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.locks[name]
	if held < 0 || exclusive && held > 0 {
		return nil, fmt.Errorf("lock %s: held in this process: %w", name, fault.ErrLocked)
	}
	if exclusive {
		s.locks[name] = -1
	} else {
		s.locks[name]++
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if exclusive {
			s.locks[name] = 0
		} else {
			s.locks[name]--
		}
	}), nil
}

func (s *Store) String() string { return "mem:" }

// Close implements blob.Store.
func (s *Store) Close() error { return nil }

func check(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return blob.CheckName(name)
}
