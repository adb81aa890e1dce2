package repo

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/vm"
)

// CheckOptions say how deep Check looks. Without any it takes the inventory:
// whether every object that is needed is there with its right length.
type CheckOptions struct {
	Scrub    bool // re-read every stored byte and compare checksums; needs no keys
	ReadData bool // decrypt, decompress and re-hash every chunk; includes Scrub
	// With one of these, Scrub and ReadData read only some packs, those first
	// that were read longest ago.
	Budget   int64            // bytes of packs and their parity
	For      time.Duration    // after this no more is begun
	Now      func() time.Time // time.Now if nil
	Progress func(doneBytes, totalBytes int64)

	guard bool // make the parity of packs that lack it and are read
}

// A Hit is a part of a restore point that a finding damages. Without keys
// only Point is known, as the record's opaque name.
type Hit struct {
	VM    string        `json:"vm,omitempty"`
	Point point.ID      `json:"point"`
	Disk  vm.DiskID     `json:"disk,omitempty"`
	Range extent.Extent `json:"range"`
}

// A Finding is one object with which something is wrong.
type Finding struct {
	Object string  // its name in the store
	Offset int64   // bytes into the object, -1 where it has no place
	Err    error   // in class fault.ErrCorrupt or fault.ErrNotFound
	More   []error // what else is wrong with it
	Hits   []Hit   // by all of it
}

// moreErrors bounds how much is said of one object.
const moreErrors = 1000

// A CheckReport counts what was looked at and lists what is wrong.
type CheckReport struct {
	Packs, Points, Manifests, Chunks int64
	Bytes                            int64 // that were read
	Findings                         []Finding
	// Unneeded are damaged packs of whose damage no restore point needs
	// anything: the points are gone, or the chunks were stored again.
	Unneeded []Finding
	// Unnoted is why damage that was found could not be written down for the
	// next backup to store it again; nil if it was.
	Unnoted  error
	Unkept   error // why it could not be written down what was read; nil if it was
	Parity   ParityState
	Verified Verified
}

// checkWorkers is how many packs are read at the same time, at most.
const checkWorkers = 3

// Check says whether the repository is sound. Findings are not an error.
//
// Damage that Scrub or ReadData finds in packs is put into quarantine: the next
// backup stores what it meets of it again. Sound packs that they read get the
// parity that they lack, such as those of a backup that died. Nothing else is
// changed.
func (r *Repository) Check(ctx context.Context, o CheckOptions) (CheckReport, error) {
	o.guard = true
	c, err := r.look(ctx, o, true)
	if c == nil {
		return CheckReport{}, err
	}
	return c.report, err
}

// look is a check; with write it notes what it finds.
func (r *Repository) look(ctx context.Context, o CheckOptions, write bool) (*check, error) {
	if o.ReadData {
		o.Scrub = true
		if err := r.needKeys(); err != nil {
			return nil, err
		}
	}
	c, err := r.takeStock(ctx, o)
	if err != nil {
		return c, err
	}
	said := 0
	for _, step := range []func(context.Context) error{nil, c.loadScrubs, c.scrub, c.blame} {
		if step != nil {
			if err := step(ctx); err != nil {
				if c.o.Scrub && write && ctx.Err() != nil {
					c.sumUp()
					c.keep(ctx)
				}
				return c, err
			}
		}
		// What was found out about the caches: by loading them, and since.
		c.h.mu.RLock()
		findings := c.h.findings[said:]
		c.h.mu.RUnlock()
		for _, f := range findings {
			c.frames[c.find(f)] = true
		}
		said += len(findings)
	}
	c.sortOut()
	c.sumUp()
	if c.o.Scrub && write {
		c.keep(ctx)
	}
	slices.SortStableFunc(c.report.Findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Offset, b.Offset))
	})
	return c, nil
}

// takeStock loads the index and takes the inventory. What seems to be missing
// may be of a point that somebody deleted, and vacuumed away, meanwhile: so it
// looks again until it finds nothing, or the same twice.
func (r *Repository) takeStock(ctx context.Context, o CheckOptions) (c *check, err error) {
	var before []string
	for range loadTries {
		c = &check{r: r, o: o, bad: map[index.Key]int{}, badPages: map[pageRef]int{}, badFiles: map[manifest.ID]int{},
			frames: map[int]bool{}, damaged: newQuarantine(), whole: map[[32]byte]bool{}}
		// Points first: what they need was stored, and indexed, before.
		if err := c.records(ctx); err != nil {
			return c, err
		}
		if c.h, err = r.reload(ctx, r.current()); err != nil {
			return c, err
		}
		if err := c.inventory(ctx); err != nil {
			return c, err
		}
		var found []string
		for _, f := range c.report.Findings {
			found = append(found, f.Object+" "+f.Err.Error())
		}
		if slices.Sort(found); len(found) == 0 || slices.Equal(found, before) {
			break
		}
		before = found
	}
	return c, nil
}

type pageRef struct {
	id manifest.ID
	i  int
}

// A check is one run of Check.
type check struct {
	r    *Repository
	o    CheckOptions
	h    *holdings
	recs []*record

	mu     sync.Mutex
	report CheckReport
	// What is bad, each with the ordinal of its finding.
	bad         map[index.Key]int
	badPages    map[pageRef]int
	badFiles    map[manifest.ID]int
	done, total int64

	last      []lastRead   // when packs were last read
	reads     []scrubEntry // packs that this check read
	scrubs    []string     // notes of other checks
	badScrubs []string     // those of them that are damaged

	files     map[manifest.ID]bool // manifests that points need
	unguarded []string             // objects that have no parity
	lacking   map[[32]byte]bool    // packs among them

	used    []bool            // packs that hold what a point needs
	frames  map[int]bool      // findings of more than records of a pack
	blind   bool              // not all that points need is known, or some is in no pack
	damaged quarantine        // what to write down, without notes
	whole   map[[32]byte]bool // packs of which every record was opened
}

// find adds a finding and gives its ordinal. Each object has one, and the same
// thing is said of it once.
func (c *check) find(f Finding) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.report.Findings {
		g := &c.report.Findings[i]
		if g.Object != f.Object {
			continue
		}
		said := func(err error) bool { return err.Error() == f.Err.Error() }
		if f.Offset != g.Offset && !said(g.Err) && len(g.More) < moreErrors && !slices.ContainsFunc(g.More, said) {
			g.More = append(g.More, f.Err)
		}
		return i
	}
	c.report.Findings = append(c.report.Findings, f)
	return len(c.report.Findings) - 1
}

// sortOut moves findings to the unneeded: those of packs in which no point
// needs anything, or of whose damaged records none is needed there.
func (c *check) sortOut() {
	if c.blind {
		return
	}
	var needed []Finding
	for i, f := range c.report.Findings {
		id, ok := parsePackName(f.Object)
		n, held := c.h.number(id)
		if of, isParity := strings.CutPrefix(f.Object, parityPrefix); isParity {
			id, ok = parsePackName(of)
			_, held = c.h.number(id)
			ok = ok && !held // vacuum takes it
		}
		if strings.HasPrefix(f.Object, scrubPrefix) {
			ok, held = true, false // the next check writes another
		}
		if ok && len(f.Hits) == 0 && (!held || int(n) < len(c.used) && !c.used[n] || !c.frames[i]) {
			c.report.Unneeded = append(c.report.Unneeded, f)
		} else {
			needed = append(needed, f)
		}
	}
	c.report.Findings = needed
}

// blameChunk notes that chunk k is lost because of finding n.
func (c *check) blameChunk(k index.Key, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.bad[k]; !ok {
		c.bad[k] = n
	}
}

// records lists the restore points.
func (c *check) records(ctx context.Context) error {
	defer func() {
		for _, name := range c.r.strayNames() {
			c.find(Finding{Object: pointPrefix + name, Offset: -1, Err: fault.Corrupt(pointPrefix+name, -1, "its session stored no restore point of this name: somebody renamed or copied it")})
		}
	}()
	return c.r.eachRecord(ctx, func(name string, rec *record, err error) error {
		c.report.Points++
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			c.find(Finding{Object: pointPrefix + name, Offset: -1, Err: err, Hits: []Hit{{Point: point.ID(name)}}})
			c.blind = true
			return nil
		}
		c.recs = append(c.recs, rec)
		return nil
	})
}

// inventory looks whether everything that points need is there.
func (c *check) inventory(ctx context.Context) error {
	c.report.Packs = c.h.there()
	c.used = make([]bool, len(c.h.packs))
	c.report.Chunks = c.h.table.Len()
	for i := range c.h.packs {
		p := &c.h.packs[i]
		said := slices.ContainsFunc(c.h.findings, func(f Finding) bool { return f.Object == p.name() })
		if p.state == packDamaged && !said {
			n := c.find(Finding{Object: p.name(), Offset: p.bytes, Err: &fault.CorruptError{Object: packLabel(p.id), Offset: p.bytes, Err: io.ErrUnexpectedEOF}})
			c.frames[n] = true
		}
	}
	for _, rec := range c.recs {
		for _, s := range rec.clear.Records {
			if id, err := hexID(s); err == nil {
				if err := c.present(ctx, id, pointPrefix+rec.name, -1); err != nil {
					return err
				}
			}
		}
	}
	n := needs{
		r: c.r,
		visit: func(id manifest.ID, f *manifest.File, i int) error {
			ids, err := f.Needs(i)
			if err == nil && c.o.ReadData {
				_, err = f.Page(i)
			}
			name := manifestName(point.ManifestID(hex.EncodeToString(id[:])))
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				err = manifestError(id, err)
				c.badPages[pageRef{id, i}] = c.find(Finding{Object: name, Offset: offsetOf(err), Err: err})
				c.blind = true
				return nil
			}
			for _, id := range ids {
				if err := c.present(ctx, id, name, -1); err != nil {
					return err
				}
			}
			return nil
		},
		fail: func(id manifest.ID, err error) error {
			if ctx.Err() != nil {
				return err
			}
			name := manifestName(point.ManifestID(hex.EncodeToString(id[:])))
			c.badFiles[id] = c.find(Finding{Object: name, Offset: offsetOf(err), Err: err})
			c.blind = true
			return nil
		},
	}
	if err := n.walk(ctx, recManifests(c.recs)); err != nil {
		return err
	}
	c.report.Manifests = int64(len(n.files))
	c.files = n.files
	return c.parityInventory(ctx)
}

func offsetOf(err error) int64 {
	if ce := (*fault.CorruptError)(nil); errors.As(err, &ce) {
		return ce.Offset
	}
	return -1
}

// present looks whether chunk id, that the object by needs, is in a pack. Where
// it cannot find out it gives an error.
func (c *check) present(ctx context.Context, id chunk.ID, by string, off int64) error {
	k := index.KeyOf(id)
	if _, known := c.bad[k]; known {
		return nil
	}
	at, p, ok, err := c.r.findIn(ctx, c.h, id)
	if err != nil {
		return err
	}
	if ok && p.state == packMissing {
		// A backup may have stored it since packs were listed.
		c.h.mu.RLock()
		n, _ := c.h.number(p.id)
		c.h.mu.RUnlock()
		if p, err = c.r.isThere(ctx, c.h, n); err != nil {
			return err
		}
	}
	e := pack.Entry{Off: at.Off, CLen: at.CLen}
	c.h.mu.RLock()
	if n, held := c.h.number(p.id); ok && held && int(n) < len(c.used) { // others are newer than this check
		c.used[n] = true
	}
	c.h.mu.RUnlock()
	switch {
	case !ok:
		c.blind = true
		err := fmt.Errorf("chunk %s and perhaps others that it needs are in no pack: %w", id.Short(), fault.ErrCorrupt)
		c.blameChunk(k, c.find(Finding{Object: by, Offset: off, Err: err}))
	case p.state == packMissing:
		err := fmt.Errorf("%s: %w", packLabel(p.id), fault.ErrNotFound)
		c.blameChunk(k, c.find(Finding{Object: p.name(), Offset: -1, Err: err}))
	case e.End() > p.bytes:
		err := &fault.CorruptError{Object: packLabel(p.id), Offset: p.bytes, Err: io.ErrUnexpectedEOF}
		n := c.find(Finding{Object: p.name(), Offset: p.bytes, Err: err})
		c.frames[n] = true
		c.blameChunk(k, n)
	case (!c.o.Scrub || c.o.limited()) && c.h.inQuarantine(p.id, at.Off):
		err := fault.Corrupt(packLabel(p.id), int64(at.Off), "an earlier check found this record damaged")
		c.blameChunk(k, c.find(Finding{Object: p.name(), Offset: int64(at.Off), Err: err}))
	}
	return nil
}

// blame names the parts of restore points that the findings hit.
func (c *check) blame(ctx context.Context) error {
	if len(c.bad)+len(c.badPages)+len(c.badFiles) == 0 {
		return nil
	}
	for _, rec := range c.recs {
		for _, s := range rec.clear.Records {
			if id, err := hexID(s); err == nil {
				if n, ok := c.bad[index.KeyOf(id)]; ok {
					c.hit(n, rec, nil, extent.Extent{})
				}
			}
		}
		if rec.point == nil {
			for _, m := range rec.clear.Manifests {
				if err := c.blameDisk(ctx, rec, nil, point.ManifestID(m)); err != nil {
					return err
				}
			}
			continue
		}
		for i := range rec.point.Disks {
			if err := c.blameDisk(ctx, rec, &rec.point.Disks[i], rec.point.Disks[i].Manifest); err != nil {
				return err
			}
		}
	}
	return nil
}

// hit adds to finding n that part of a disk; neighbours melt.
func (c *check) hit(n int, rec *record, d *point.Disk, part extent.Extent) {
	h := Hit{Point: point.ID(rec.name)}
	if rec.point != nil {
		h.VM, h.Point = rec.point.VM, rec.point.ID
	}
	if d != nil {
		h.Disk, h.Range = d.ID, part
	}
	hits := c.report.Findings[n].Hits
	if k := len(hits) - 1; k >= 0 && hits[k].VM == h.VM && hits[k].Point == h.Point && hits[k].Disk == h.Disk {
		if d == nil {
			return
		}
		if hits[k].Range.End() == part.Off {
			hits[k].Range.Len += part.Len
			return
		}
	}
	c.report.Findings[n].Hits = append(hits, h)
}

func (c *check) blameDisk(ctx context.Context, rec *record, d *point.Disk, m point.ManifestID) error {
	id, err := parseManifestID(m)
	if err != nil {
		return nil // decodeRecord refuses such a record
	}
	whole := extent.Extent{}
	if d != nil {
		whole.Len = d.SizeBytes
	}
	if n, ok := c.badFiles[id]; ok {
		c.hit(n, rec, d, whole)
		return nil
	}
	f, base, err := c.r.openManifests(ctx, id)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.hit(c.find(Finding{Object: manifestName(m), Offset: offsetOf(err), Err: err}), rec, d, whole)
		return nil
	}
	if base != nil {
		if n, ok := c.badFiles[f.Base]; ok {
			c.hit(n, rec, d, whole)
			return nil
		}
		for i := range base.Written() {
			if _, replaced := f.Find(base.PageNo(i)); !replaced {
				if err := c.blamePage(ctx, rec, d, f.Base, base, i); err != nil {
					return err
				}
			}
		}
	}
	for i := range f.Written() {
		if err := c.blamePage(ctx, rec, d, id, f, i); err != nil {
			return err
		}
	}
	return nil
}

func (c *check) blamePage(ctx context.Context, rec *record, d *point.Disk, id manifest.ID, f *manifest.File, i int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	first := f.PageNo(i) * manifest.Positions
	part := func(index, n int64) extent.Extent {
		off := index * f.ChunkBytes
		return extent.Extent{Off: off, Len: min(n*f.ChunkBytes, f.DiskBytes-off)}
	}
	if n, ok := c.badPages[pageRef{id, i}]; ok {
		c.hit(n, rec, d, part(first, manifest.Positions))
		return nil
	}
	if len(c.bad) == 0 {
		return nil
	}
	ids, err := f.Needs(i)
	if err != nil {
		return nil // it was good a moment ago: the next check will say
	}
	lost := func(id chunk.ID) bool { _, ok := c.bad[index.KeyOf(id)]; return ok }
	if !slices.ContainsFunc(ids, lost) {
		return nil
	}
	if d == nil {
		for _, id := range ids {
			if n, ok := c.bad[index.KeyOf(id)]; ok {
				c.hit(n, rec, nil, extent.Extent{})
			}
		}
		return nil
	}
	p, err := f.Page(i)
	if err != nil {
		return nil
	}
	for k := range p.IDs {
		if !p.Data[k] {
			continue
		}
		at := ref{p.IDs[k], p.Base(k)}
		n, ok := c.bad[index.KeyOf(c.r.recordID(at))]
		if !ok && at.overlay() {
			if n, ok = c.bad[index.KeyOf(at.base)]; ok && c.needsNoBase(ctx, at) {
				continue
			}
		}
		if ok {
			c.hit(n, rec, d, part(first+int64(k), 1))
		}
	}
	return ctx.Err()
}

// needsNoBase says whether overlay at, whose base is lost, can be read all the
// same.
func (c *check) needsNoBase(ctx context.Context, at ref) bool {
	w := c.r.worker(readLevel)
	defer c.r.idle(readLevel, w)
	if whole, err := c.r.whole(ctx, w, at); err == nil && whole {
		return true
	}
	_, stored, err := c.r.stores(ctx, c.h, at.id)
	return err == nil && stored
}
