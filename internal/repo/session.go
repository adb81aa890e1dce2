package repo

import (
	"context"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/point"
)

// A Level says how hard to compress: "none", "fast", "default" or "high".
// The empty Level is "fast".
type Level string

// The levels and what they mean to zstd.
const (
	LevelNone    Level = "none"    // stored as it is
	LevelFast    Level = "fast"    // 1
	LevelDefault Level = "default" // 3
	LevelHigh    Level = "high"    // 9
)

// SessionOptions hold for one session.
type SessionOptions struct {
	Level Level
}

// A Session stores the disks of one VM and publishes their restore points
// together. Several at once share what they store.
type Session struct{}

// Begin starts a session. It holds a shared lock on the store, where the store
// has locks, until Commit or Abort.
func (r *Repository) Begin(ctx context.Context, o SessionOptions) (*Session, error) {
	return nil, errSoon
}

// ID is the session's name in the store.
func (s *Session) ID() string { return "" }

// Disk starts a disk of sizeBytes. Chunks that are never mentioned are those
// of previous, or holes where there is no previous.
func (s *Session) Disk(ctx context.Context, sizeBytes int64, previous point.ManifestID) (*DiskWriter, error) {
	return nil, errSoon
}

// PutBlob stores a small file.
func (s *Session) PutBlob(ctx context.Context, data []byte) (point.Blob, error) {
	return point.Blob{}, errSoon
}

// Commit makes all of points exist, or none of them. It gives fault.ErrFenced
// if the session was revoked meanwhile; then the backup may be repeated.
func (s *Session) Commit(ctx context.Context, points ...*point.RestorePoint) error { return errSoon }

// Abort ends a session that was not committed; after Commit it does nothing.
// What was stored can be reused by the next backup until vacuum takes it.
func (s *Session) Abort(ctx context.Context) error { return errSoon }

// A DiskWriter takes the chunks of one disk, in any order and from several
// goroutines.
type DiskWriter struct{}

// PutKind says what became of a chunk.
type PutKind int

// The kinds.
const (
	Hole  PutKind = iota // nothing but zeros
	Same                 // what the previous point has at this index
	Known                // in the repository already
	New                  // stored now
)

// A Put is what became of one chunk.
type Put struct {
	Kind        PutKind
	StoredBytes int64 // in a pack, overhead included; 0 unless Kind is New
}

// Put stores chunk index. Plain may be reused when Put returns.
func (w *DiskWriter) Put(ctx context.Context, index int64, plain []byte) (Put, error) {
	return Put{}, errSoon
}

// Hole says that chunk index reads as zeros.
func (w *DiskWriter) Hole(index int64) error { return errSoon }

// Previous is the chunk that the previous point has at index; it is a hole
// also behind the previous point's end.
func (w *DiskWriter) Previous(ctx context.Context, index int64) (id chunk.ID, hole bool, err error) {
	return chunk.ID{}, false, errSoon
}

// ReadPrevious fills buf with the previous point's chunk index, verified by
// id, and with zeros where that ends.
func (w *DiskWriter) ReadPrevious(ctx context.Context, index int64, buf []byte) error {
	return errSoon
}

// Finish completes the disk. Its manifest is durable when Commit returns.
func (w *DiskWriter) Finish(ctx context.Context) (point.ManifestID, error) { return "", errSoon }
