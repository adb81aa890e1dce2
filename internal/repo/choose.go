package repo

import (
	"slices"

	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// DefaultWaste is from which percentage of dead bytes on a pack is rewritten. It
// bounds both what stays wasted and what is written for each byte that is freed.
const DefaultWaste = 30

// What packs are joined. Every backup leaves a small one, and each is a name in
// every listing and a request in every restore. Since many become one, a byte
// is copied a few times in the life of a repository, and a bounded number at
// once.
const (
	smallPackBytes = pack.TargetBytes / 4
	manySmall      = 32
	joinBytes      = 1 << 30 // in one vacuum
)

// choose decides about each pack. Of damaged ones what lives is moved out too,
// if all of it can be; but while some chunk is in no pack they stay, because
// what is left in them may be all that there is.
func (v *vacuum) choose() {
	from := int64(v.o.Waste)
	if from <= 0 {
		from = DefaultWaste
	}
	for i := range v.h.packs {
		p, live := &v.h.packs[i], v.live[i]
		waste := p.bytes - v.kept[i] - pack.FrameBytes
		damaged := p.state == packDamaged || v.h.quarantined(p.id)
		switch {
		case p.state == packMissing:
		case damaged && v.homeless > 0, v.stuck[i]:
			v.report.KeptWasteBytes += max(0, waste)
			v.report.Kept.Damaged++
		case live == 0:
			v.dead = append(v.dead, uint32(i))
			v.report.DeletedPacks++
			v.report.FreedBytes += p.bytes
		case damaged, waste > 0 && waste*100 >= p.bytes*from:
			v.rewrite = append(v.rewrite, uint32(i))
			v.report.RewrittenPacks++
			v.report.RewrittenBytes += live
			v.report.FreedBytes += p.bytes - live
		case waste > 0:
			v.report.KeptWasteBytes += waste
			v.report.Kept.LittleWaste++
		}
	}
}

// chooseSmall rewrites small packs too, if there are many.
func (v *vacuum) chooseSmall() {
	chosen := map[uint32]bool{}
	for _, n := range slices.Concat(v.dead, v.rewrite) {
		chosen[n] = true
	}
	var small []uint32
	var bytes int64
	for i := range v.h.packs {
		p := &v.h.packs[i]
		if !chosen[uint32(i)] && p.state == packSound && p.bytes < smallPackBytes && v.live[i] > 0 && bytes+p.bytes <= joinBytes && !v.h.quarantined(p.id) {
			small = append(small, uint32(i))
			bytes += p.bytes
		}
	}
	if len(small) < manySmall {
		return
	}
	for _, n := range small {
		p, live := &v.h.packs[n], v.live[n]
		v.rewrite = append(v.rewrite, n)
		if waste := p.bytes - v.kept[n] - pack.FrameBytes; waste > 0 {
			v.report.KeptWasteBytes -= waste
			v.report.Kept.LittleWaste--
		}
		v.report.RewrittenPacks++
		v.report.RewrittenBytes += live
		v.report.FreedBytes += p.bytes - live
	}
}
