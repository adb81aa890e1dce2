package repo

import (
	"context"
	"slices"
	"sync"
)

// buffers are what reads from the store go into: never more bytes in all than
// most, unless a single one is larger.
type buffers struct {
	most int64 // 0 for no bound

	mu   sync.Mutex
	back sync.Cond // signalled when one comes back
	out  int       // given and not come back
	held int64     // bytes of all, given and free
	free [][]byte  // by length
}

func newBuffers(most int64) *buffers {
	b := &buffers{most: most}
	b.back.L = &b.mu
	return b
}

// bufferStep makes lengths of buffers coarse, so that one serves many reads.
const bufferStep = 64 << 10

// get gives a buffer of n bytes as soon as there is room for it. Nobody may
// wait for a second one.
func (b *buffers) get(ctx context.Context, n int64) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.back.Broadcast()
	})
	defer stop()
	need := (n + bufferStep - 1) / bufferStep * bufferStep
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		i, _ := slices.BinarySearchFunc(b.free, need, func(f []byte, need int64) int { return int(int64(cap(f)) - need) })
		if i < len(b.free) {
			buf := b.free[i]
			b.free = slices.Delete(b.free, i, i+1)
			b.out++
			return buf[:n], nil
		}
		// None is large enough: those that are not make room.
		for len(b.free) > 0 && (b.most == 0 || b.held+need > b.most) {
			b.held -= int64(cap(b.free[0]))
			b.free = slices.Delete(b.free, 0, 1)
		}
		if b.most == 0 || b.held+need <= b.most || b.out == 0 {
			b.held += need
			b.out++
			return make([]byte, n, need), nil
		}
		b.back.Wait()
	}
}

// put takes a buffer back.
func (b *buffers) put(buf []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i, _ := slices.BinarySearchFunc(b.free, cap(buf), func(f []byte, n int) int { return cap(f) - n })
	b.free = slices.Insert(b.free, i, buf)
	b.out--
	b.back.Broadcast()
}
