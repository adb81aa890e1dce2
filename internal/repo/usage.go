package repo

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// Usage says what restore points cost. Bytes are those of records in packs,
// which is what chunks take when they are compressed and sealed; manifests, the
// index and the frames of packs, together less than a hundredth, are left out.
type Usage struct {
	NeededBytes int64 // that some point needs, each chunk once
	Missing     int64 // chunks that points need and that are in no pack
	VMs         []VMUsage
}

// VMUsage is what one VM's points cost.
type VMUsage struct {
	VM          string       `json:"vm"`
	SizeBytes   int64        `json:"size_bytes"`   // of the newest point's disks
	NeededBytes int64        `json:"needed_bytes"` // that some point of the VM needs
	FreesBytes  int64        `json:"frees_bytes"`  // that only its points need: what deleting them all frees
	SharedBytes int64        `json:"shared_bytes"` // that other VMs need too
	SharedWith  []VMShare    `json:"shared_with"`  // most first
	Points      []PointUsage `json:"points"`       // oldest first
}

// VMShare is what two VMs both need. Shares do not add up: three VMs may need
// one chunk.
type VMShare struct {
	VM    string `json:"vm"`
	Bytes int64  `json:"bytes"`
}

// PointUsage is what one restore point costs.
type PointUsage struct {
	ID        point.ID  `json:"id"`
	Time      time.Time `json:"time"`
	SizeBytes int64     `json:"size_bytes"` // of its disks
	// NewBytes is what no older point that still exists needs, of any VM: what
	// the repository grew by, seen from now. They add up to Usage.NeededBytes.
	NewBytes int64 `json:"new_bytes"`
	// FreesBytes is what no other point needs: what deleting this one alone
	// frees. What two points share is freed by deleting both.
	FreesBytes int64 `json:"frees_bytes"`
}

// Usage works out what each VM and each restore point costs, from the clear
// lists of manifests and the index. It reads all manifests that exist and no
// chunk. In memory are 64 MB of references, a hundredth of them all and a
// number for each page of a base; the rest waits in a temporary file. If any
// record or manifest cannot be read nobody knows what is shared, and it fails.
func (r *Repository) Usage(ctx context.Context) (Usage, error) {
	var u Usage
	if err := r.needKeys(); err != nil {
		return u, err
	}
	recs, err := r.list(ctx)
	if err != nil {
		return u, err
	}
	// Points are numbered by time, so that the smallest number is the oldest.
	slices.SortFunc(recs, func(a, b *record) int {
		return cmp.Or(a.point.Time.Compare(b.point.Time), cmp.Compare(a.name, b.name))
	})
	s := &usage{r: r, recs: recs, classes: newClasses(), refs: newReferences()}
	defer s.refs.close()
	if err := s.gather(ctx); err != nil {
		return u, err
	}
	s.begin(&u)
	return u, s.sum(ctx, &u)
}

type usage struct {
	r       *Repository
	recs    []*record
	classes *classes
	refs    *references

	at [][2]int // by point: its VM and its place in that VM's points
}

// vms numbers the VMs, in order of name.
func (s *usage) vms() (names []string, of map[string]uint32) {
	of = map[string]uint32{}
	for _, rec := range s.recs {
		names = append(names, rec.point.VM)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	for i, n := range names {
		of[n] = uint32(i)
	}
	return names, of
}

// gather notes for every chunk that a page or a record names who needs it.
func (s *usage) gather(ctx context.Context) error {
	_, vms := s.vms()
	users := map[manifest.ID]uint32{} // classes
	for i, rec := range s.recs {
		c := s.classes.point(uint32(i), vms[rec.point.VM])
		for _, m := range rec.clear.Manifests {
			id, err := parseManifestID(point.ManifestID(m))
			if err != nil {
				return err
			}
			users[id] = s.classes.join(users[id], c)
		}
		for _, name := range rec.clear.Records {
			id, err := hexID(name)
			if err != nil {
				return &fault.CorruptError{Object: pointPrefix + rec.name, Offset: -1, Err: err}
			}
			if err := s.refs.add(id, c); err != nil {
				return err
			}
		}
	}
	// A base's page is needed by those who name the base, and by those who name a
	// differential over it that does not replace the page.
	bases := map[manifest.ID][]uint32{}
	pages := func(id manifest.ID, f *manifest.File) []uint32 {
		if bases[id] == nil {
			bases[id] = make([]uint32, f.Written())
		}
		return bases[id]
	}
	for id, c := range users {
		f, base, err := s.r.openManifests(ctx, id)
		if err != nil {
			return err
		}
		if base == nil {
			for i, was := range pages(id, f) {
				bases[id][i] = s.classes.join(was, c)
			}
			continue
		}
		for i, was := range pages(f.Base, base) {
			if _, replaced := f.Find(base.PageNo(i)); !replaced {
				bases[f.Base][i] = s.classes.join(was, c)
			}
		}
		for i := range f.Written() {
			if err := s.page(ctx, id, f, i, c); err != nil {
				return err
			}
		}
	}
	for id, classes := range bases {
		f, err := s.r.openManifest(ctx, id)
		if err != nil {
			return err
		}
		for i, c := range classes {
			if c == 0 || i >= f.Written() {
				continue
			}
			if err := s.page(ctx, id, f, i, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *usage) page(ctx context.Context, id manifest.ID, f *manifest.File, i int, c uint32) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ids, err := f.Needs(i)
	if err != nil {
		return manifestError(id, err)
	}
	for _, id := range ids {
		if err := s.refs.add(id, c); err != nil {
			return err
		}
	}
	return nil
}

// begin lists the VMs and their points, with nothing counted yet.
func (s *usage) begin(u *Usage) {
	names, of := s.vms()
	u.VMs = make([]VMUsage, len(names))
	for i, n := range names {
		u.VMs[i] = VMUsage{VM: n, SharedWith: []VMShare{}}
	}
	for _, rec := range s.recs {
		v := &u.VMs[of[rec.point.VM]]
		s.at = append(s.at, [2]int{int(of[rec.point.VM]), len(v.Points)})
		v.SizeBytes = rec.point.SizeBytes()
		v.Points = append(v.Points, PointUsage{ID: rec.point.ID, Time: rec.point.Time, SizeBytes: v.SizeBytes})
	}
}

// sum counts every chunk once, with those who need it.
func (s *usage) sum(ctx context.Context, u *Usage) error {
	sets := map[uint32]int64{}
	err := s.refs.each(s.classes, func(refs []reference) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return s.storedBytes(ctx, refs, func(ref reference, bytes int64, ok bool) {
			if !ok {
				u.Missing++
				return
			}
			c := s.classes.all[ref.class]
			u.NeededBytes += bytes
			s.pointOf(u, c.first).NewBytes += bytes
			if c.only != manyPoints {
				s.pointOf(u, c.only).FreesBytes += bytes
			}
			sets[c.vms] += bytes
		})
	})
	if err != nil {
		return err
	}
	with := make([]map[uint32]int64, len(u.VMs))
	for set, bytes := range sets {
		vms := s.classes.vms[set]
		for _, v := range vms {
			u.VMs[v].NeededBytes += bytes
			if len(vms) == 1 {
				u.VMs[v].FreesBytes += bytes
				continue
			}
			u.VMs[v].SharedBytes += bytes
			if with[v] == nil {
				with[v] = map[uint32]int64{}
			}
			for _, w := range vms {
				if w != v {
					with[v][w] += bytes
				}
			}
		}
	}
	for v := range u.VMs {
		for w, bytes := range with[v] {
			u.VMs[v].SharedWith = append(u.VMs[v].SharedWith, VMShare{u.VMs[w].VM, bytes})
		}
		slices.SortFunc(u.VMs[v].SharedWith, func(a, b VMShare) int {
			return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.VM, b.VM))
		})
	}
	return nil
}

func (s *usage) pointOf(u *Usage, p uint32) *PointUsage {
	at := s.at[p]
	return &u.VMs[at[0]].Points[at[1]]
}

// storedBytes calls fn with what each chunk takes in its pack. Refs ascend, each
// once. A part of the index that turns out to be damaged is read anew from the
// packs.
func (s *usage) storedBytes(ctx context.Context, refs []reference, fn func(ref reference, bytes int64, ok bool)) error {
	const step = 1 << 16
	var keys []index.Key
	for len(refs) > 0 {
		n := min(step, len(refs))
		keys = keys[:0]
		for _, ref := range refs[:n] {
			keys = append(keys, ref.key)
		}
		h, err := s.r.held(ctx)
		if err != nil {
			return err
		}
		places, err := h.table.Resolve(ctx, keys)
		if part := (*index.PartError)(nil); errors.As(err, &part) {
			if _, err := s.r.mend(ctx, h, err); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		h.mu.RLock()
		for i, p := range places {
			e := pack.Entry{CLen: p.Place.CLen}
			fn(refs[i], e.Bytes(), p.OK && h.packs[p.Place.Pack].state != packMissing)
		}
		h.mu.RUnlock()
		refs = refs[n:]
	}
	return nil
}
