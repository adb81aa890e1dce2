package repo

import "context"

// VacuumOptions say how to vacuum.
type VacuumOptions struct {
	DryRun   bool // report only
	Progress func(done, total int64)
}

// A VacuumReport says what was, or would be, freed.
type VacuumReport struct {
	DeletedPacks   int   `json:"deleted_packs"`
	RewrittenPacks int   `json:"rewritten_packs"`
	FreedBytes     int64 `json:"freed_bytes"`
	RewrittenBytes int64 `json:"rewritten_bytes"`
	KeptWasteBytes int64 `json:"kept_waste_bytes"` // dead, in packs not worth a rewrite
	Revoked        int   `json:"revoked"`          // sessions that died without an outcome
}

// Vacuum frees what no restore point needs. It needs no keys. It gives
// fault.ErrLocked while a writer is known to live.
func (r *Repository) Vacuum(ctx context.Context, o VacuumOptions) (VacuumReport, error) {
	return VacuumReport{}, errSoon
}
