package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

const epochPrefix = "epoch/"

// maxCondemned is how many packs one epoch may condemn: 16 TiB of them.
const maxCondemned = 1 << 18

// epochObject is epoch/<n>.
type epochObject struct {
	Format int      `json:"format"`
	Epoch  int64    `json:"epoch"`
	Vacuum string   `json:"vacuum"`
	Packs  []string `json:"packs"`
}

// An epoch says which packs a vacuum is going to delete, or has. It never
// changes.
type epoch struct {
	n      int64
	vacuum string
	packs  map[[32]byte]struct{}
}

func (e *epoch) condemns(pack [32]byte) bool {
	_, ok := e.packs[pack]
	return ok
}

func epochName(n int64) string { return fmt.Sprintf("%s%010d", epochPrefix, n) }

func parseEpochName(name string) (n int64, ok bool) {
	s := strings.TrimPrefix(name, epochPrefix)
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n > 0 && epochName(n) == name
}

// epochNumbers are those of all epochs in the store, ascending.
func (r *Repository) epochNumbers(ctx context.Context) (all []int64, err error) {
	for o, err := range r.st.List(ctx, epochPrefix) {
		if err != nil {
			return nil, err
		}
		if n, ok := parseEpochName(o.Name); ok {
			all = append(all, n)
		}
	}
	return all, nil
}

// newestEpoch is the highest number in the store, 0 where there is none.
func (r *Repository) newestEpoch(ctx context.Context) (int64, error) {
	all, err := r.epochNumbers(ctx)
	if err != nil || len(all) == 0 {
		return 0, err
	}
	return all[len(all)-1], nil
}

// epochsAfter are the epochs with higher numbers than after, ascending. All of
// them count and not just the newest: a vacuum that was revoked may publish its
// own late.
func (r *Repository) epochsAfter(ctx context.Context, after int64) (es []*epoch, err error) {
	all, err := r.epochNumbers(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range all {
		if n <= after {
			continue
		}
		e, err := r.readEpoch(ctx, n)
		if errors.Is(err, fault.ErrNotFound) {
			// Its vacuum is over, and there is a higher one.
			if n == all[len(all)-1] {
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				return r.epochsAfter(ctx, after)
			}
			continue
		}
		if err == nil {
			e, err = r.binding(ctx, e)
		}
		if err != nil {
			return nil, err
		}
		es = append(es, e)
	}
	return es, nil
}

func (r *Repository) readEpoch(ctx context.Context, n int64) (*epoch, error) {
	r.epochMu.Lock()
	e := r.epochs[n]
	r.epochMu.Unlock()
	if e != nil {
		return e, nil
	}
	name := epochName(n)
	b, err := readObject(ctx, r.st, name)
	if err != nil {
		return nil, err
	}
	if e, err = decodeEpoch(n, b); err != nil {
		return nil, err
	}
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	if len(r.epochs) > 4 { // more than there are at once, but for strange times
		clear(r.epochs)
	}
	r.epochs[n] = e
	return e, nil
}

func decodeEpoch(n int64, b []byte) (*epoch, error) {
	name := epochName(n)
	var eo epochObject
	if err := object.Decode(name, b, &eo); err != nil {
		return nil, err
	}
	if eo.Format > formatVersion {
		return nil, fmt.Errorf("%s has format %d, this version reads up to %d: %w", name, eo.Format, formatVersion, fault.ErrUnsupported)
	}
	if eo.Epoch != n || !isID(eo.Vacuum) || len(eo.Packs) > maxCondemned {
		return nil, fault.Corrupt(name, -1, "it says epoch %d of vacuum %q", eo.Epoch, eo.Vacuum)
	}
	e := &epoch{n: n, vacuum: eo.Vacuum, packs: make(map[[32]byte]struct{}, len(eo.Packs))}
	for _, s := range eo.Packs {
		id, err := hexID(s)
		if err != nil {
			return nil, &fault.CorruptError{Object: name, Offset: -1, Err: err}
		}
		e.packs[id] = struct{}{}
	}
	return e, nil
}

// binding is e, or an epoch of the same number that condemns nothing if the
// vacuum that published it can no longer delete anything.
func (r *Repository) binding(ctx context.Context, e *epoch) (*epoch, error) {
	out, err := r.outcomeOf(ctx, e.vacuum)
	if errors.Is(err, fault.ErrCorrupt) {
		return e, nil // it may have committed
	}
	if err != nil {
		return nil, err
	}
	if out.State == revoked {
		return &epoch{n: e.n, vacuum: e.vacuum}, nil
	}
	return e, nil
}

// publishEpoch condemns packs in epoch n. It gives fault.ErrExists if another
// vacuum published that one.
func (r *Repository) publishEpoch(ctx context.Context, n int64, vacuum string, packs [][32]byte) error {
	eo := epochObject{Format: formatVersion, Epoch: n, Vacuum: vacuum, Packs: []string{}}
	for _, id := range packs {
		eo.Packs = append(eo.Packs, hex.EncodeToString(id[:]))
	}
	slices.Sort(eo.Packs)
	b, err := object.Encode(eo)
	if err != nil {
		return err
	}
	err = create(ctx, r.st, epochName(n), b)
	if !errors.Is(err, fault.ErrExists) {
		return err
	}
	// The first reply may have been lost.
	if e, rerr := r.readEpoch(ctx, n); rerr == nil && e.vacuum == vacuum {
		return nil
	}
	return err
}
