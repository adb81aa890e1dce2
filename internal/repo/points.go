package repo

import (
	"context"

	"github.com/backstay/backstay/internal/point"
)

// Points gives all restore points, sorted by VM and then by time.
func (r *Repository) Points(ctx context.Context) ([]*point.RestorePoint, error) {
	return nil, errSoon
}

// Point gives one restore point; an empty id means the newest of vm.
func (r *Repository) Point(ctx context.Context, vm string, id point.ID) (*point.RestorePoint, error) {
	return nil, errSoon
}

// DeletePoint makes a restore point cease to exist. Vacuum frees its chunks.
func (r *Repository) DeletePoint(ctx context.Context, vm string, id point.ID) error { return errSoon }

// MarkSuspect notes beside a restore point why it may be wrong.
func (r *Repository) MarkSuspect(ctx context.Context, vm string, id point.ID, why string) error {
	return errSoon
}

// ReadBlob reads a small file that PutBlob stored.
func (r *Repository) ReadBlob(ctx context.Context, b point.Blob) ([]byte, error) { return nil, errSoon }
