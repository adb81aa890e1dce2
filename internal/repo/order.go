package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"syscall"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// A move is a live record that a vacuum copies into a new pack.
type move struct {
	key       index.Key
	pack      uint32
	off, clen uint32
	page      uint32 // who reads it, and when: see readingOrder
}

func (m *move) end() int64 { return int64(m.off) + pack.RecordOverhead + int64(m.clen) }

// movesAtOnce is how many records are put into one order, 32 bytes each. More
// are copied in several goes. A variable for the sake of tests.
var movesAtOnce = 2 << 20

// unread is the page of what no restore point reads, but a session needs.
const unread = math.MaxUint32

// readsPerPack is how many reads of one pack the order of what is copied may
// cost on average. Reads from an object storage are round trips, and paid for.
const (
	readsPerPack    = 64
	readsPerPackFar = 8
)

// liveIn gives what lives in packs, which are those to be rewritten, up to
// movesAtOnce; next are those that are left for another time. Packs of which not
// all of that is listed by their trailers stay.
func (v *vacuum) liveIn(ctx context.Context, packs []uint32) (moves []move, next []uint32, err error) {
	for len(packs) > 0 && len(moves) < movesAtOnce {
		some := packs[:min(adoptAtOnce, len(packs))]
		packs = packs[len(some):]
		listed := map[uint32]bool{}
		var failed error
		err := v.r.trailers(ctx, v.h, some, func(n uint32, ip index.Pack, _ error) {
			if failed != nil {
				return
			}
			places, err := v.liveOf(ctx, ip.Entries)
			if index.Damaged(err) {
				return // it stays
			}
			if failed = err; err != nil {
				return
			}
			var bytes int64
			first := len(moves)
			for _, e := range ip.Entries {
				if at, lives := places[e.Key]; lives && at.Pack == n && at.Off == e.Off {
					moves = append(moves, move{key: e.Key, pack: n, off: e.Off, clen: e.CLen, page: unread})
					bytes += pack.RecordOverhead + int64(e.CLen)
				}
			}
			if listed[n] = bytes == v.live[n]; !listed[n] {
				moves = moves[:first]
			}
		})
		if err = errors.Join(err, failed); err != nil {
			return nil, nil, err
		}
		for _, n := range some {
			if !listed[n] {
				v.leaveDamaged(n)
			}
		}
	}
	return moves, packs, nil
}

// leaveDamaged leaves a pack as it is of which something that lives cannot be
// read: Check will name it.
func (v *vacuum) leaveDamaged(n uint32) {
	p := &v.h.packs[n]
	v.rewrite = slices.DeleteFunc(v.rewrite, func(m uint32) bool { return m == n })
	v.report.RewrittenPacks--
	v.report.RewrittenBytes -= v.live[n]
	v.report.FreedBytes -= p.bytes - v.live[n]
	v.report.KeptWasteBytes += p.bytes - v.live[n]
}

// readingOrder sorts moves as restores read them: what the newest point needs
// first, page by page of its manifests, then what the next one needs besides, and
// so on. Which position within its page a record has is sealed; there they go as
// they lie, which is the order of the disk for what was stored at once.
func (v *vacuum) readingOrder(ctx context.Context, moves []move) error {
	slices.SortFunc(moves, func(a, b move) int { return a.key.Compare(&b.key) })
	o := ordering{v: v, moves: moves, left: len(moves), bases: map[manifest.ID][]bool{}, done: map[manifest.ID]bool{}}
	recs := slices.Clone(v.recs)
	slices.SortStableFunc(recs, func(a, b *record) int { return cmp.Compare(b.name, a.name) })
	for _, rec := range recs {
		if err := o.point(ctx, rec); err != nil {
			return err
		}
	}
	shape := blob.ShapeOf(v.r.st)
	reads := readsPerPack
	if shape.InFlight > 0 {
		reads = readsPerPackFar
	}
	packs := map[uint32]bool{}
	for i := range moves {
		packs[moves[i].pack] = true
	}
	// Pages are taken together until that is read in few enough pieces: the more
	// packs have something of each page, the more these are.
	for shift := 0; ; shift++ {
		slices.SortFunc(moves, func(a, b move) int {
			return cmp.Or(cmp.Compare(a.page>>shift, b.page>>shift), cmp.Compare(a.pack, b.pack), cmp.Compare(a.off, b.off))
		})
		if shift == 31 || countPieces(moves, shape) <= reads*len(packs) {
			return nil
		}
	}
}

// An ordering gives moves, which are sorted by key, the first page that reads
// them.
type ordering struct {
	v     *vacuum
	moves []move
	left  int // of moves that have no page yet
	no    uint32
	bases map[manifest.ID][]bool // pages that were looked at
	done  map[manifest.ID]bool   // manifests
}

func (o *ordering) point(ctx context.Context, rec *record) error {
	for _, s := range rec.clear.Records {
		if id, err := hexID(s); err == nil {
			o.take(index.KeyOf(id))
		}
	}
	o.no++
	for _, m := range rec.clear.Manifests {
		id, err := parseManifestID(point.ManifestID(m))
		if err != nil {
			return err
		}
		if o.done[id] || o.left == 0 {
			continue
		}
		o.done[id] = true
		if err := o.manifest(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// manifest walks the pages of a disk in their order.
func (o *ordering) manifest(ctx context.Context, id manifest.ID) error {
	f, base, err := o.v.r.openManifests(ctx, id)
	if err != nil {
		return err
	}
	if base == nil {
		return o.merge(ctx, manifest.ID{}, nil, id, f)
	}
	return o.merge(ctx, id, f, f.Base, base)
}

// merge walks the pages of a base as far as f does not replace them, and those of
// f, which is nil where there is no differential. What was looked at of the base
// is not looked at again.
func (o *ordering) merge(ctx context.Context, id manifest.ID, f *manifest.File, baseID manifest.ID, base *manifest.File) error {
	if o.bases[baseID] == nil {
		o.bases[baseID] = make([]bool, base.Written())
	}
	seen, own := o.bases[baseID], 0
	if f != nil {
		own = f.Written()
	}
	for i, j := 0, 0; i < base.Written() || j < own; {
		if j < own && (i == base.Written() || f.PageNo(j) <= base.PageNo(i)) {
			if i < base.Written() && f.PageNo(j) == base.PageNo(i) {
				i++
			}
			if err := o.page(ctx, id, f, j); err != nil {
				return err
			}
			j++
			continue
		}
		if !seen[i] {
			seen[i] = true
			if err := o.page(ctx, baseID, base, i); err != nil {
				return err
			}
		}
		i++
	}
	return nil
}

func (o *ordering) page(ctx context.Context, id manifest.ID, f *manifest.File, i int) error {
	if err := ctx.Err(); err != nil || o.left == 0 {
		return err
	}
	ids, err := f.Needs(i)
	if err != nil {
		return manifestError(id, err)
	}
	for _, id := range ids {
		o.take(index.KeyOf(id))
	}
	o.no++
	return nil
}

func (o *ordering) take(k index.Key) {
	i, ok := slices.BinarySearchFunc(o.moves, k, func(m move, k index.Key) int { return m.key.Compare(&k) })
	if ok && o.moves[i].page == unread {
		o.moves[i].page = min(o.no, unread-1)
		o.left--
	}
}

// piece is how many of moves one read takes.
func piece(moves []move, shape blob.ReadShape) int {
	n := 1
	for n < len(moves) && moves[n].pack == moves[0].pack && moves[n].off > moves[n-1].off &&
		int64(moves[n].off)-moves[n-1].end() <= shape.Gap && int64(moves[n].off-moves[0].off) < shape.Run {
		n++
	}
	return n
}

func countPieces(moves []move, shape blob.ReadShape) (n int) {
	for ; len(moves) > 0; n++ {
		moves = moves[piece(moves, shape):]
	}
	return n
}

// copyLive writes what lives in packs that are mostly dead into new ones,
// record by record as they are.
func (v *vacuum) copyLive(ctx context.Context) error {
	c := &repacker{v: v, mem: pack.NewMemory(2 * pack.TargetBytes), shape: blob.ShapeOf(v.r.st), bad: map[uint32]bool{}}
	c.b = pack.NewBuilder(c.mem, v.r.id, v.bin)
	defer func() { c.b.Free() }()
	left := slices.Clone(v.rewrite)
	all := len(left)
	for len(left) > 0 {
		moves, next, err := v.liveIn(ctx, left)
		if err == nil {
			err = v.readingOrder(ctx, moves)
		}
		if err != nil {
			return err
		}
		packs := len(left) - len(next)
		for at := 0; at < len(moves); {
			n := piece(moves[at:], c.shape)
			if err := c.copy(ctx, moves[at:at+n]); err != nil {
				return err
			}
			at += n
			v.progress(all - len(left) + packs*at/len(moves))
		}
		left = next
	}
	for n := range c.bad {
		v.leaveDamaged(n)
	}
	return c.send(ctx)
}

// copyNothing leaves packs alone that were to be rewritten, where there is no
// room for that: those in which nothing lives can go nevertheless, and make it.
// What was copied already is stored twice, and the next vacuum keeps the older.
func (v *vacuum) copyNothing() {
	v.fresh = nil
	for _, n := range slices.Clone(v.rewrite) {
		v.spare(n, &v.report.Kept.NoSpace)
	}
}

// A repacker fills new packs.
type repacker struct {
	v     *vacuum
	mem   *pack.Memory
	b     *pack.Builder
	shape blob.ReadShape
	buf   []byte
	bad   map[uint32]bool // packs of which something that lives cannot be read
}

// copy copies moves that one read takes.
func (c *repacker) copy(ctx context.Context, moves []move) error {
	n, first := moves[0].pack, int64(moves[0].off)
	if c.bad[n] {
		return nil
	}
	p := c.v.h.packs[n]
	if want := moves[len(moves)-1].end() - first; int64(len(c.buf)) < want {
		c.buf = make([]byte, max(want, c.shape.Run))
	}
	buf := c.buf[:moves[len(moves)-1].end()-first]
	got, err := c.v.r.st.ReadAt(ctx, p.name(), buf, first)
	switch {
	case errors.Is(err, fault.ErrCorrupt), errors.Is(err, syscall.EIO):
		c.bad[n] = true
		return nil
	case err != nil && !errors.Is(err, io.EOF):
		return fmt.Errorf("%s: %w", packLabel(p.id), err)
	}
	for _, m := range moves {
		if m.end()-first > int64(got) {
			c.bad[n] = true
			return nil
		}
		rec := buf[int64(m.off)-first : m.end()-first]
		e, err := pack.CheckRecord(rec)
		if err != nil || index.KeyOf(e.ID) != m.key || e.CLen != m.clen {
			c.bad[n] = true
			return nil
		}
		if c.b.Full(len(rec)) {
			if err := c.send(ctx); err != nil {
				return err
			}
		}
		if _, err := c.b.Append(e, rec); err != nil {
			return err
		}
	}
	return nil
}

// send stores the pack that is full, or the last one.
func (c *repacker) send(ctx context.Context) error {
	if c.b.Len() == 0 {
		return nil
	}
	r := c.v.r
	entries := c.b.Entries()
	_, sum := c.b.Finish()
	if err := r.st.Put(ctx, packName(sum), c.b, c.b.Bytes()); err != nil {
		return err
	}
	if err := r.guard(ctx, packName(sum), sum, c.b, c.b.Bytes()); err != nil {
		return err
	}
	c.v.fresh = append(c.v.fresh, indexPack(sum, c.b.Bytes(), entries))
	c.b.Free()
	c.b = pack.NewBuilder(c.mem, r.id, c.v.bin)
	return nil
}
