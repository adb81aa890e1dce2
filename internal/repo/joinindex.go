package repo

import (
	"context"
	"errors"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
)

// looseEntries is how many entries of flat index objects, which whoever opens
// the repository holds in memory, are worth being joined at once: some 45 MB.
var looseEntries = 1 << 20

// JoinIndex joins what sessions noted of their chunks into sorted runs, as a
// vacuum does, if that is more than everybody should hold in memory. It says
// whether it did. It is for after a backup, so that a repository stays small in
// memory that nobody vacuums: where a vacuum is under way, or the store lets
// this client do no such thing, or the index is damaged, it leaves all to the
// next vacuum and gives no error.
//
// It is a vacuum that condemns nothing: docs/format/repository.md, "Vacuum and
// writers".
func (r *Repository) JoinIndex(ctx context.Context) (joined bool, err error) {
	h := r.current()
	if h == nil || h.table.FreshLen() < int64(looseEntries) {
		return false, nil
	}
	vs, err := r.vacuums(ctx)
	if err != nil || len(vs) > 0 {
		return false, err // if it is dead the next vacuum waits for it; a backup does not
	}
	v := &vacuum{r: r, brief: true, o: VacuumOptions{Patience: patience}, sight: newSight(r, patience)}
	err = v.announce(ctx)
	if err == nil {
		joined, err = v.joinOnly(ctx)
		err = errors.Join(err, v.leave(ctx, err))
	}
	switch {
	case errors.Is(err, fault.ErrLocked), errors.Is(err, fault.ErrFenced), errors.Is(err, fault.ErrDenied), errors.Is(err, fault.ErrReadOnly), index.Damaged(err):
		return false, nil
	case err != nil:
		return false, err
	}
	return joined, nil
}

// joinOnly is what remains of a vacuum that looks at nothing but the index.
func (v *vacuum) joinOnly(ctx context.Context) (joined bool, err error) {
	if err := v.load(ctx); err != nil {
		return false, err
	}
	// Somebody may have joined them meanwhile; what is damaged needs trailers.
	if len(v.h.findings) == 0 && len(v.h.strays) == 0 && v.h.table.FreshLen() >= int64(looseEntries) {
		if err := v.elders(ctx); err != nil {
			return false, err
		}
		if err := v.compact(ctx); err != nil {
			return false, err
		}
		joined, v.plan = true, v.replaced
	}
	if err := v.commit(ctx); err != nil {
		return false, err
	}
	return joined, v.cleanUp(ctx)
}
