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

// A sparseWriter writes a monolithicSparse disk:
//
//	header | descriptor | directory and tables, redundant | the same again | grains
//
// All tables have their place, as VMware's own have, so that a directory is
// known from the start and the tables of empty parts are holes in the file.
// Grains lie in the order in which they were written.
type sparseWriter struct {
	file     *os.File
	name     string
	size     int64 // bytes that may be written
	capacity int64
	grain    int64
	layout   sparseLayout

	mu     sync.Mutex
	end    int64 // where the next grain goes
	tables map[int64][]byte
	failed error
	closed bool
}

// A sparseLayout is where everything lies, in bytes.
type sparseLayout struct {
	tables             int64 // how many
	redundant, primary int64 // the two directories, their tables behind them
	grains             int64
}

func newSparseLayout(capacity, grain int64) sparseLayout {
	l := sparseLayout{tables: ceilDiv(ceilDiv(capacity, grain), entriesPerTable)}
	one := l.directoryBytes() + l.tables*entriesPerTable*4
	l.redundant = (1 + descriptorSectors) * sector
	l.primary = l.redundant + one
	l.grains = ceilDiv(l.primary+one, grain) * grain
	return l
}

func (l sparseLayout) directoryBytes() int64 { return ceilDiv(l.tables*4, sector) * sector }

// table is where table n lies that belongs to the directory at base.
func (l sparseLayout) table(base, n int64) int64 {
	return base + l.directoryBytes() + n*entriesPerTable*4
}

func newSparseWriter(fs Files, o image.CreateOptions) (*sparseWriter, error) {
	if err := plainOnly(o); err != nil {
		return nil, err
	}
	grain := o.BlockBytes
	if grain == 0 {
		grain = usualGrain
	}
	if grain < 4<<10 || grain > 1<<20 || bits.OnesCount64(uint64(grain)) != 1 {
		return nil, fmt.Errorf("a VMDK with grains of %d bytes: take a power of two, best 64 KiB", grain)
	}
	capacity := ceilDiv(o.VirtualBytes, sector) * sector
	w := &sparseWriter{
		file: fs.Disk, name: fs.Name, size: o.VirtualBytes, capacity: capacity, grain: grain,
		layout: newSparseLayout(capacity, grain), tables: map[int64][]byte{},
	}
	w.end = w.layout.grains
	if w.end > maxSparseFile/2 {
		return nil, fmt.Errorf("a sparse VMDK of %d bytes: %w; %s holds it", capacity, fault.ErrUnsupported, MonolithicFlat)
	}
	if err := fs.Disk.Truncate(0); err != nil {
		return nil, err
	}
	// From here on every table can be read, as zeros.
	return w, fs.Disk.Truncate(w.layout.grains)
}

func (w *sparseWriter) Unit() int64   { return w.grain }
func (w *sparseWriter) Ordered() bool { return false }

// WriteAt writes the grains of p that are not zero.
func (w *sparseWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), w.size, w.grain); err != nil {
		return 0, err
	}
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

func (w *sparseWriter) writeGrains(p []byte, off int64) error {
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

// fail makes sure that no Finish calls an image good that a write failed in.
func (w *sparseWriter) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed = err
	return err
}

// setEntry enters grain index into its table. The caller holds mu.
func (w *sparseWriter) setEntry(index int64, value uint32) error {
	n := index / entriesPerTable
	table := w.tables[n]
	if table == nil {
		if len(w.tables) >= maxTablesKept {
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
func (w *sparseWriter) dropOne() error {
	for n := range w.tables {
		return w.flush(n)
	}
	return nil
}

func (w *sparseWriter) flush(n int64) error {
	for _, base := range []int64{w.layout.redundant, w.layout.primary} {
		if _, err := w.file.WriteAt(w.tables[n], w.layout.table(base, n)); err != nil {
			return err
		}
	}
	delete(w.tables, n)
	return nil
}

// Finish writes the tables and the directories, and the header once they are
// durable: until then the file is no VMDK.
func (w *sparseWriter) Finish() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.failed != nil:
		return fmt.Errorf("an earlier write failed: %w", w.failed)
	case w.closed:
		return nil
	}
	if err := w.finish(); err != nil {
		w.failed = err
		return err
	}
	w.closed = true
	if err := w.file.Close(); err != nil {
		return err
	}
	return image.SyncDir(w.file.Name())
}

func (w *sparseWriter) finish() error {
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
	text := newDescriptor(MonolithicSparse, w.capacity, "RW", `SPARSE "`+w.name+`"`)
	if len(text) > descriptorSectors*sector {
		return fmt.Errorf("the name %q is too long for a descriptor", w.name)
	}
	if _, err := w.file.WriteAt([]byte(text), sector); err != nil {
		return err
	}
	// The last grain is whole even where the disk ends in it.
	if err := w.file.Truncate(w.end); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	h := header{
		version: 1, flags: flagNewlines | flagRedundant,
		capacity: w.capacity, grain: w.grain, tableSize: entriesPerTable,
		descOffset: sector, descBytes: descriptorSectors * sector,
		rgdOffset: w.layout.redundant, gdOffset: w.layout.primary, overhead: w.layout.grains,
	}
	if _, err := w.file.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	return w.file.Sync()
}

// Close closes the file, which is no VMDK unless Finish returned nil.
func (w *sparseWriter) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	return w.file.Close()
}
