package index

import "context"

// How the reads of a batch are joined.
const (
	gapBlocks    = 16  // unwanted blocks that are read rather than skipped
	windowBlocks = 256 // in one read, at most
)

// A probe is a key of a batch and the blocks that may hold it.
type probe struct {
	i      int // of the key in the batch
	lo, hi int64
}

// batch looks keys[i] up for each i of want, which ascend as the keys do, and
// calls fn for each that is found. It reads each block once. Filters are used
// where they are in memory and not loaded otherwise.
func (r *Run) batch(ctx context.Context, keys []Key, want []int, fn func(i int, f found)) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	var probes []probe
	var buf []byte
	for at := 0; at < len(want); {
		n := r.part(&keys[want[at]])
		end := at + 1
		for end < len(want) && (n+1 == len(r.parts) || keys[want[end]].Compare(&r.parts[n+1].first) < 0) {
			end++
		}
		mine := want[at:end]
		at = end
		if n < 0 || r.parts[n].lost() {
			continue
		}
		p := &r.parts[n]
		filter := p.filter.Load()
		probes = probes[:0]
		for _, i := range mine {
			if filter == nil || filter.Contains(keys[i].hash64()) {
				lo, hi, err := p.candidates(&keys[i])
				if err != nil {
					return err
				}
				probes = append(probes, probe{i, lo, hi})
			}
		}
		for left := probes; len(left) > 0; {
			k, end := 1, left[0].hi+1
			for k < len(left) && left[k].lo <= end+gapBlocks && left[k].hi < left[0].lo+windowBlocks {
				end = max(end, left[k].hi+1)
				k++
			}
			if err := r.window(ctx, s.sum, uint32(n), left[:k], end, &buf, keys, fn); err != nil {
				return err
			}
			left = left[k:]
		}
	}
	return nil
}

// window reads the blocks from that of the first probe up to end at once.
func (r *Run) window(ctx context.Context, sum *summer, part uint32, probes []probe, end int64, buf *[]byte, keys []Key, fn func(int, found)) error {
	first := probes[0].lo
	bytes := (end - first) * blockBytes
	if int64(cap(*buf)) < bytes {
		*buf = make([]byte, max(bytes, min(windowBlocks*blockBytes, 2*int64(cap(*buf)))))
	}
	b := (*buf)[:bytes]
	p := &r.parts[part]
	if err := r.read(ctx, p.name, b, (first+1)*blockBytes); err != nil {
		return &PartError{p.name, err}
	}
	checked := int64(-1)
	for _, q := range probes {
		for no := q.hi; no >= q.lo; no-- {
			block := b[(no-first)*blockBytes:][:blockBytes]
			if no != checked {
				if err := r.check(sum, part, no, block); err != nil {
					return err
				}
				checked = no
			}
			f, ok, err := r.find(p, no, block, &keys[q.i])
			if err != nil {
				return err
			}
			if ok {
				fn(q.i, f)
				break
			}
		}
	}
	return nil
}
