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

// A Stream writes a streamOptimized disk into a part of a file, as VMware's
// OVF tools do:
//
//	header | descriptor | grains, after the last of 512 their table | … | directory | footer | end
//
// Grains are compressed in parallel and written in order. The head of the
// stream says that the directory's place is in the footer, so that all of it
// is known from the start; it makes the stream valid and is written last, by
// Commit. WriteAt is for one goroutine, with ascending offsets.
type Stream struct {
	file     *os.File
	base     int64 // where in file the stream begins
	head     []byte
	size     int64 // bytes that may be written
	capacity int64
	level    int

	next  int64           // no WriteAt may begin before
	jobs  chan *streamJob // to be compressed
	queue chan *streamJob // the same, in the order in which they are to be written
	ended chan struct{}   // nobody works any longer

	failed atomic.Pointer[error]
	stop   sync.Once
	closed atomic.Bool // nothing more is taken

	// Of the goroutine that writes, and of End after it has ended:
	out       *bufio.Writer
	early     *image.Writeback
	at        int64  // where out is in the stream
	grains    int64  // written
	table     []byte // of those since the last table
	tableN    int64
	directory []byte
}

// usualLevel of compression is zlib's own default.
const usualLevel = 6

// ourLevel is the level of the compressor that we use by what people ask of
// zlib: one whose grains are hardly longer. On files of a Linux system they are 1
// to 2 percent longer than zlib's, and cost less time.
var ourLevel = [...]int{1: 2, 3, 4, 5, 7, 8, 8, 9, 9}

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

// NewStream begins a stream at base of file, which has nothing there; name is
// what its descriptor calls it. What Commit makes of it is also given to sum,
// from the first byte to the last, if sum is not nil.
func NewStream(file *os.File, base int64, name string, o image.CreateOptions, sum io.Writer) (*Stream, error) {
	switch {
	case o.Compression != "" && o.Compression != "zlib":
		return nil, fmt.Errorf("a VMDK is compressed by zlib alone, not by %s", o.Compression)
	case o.Level < 0 || o.Level > 9:
		return nil, fmt.Errorf("zlib has levels 1 to 9, not %d", o.Level)
	case o.BlockBytes != 0 && o.BlockBytes != usualGrain:
		return nil, fmt.Errorf("a streamOptimized VMDK has grains of 64 KiB, not of %d bytes", o.BlockBytes)
	}
	if o.Level == 0 {
		o.Level = usualLevel
	}
	// VirtualBox takes no stream whose capacity is not whole grains.
	capacity := ceilDiv(o.VirtualBytes, usualGrain) * usualGrain
	text := description{
		variant: StreamOptimized, capacity: capacity, parent: parentLink{cid: noParent},
		extents: []string{extentDescription("RDONLY", capacity, "SPARSE", name)},
	}.text()
	if len(text) > descriptorRoom {
		return nil, fmt.Errorf("the name %q is too long for a descriptor", name)
	}
	workers := runtime.GOMAXPROCS(0)
	w := &Stream{
		file: file, base: base, head: make([]byte, streamOverhead),
		size: o.VirtualBytes, capacity: capacity, level: o.Level,
		jobs: make(chan *streamJob, 4*workers), queue: make(chan *streamJob, 8*workers),
		ended:     make(chan struct{}),
		at:        streamOverhead,
		tableN:    -1,
		early:     image.NewWriteback(file),
		directory: make([]byte, ceilDiv(ceilDiv(capacity, usualGrain), entriesPerTable)*4),
	}
	copy(w.head, w.header().encode())
	copy(w.head[sector:], text)
	to := io.Writer(io.NewOffsetWriter(file, base+streamOverhead))
	if sum != nil {
		sum.Write(w.head)
		to = io.MultiWriter(to, sum)
	}
	w.out = bufio.NewWriterSize(to, 1<<20)
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

func (w *Stream) header() header {
	return header{
		version: 3, flags: flagNewlines | flagCompressed | flagMarkers,
		capacity: w.capacity, grain: usualGrain, tableSize: entriesPerTable,
		descOffset: sector, descBytes: descriptorRoom,
		gdOffset: -1, overhead: streamOverhead,
	}
}

// Capacity is the size of the disk in bytes: whole grains.
func (w *Stream) Capacity() int64 { return w.capacity }

// Populated is how many bytes of the disk are in the stream, once it has ended.
func (w *Stream) Populated() int64 { return w.grains * usualGrain }

// Warnings says what the disk has that was not asked for.
func (w *Stream) Warnings() []string {
	return grown(w.size, w.capacity, "a streamOptimized VMDK has whole grains of 64 KiB")
}

func (w *Stream) Unit() int64   { return usualGrain }
func (w *Stream) Ordered() bool { return true }

// WriteAt takes the grains of p that are not zero. An error may belong to an
// earlier write.
func (w *Stream) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), w.size, usualGrain); err != nil {
		return 0, err
	}
	if off < w.next {
		return 0, fmt.Errorf("write at %d behind %d: a stream is written in order", off, w.next)
	}
	if w.closed.Load() {
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
func (w *Stream) pack() {
	z, err := zlib.NewWriterLevel(io.Discard, ourLevel[w.level])
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
func (w *Stream) write() {
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

func (w *Stream) writeGrain(j *streamJob) error {
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
	w.grains++
	binary.LittleEndian.PutUint32(w.table[j.index%entriesPerTable*4:], place)
	var m [markerBytes]byte
	binary.LittleEndian.PutUint64(m[:], uint64(j.index*usualGrain/sector))
	binary.LittleEndian.PutUint32(m[8:], uint32(j.packed.Len()))
	return w.put(m[:], j.packed.Bytes())
}

// sectorNumber is where the next thing goes, in sectors.
func (w *Stream) sectorNumber() (uint32, error) {
	if w.at >= maxSparseFile {
		return 0, fmt.Errorf("a streamOptimized VMDK file of more than 2 TiB: %w", fault.ErrUnsupported)
	}
	return uint32(w.at / sector), nil
}

// put writes the parts one behind the other and fills the last sector.
func (w *Stream) put(parts ...[]byte) error {
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
	w.early.Grown(w.base + w.at)
	return err
}

// putMarked writes a metadata marker and p behind it.
func (w *Stream) putMarked(kind uint32, p []byte) error {
	var m [sector]byte
	binary.LittleEndian.PutUint64(m[:], uint64(ceilDiv(int64(len(p)), sector)))
	binary.LittleEndian.PutUint32(m[12:], kind)
	return w.put(m[:], p)
}

// writeTable writes the table of the grains written last, if any.
func (w *Stream) writeTable() error {
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
func (w *Stream) drain() {
	w.stop.Do(func() {
		close(w.jobs)
		close(w.queue)
	})
	<-w.ended
}

// End writes the rest of the stream but for its head, and gives the length of
// all of it in bytes. Nothing can be written any longer.
func (w *Stream) End() (int64, error) {
	w.closed.Store(true)
	w.drain()
	if err := w.failed.Load(); err != nil {
		return 0, fmt.Errorf("an earlier write failed: %w", *err)
	}
	err := w.end()
	if err != nil {
		w.failed.Store(&err)
	}
	return w.at, err
}

func (w *Stream) end() error {
	if err := w.writeTable(); err != nil {
		return err
	}
	foot := w.header()
	foot.gdOffset = w.at + sector
	if _, err := w.sectorNumber(); err != nil {
		return err
	}
	return errors.Join(
		w.putMarked(markerDirectory, w.directory),
		w.putMarked(markerFooter, foot.encode()),
		w.putMarked(markerEnd, nil),
		w.out.Flush())
}

// Commit writes the head. The caller has made what comes before it durable.
func (w *Stream) Commit() error {
	_, err := w.file.WriteAt(w.head, w.base)
	return err
}

// Stop gives up: nothing works any longer when it returns.
func (w *Stream) Stop() {
	w.closed.Store(true)
	w.drain()
}

// A streamWriter writes a streamOptimized disk to a file of its own.
type streamWriter struct {
	*Stream
	finished, released bool
}

func newStreamWriter(fs Files, o image.CreateOptions) (*streamWriter, error) {
	if err := fs.Disk.Truncate(0); err != nil {
		return nil, err
	}
	s, err := NewStream(fs.Disk, 0, fs.Name, o, nil)
	if err != nil {
		return nil, err
	}
	return &streamWriter{Stream: s}, nil
}

// Finish writes the rest of the stream, and the head once that is durable.
func (w *streamWriter) Finish() error {
	if w.finished || w.released {
		return nil
	}
	if _, err := w.End(); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	if err := w.Commit(); err != nil {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	w.finished, w.released = true, true
	if err := w.file.Close(); err != nil {
		return err
	}
	return image.SyncDir(w.file.Name())
}

// Close ends the compression and closes the file, which is no VMDK unless
// Finish returned nil.
func (w *streamWriter) Close() error {
	if w.released {
		return nil
	}
	w.released = true
	w.Stop()
	return w.file.Close()
}
