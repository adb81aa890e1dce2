package repo

import (
	"context"
	"errors"
	"io"
	"slices"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

const (
	// fewIndexes is how many flat index objects are not worth being joined.
	fewIndexes = 8
	// A run is joined with what is newer once that is one part in growth of it,
	// and one whose packs are gone to one part in staleShare. So each entry is
	// written some times in the life of a repository, and runs stay few.
	growth     = 4
	staleShare = 4
	// smallRun is how many entries are always worth being joined.
	smallRun = 1 << 20
)

// notKept is the rank of places in packs that go.
const notKept = ^uint8(0)

// writeIndex writes a run that names every pack that stays and that no older
// run names which is left alone, and says which index objects it replaces. It
// needs the memory of a merge and no more: the entries stream from the old
// objects to the new ones. Runs are read first, so that what is damaged of them
// is written anew.
func (v *vacuum) writeIndex(ctx context.Context) error {
	if err := v.confirm(ctx); err != nil {
		return err
	}
	for _, r := range v.h.table.Runs() {
		fits := func(p index.Place) bool {
			w := want{place: p}
			return v.h.packs[p.Pack].state != packSound || w.end() <= v.h.packs[p.Pack].bytes
		}
		if err := r.Verify(ctx, fits, func(e *index.PartError) error { return v.r.mendPart(ctx, v.h, e) }); err != nil {
			return err
		}
	}
	changed := len(v.dead)+len(v.rewrite)+len(v.elected) > 0
	if !changed && len(v.h.indexes) <= fewIndexes && len(v.h.orphans) == 0 && len(v.h.findings) == 0 && len(v.h.strays) == 0 {
		return nil
	}
	for _, p := range v.fresh {
		v.h.take(p)
	}
	for {
		err := v.compact(ctx)
		if !index.Damaged(err) {
			return err
		}
		if _, err := v.r.mend(ctx, v.h, err); err != nil {
			return err
		}
	}
}

// compact joins what is in memory with the runs that it is time for.
func (v *vacuum) compact(ctx context.Context) error {
	goes := make([]bool, len(v.h.packs))
	for _, n := range slices.Concat(v.dead, v.rewrite) {
		goes[n] = true
	}
	stays := func(n uint32) bool { return !goes[n] && v.h.packs[n].state == packSound }
	v.younger(stays)
	joined := v.chooseRuns(stays)
	packs, refs := v.named(stays, joined)
	id, bin, err := newID()
	if err != nil {
		return err
	}
	var generation uint64
	for _, r := range v.h.table.Runs() {
		generation = max(generation, r.Generation+1)
	}
	var names []string // of what was stored of the run
	w, err := index.NewRunWriter(index.RunOptions{
		Repo: v.r.id, ID: bin, Generation: generation, Packs: packs,
		Spool: func() index.Spool { return manifest.NewSpool() },
		Put: func(n int, body io.ReaderAt, size int64) error {
			name := runPrefix + id
			if n >= 0 {
				name = index.PartName(name, n)
			}
			names = append(names, name)
			return v.r.st.Put(ctx, name, body, size)
		},
	})
	if err != nil {
		return err
	}
	defer w.Close()
	rank := func(p index.Place) uint8 {
		if !stays(p.Pack) {
			return notKept
		}
		return v.h.rank(p)
	}
	err = v.h.table.Merge(ctx, joined, rank, func(k index.Key, p index.Place) error {
		if !stays(p.Pack) {
			return nil
		}
		return w.Add(k, refs[p.Pack], p.Off, p.CLen)
	})
	if err == nil {
		err = w.Finish()
	}
	if errors.Is(err, fault.ErrNoSpace) {
		// Half a run helps nobody, and others may need the room. What makes it one
		// comes last and goes first.
		for _, name := range slices.Backward(names) {
			_ = v.r.remove(ctx, name)
		}
	}
	if err != nil {
		return err
	}
	v.replaced = nil
	for _, o := range v.h.indexes {
		v.replaced = append(v.replaced, o.Name)
	}
	for _, r := range joined {
		v.replaced = append(v.replaced, r.Objects()...)
	}
	v.replaced = append(v.replaced, v.h.strays...)
	if v.freshIndex != "" {
		v.replaced = append(v.replaced, v.freshIndex)
	}
	return nil
}

// chooseRuns says which runs are joined, the newest first. The others are left
// alone. A damaged one is joined, and all that are newer.
func (v *vacuum) chooseRuns(stays func(uint32) bool) []*index.Run {
	runs := v.h.table.Runs()
	n, entries := 0, v.h.table.FreshLen()
	for i, r := range runs {
		gone, packs := 0, r.Packs()
		for _, p := range packs {
			if p == index.Gone || !stays(p) {
				gone++
			}
		}
		entries += r.Len()
		if r.Len() <= smallRun || r.Len() <= growth*(entries-r.Len()) || gone*staleShare > len(packs) || len(r.LostParts()) > 0 {
			n = i + 1
		}
	}
	return runs[:n]
}

// named are the packs that the new run names: those that stay of all that went
// into it. Refs are their places in that list, by number.
func (v *vacuum) named(stays func(uint32) bool, joined []*index.Run) (packs []index.RunPack, refs []uint32) {
	in := make([]bool, len(v.h.packs))
	for n := range v.h.packs {
		in[n] = v.h.packs[n].fresh
	}
	for _, r := range joined {
		for _, n := range r.Packs() {
			if n != index.Gone {
				in[n] = true
			}
		}
	}
	refs = make([]uint32, len(v.h.packs))
	var order []uint32
	for n := range v.h.packs {
		if in[n] && stays(uint32(n)) {
			order = append(order, uint32(n))
		}
	}
	slices.SortFunc(order, v.h.byPackID)
	packs = make([]index.RunPack, len(order))
	for i, n := range order {
		packs[i] = index.RunPack{ID: v.h.packs[n].id, Bytes: uint32(v.h.packs[n].bytes)}
		refs[n] = uint32(i)
	}
	return packs, refs
}

func (h *holdings) byPackID(a, b uint32) int { return compareIDs(h.packs[a].id, h.packs[b].id) }
