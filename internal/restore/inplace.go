package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/repo"
)

// Marker is the name of the file that lies beside the image at path while it
// is neither what it was nor what it shall be.
func Marker(path string) string { return path + ".backstay-inplace" }

// comparand is what can be compared with a Source.
type comparand interface {
	io.ReaderAt
	// Data is a part of within outside of which everything is zero.
	Data(ctx context.Context, within extent.Extent) (extent.Set, error)
}

// device is an existing image as InPlace writes it. Methods are safe for
// concurrent use. Close lets go of the image, which may take a while.
type device interface {
	comparand
	io.WriterAt
	Size() int64
	// Zero makes e read as zeros, and a hole where it can.
	Zero(ctx context.Context, e extent.Extent) error
	Flush(ctx context.Context) error
	Close() error
}

// InPlace gives the existing image or block device at target the content of
// src, and writes only the chunks that differ. Raw images and devices are
// written directly, all others through qemu-nbd, which must be installed.
//
// The sizes must be the same, except that a device may be larger. An image
// that is in use is refused with fault.ErrLocked.
//
// This is not atomic: from the first write to the last the image is neither
// the old nor the new disk, and the file Marker(target) lies beside it. If the
// restore is interrupted, the same call completes it.
func InPlace(ctx context.Context, r Repository, src Source, target string, o Options) (Result, error) {
	start := time.Now()
	f, err := existingFormat(target, o.Format)
	if err != nil {
		return Result{}, err
	}
	d, err := openDevice(ctx, target, f)
	if err != nil {
		return Result{}, err
	}
	closed := false
	defer func() {
		if !closed {
			d.Close()
		}
	}()
	if err := sameSize(target, d.Size(), src.Size()); err != nil {
		return Result{}, err
	}
	res := Result{Target: target, Format: f, SizeBytes: src.Size()}
	p := newProgress(o.Progress, 0)
	diff, err := compare(ctx, r, src, d, o.workers(), p)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", target, err)
	}
	res.ComparedBytes, res.SkippedBytes = diff.compared, diff.same
	res.ZeroedBytes = diff.zero.Bytes()
	if diff.write.Bytes()+diff.zero.Bytes() > 0 {
		marker := Marker(target)
		if err := mark(marker); err != nil {
			return Result{}, err
		}
		res.ReadBytes, err = apply(ctx, src, d, diff, o, p)
		res.WrittenBytes = res.ReadBytes
		if err == nil {
			closed = true
			err = d.Close() // an image's metadata may be written only now
		}
		if err != nil {
			return Result{}, fmt.Errorf("%s: %w; it is half restored, as %s says: run the same restore again to complete it",
				target, classify(err), marker)
		}
		if err := os.Remove(marker); err != nil {
			return Result{}, fmt.Errorf("%s is restored, but its marker remains: %w", target, err)
		}
	}
	if _, err := os.Stat(Marker(target)); err == nil {
		// An earlier restore got as far as its last write.
		if err := os.Remove(Marker(target)); err != nil {
			return Result{}, err
		}
	}
	res.Duration = time.Since(start)
	return res, nil
}

func sameSize(target string, have, want int64) error {
	info, err := os.Stat(target)
	if err != nil {
		return err
	}
	if have == want || have > want && info.Mode()&os.ModeDevice != 0 {
		return nil
	}
	return fmt.Errorf("%s has %d bytes and the disk to restore has %d: a restore in place keeps the size", target, have, want)
}

// mark leaves the marker, durably.
func mark(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return classify(err)
	}
	_, err = fmt.Fprintf(f, "backstay is restoring %s in place since %s.\nWhile this file exists the image is neither the old nor the new disk.\nIf no restore runs, run the same one again.\n",
		filepath.Base(path[:len(path)-len(Marker(""))]), time.Now().UTC().Format(time.RFC3339))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return classify(err)
	}
	return image.SyncDir(path)
}

// existingFormat settles the format of target. What the file looks like may
// overrule its extension only towards a refusal: its first bytes may be a
// guest's.
func existingFormat(target string, f image.Format) (image.Format, error) {
	info, err := os.Stat(target)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%s: %w: a restore in place needs an image that is there", target, fault.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	if f != "" {
		return f, nil
	}
	if info.Mode()&os.ModeDevice != 0 {
		return image.Raw, nil
	}
	f = FormatOf(target)
	seen, err := sniff(target)
	switch {
	case err != nil:
		return "", err
	case f == "" && seen == "":
		return image.Raw, nil
	case f == "" || f == image.Raw && seen != "":
		return "", fmt.Errorf("%s looks like %s: name its format to have it written in place", target, seen)
	}
	return f, nil
}

// sniff knows the formats by their first bytes.
func sniff(path string) (image.Format, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var head [8]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	switch s := string(head[:n]); {
	case n < 4:
	case s[:4] == "QFI\xfb":
		return image.Qcow2, nil
	case s[:4] == "KDMV", s[:4] == "COWD":
		return image.VMDK, nil
	case s == "vhdxfile":
		return image.VHDX, nil
	case s == "conectix":
		return image.VHD, nil
	}
	return "", nil
}

// difference is what has to be done to a device.
type difference struct {
	write, zero    extent.Set // whole chunks
	compared, same int64      // bytes read from the device, and of them those that were right
}

// window is how much of a disk is compared between two looks at its extents.
const window = 1 << 30

// compare finds the chunks of the device that differ from src.
func compare(ctx context.Context, r Repository, src Source, d comparand, workers int, p *progress) (difference, error) {
	var diff difference
	var mu sync.Mutex
	var compared, same atomic.Int64
	size, step := src.Size(), src.ChunkBytes()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	buffers := sync.Pool{New: func() any { b := make([]byte, step); return &b }}
	var walk error
	for at := int64(0); at < size && walk == nil; at += window {
		within := extent.Extent{Off: at, Len: min(window, size-at)}
		have, err := d.Data(ctx, within)
		if err != nil {
			walk = err
			break
		}
		want, err := src.Data(ctx, within)
		if err != nil {
			walk = err
			break
		}
		both := have.Union(want).Align(step, size)
		p.more(both.Bytes())
		for _, e := range both.List() {
			for off := e.Off; off < e.End() && walk == nil; off += step {
				if walk = ctx.Err(); walk != nil {
					break
				}
				c := extent.Extent{Off: off, Len: min(step, size-off)}
				id, hole, err := src.Chunk(ctx, off/step)
				if err != nil {
					walk = err
					break
				}
				here := have.Within(c).Bytes() > 0
				g.Go(func() error {
					differs := !hole
					if here {
						b := buffers.Get().(*[]byte)
						defer buffers.Put(b)
						buf := (*b)[:c.Len]
						if n, err := d.ReadAt(buf, c.Off); n < len(buf) {
							return fmt.Errorf("read: %w", err)
						}
						compared.Add(c.Len)
						if hole {
							differs = !chunk.IsZero(buf)
						} else {
							differs = r.ChunkID(buf) != id
						}
					}
					p.add(c.Len)
					if !differs {
						same.Add(c.Len)
						return nil
					}
					mu.Lock()
					defer mu.Unlock()
					if hole {
						diff.zero.Add(c)
					} else {
						diff.write.Add(c)
					}
					return nil
				})
			}
		}
	}
	if err := g.Wait(); err != nil {
		return diff, err
	}
	diff.compared, diff.same = compared.Load(), same.Load()
	return diff, walk
}

// apply writes the difference and makes it durable. It gives the bytes that
// were read from src and written.
func apply(ctx context.Context, src Source, d device, diff difference, o Options, p *progress) (int64, error) {
	p.more(diff.write.Bytes())
	for _, e := range diff.zero.List() {
		if err := d.Zero(ctx, e); err != nil {
			return 0, err
		}
	}
	var n atomic.Int64
	step := src.ChunkBytes()
	write := diff.write.List()
	wanted := func(off int64) bool {
		i, found := slices.BinarySearchFunc(write, off, func(e extent.Extent, off int64) int {
			switch {
			case e.End() <= off:
				return -1
			case e.Off > off:
				return 1
			}
			return 0
		})
		return found && i < len(write)
	}
	skip := func(index int64, _ chunk.ID) bool { return !wanted(index * step) }
	if len(write) > 0 {
		within := extent.Extent{Off: write[0].Off, Len: write[len(write)-1].End() - write[0].Off}
		err := src.Fetch(ctx, within, repo.FetchOptions{Workers: o.workers(), Skip: skip}, func(off int64, data []byte) error {
			if _, err := d.WriteAt(data, off); err != nil {
				return fmt.Errorf("write: %w", classify(err))
			}
			n.Add(int64(len(data)))
			p.add(int64(len(data)))
			return nil
		})
		if err != nil {
			return n.Load(), err
		}
	}
	if err := ctx.Err(); err != nil {
		return n.Load(), err
	}
	if n.Load() != diff.write.Bytes() {
		return n.Load(), fmt.Errorf("the repository gave %d bytes of %d that differ", n.Load(), diff.write.Bytes())
	}
	return n.Load(), d.Flush(ctx)
}
