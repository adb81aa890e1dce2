package smb

import (
	"context"
	"sync"
	"sync/atomic"
)

// aheadBlocks is how many blocks of pieceBytes are read ahead at most, those
// included that others have asked for: many readers keep the line full by
// themselves, and what is read ahead is copied once more.
const aheadBlocks = 16

// An ahead reads what a reader that goes through a file from front to back is
// going to ask for. It reads ahead at most a sixteenth of what was asked for
// without gaps so far, so that a backup which picks extents never moves much
// that it does not need.
type ahead struct {
	mu sync.Mutex
	// The run: what was asked for lately. Several readers that share the work
	// ask out of order, so it may have small gaps.
	start, end, bytes int64

	asking atomic.Int32 // who waits for bytes that were not read ahead

	blocks  map[int64]*block // by number
	stopped bool
	pending sync.WaitGroup
}

// A block is pieceBytes of the file, at a multiple of them.
type block struct {
	done chan struct{}
	p    []byte
	err  error
	used int64
}

// slack is how far apart the reads of a run may be.
const slack = 4 << 20

// read fills p, from blocks where there are some.
func (a *ahead) read(ctx context.Context, f *File, p []byte, off int64) error {
	a.note(f, off, int64(len(p)))
	for len(p) > 0 {
		b, n := a.next(off, int64(len(p)))
		var err error
		if b == nil {
			a.asking.Add(1)
			err = f.fill(ctx, p[:n], off)
			a.asking.Add(-1)
		} else if err = b.wait(ctx); err == nil {
			copy(p[:n], b.p[off%pieceBytes:])
			a.took(off/pieceBytes, n)
		} else if ctx.Err() == nil {
			a.drop(off / pieceBytes)
			err = f.fill(ctx, p[:n], off) // which says what is wrong, in the words of who asked
		} else {
			err = f.error("read", off, context.Cause(ctx))
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// note takes a read into the run and begins to read ahead of it.
func (a *ahead) note(f *File, off, n int64) {
	size := f.Bytes()
	a.mu.Lock()
	defer a.mu.Unlock()
	if off < a.start || off > a.end+slack {
		a.start, a.end, a.bytes = off, off, 0
		a.blocks = nil // what is still under way ends by itself
	}
	a.end, a.bytes = max(a.end, off+n), a.bytes+n
	if a.bytes < (a.end-a.start)/8*7 {
		return
	}
	most := min(a.bytes/16/pieceBytes, aheadBlocks-int64(a.asking.Load()))
	first := (a.end + pieceBytes - 1) / pieceBytes
	for i := first; i < first+most && i*pieceBytes < size; i++ {
		if a.blocks[i] != nil {
			continue
		}
		if a.stopped || len(a.blocks) >= 2*aheadBlocks {
			return
		}
		if a.blocks == nil {
			a.blocks = map[int64]*block{}
		}
		b := &block{done: make(chan struct{})}
		a.blocks[i] = b
		a.pending.Go(func() {
			defer close(b.done)
			p := make([]byte, min(pieceBytes, size-i*pieceBytes))
			if b.err = f.piece(f.life, p, i*pieceBytes, true); b.err == nil {
				b.p = p
			}
		})
	}
	// What nobody came for, because one reader of several skipped it.
	for i := range a.blocks {
		if (i+1)*pieceBytes < off-slack {
			delete(a.blocks, i)
		}
	}
}

// next is the block that off lies in, if there is one, and how many of n bytes
// to take from it, or from elsewhere.
func (a *ahead) next(off, n int64) (*block, int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := off / pieceBytes
	if b := a.blocks[i]; b != nil {
		return b, min(n, (i+1)*pieceBytes-off)
	}
	for len(a.blocks) > 0 {
		if i++; i*pieceBytes >= off+n {
			break
		}
		if a.blocks[i] != nil {
			return nil, i*pieceBytes - off
		}
	}
	return nil, n
}

func (b *block) wait(ctx context.Context) error {
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// took counts n bytes of block i as used, and drops it once all are.
func (a *ahead) took(i, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if b := a.blocks[i]; b != nil {
		if b.used += n; b.used >= int64(len(b.p)) {
			delete(a.blocks, i)
		}
	}
}

func (a *ahead) drop(i int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.blocks, i)
}

// stop waits for what is under way and begins nothing more.
func (a *ahead) stop() {
	a.mu.Lock()
	a.stopped, a.blocks = true, nil
	a.mu.Unlock()
	a.pending.Wait()
}
