package vmdk

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zlib"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// Where a stream's grains begin. VMware's own streams leave the same room
// behind the descriptor.
const streamOverhead = 128 * sector

// A streamWriter writes a streamOptimized disk, as VMware's OVF tools do:
//
//	header | descriptor | grains, after the last of 512 their table | … | directory | footer | end
//
// Grains are compressed in parallel and written in order. The head of the file
// says that the directory's place is in the footer, so that nothing but the
// header, which makes the file valid, is written out of order.
type streamWriter struct {
	file     *os.File
	name     string
	size     int64 // bytes that may be written
	capacity int64
	level    int

	next  int64           // no WriteAt may begin before
	jobs  chan *streamJob // to be compressed
	queue chan *streamJob // the same, in the order in which they are to be written
	ended chan struct{}   // nobody works any longer

	failed atomic.Pointer[error]
	stop   sync.Once
	closed bool

	// Of the goroutine that writes, and of Finish after it has ended:
	out       *bufio.Writer
	at        int64  // where out is in the file
	table     []byte // of the grains since the last table
	tableN    int64
	directory []byte
}

// A streamJob is a grain on its way.
type streamJob struct {
	index  int64
	plain  []byte
	packed bytes.Buffer
	err    error
	done   chan struct{} // one token when packed
}

var streamJobs = sync.Pool{New: func() any {
	return &streamJob{plain: make([]byte, usualGrain), done: make(chan struct{}, 1)}
}}

func newStreamWriter(fs Files, o image.CreateOptions) (*streamWriter, error) {
	switch {
	case o.Compression != "" && o.Compression != "zlib":
		return nil, fmt.Errorf("a VMDK is compressed by zlib alone, not by %s", o.Compression)
	case o.Level < 0 || o.Level > 9:
		return nil, fmt.Errorf("zlib has levels 1 to 9, not %d", o.Level)
	case o.BlockBytes != 0 && o.BlockBytes != usualGrain:
		return nil, fmt.Errorf("a streamOptimized VMDK has grains of 64 KiB, not of %d bytes", o.BlockBytes)
	}
	if o.Level == 0 {
		o.Level = zlib.DefaultCompression
	}
	// VirtualBox takes no stream whose capacity is not whole grains.
	capacity := ceilDiv(o.VirtualBytes, usualGrain) * usualGrain
	if err := fs.Disk.Truncate(0); err != nil {
		return nil, err
	}
	workers := runtime.GOMAXPROCS(0)
	w := &streamWriter{
		file: fs.Disk, name: fs.Name, size: o.VirtualBytes, capacity: capacity, level: o.Level,
		jobs: make(chan *streamJob, 4*workers), queue: make(chan *streamJob, 8*workers),
		ended:     make(chan struct{}),
		out:       bufio.NewWriterSize(io.NewOffsetWriter(fs.Disk, streamOverhead), 1<<20),
		at:        streamOverhead,
		tableN:    -1,
		directory: make([]byte, ceilDiv(ceilDiv(capacity, usualGrain), entriesPerTable)*4),
	}
	var packers sync.WaitGroup
	for range workers {
		packers.Go(w.pack)
	}
	go func() {
		w.write()
		packers.Wait()
		close(w.ended)
	}()
	return w, nil
}

func (w *streamWriter) Unit() int64   { return usualGrain }
func (w *streamWriter) Ordered() bool { return true }

// WriteAt takes the grains of p that are not zero. An error may belong to an
// earlier write.
func (w *streamWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), w.size, usualGrain); err != nil {
		return 0, err
	}
	if off < w.next {
		return 0, fmt.Errorf("write at %d behind %d: a stream is written in order", off, w.next)
	}
	if w.closed {
		return 0, os.ErrClosed
	}
	for done := 0; done < len(p); {
		if err := w.failed.Load(); err != nil {
			return done, *err
		}
		n := min(usualGrain, len(p)-done)
		if part := p[done : done+n]; !chunk.IsZero(part) {
			j := streamJobs.Get().(*streamJob)
			j.index = (off + int64(done)) / usualGrain
			clear(j.plain[copy(j.plain, part):])
			w.jobs <- j
			w.queue <- j
		}
		done += n
	}
	w.next = off + int64(len(p))
	return len(p), nil
}

// pack compresses grains until there are no more.
func (w *streamWriter) pack() {
	z, err := zlib.NewWriterLevel(io.Discard, w.level)
	for j := range w.jobs {
		j.packed.Reset()
		j.err = err
		if err == nil {
			z.Reset(&j.packed)
			_, werr := z.Write(j.plain)
			j.err = errors.Join(werr, z.Close())
		}
		j.done <- struct{}{}
	}
}

// write writes grains in order until there are no more. After an error it
// only takes them off the queue.
func (w *streamWriter) write() {
	for j := range w.queue {
		<-j.done
		if w.failed.Load() == nil {
			if err := errors.Join(j.err, w.writeGrain(j)); err != nil {
				w.failed.Store(&err)
			}
		}
		streamJobs.Put(j)
	}
}

func (w *streamWriter) writeGrain(j *streamJob) error {
	if n := j.index / entriesPerTable; n != w.tableN {
		if err := w.writeTable(); err != nil {
			return err
		}
		w.tableN, w.table = n, make([]byte, entriesPerTable*4)
	}
	place, err := w.sectorNumber()
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(w.table[j.index%entriesPerTable*4:], place)
	var m [markerBytes]byte
	binary.LittleEndian.PutUint64(m[:], uint64(j.index*usualGrain/sector))
	binary.LittleEndian.PutUint32(m[8:], uint32(j.packed.Len()))
	return w.put(m[:], j.packed.Bytes())
}

// sectorNumber is where the next thing goes, in sectors.
func (w *streamWriter) sectorNumber() (uint32, error) {
	if w.at >= maxSparseFile {
		return 0, fmt.Errorf("a streamOptimized VMDK file of more than 2 TiB: %w", fault.ErrUnsupported)
	}
	return uint32(w.at / sector), nil
}

// put writes the parts one behind the other and fills the last sector.
func (w *streamWriter) put(parts ...[]byte) error {
	n := 0
	for _, p := range parts {
		if _, err := w.out.Write(p); err != nil {
			return err
		}
		n += len(p)
	}
	var pad [sector]byte
	rest := -n & (sector - 1)
	_, err := w.out.Write(pad[:rest])
	w.at += int64(n + rest)
	return err
}

// putMarked writes a metadata marker and p behind it.
func (w *streamWriter) putMarked(kind uint32, p []byte) error {
	var m [sector]byte
	binary.LittleEndian.PutUint64(m[:], uint64(ceilDiv(int64(len(p)), sector)))
	binary.LittleEndian.PutUint32(m[12:], kind)
	return w.put(m[:], p)
}

// writeTable writes the table of the grains written last, if any.
func (w *streamWriter) writeTable() error {
	if w.tableN < 0 {
		return nil
	}
	place, err := w.sectorNumber()
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(w.directory[w.tableN*4:], place+1) // behind its marker
	return w.putMarked(markerTable, w.table)
}

// drain waits until all that was taken is written.
func (w *streamWriter) drain() {
	w.stop.Do(func() {
		close(w.jobs)
		close(w.queue)
	})
	<-w.ended
}

// Finish writes the rest of the stream, and the header once that is durable.
func (w *streamWriter) Finish() error {
	if w.closed {
		return nil
	}
	w.drain()
	if err := w.failed.Load(); err != nil {
		return fmt.Errorf("an earlier write failed: %w", *err)
	}
	if err := w.finish(); err != nil {
		w.failed.Store(&err)
		return err
	}
	w.closed = true
	if err := w.file.Close(); err != nil {
		return err
	}
	return image.SyncDir(w.file.Name())
}

func (w *streamWriter) finish() error {
	h := header{
		version: 3, flags: flagNewlines | flagCompressed | flagMarkers,
		capacity: w.capacity, grain: usualGrain, tableSize: entriesPerTable,
		descOffset: sector, descBytes: descriptorSectors * sector,
		gdOffset: -1, overhead: streamOverhead,
	}
	if err := w.writeTable(); err != nil {
		return err
	}
	foot := h
	foot.gdOffset = w.at + sector
	if _, err := w.sectorNumber(); err != nil {
		return err
	}
	err := errors.Join(
		w.putMarked(markerDirectory, w.directory),
		w.putMarked(markerFooter, foot.encode()),
		w.putMarked(markerEnd, nil),
		w.out.Flush())
	if err != nil {
		return err
	}
	text := newDescriptor(StreamOptimized, w.capacity, "RDONLY", `SPARSE "`+w.name+`"`)
	if len(text) > descriptorSectors*sector {
		return fmt.Errorf("the name %q is too long for a descriptor", w.name)
	}
	if _, err := w.file.WriteAt([]byte(text), sector); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	if _, err := w.file.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	return w.file.Sync()
}

// Close ends the compression and closes the file, which is no VMDK unless
// Finish returned nil.
func (w *streamWriter) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	w.drain()
	return w.file.Close()
}
