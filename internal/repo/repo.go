// Package repo keeps restore points in a store: encrypted, deduplicated, and
// each of them whole on its own.
//
// docs/format is the specification of every object; docs/design/repository.md
// says why it is so.
package repo

import (
	"context"
	"errors"

	"filippo.io/age"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/secret"
)

var errSoon = errors.New("repository: not yet")

// A Key is what opens a repository: a passphrase, age identities, or both.
type Key struct {
	Passphrase secret.Bytes
	Identities []age.Identity
}

// KDF is the cost of turning a passphrase into a key with Argon2id. The zero
// KDF is the default: 3 passes over 256 MiB by 4 threads.
type KDF struct {
	Passes    uint32
	MemoryKiB uint32
	Threads   uint8
}

// InitOptions are chosen once in a repository's life.
type InitOptions struct {
	ChunkBytes int64 // 0 means chunk.DefaultBytes
	// At least one of Passphrase and Recipients must be there.
	Passphrase secret.Bytes
	Recipients []age.Recipient
	KDF        KDF
}

// Init makes an empty repository in st. It gives fault.ErrExists where there
// is one.
func Init(ctx context.Context, st blob.Store, o InitOptions) error { return errSoon }

// A Repository is one open repository. All methods are safe for concurrent
// use.
type Repository struct{}

// Open opens the repository in st. It gives fault.ErrNotFound where there is
// none, fault.ErrKey if k does not fit, fault.ErrUnsupported for a newer
// format.
func Open(ctx context.Context, st blob.Store, k Key) (*Repository, error) { return nil, errSoon }

// OpenKeyless opens the repository for what needs no keys: Check without
// ReadData, Vacuum and Info. Everything else gives fault.ErrKey.
func OpenKeyless(ctx context.Context, st blob.Store) (*Repository, error) { return nil, errSoon }

// ID is the repository's name for itself, hexadecimal and stable.
func (r *Repository) ID() string { return "" }

// ChunkBytes is the size of all chunks but a disk's last.
func (r *Repository) ChunkBytes() int64 { return 0 }

// ChunkID names the chunk that holds plain.
func (r *Repository) ChunkID(plain []byte) chunk.ID { return chunk.ID{} }

// Info says what the repository is and what it holds.
type Info struct {
	ID          string `json:"id"`
	Format      int    `json:"format"`
	ChunkBytes  int64  `json:"chunk_bytes"`
	Passphrases int    `json:"passphrases"` // that open it
	Recipients  int    `json:"recipients"`  // age recipients that open it
	Points      int64  `json:"points"`
	Packs       int64  `json:"packs"`
	Chunks      int64  `json:"chunks"`       // unique
	StoredBytes int64  `json:"stored_bytes"` // all objects
	IndexBytes  int64  `json:"index_bytes"`  // memory that the index takes
}

// Info counts what is in the store; it lists every object.
func (r *Repository) Info(ctx context.Context) (Info, error) { return Info{}, errSoon }

// Close ends the repository's use of memory and locks, not the store. It may
// be called twice.
func (r *Repository) Close() error { return nil }
