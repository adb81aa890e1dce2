package backup

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
)

// audit reads a random sample of the chunks that tracking calls unchanged and
// compares them with the previous point. It says how many of how many differ.
//
// A tracker that loses a share s of the changed chunks escapes a sample of n
// among N unchanged ones with a probability of about (1 - s·c/N)^n, where c is
// how many changed; what counts is that no tracker lies for long.
func (r *reader) audit(ctx context.Context) (bad, sampled int64, err error) {
	if r.Audit < 0 {
		return 0, 0, nil
	}
	sample := r.sample()
	r.Log.Info("tracking audit", "vm", r.history.name, "disk", r.info.ID, "chunks", len(sample), "seed", r.seed)
	unit, sampled := r.Repo.ChunkBytes(), int64(len(sample))
	var differ, bytes atomic.Int64
	err = r.pipeline(ctx, func(ctx context.Context, emit func(task) error) error {
		for len(sample) > 0 {
			off := sample[0] * unit / windowBytes * windowBytes
			win := extent.Extent{Off: off, Len: min(windowBytes, r.info.SizeBytes-off)}
			n, _ := slices.BinarySearch(sample, chunk.Count(win.End(), unit))
			data, err := r.src.Data(ctx, win)
			if err != nil {
				return sourceError{err}
			}
			for _, i := range sample[:n] {
				whole := r.whole(i)
				if empty, err := r.emptyAsEver(ctx, i, data.Within(whole)); err != nil {
					return err
				} else if empty {
					bytes.Add(whole.Len)
				} else if err := emit(task{index: i, parts: []extent.Extent{whole}}); err != nil {
					return err
				}
			}
			sample = sample[n:]
		}
		return nil
	}, func(ctx context.Context, t task, buf []byte) error {
		if err := r.readParts(t, buf); err != nil {
			return err
		}
		bytes.Add(int64(len(buf)))
		id, hole, err := r.out.Previous(ctx, t.index)
		if err != nil {
			return err
		}
		same := hole && chunk.IsZero(buf) || !hole && r.Repo.ChunkID(buf) == id
		if !same {
			r.Log.Error("unchanged says the tracking, but it differs", "vm", r.history.name, "disk", r.info.ID, "chunk", t.index, "offset", t.index*unit)
			differ.Add(1)
		}
		return nil
	})
	r.auditBytes += bytes.Load()
	return differ.Load(), sampled, err
}

// emptyAsEver says whether chunk i, of which the source has data, is known to be
// the zeros that the previous point has there: what the source has no data of
// need not be read to see that.
func (r *reader) emptyAsEver(ctx context.Context, i int64, data extent.Set) (bool, error) {
	if data.Bytes() > 0 {
		return false, nil
	}
	_, hole, err := r.out.Previous(ctx, i)
	return hole, err
}

// sample chooses the chunks to audit: a share of the untouched ones, at least
// AuditLeast, all of them if there are fewer.
func (r *reader) sample() []int64 {
	total := chunk.Count(r.info.SizeBytes, r.Repo.ChunkBytes())
	left := total - r.touched.count()
	n := max(int64(r.AuditLeast), int64(math.Ceil(r.Audit*float64(left))))
	if n >= left {
		var all []int64
		for i := range total {
			if !r.touched.has(i) {
				all = append(all, i)
			}
		}
		return all
	}
	rng := rand.New(rand.NewPCG(r.seed, 0))
	// With most chunks taken, drawing until n untouched ones are found would
	// take long; then it draws from a list of them.
	if left < total/4 {
		var all []int64
		for i := range total {
			if !r.touched.has(i) {
				all = append(all, i)
			}
		}
		rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		all = all[:n]
		slices.Sort(all)
		return all
	}
	chosen := make(map[int64]bool, n)
	out := make([]int64, 0, n)
	for int64(len(out)) < n {
		i := rng.Int64N(total)
		if !r.touched.has(i) && !chosen[i] {
			chosen[i] = true
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return out
}

// bits is a set of chunk indexes: 2.5 MB for a disk of 10 TiB.
type bits []uint64

func newBits(n int64) bits { return make(bits, (n+63)/64) }

func (b bits) set(i int64)      { b[i/64] |= 1 << (i % 64) }
func (b bits) has(i int64) bool { return b[i/64]&(1<<(i%64)) != 0 }

func (b bits) count() int64 {
	var n int64
	for _, w := range b {
		for ; w != 0; w &= w - 1 {
			n++
		}
	}
	return n
}
