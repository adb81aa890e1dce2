// Package retry is a store that tries again when another store had passing
// trouble: a reset connection, a server that is busy.
//
// It asks the class of an error and never its text. What a second try cannot
// mend (what is missing, exists, is damaged, locked, full, read-only, denied)
// is returned at once, and so is the error of a body that could not be read.
package retry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// Options say how long to go on. Zero values choose what is usual.
type Options struct {
	// Patience is how long one call is tried in all, 3 minutes by default:
	// longer than a load balancer takes to notice a dead server, shorter than
	// an administrator's.
	Patience time.Duration
	// First and Longest bound the pauses between tries, which double: 100 ms
	// and 10 s by default.
	First, Longest time.Duration
	// Told is called before each pause, so that a slow store can be seen.
	Told func(op, name string, err error, pause time.Duration)

	sleep func(context.Context, time.Duration) error // tests
}

// Wrap makes a store that makes st's calls again. It is a blob.Locker if st is
// one; locks are taken once, since they do not wait by definition.
func Wrap(st blob.Store, o Options) blob.Store {
	if o.Patience <= 0 {
		o.Patience = 3 * time.Minute
	}
	if o.First <= 0 {
		o.First = 100 * time.Millisecond
	}
	if o.Longest <= 0 {
		o.Longest = 10 * time.Second
	}
	if o.sleep == nil {
		o.sleep = sleep
	}
	s := &store{Store: st, o: o}
	if l, ok := st.(blob.Locker); ok {
		return struct {
			*store
			blob.Locker
		}{s, l}
	}
	return s
}

type store struct {
	blob.Store
	o Options
}

// ReadShape implements blob.ReadShaper: that of the store underneath.
func (s *store) ReadShape() blob.ReadShape { return blob.ShapeOf(s.Store) }

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// passing says whether a call that ended so may end otherwise.
func passing(ctx context.Context, err error) bool {
	if err == nil || err == io.EOF || ctx.Err() != nil {
		return false
	}
	for _, class := range []error{
		fault.ErrNotFound, fault.ErrExists, fault.ErrCorrupt, fault.ErrLocked, fault.ErrKey, fault.ErrUnsupported,
		fault.ErrNoSpace, fault.ErrReadOnly, fault.ErrDenied, context.Canceled,
	} {
		if errors.Is(err, class) {
			return false
		}
	}
	return true
}

// do calls until it succeeds, meets something that lasts, or patience is over.
// Patience is counted in pauses, so that a call which itself takes long, with
// all it achieved, is never the reason to give up.
func (s *store) do(ctx context.Context, op, name string, call func(try int) error) error {
	pause, waited := s.o.First, time.Duration(0)
	for try := 0; ; try++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := call(try)
		if !passing(ctx, err) {
			return err
		}
		// Half of the pause is random: clients that failed together do not come
		// back together.
		d := pause/2 + rand.N(pause/2+1)
		if waited += d; waited > s.o.Patience {
			return fmt.Errorf("%s %s: gave up after %d tries: %w", op, name, try+1, err)
		}
		if s.o.Told != nil {
			s.o.Told(op, name, err, d)
		}
		if err := s.o.sleep(ctx, d); err != nil {
			return err
		}
		pause = min(2*pause, s.o.Longest)
	}
}

// A watchedBody remembers whether it was the body that failed.
type watchedBody struct {
	io.ReaderAt
	mu  sync.Mutex
	err error
}

func (b *watchedBody) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.ReaderAt.ReadAt(p, off)
	if err != nil && err != io.EOF {
		b.mu.Lock()
		b.err = err
		b.mu.Unlock()
	}
	return n, err
}

func (b *watchedBody) failed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err != nil
}

func (s *store) send(ctx context.Context, op, name string, body io.ReaderAt, size int64, call func(io.ReaderAt) error) error {
	if err := blob.CheckName(name); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%s: size %d", name, size)
	}
	// A body that is too short would fail again each time.
	if size > 0 {
		if n, err := body.ReadAt(make([]byte, 1), size-1); n == 0 {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("%s: body: %w", name, err)
		}
	}
	watched := &watchedBody{ReaderAt: body}
	var broken error
	err := s.do(ctx, op, name, func(int) error {
		err := call(watched)
		if err != nil && watched.failed() {
			broken = err
			return nil
		}
		return err
	})
	return errors.Join(err, broken)
}

// Put implements blob.Store.
func (s *store) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.send(ctx, "put", name, body, size, func(body io.ReaderAt) error {
		return s.Store.Put(ctx, name, body, size)
	})
}

// Create implements blob.Store. If an earlier try failed, its request may have
// arrived all the same: then an object that holds exactly these bytes is taken
// for ours. Creators of one name whose bytes are the same may so both succeed;
// whoever must tell them apart puts something of its own into the object.
func (s *store) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	unsure := false
	return s.send(ctx, "create", name, body, size, func(body io.ReaderAt) error {
		err := s.Store.Create(ctx, name, body, size)
		if errors.Is(err, fault.ErrExists) && unsure {
			same, cmpErr := s.holds(ctx, name, body, size)
			if cmpErr != nil {
				return cmpErr
			}
			if same {
				return nil
			}
		}
		unsure = unsure || passing(ctx, err)
		return err
	})
}

// holds says whether the object is byte by byte the body.
func (s *store) holds(ctx context.Context, name string, body io.ReaderAt, size int64) (bool, error) {
	n, err := s.Size(ctx, name)
	if err != nil || n != size {
		return false, err
	}
	const piece = 1 << 20
	there, ours := make([]byte, min(piece, size)), make([]byte, min(piece, size))
	for off := int64(0); off < size; off += piece {
		n := min(piece, size-off)
		if _, err := s.ReadAt(ctx, name, there[:n], off); err != nil {
			return false, err
		}
		if got, err := body.ReadAt(ours[:n], off); int64(got) < n {
			return false, err
		}
		if string(there[:n]) != string(ours[:n]) {
			return false, nil
		}
	}
	return true, nil
}

// ReadAt implements blob.Store. A read that broke off begins again: the object
// may have been replaced, and half of each is neither.
func (s *store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if err := blob.CheckName(name); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: offset %d", name, off)
	}
	var n int
	err := s.do(ctx, "read", name, func(int) (err error) {
		n, err = s.Store.ReadAt(ctx, name, p, off)
		return err
	})
	return n, err
}

// Size implements blob.Store.
func (s *store) Size(ctx context.Context, name string) (int64, error) {
	if err := blob.CheckName(name); err != nil {
		return 0, err
	}
	var size int64
	err := s.do(ctx, "size", name, func(int) (err error) {
		size, err = s.Store.Size(ctx, name)
		return err
	})
	return size, err
}

// Delete implements blob.Store.
func (s *store) Delete(ctx context.Context, name string) error {
	if err := blob.CheckName(name); err != nil {
		return err
	}
	return s.do(ctx, "delete", name, func(int) error { return s.Store.Delete(ctx, name) })
}

// List implements blob.Store. A walk that broke off begins again and leaves
// out what it has given already.
func (s *store) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		last, stopped := "", false
		err := s.do(ctx, "list", prefix, func(int) error {
			for o, err := range s.Store.List(ctx, prefix) {
				if err != nil {
					return err
				}
				if o.Name <= last {
					continue
				}
				last = o.Name
				if !yield(o, nil) {
					stopped = true
					return nil
				}
			}
			return nil
		})
		if err != nil && !stopped {
			yield(blob.Object{}, err)
		}
	}
}
