package backup

import (
	"context"
	"errors"
	"fmt"

	"github.com/backstay/backstay/internal/hypervisor"
)

// worthAnother says whether a backup that failed may well succeed right away:
// its host went down under it, and another one has the VM. Nothing of it is in
// the repository.
func worthAnother(ctx context.Context, r Result) bool {
	return r.Point == nil && ctx.Err() == nil && errors.As(r.Err, new(*hypervisor.RetryError))
}

// backUpAgain does a job once more that failed as first says.
func (e *engine) backUpAgain(ctx context.Context, first Result) Result {
	e.Log.Warn("the backup begins anew", "vm", first.VM, "err", first.Err)
	e.mu.Lock()
	delete(e.names, first.VM) // it was this job's
	e.mu.Unlock()
	res := e.backUp(ctx, first.Job)
	res.Duration += first.Duration
	res.HostTime += first.HostTime
	// What it found out holds all the same.
	res.Lied, res.Suspect = append(first.Lied, res.Lied...), append(first.Suspect, res.Suspect...)
	if res.Damage == nil {
		res.Damage = first.Damage
	}
	if res.Err != nil {
		res.Err = fmt.Errorf("%w; it was begun anew, after: %w", res.Err, first.Err)
		return res
	}
	res.Warnings = append(res.Warnings, fmt.Sprintf("it was begun anew, after: %v", first.Err))
	return res
}
