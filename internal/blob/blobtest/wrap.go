package blobtest

import (
	"context"
	"errors"
	"io"
	"iter"
	"sync"

	"github.com/backstay/backstay/internal/blob"
)

// An Op is one of the calls of a blob.Store or blob.Locker.
type Op string

// The calls.
const (
	OpPut    Op = "put"
	OpCreate Op = "create"
	OpReadAt Op = "read"
	OpSize   Op = "size"
	OpList   Op = "list"
	OpDelete Op = "delete"
	OpLock   Op = "lock"
)

// Mutates says whether the call changes what is stored.
func (o Op) Mutates() bool { return o == OpPut || o == OpCreate || o == OpDelete }

// A Call is one call as a hook sees it.
type Call struct {
	Op   Op
	Name string // of the object; the prefix of OpList, the lock's name of OpLock
	N    int    // calls before this one, of any kind
	Nth  int    // calls of this kind before this one
}

// ErrLostReply, returned (or wrapped) by the hook of Faulty, lets the call take
// effect and fails it nevertheless: the reply was lost, not the request.
var ErrLostReply = errors.New("reply lost")

// Faulty is st with a hook before every call. Where the hook returns an error
// the call fails with it, without effect unless it is ErrLostReply. A hook may
// sleep to delay a call; it is called from many goroutines, one at a time.
// The wrapper is a blob.Locker if st is one.
func Faulty(st blob.Store, hook func(Call) error) blob.Store {
	w := &hooked{Store: st, seen: map[Op]int{}, hook: hook}
	if _, ok := st.(blob.Locker); ok {
		return &hookedLocker{w}
	}
	return w
}

type hooked struct {
	blob.Store
	hook func(Call) error

	mu   sync.Mutex
	n    int
	seen map[Op]int
}

func (w *hooked) ReadShape() blob.ReadShape { return blob.ShapeOf(w.Store) }

// before says whether to make the call, and with which error to end it.
func (w *hooked) before(op Op, name string) (apply bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	err = w.hook(Call{op, name, w.n, w.seen[op]})
	w.n++
	w.seen[op]++
	return err == nil || errors.Is(err, ErrLostReply), err
}

func (w *hooked) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return w.mutate(OpPut, name, func() error { return w.Store.Put(ctx, name, body, size) })
}

func (w *hooked) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return w.mutate(OpCreate, name, func() error { return w.Store.Create(ctx, name, body, size) })
}

func (w *hooked) Delete(ctx context.Context, name string) error {
	return w.mutate(OpDelete, name, func() error { return w.Store.Delete(ctx, name) })
}

func (w *hooked) mutate(op Op, name string, call func() error) error {
	apply, err := w.before(op, name)
	if !apply {
		return err
	}
	return errors.Join(call(), err)
}

func (w *hooked) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if _, err := w.before(OpReadAt, name); err != nil {
		return 0, err
	}
	return w.Store.ReadAt(ctx, name, p, off)
}

func (w *hooked) Size(ctx context.Context, name string) (int64, error) {
	if _, err := w.before(OpSize, name); err != nil {
		return 0, err
	}
	return w.Store.Size(ctx, name)
}

func (w *hooked) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		if _, err := w.before(OpList, prefix); err != nil {
			yield(blob.Object{}, err)
			return
		}
		w.Store.List(ctx, prefix)(yield)
	}
}

type hookedLocker struct{ *hooked }

func (w *hookedLocker) Lock(ctx context.Context, name string, exclusive bool) (func(), error) {
	if _, err := w.before(OpLock, name); err != nil {
		return nil, err
	}
	return w.Store.(blob.Locker).Lock(ctx, name, exclusive)
}

// A Counter is a store that counts. It is a blob.Locker if it was made from one.
type Counter struct {
	mu    sync.Mutex
	calls map[Op]int
	put   int64
	read  int64
}

// Count is st with a Counter of its calls.
func Count(st blob.Store) (blob.Store, *Counter) {
	c := &Counter{calls: map[Op]int{}}
	inner := &counted{Store: st, c: c}
	return Faulty(inner.asLocker(), func(call Call) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.calls[call.Op]++
		return nil
	}), c
}

// Calls is how often op was called, whether or not it succeeded.
func (c *Counter) Calls(op Op) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls[op]
}

// Mutations is how many calls could have changed what is stored.
func (c *Counter) Mutations() int {
	return c.Calls(OpPut) + c.Calls(OpCreate) + c.Calls(OpDelete)
}

// Bytes is how many bytes were stored and read by calls that succeeded.
func (c *Counter) Bytes() (put, read int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.put, c.read
}

type counted struct {
	blob.Store
	c *Counter
}

func (s *counted) asLocker() blob.Store {
	if l, ok := s.Store.(blob.Locker); ok {
		return struct {
			*counted
			blob.Locker
		}{s, l}
	}
	return s
}

func (s *counted) ReadShape() blob.ReadShape { return blob.ShapeOf(s.Store) }

func (s *counted) add(err error, put, read int64) {
	if err != nil && err != io.EOF {
		return
	}
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.c.put += put
	s.c.read += read
}

func (s *counted) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	err := s.Store.Put(ctx, name, body, size)
	s.add(err, size, 0)
	return err
}

func (s *counted) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	err := s.Store.Create(ctx, name, body, size)
	s.add(err, size, 0)
	return err
}

func (s *counted) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	n, err := s.Store.ReadAt(ctx, name, p, off)
	s.add(err, 0, int64(n))
	return n, err
}
