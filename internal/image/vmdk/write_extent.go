package vmdk

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/bits"
	"os"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// The tables of a disk that is written in any order are kept in memory up to
// this many of 2 KiB each; each is for 32 MiB of a disk with usual grains.
const maxTablesKept = 8192

// A sparseExtent is a sparse extent being written, from any number of
// goroutines in any order:
//
//	header | descriptor | directory and tables, redundant | the same again | grains
//
// All tables have their place, as VMware's own have, so that a directory is
// known from the start and the tables of empty parts are holes in the file.
// Grains lie in the order in which they were written.
type sparseExtent struct {
	file     *os.File
	capacity int64
	grain    int64
	layout   sparseLayout
	keep     int  // tables in memory
	layer    bool // over a parent, which zeros must hide
	early    *image.Writeback

	mu     sync.Mutex
	end    int64 // where the next grain goes
	tables map[int64][]byte
	zeros  bool // there is a grain of zeros
	failed error
}

// A sparseLayout is where everything lies, in bytes.
type sparseLayout struct {
	descriptor         int64 // room for it behind the header
	tables             int64 // how many
	redundant, primary int64 // the two directories, their tables behind them
	grains             int64
}

func newSparseLayout(capacity, grain, descriptor int64) sparseLayout {
	l := sparseLayout{descriptor: descriptor, tables: ceilDiv(ceilDiv(capacity, grain), entriesPerTable)}
	one := l.directoryBytes() + l.tables*entriesPerTable*4
	l.redundant = sector + descriptor
	l.primary = l.redundant + one
	l.grains = ceilDiv(l.primary+one, max(grain, usualGrain)) * max(grain, usualGrain)
	return l
}

func (l sparseLayout) directoryBytes() int64 { return ceilDiv(l.tables*4, sector) * sector }

// table is where table n lies that belongs to the directory at base.
func (l sparseLayout) table(base, n int64) int64 {
	return base + l.directoryBytes() + n*entriesPerTable*4
}

// grainSize is what was asked for, or what is usual.
func grainSize(asked int64) (int64, error) {
	if asked == 0 {
		return usualGrain, nil
	}
	if asked < 4<<10 || asked > 1<<20 || bits.OnesCount64(uint64(asked)) != 1 {
		return 0, fmt.Errorf("a VMDK with grains of %d bytes: take a power of two from 4 KiB to 1 MiB, best 64 KiB", asked)
	}
	return asked, nil
}

// newSparseExtent begins an extent in f with room for a descriptor of so many
// bytes.
func newSparseExtent(f *os.File, capacity, grain, descriptor int64) (*sparseExtent, error) {
	w := &sparseExtent{
		file: f, capacity: capacity, grain: grain, keep: maxTablesKept,
		layout: newSparseLayout(capacity, grain, descriptor), tables: map[int64][]byte{},
		early: image.NewWriteback(f),
	}
	w.end = w.layout.grains
	if w.end > maxSparseFile/2 {
		return nil, fmt.Errorf("a sparse VMDK of %d bytes: %w; %s holds it", capacity, fault.ErrUnsupported, MonolithicFlat)
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	// From here on every table can be read, as zeros.
	return w, f.Truncate(w.layout.grains)
}

// write writes the grains of p that are not zero, and notes those that are
// where a parent would show through.
func (w *sparseExtent) write(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		// A run of grains that are not zero is written at once.
		n := done
		for n < len(p) {
			end := min(n+int(w.grain), len(p))
			if chunk.IsZero(p[n:end]) {
				break
			}
			n = end
		}
		if n == done {
			if w.layer {
				if err := w.writeZero((off + int64(done)) / w.grain); err != nil {
					return done, err
				}
			}
			done = min(done+int(w.grain), len(p))
			continue
		}
		if err := w.writeGrains(p[done:n], off+int64(done)); err != nil {
			return done, err
		}
		done = n
	}
	return len(p), nil
}

// checkRange holds a range to the promise that callers of WriteAt give.
func checkRange(off, n, size, unit int64) error {
	switch {
	case off < 0 || off > size || n > size-off:
		return fmt.Errorf("write of %d bytes at %d to a disk of %d", n, off, size)
	case off%unit != 0 || n%unit != 0 && off+n != size:
		return fmt.Errorf("write of %d bytes at %d is not in units of %d", n, off, unit)
	}
	return nil
}

func (w *sparseExtent) writeZero(index int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.zeros = true
	err := w.setEntry(index, zeroGrain)
	if err != nil {
		w.failed = err
	}
	return err
}

func (w *sparseExtent) writeGrains(p []byte, off int64) error {
	count := ceilDiv(int64(len(p)), w.grain)
	w.mu.Lock()
	where := w.end
	if where > maxSparseFile-count*w.grain {
		w.mu.Unlock()
		return fmt.Errorf("a sparse VMDK file of more than 2 TiB: %w; %s holds it", fault.ErrUnsupported, MonolithicFlat)
	}
	w.end += count * w.grain
	w.mu.Unlock()
	if _, err := w.file.WriteAt(p, where); err != nil {
		return w.fail(err)
	}
	w.early.Grown(where + int64(len(p)))
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range count {
		if err := w.setEntry(off/w.grain+i, uint32((where+i*w.grain)/sector)); err != nil {
			w.failed = err
			return err
		}
	}
	return nil
}

// fail makes sure that no finish calls an image good that a write failed in.
func (w *sparseExtent) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed = err
	return err
}

// setEntry enters grain index into its table. The caller holds mu.
func (w *sparseExtent) setEntry(index int64, value uint32) error {
	n := index / entriesPerTable
	table := w.tables[n]
	if table == nil {
		if len(w.tables) >= w.keep {
			if err := w.dropOne(); err != nil {
				return err
			}
		}
		table = make([]byte, entriesPerTable*4)
		// It may have been here before.
		if _, err := w.file.ReadAt(table, w.layout.table(w.layout.primary, n)); err != nil {
			return err
		}
		w.tables[n] = table
	}
	binary.LittleEndian.PutUint32(table[index%entriesPerTable*4:], value)
	return nil
}

// dropOne writes some table to its two places and forgets it.
func (w *sparseExtent) dropOne() error {
	for n := range w.tables {
		return w.flush(n)
	}
	return nil
}

func (w *sparseExtent) flush(n int64) error {
	for _, base := range []int64{w.layout.redundant, w.layout.primary} {
		if _, err := w.file.WriteAt(w.tables[n], w.layout.table(base, n)); err != nil {
			return err
		}
	}
	delete(w.tables, n)
	return nil
}

// finish writes the tables, the directories and the descriptor, if there is
// one, and the header once they are durable: until then the file is no VMDK.
func (w *sparseExtent) finish(descriptor string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed != nil {
		return fmt.Errorf("an earlier write failed: %w", w.failed)
	}
	err := w.writeTables()
	if err == nil && descriptor != "" {
		_, err = w.file.WriteAt([]byte(descriptor), sector)
	}
	if err == nil {
		// The last grain is whole even where the disk ends in it.
		err = w.file.Truncate(w.end)
	}
	if err == nil {
		err = w.file.Sync()
	}
	if err == nil {
		_, err = w.file.WriteAt(w.header().encode(), 0)
	}
	if err == nil {
		err = w.file.Sync()
	}
	w.failed = err
	return err
}

func (w *sparseExtent) writeTables() error {
	for _, n := range slices.Sorted(maps.Keys(w.tables)) {
		if err := w.flush(n); err != nil {
			return err
		}
	}
	for _, base := range []int64{w.layout.redundant, w.layout.primary} {
		dir := make([]byte, w.layout.tables*4)
		for n := range w.layout.tables {
			binary.LittleEndian.PutUint32(dir[n*4:], uint32(w.layout.table(base, n)/sector))
		}
		if _, err := w.file.WriteAt(dir, base); err != nil {
			return err
		}
	}
	return nil
}

func (w *sparseExtent) header() header {
	h := header{
		version: 1, flags: flagNewlines | flagRedundant,
		capacity: w.capacity, grain: w.grain, tableSize: entriesPerTable,
		rgdOffset: w.layout.redundant, gdOffset: w.layout.primary, overhead: w.layout.grains,
	}
	if w.layout.descriptor > 0 {
		h.descOffset, h.descBytes = sector, w.layout.descriptor
	}
	if w.zeros {
		h.version, h.flags = 2, h.flags|flagZeroGrains
	}
	return h
}
