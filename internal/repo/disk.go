package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

const manifestPrefix = "man/"

func manifestName(id point.ManifestID) string {
	return manifestPrefix + string(id[:2]) + "/" + string(id)
}

// manifestObject is manifestName of an id that is no string.
func manifestObject(id manifest.ID) string {
	return manifestName(point.ManifestID(hex.EncodeToString(id[:])))
}

func manifestLabel(id manifest.ID) string { return "manifest " + hex.EncodeToString(id[:4]) }

func parseManifestID(s point.ManifestID) (id manifest.ID, err error) {
	b, err := hex.DecodeString(string(s))
	if err != nil || len(b) != len(id) || hex.EncodeToString(b) != string(s) {
		return id, fmt.Errorf("%q is no manifest", s)
	}
	return manifest.ID(b), nil
}

// cachedPages is how many decoded pages a Disk keeps: 33 KiB each.
const cachedPages = 32

// cachedBytes is how much of its chunks a Disk keeps for ReadAt.
const cachedBytes = 16 << 20

// A Disk is one disk of a restore point, open for reading. All methods are
// safe for concurrent use.
type Disk struct {
	r    *Repository
	ctx  context.Context // of ReadAt, which has none
	id   point.ManifestID
	file *manifest.File
	base *manifest.File // nil if file stands alone

	mu     sync.Mutex
	pages  lru[int64, manifest.Page]
	chunks lru[chunk.ID, []byte]
}

// OpenDisk opens the disk whose manifest is id.
func (r *Repository) OpenDisk(ctx context.Context, id point.ManifestID) (*Disk, error) {
	if err := r.needKeys(); err != nil {
		return nil, err
	}
	mid, err := parseManifestID(id)
	if err != nil {
		return nil, err
	}
	d := &Disk{r: r, ctx: context.WithoutCancel(ctx), id: id}
	d.pages.limit = cachedPages
	d.chunks.limit = int(max(4, cachedBytes/r.conf.ChunkBytes))
	if d.file, d.base, err = r.openManifests(ctx, mid); err != nil {
		return nil, err
	}
	return d, nil
}

// openManifests opens a manifest and its base, if it has one.
func (r *Repository) openManifests(ctx context.Context, id manifest.ID) (f, base *manifest.File, err error) {
	if f, err = r.openManifest(ctx, id); err != nil || !f.Differential() {
		return f, nil, err
	}
	if base, err = r.openManifest(ctx, f.Base); err != nil {
		return nil, nil, fmt.Errorf("base of %s: %w", manifestLabel(id), err)
	}
	if base.Differential() || base.DiskBytes != f.DiskBytes || base.ChunkBytes != f.ChunkBytes {
		return nil, nil, fault.Corrupt(manifestLabel(id), -1, "its base %x is of another kind or size", f.Base[:4])
	}
	return f, base, nil
}

func (r *Repository) openManifest(ctx context.Context, id manifest.ID) (*manifest.File, error) {
	name := manifestName(point.ManifestID(hex.EncodeToString(id[:])))
	size, err := r.st.Size(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", manifestLabel(id), err)
	}
	src := r.ahead(&storeReader{context.WithoutCancel(ctx), r.st, name}, size)
	var f *manifest.File
	if r.keys == nil {
		f, err = manifest.Open(src, size, id, r.id, nil)
	} else {
		f, err = manifest.Open(src, size, id, r.id, &r.keys.Meta)
	}
	if err != nil {
		return nil, manifestError(id, err)
	}
	if f.ChunkBytes != r.conf.ChunkBytes {
		return nil, fault.Corrupt(manifestLabel(id), -1, "its chunks have %d bytes", f.ChunkBytes)
	}
	return f, nil
}

// manifestError tells damage from trouble with the store.
func manifestError(id manifest.ID, err error) error {
	if se := (*storeError)(nil); errors.As(err, &se) {
		return fmt.Errorf("%s: %w", manifestLabel(id), se.err)
	}
	off := int64(-1)
	if pe := (*manifest.PageError)(nil); errors.As(err, &pe) {
		off = pe.Off
	}
	return &fault.CorruptError{Object: manifestLabel(id), Offset: off, Err: err}
}

// Size is the disk's size in bytes.
func (d *Disk) Size() int64 { return d.file.DiskBytes }

// ChunkBytes is the size of all chunks but the last.
func (d *Disk) ChunkBytes() int64 { return d.file.ChunkBytes }

// Chunks is how many chunks the disk has.
func (d *Disk) Chunks() int64 { return d.file.Chunks() }

// Close lets go of the disk's memory.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pages.clear()
	d.chunks.clear()
	return nil
}

// baseID is the base that a successor of d would build on.
func (d *Disk) baseID() manifest.ID {
	if d.base != nil {
		return d.file.Base
	}
	id, _ := parseManifestID(d.id) // OpenDisk parsed it
	return id
}

// basePages is how many pages that base has.
func (d *Disk) basePages() int {
	if d.base != nil {
		return d.base.Written()
	}
	return d.file.Written()
}

// replaced are the pages of that base that d replaces.
func (d *Disk) replaced() (nos []int64) {
	if d.base == nil {
		return nil
	}
	return pageNos(d.file)
}

// written are all pages that d or its base wrote.
func (d *Disk) written() []int64 {
	nos := pageNos(d.file)
	if d.base != nil {
		nos = merge(nos, pageNos(d.base))
	}
	return nos
}

func pageNos(f *manifest.File) []int64 {
	nos := make([]int64, f.Written())
	for i := range nos {
		nos[i] = f.PageNo(i)
	}
	return nos
}

// page gives page no, through the cache. The caller must not change it.
func (d *Disk) page(ctx context.Context, no int64) (manifest.Page, error) {
	d.mu.Lock()
	p, ok := d.pages.get(no)
	d.mu.Unlock()
	if ok {
		return p, nil
	}
	if err := ctx.Err(); err != nil {
		return p, err
	}
	p, err := d.readPage(no)
	if err != nil {
		return p, err
	}
	d.mu.Lock()
	d.pages.put(no, p)
	d.mu.Unlock()
	return p, nil
}

func (d *Disk) readPage(no int64) (manifest.Page, error) {
	f, id := d.file, d.id
	i, ok := f.Find(no)
	if !ok && d.base != nil {
		f, id = d.base, point.ManifestID(hex.EncodeToString(d.file.Base[:]))
		i, ok = f.Find(no)
	}
	if !ok {
		n := d.file.PageLen(no)
		return manifest.Page{IDs: make([]chunk.ID, n), Data: make([]bool, n)}, nil
	}
	p, err := f.Page(i)
	if err != nil {
		mid, _ := parseManifestID(id)
		return p, manifestError(mid, err)
	}
	return p, nil
}

// wrote says whether page no may hold anything but holes.
func (d *Disk) wrote(no int64) bool {
	_, ok := d.file.Find(no)
	if !ok && d.base != nil {
		_, ok = d.base.Find(no)
	}
	return ok
}

// nextWritten is the first page from no on that may hold data, or the number
// of pages.
func (d *Disk) nextWritten(no int64) int64 {
	next := d.file.Pages()
	for _, f := range []*manifest.File{d.file, d.base} {
		if f == nil {
			continue
		}
		if i, _ := f.Find(no); i < f.Written() {
			next = min(next, f.PageNo(i))
		}
	}
	return next
}

// Chunk names chunk index.
func (d *Disk) Chunk(ctx context.Context, index int64) (id chunk.ID, hole bool, err error) {
	c, hole, err := d.ref(ctx, index)
	return c.id, hole, err
}

// ref says how the disk refers to chunk index.
func (d *Disk) ref(ctx context.Context, index int64) (c ref, hole bool, err error) {
	if index < 0 || index >= d.Chunks() {
		return c, false, fmt.Errorf("chunk %d of a disk with %d chunks", index, d.Chunks())
	}
	no := index / manifest.Positions
	if !d.wrote(no) {
		return c, true, nil
	}
	p, err := d.page(ctx, no)
	if err != nil {
		return c, false, err
	}
	i := int(index % manifest.Positions)
	return ref{p.IDs[i], p.Base(i)}, !p.Data[i], nil
}

// within gives the chunks that e touches: from first up to but not including
// end.
func (d *Disk) within(e extent.Extent) (first, end int64, err error) {
	if e.Off < 0 || e.Len < 0 || e.Off > d.Size() || e.Len > d.Size()-e.Off {
		return 0, 0, fmt.Errorf("%v is not inside a disk of %d bytes", e, d.Size())
	}
	if e.Len == 0 {
		return 0, 0, nil
	}
	return e.Off / d.ChunkBytes(), (e.End()-1)/d.ChunkBytes() + 1, nil
}

// walk calls fn for each chunk from first up to end that is no hole.
func (d *Disk) walk(ctx context.Context, first, end int64, fn func(index int64, c ref) error) error {
	for at := first; at < end; {
		no := at / manifest.Positions
		if next := d.nextWritten(no); next != no {
			at = next * manifest.Positions
			continue
		}
		p, err := d.page(ctx, no)
		if err != nil {
			return err
		}
		for ; at < end && at/manifest.Positions == no; at++ {
			if i := int(at % manifest.Positions); p.Data[i] {
				if err := fn(at, ref{p.IDs[i], p.Base(i)}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Data is the part of within that is no hole, in whole chunks cut at within.
func (d *Disk) Data(ctx context.Context, within extent.Extent) (set extent.Set, err error) {
	first, end, err := d.within(within)
	if err != nil {
		return set, err
	}
	err = d.walk(ctx, first, end, func(index int64, _ ref) error {
		set.Add(d.extent(index).Intersect(within))
		return nil
	})
	return set, err
}

func (d *Disk) extent(index int64) extent.Extent {
	return extent.Extent{Off: index * d.ChunkBytes(), Len: chunk.Len(index, d.Size(), d.ChunkBytes())}
}

// ReadAt reads like an io.ReaderAt, through a small cache of chunks.
func (d *Disk) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read at offset %d", off)
	}
	for n < len(p) && off < d.Size() {
		index := off / d.ChunkBytes()
		part := d.extent(index).Intersect(extent.Extent{Off: off, Len: min(int64(len(p)-n), d.Size()-off)})
		out := p[n : n+int(part.Len)]
		c, hole, err := d.ref(d.ctx, index)
		if err != nil {
			return n, err
		}
		if hole {
			clear(out)
		} else {
			plain, err := d.chunk(c, d.extent(index).Len)
			if err != nil {
				return n, err
			}
			copy(out, plain[off-index*d.ChunkBytes():])
		}
		n, off = n+len(out), off+part.Len
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *Disk) chunk(c ref, want int64) ([]byte, error) {
	d.mu.Lock()
	plain, ok := d.chunks.get(c.id)
	d.mu.Unlock()
	if ok && int64(len(plain)) == want {
		return plain, nil
	}
	w := d.r.worker(readLevel)
	defer d.r.idle(readLevel, w)
	plain, err := d.r.readChunk(d.ctx, w, c, want)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.chunks.put(c.id, plain)
	d.mu.Unlock()
	return plain, nil
}
