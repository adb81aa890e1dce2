package retry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/fault"
)

var errPassing = errors.New("connection reset")

// atOnce lets no time pass and counts what would have.
func atOnce(total *atomic.Int64) Options {
	return Options{sleep: func(ctx context.Context, d time.Duration) error {
		total.Add(int64(d))
		return ctx.Err()
	}}
}

func TestStore(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return Wrap(mem.New(), Options{}) })
}

// Every second call fails, half of these after they took effect.
func TestStoreWithTroubleEverySecondCall(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store {
		var waited atomic.Int64
		o := atOnce(&waited)
		return Wrap(blobtest.Faulty(mem.New(), func(c blobtest.Call) error {
			switch {
			case c.Op == blobtest.OpLock || c.N%2 == 1:
				return nil
			case c.N%4 == 0 && c.Op.Mutates():
				return fmt.Errorf("%w: %w", blobtest.ErrLostReply, errPassing)
			}
			return errPassing
		}), o)
	})
}

func TestAMinuteOf503IsWaitedForAndAnHourIsNot(t *testing.T) {
	for _, c := range []struct {
		trouble time.Duration
		ok      bool
	}{{time.Minute, true}, {time.Hour, false}} {
		var waited atomic.Int64
		st := Wrap(blobtest.Faulty(mem.New(), func(blobtest.Call) error {
			if time.Duration(waited.Load()) < c.trouble {
				return errPassing
			}
			return nil
		}), atOnce(&waited))
		r, n := blobtest.Body([]byte("x"))
		err := st.Put(t.Context(), "a", r, n)
		if (err == nil) != c.ok || !c.ok && !errors.Is(err, errPassing) {
			t.Errorf("after %v of trouble: %v", c.trouble, err)
		}
		if d := time.Duration(waited.Load()); d > 4*time.Minute {
			t.Errorf("waited %v", d)
		}
	}
}

func TestWhatLastsIsNotTriedAgain(t *testing.T) {
	for _, class := range []error{fault.ErrNotFound, fault.ErrExists, fault.ErrCorrupt, fault.ErrNoSpace, fault.ErrReadOnly, fault.ErrDenied} {
		calls := 0
		st := Wrap(blobtest.Faulty(mem.New(), func(blobtest.Call) error {
			calls++
			return fmt.Errorf("bucket: %w", class)
		}), Options{})
		r, n := blobtest.Body([]byte("x"))
		if err := st.Create(t.Context(), "a", r, n); !errors.Is(err, class) || calls != 1 {
			t.Errorf("%v: %v after %d calls", class, err, calls)
		}
	}
}

func TestALostReplyToCreate(t *testing.T) {
	var waited atomic.Int64
	inner := mem.New()
	lose := 1
	st := Wrap(blobtest.Faulty(inner, func(c blobtest.Call) error {
		if c.Op == blobtest.OpCreate && lose > 0 {
			lose--
			return blobtest.ErrLostReply
		}
		return nil
	}), atOnce(&waited))
	r, n := blobtest.Body([]byte("ours"))
	if err := st.Create(t.Context(), "a", r, n); err != nil {
		t.Errorf("our own object was taken for another's: %v", err)
	}
	r, n = blobtest.Body([]byte("ours"))
	if err := st.Create(t.Context(), "a", r, n); !errors.Is(err, fault.ErrExists) {
		t.Errorf("a second create: %v", err)
	}

	// The request was lost, and somebody else's came in between.
	lost := true
	st = Wrap(blobtest.Faulty(inner, func(c blobtest.Call) error {
		if c.Op == blobtest.OpCreate && lost {
			lost = false
			r, n := blobtest.Body([]byte("them"))
			if err := inner.Create(t.Context(), "b", r, n); err != nil {
				t.Error(err)
			}
			return errPassing
		}
		return nil
	}), atOnce(&waited))
	r, n = blobtest.Body([]byte("ours"))
	if err := st.Create(t.Context(), "b", r, n); !errors.Is(err, fault.ErrExists) {
		t.Errorf("another's object was taken for ours: %v", err)
	}
}

// halves is a store whose reads break off in the middle, and whose lists do.
type halves struct {
	blob.Store
	reads, lists int
}

func (h *halves) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if h.reads++; h.reads > 2 {
		return h.Store.ReadAt(ctx, name, p, off)
	}
	n, err := h.Store.ReadAt(ctx, name, p[:len(p)/2], off)
	return n, errors.Join(err, errPassing)
}

func (h *halves) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	h.lists++
	give := 3 * h.lists
	return func(yield func(blob.Object, error) bool) {
		for o, err := range h.Store.List(ctx, prefix) {
			if give--; give < 0 {
				yield(blob.Object{}, errPassing)
				return
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

func TestWhatBrokeOffIsDoneAgain(t *testing.T) {
	var waited atomic.Int64
	inner := &halves{Store: mem.New()}
	st := Wrap(inner, atOnce(&waited))
	data := bytes.Repeat([]byte("0123456789"), 100)
	r, n := blobtest.Body(data)
	if err := st.Put(t.Context(), "a", r, n); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, len(data))
	if n, err := st.ReadAt(t.Context(), "a", p, 0); n != len(data) || err != nil || !bytes.Equal(p, data) || inner.reads != 3 {
		t.Errorf("read %d bytes in %d tries, %v", n, inner.reads, err)
	}
	if n, err := st.ReadAt(t.Context(), "a", make([]byte, 8), int64(len(data))-4); n != 4 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
	var want []string
	for i := range 10 {
		name := fmt.Sprintf("l/%02d", i)
		want = append(want, name)
		r, n := blobtest.Body(nil)
		if err := st.Put(t.Context(), name, r, n); err != nil {
			t.Fatal(err)
		}
	}
	got, err := blobtest.Names(t.Context(), st, "l/")
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("listed %v, %v", got, err)
	}
}

func TestABrokenBodyIsNotSentAgain(t *testing.T) {
	calls := 0
	st := Wrap(blobtest.Faulty(mem.New(), func(blobtest.Call) error { calls++; return nil }), Options{})
	body := iotestErr{errors.New("disk gone")}
	if err := st.Put(t.Context(), "a", body, 10); !errors.Is(err, body.err) || calls > 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

type iotestErr struct{ err error }

func (b iotestErr) ReadAt(p []byte, off int64) (int, error) {
	if off == 9 { // the end is looked at first
		return len(p), nil
	}
	return 0, b.err
}

// What a store does not keep is not asked for again.
func TestClaimsOfAStoreThatKeepsNone(t *testing.T) {
	var waited atomic.Int64
	c := Wrap(mem.New(), atOnce(&waited)).(blob.Claimer)
	if _, _, err := c.Claim(t.Context(), blob.Ticket{}, []blob.ClaimKey{{}}); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("claim: %v, want fault.ErrUnsupported", err)
	}
	if err := c.Settle(t.Context(), blob.Ticket{}, nil); !errors.Is(err, fault.ErrUnsupported) || waited.Load() > 0 {
		t.Errorf("settle: %v after %d ns, want fault.ErrUnsupported", err, waited.Load())
	}
}
