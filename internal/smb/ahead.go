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
	buf  *[pieceBytes]byte
	p    []byte // of buf, nil until it was read
	err  error

	// Under the ahead's lock: how much of it was taken, who has it, and that it
	// is in blocks no more. Its memory serves again when nobody has it.
	used    int64
	readers int
	gone    bool
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
			a.leave(b, off/pieceBytes, n)
		} else if a.leave(b, off/pieceBytes, 0); ctx.Err() == nil {
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
		if a.stopped || len(a.blocks) >= aheadBlocks {
			return
		}
		if a.blocks == nil {
			a.blocks = map[int64]*block{}
		}
		b := &block{done: make(chan struct{})}
		a.blocks[i] = b
		a.pending.Go(func() {
			defer close(b.done)
			b.buf = pieces.Get().(*[pieceBytes]byte)
			p := b.buf[:min(pieceBytes, size-i*pieceBytes)]
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
// to take from it, or from elsewhere. Who gets one leaves it.
func (a *ahead) next(off, n int64) (*block, int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := off / pieceBytes
	if b := a.blocks[i]; b != nil {
		b.readers++
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

// leave says that a reader is done with block i, of which it took n bytes. A
// block of which all was taken, or that can't be read, is dropped.
func (a *ahead) leave(b *block, i, n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.readers--
	select {
	case <-b.done:
	default:
		return // who gave up waiting; others may come for it
	}
	if b.used += n; b.used >= int64(len(b.p)) && !b.gone {
		b.gone = true
		if a.blocks[i] == b {
			delete(a.blocks, i)
		}
	}
	if b.gone && b.readers == 0 && b.p != nil {
		pieces.Put(b.buf)
	}
}

// stop waits for what is under way and begins nothing more.
func (a *ahead) stop() {
	a.mu.Lock()
	a.stopped, a.blocks = true, nil
	a.mu.Unlock()
	a.pending.Wait()
}
