package qcow2

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

const usualClusterBytes = 64 << 10

// Writer writes a qcow2 image of version 3, from any number of goroutines in
// any order. Clusters go to the file as they come, side by side; the tables
// follow at the end, and the header last of all. Compression runs in the
// goroutine that calls WriteAt.
//
// Clusters of zeros are left out, or marked as zero where there is a parent
// that they must hide.
type Writer struct {
	file     *os.File
	size     int64 // virtual, in bytes
	asked    int64 // virtual size that the caller asked for
	bits     uint32
	parent   string
	format   string // of the parent, as QEMU calls it
	deflate  deflater
	zstd     bool
	space    *space
	tables   *l2Tables
	early    *image.Writeback
	failed   atomic.Pointer[error]
	fsync    func() error // of the file
	syncDir  func() error // of its name, where we made it
	closed   bool
	finished bool
}

var _ image.Writer = (*Writer)(nil)

// Create makes the file path, which must not exist.
func Create(path string, o image.CreateOptions) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	w, err := NewWriter(f, o)
	if err != nil {
		f.Close()
		os.Remove(path)
		return nil, err
	}
	w.syncDir = func() error { return image.SyncDir(path) }
	return w, nil
}

// NewWriter writes the image to f, an empty file, which belongs to the Writer
// once there is one. The virtual size is rounded up to a multiple of 512.
func NewWriter(f *os.File, o image.CreateOptions) (*Writer, error) {
	w := &Writer{file: f, fsync: f.Sync, size: (o.VirtualBytes + 511) &^ 511, asked: o.VirtualBytes, parent: o.Parent}
	cluster := o.BlockBytes
	if cluster == 0 {
		cluster = usualClusterBytes
	}
	for w.bits = minClusterBits; w.bits < maxClusterBits && 1<<w.bits < cluster; w.bits++ {
	}
	switch {
	case o.VirtualBytes < 0 || w.size < 0:
		return nil, fmt.Errorf("virtual size of %d bytes", o.VirtualBytes)
	case 1<<w.bits != cluster:
		return nil, fmt.Errorf("clusters of %d bytes: qcow2 has powers of two from 512 to %d", cluster, 1<<maxClusterBits)
	case o.Variant != "":
		return nil, fmt.Errorf("qcow2 variant %q: %w", o.Variant, fault.ErrUnsupported)
	}
	perTable := cluster / 8 * cluster
	// Even an empty disk has an L1 table, so that its room is accounted for.
	tables := max((w.size+perTable-1)/perTable, 1)
	if w.size > 1<<62 || tables > maxL1Bytes/8 {
		return nil, fmt.Errorf("qcow2 with clusters of %d bytes holds at most %d bytes, not %d: %w", cluster, maxL1Bytes/8*perTable, w.size, fault.ErrUnsupported)
	}
	var err error
	if o.Compression != "" {
		if w.deflate, err = newDeflater(o.Compression, o.Level); err != nil {
			return nil, err
		}
		w.zstd = o.Compression == "zstd"
	}
	if o.Parent != "" {
		if err := plainName(o.Parent); err != nil {
			return nil, fmt.Errorf("parent %w", err)
		}
		if w.format, err = qemuFormat(o.ParentFormat); err != nil {
			return nil, err
		}
	}
	w.early = image.NewWriteback(f)
	w.space = newSpace(f, w.bits)
	w.tables = newL2Tables(f, w.bits, tables, w.space)
	if _, err := w.headerCluster(0, 0, 0); err != nil {
		return nil, err
	}
	return w, nil
}

// qemuFormat is the reverse of parentFormat. A parent without a format would
// have to be guessed by its content, which is the guest's.
func qemuFormat(f image.Format) (string, error) {
	switch f {
	case image.Raw, image.Qcow2, image.VHDX, image.VMDK, image.VDI:
		return string(f), nil
	case image.VHD:
		return "vpc", nil
	}
	return "", fmt.Errorf("qcow2 over a parent of format %q: %w", f, fault.ErrUnsupported)
}

// Unit is the length of a cluster.
func (w *Writer) Unit() int64 { return 1 << w.bits }

// Ordered is false.
func (w *Writer) Ordered() bool { return false }

// Warnings say what of the request the format could not follow.
func (w *Writer) Warnings() []string {
	if w.size == w.asked {
		return nil
	}
	return []string{fmt.Sprintf("the virtual size of %d bytes became %d, a multiple of 512, as qcow2 needs", w.asked, w.size)}
}

// WriteAt writes clusters. After an error the image cannot be finished.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	cluster := w.Unit()
	n := int64(len(p))
	switch {
	case off < 0 || off > w.size || n > w.size-off:
		return 0, fmt.Errorf("write of %d bytes at %d to a disk of %d", n, off, w.size)
	case off%cluster != 0 || n%cluster != 0 && off+n < w.asked:
		return 0, fmt.Errorf("write of %d bytes at %d: not whole clusters of %d", n, off, cluster)
	}
	var err error
	if w.deflate != nil {
		err = w.writePacked(p, off)
	} else {
		err = w.eachRun(p, off, w.writePlain)
	}
	if err != nil {
		w.failed.CompareAndSwap(nil, &err)
		return 0, err
	}
	return len(p), nil
}

// eachRun calls write for every run of clusters that are not zero, and sees
// to those that are.
func (w *Writer) eachRun(p []byte, off int64, write func(p []byte, off int64) error) error {
	cluster := int(w.Unit())
	start := 0
	for at := 0; at < len(p); {
		end := min(at+cluster, len(p))
		if !chunk.IsZero(p[at:end]) {
			at = end
			continue
		}
		if start < at {
			if err := write(p[start:at], off+int64(start)); err != nil {
				return err
			}
		}
		if err := w.zero(off + int64(at)); err != nil {
			return err
		}
		start, at = end, end
	}
	if start < len(p) {
		return write(p[start:], off+int64(start))
	}
	return nil
}

// zero sees to the cluster of zeros at off.
func (w *Writer) zero(off int64) error {
	if w.parent == "" {
		return nil
	}
	return w.tables.set(off>>w.bits, flagZero)
}

// writePlain writes clusters in one piece, of which the last may be short.
func (w *Writer) writePlain(p []byte, off int64) error {
	n := (int64(len(p)) + w.Unit() - 1) >> w.bits
	host, err := w.space.clusters(n)
	if err != nil {
		return err
	}
	if _, err := w.file.WriteAt(p, host); err != nil {
		return err
	}
	w.early.Grown(host + int64(len(p)))
	return w.tables.setRun(off>>w.bits, n, func(i int64) uint64 { return uint64(host+i<<w.bits) | flagCopied })
}

// A batch collects the compressed clusters of one WriteAt, to be written in
// one piece.
type batch struct {
	packed  []byte
	first   []int64 // number of the virtual cluster
	lengths []int
	offs    []int64
	whole   []byte // a last, short cluster with zeros behind it
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// writePacked compresses the clusters of p. Those that do not get smaller are
// written plain.
func (w *Writer) writePacked(p []byte, off int64) error {
	b := batches.Get().(*batch)
	defer batches.Put(b)
	b.packed, b.first, b.lengths = b.packed[:0], b.first[:0], b.lengths[:0]
	cluster := int(w.Unit())
	err := w.eachRun(p, off, func(p []byte, off int64) error {
		plain := 0 // where the clusters begin that would not compress
		for at := 0; at < len(p); at += cluster {
			c := p[at:min(at+cluster, len(p))]
			if len(c) < cluster {
				b.whole = append(append(b.whole[:0], c...), make([]byte, cluster-len(c))...)
				c = b.whole
			}
			before := len(b.packed)
			var err error
			if b.packed, err = w.deflate.deflate(b.packed, c); err != nil {
				return err
			}
			n := len(b.packed) - before
			if n > cluster-cluster/128 { // not worth decoding
				b.packed = b.packed[:before]
				continue
			}
			// Refcounts have 16 bits, and this many share a cluster at most.
			if least := cluster >> 15; n < least {
				b.packed = append(b.packed, make([]byte, least-n)...)
				n = least
			}
			b.first = append(b.first, (off+int64(at))>>w.bits)
			b.lengths = append(b.lengths, n)
			if plain < at {
				if err := w.writePlain(p[plain:at], off+int64(plain)); err != nil {
					return err
				}
			}
			plain = at + cluster
		}
		if plain < len(p) {
			return w.writePlain(p[plain:], off+int64(plain))
		}
		return nil
	})
	if err != nil || len(b.packed) == 0 {
		return err
	}
	b.offs = append(b.offs[:0], make([]int64, len(b.lengths))...)
	if err := w.space.packed(b.lengths, b.offs); err != nil {
		return err
	}
	return w.writeBatch(b)
}

// writeBatch writes compressed clusters that have their places, and then
// their entries.
func (w *Writer) writeBatch(b *batch) error {
	x := 62 - (w.bits - 8)
	for rest, i := b.packed, 0; i < len(b.offs); {
		first, end := i, b.offs[i]
		for ; i < len(b.offs) && b.offs[i] == end; i++ {
			end += int64(b.lengths[i])
		}
		n := end - b.offs[first]
		if _, err := w.file.WriteAt(rest[:n], b.offs[first]); err != nil {
			return err
		}
		w.early.Grown(end)
		rest = rest[n:]
		for j := first; j < i; j++ {
			off, l := b.offs[j], int64(b.lengths[j])
			sectors := (off+l-1)>>9 - off>>9
			if err := w.tables.set(b.first[j], flagCompressed|uint64(sectors)<<x|uint64(off)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Finish writes the tables, and the header once they are durable.
func (w *Writer) Finish() error {
	if w.finished {
		return nil
	}
	if err := w.failed.Load(); err != nil {
		return fmt.Errorf("an earlier write failed: %w", *err)
	}
	if err := w.finish(); err != nil {
		w.failed.CompareAndSwap(nil, &err)
		return err
	}
	w.finished, w.closed = true, true
	if err := w.file.Close(); err != nil {
		return err
	}
	if w.syncDir != nil {
		return w.syncDir()
	}
	return nil
}

func (w *Writer) finish() error {
	w.space.release()
	l1, err := w.tables.flush()
	if err != nil {
		return err
	}
	refcounts, refcountClusters, err := w.space.flush()
	if err != nil {
		return err
	}
	if err := w.file.Truncate(w.space.end); err != nil {
		return err
	}
	head, err := w.headerCluster(l1, refcounts, refcountClusters)
	if err != nil {
		return err
	}
	// Until its header is there the file is no image. It must not come to be
	// there before what it names.
	if err := w.fsync(); err != nil {
		return err
	}
	if _, err := w.file.WriteAt(head, 0); err != nil {
		return err
	}
	return w.fsync()
}

// headerCluster is the first cluster, up to its last byte that is not zero.
func (w *Writer) headerCluster(l1, refcounts, refcountClusters int64) ([]byte, error) {
	const length = 112
	be := binary.BigEndian
	p := make([]byte, length, 512)
	copy(p, magic)
	be.PutUint32(p[4:], 3)
	be.PutUint32(p[20:], w.bits)
	be.PutUint64(p[24:], uint64(w.size))
	be.PutUint32(p[36:], uint32(w.tables.count()))
	be.PutUint64(p[40:], uint64(l1))
	be.PutUint64(p[48:], uint64(refcounts))
	be.PutUint32(p[56:], uint32(refcountClusters))
	be.PutUint32(p[96:], 4) // refcounts of 2^4 bits
	be.PutUint32(p[100:], length)
	if w.zstd {
		be.PutUint64(p[72:], incompatCompression)
		p[104] = compressZstd
	}
	if w.parent != "" {
		p = be.AppendUint32(p, extBackingFormat)
		p = be.AppendUint32(p, uint32(len(w.format)))
		p = append(p, w.format...)
		p = append(p, make([]byte, -len(w.format)&7)...)
	}
	p = append(p, make([]byte, 8)...) // the end of the extensions
	if w.parent != "" {
		be.PutUint64(p[8:], uint64(len(p)))
		be.PutUint32(p[16:], uint32(len(w.parent)))
		p = append(p, w.parent...)
	}
	if int64(len(p)) > w.Unit() {
		return nil, fmt.Errorf("parent's name of %d bytes does not fit into clusters of %d", len(w.parent), w.Unit())
	}
	return p, nil
}

// Close closes the file, which is no image unless Finish returned nil.
func (w *Writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	return w.file.Close()
}
