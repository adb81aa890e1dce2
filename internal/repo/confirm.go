package repo

import (
	"context"
	"slices"

	"github.com/backstay/backstay/internal/repo/internal/index"
)

// A claim is what the index says of a chunk that lives and of which a pack that
// is to go has a record too.
type claim struct {
	key   index.Key
	said  index.Place // by the index; its zero value where that knows nothing
	known bool
	here  index.Place // in the pack that is to go
}

// liveOf gives where those of the entries' chunks are that live.
func (v *vacuum) liveOf(ctx context.Context, entries []index.Entry) (map[index.Key]index.Place, error) {
	keys := make([]index.Key, len(entries))
	for i := range entries {
		keys[i] = entries[i].Key
	}
	return v.marks.Marked(ctx, keys)
}

// confirm makes sure that no pack goes because the index is wrong: it is a
// cache, and packs alone say what is in them. The trailers of the packs that
// are to go name chunks that live elsewhere; the trailers of those other packs
// must say so too. What they don't say stays where it is, and the index learns it.
func (v *vacuum) confirm(ctx context.Context) error {
	var claims []claim
	var failed error
	going := slices.Concat(v.dead, v.rewrite)
	err := v.r.trailers(ctx, v.h, going, func(n uint32, ip index.Pack, _ error) {
		if failed != nil {
			return
		}
		places, err := v.liveOf(ctx, ip.Entries)
		if err != nil {
			failed = err
			return
		}
		for _, e := range ip.Entries {
			here := index.Place{Pack: n, Off: e.Off, CLen: e.CLen}
			if at, lives := places[e.Key]; lives && at != here {
				claims = append(claims, claim{e.Key, at, true, here})
			} else if v.unknown[e.Key] {
				claims = append(claims, claim{key: e.Key, here: here})
			}
		}
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return err
	}
	lies, err := v.lies(ctx, claims)
	if err != nil || len(lies) == 0 {
		return err
	}
	stay := map[uint32]bool{}
	for _, c := range lies {
		stay[c.here.Pack] = true
		if c.known {
			lie, err := v.h.table.Blame(ctx, c.key, c.said)
			if err == nil && lie != nil {
				err = v.r.mendPart(ctx, v.h, lie)
			}
			if err != nil {
				return err
			}
		}
		v.h.table.Insert(c.key, c.here, func(index.Place) bool { return true })
	}
	spare := func(packs []uint32, gone func(n uint32)) []uint32 {
		return slices.DeleteFunc(packs, func(n uint32) bool {
			if stay[n] {
				gone(n)
				v.rescued++
			}
			return stay[n]
		})
	}
	v.dead = spare(v.dead, func(n uint32) {
		v.report.DeletedPacks--
		v.report.FreedBytes -= v.h.packs[n].bytes
	})
	v.rewrite = spare(v.rewrite, func(n uint32) {
		v.report.RewrittenPacks--
		v.report.FreedBytes -= v.h.packs[n].bytes - v.live[n]
	})
	return nil
}

// lies are those of claims that no trailer confirms.
func (v *vacuum) lies(ctx context.Context, claims []claim) (lies []claim, err error) {
	by := map[uint32][]claim{}
	for _, c := range claims {
		if c.known {
			by[c.said.Pack] = append(by[c.said.Pack], c)
		} else {
			lies = append(lies, c)
		}
	}
	var packs []uint32
	for n := range by {
		packs = append(packs, n)
	}
	slices.Sort(packs)
	err = v.r.trailers(ctx, v.h, packs, func(n uint32, ip index.Pack, _ error) {
		in := make(map[index.Key]index.Place, len(ip.Entries))
		for _, e := range ip.Entries {
			in[e.Key] = index.Place{Pack: n, Off: e.Off, CLen: e.CLen}
		}
		by[n] = slices.DeleteFunc(by[n], func(c claim) bool { return in[c.key] == c.said })
	})
	for _, n := range packs {
		lies = append(lies, by[n]...)
	}
	return lies, err
}
