package index

import (
	"context"
	"errors"
	"fmt"

	"github.com/zeebo/blake3"
)

// VerifyRun reads the run called name, its parts not included. Where it is not
// what was written the error is Damaged.
func VerifyRun(ctx context.Context, src Source, name string, size int64, repo, id [16]byte) error {
	r, err := OpenRun(ctx, src, name, OpenOptions{
		Repo: repo, ID: id,
		Size:   func(o string) (int64, bool) { return size, o == name },
		Number: func(RunPack) uint32 { return Gone },
	})
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for i := range r.parts {
		p := &r.parts[i]
		at := p.filterAt - blocks(p.entries)*fenceBytes - sumBytes
		if err := r.readFences(ctx, p, at); err != nil {
			return err
		}
		p.fences = nil
		if err := r.hashed(ctx, p.filterAt, p.shape.bytes(), buf); err != nil {
			return err
		}
	}
	return nil
}

// Verify reads the run and all its parts. It calls bad for each that counts and
// is not what was written, or has an entry that does not fit, and otherwise ends
// with the first error.
func (r *Run) Verify(ctx context.Context, fits func(Place) bool, bad func(*PartError) error) error {
	buf := make([]byte, 1<<20)
	for i := range r.parts {
		p := &r.parts[i]
		if p.lost() {
			continue
		}
		err := r.hashed(ctx, p.filterAt, p.shape.bytes(), buf)
		if err == nil {
			err = r.verifyPart(ctx, p.name, partBytes(p.entries), uint32(i), func(e *record) error {
				n, err := r.number(e)
				if err == nil && n != Gone && !fits(Place{n, e.off, e.clen}) {
					err = &damage{fmt.Errorf("it is wrong about where chunk %x… lies", e.key[:4])}
				}
				return err
			})
		}
		if Damaged(err) {
			err = bad(&PartError{p.name, err})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hashed reads n bytes of the run, a buffer at a time, and compares the hash
// behind them.
func (r *Run) hashed(ctx context.Context, off, n int64, buf []byte) error {
	h := blake3.New()
	for at := int64(0); at < n; {
		b := buf[:min(int64(len(buf)), n-at)]
		if err := r.read(ctx, r.Name, b, off+at); err != nil {
			return err
		}
		h.Write(b)
		at += int64(len(b))
	}
	var want, got [sumBytes]byte
	if err := r.read(ctx, r.Name, want[:], off+n); err != nil {
		return err
	}
	if h.Sum(got[:0]); got != want {
		return &damage{fmt.Errorf("checksum of %d bytes at %d does not match", n, off)}
	}
	return nil
}

// VerifyPart reads part n of a run. Where it is not what was written the error
// is Damaged.
func VerifyPart(ctx context.Context, src Source, name string, size int64, repo, run [16]byte, n uint32) error {
	r := &Run{src: src, id: run, repo: repo}
	return r.verifyPart(ctx, name, size, n, func(*record) error { return nil })
}

func (r *Run) verifyPart(ctx context.Context, name string, size int64, n uint32, each func(*record) error) error {
	sum := newSummer()
	buf := make([]byte, windowBlocks*blockBytes)
	if size < blockBytes || size%blockBytes != 0 {
		return &damage{fmt.Errorf("%d bytes are not a number of blocks", size)}
	}
	var entries uint32
	var last Key
	for no := int64(0); no < size/blockBytes; no++ {
		if at := no % windowBlocks; at == 0 {
			if err := r.read(ctx, name, buf[:min(int64(len(buf)), size-no*blockBytes)], no*blockBytes); err != nil {
				return err
			}
		}
		b := buf[no%windowBlocks*blockBytes:][:blockBytes]
		if err := sum.check(r.id, n, uint32(no), b); err != nil {
			return &damage{err}
		}
		if no == 0 {
			entries = le.Uint32(b[44:])
			if err := checkPartHeader(b, r.repo, r.id, n, entries); err != nil {
				return &damage{err}
			}
			if size != partBytes(entries) {
				return &damage{fmt.Errorf("it is %d bytes long, want %d", size, partBytes(entries))}
			}
			continue
		}
		for i := range inBlock(entries, no-1) {
			e := getRecord(b[i*recordBytes:])
			if (no > 1 || i > 0) && last.Compare(&e.key) >= 0 {
				return &damage{errors.New("its entries do not ascend")}
			}
			last = e.key
			if err := each(&e); err != nil {
				return err
			}
		}
	}
	return nil
}
