// Package repo keeps restore points in a store: encrypted, deduplicated, and
// each of them whole on its own.
//
// A Session stores disks chunk by chunk and publishes restore points; a Disk
// reads one back; Check says whether all is sound and Vacuum frees what no
// point needs. docs/format is the specification of every object, and
// docs/design/repository.md says why it is so.
package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/copies"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// packMemory is what all open packs of a repository may take together, in
// bytes: an open pack and two on their way to the store. More streams share it,
// and then packs are smaller.
const packMemory = 3 * pack.TargetBytes

// packsInFlight is how many packs are stored at the same time.
const packsInFlight = 2

// A Repository is one open repository. All methods are safe for concurrent
// use.
type Repository struct {
	st       blob.Store
	id       [16]byte
	conf     config
	keys     *seal.Keys // nil when opened without
	overlays *seal.Overlays

	mem    *pack.Memory
	flight chan struct{} // one place for each pack being stored

	slotMu sync.Mutex
	slots  map[*slot]struct{} // every pack that is open, of all sessions

	workMu  sync.Mutex
	workers map[int][]*pack.Worker // idle, by zstd level
	wrong   []wrongRecord          // found by readers, and in no note yet

	loading  chan struct{} // one place, for who loads the index
	loadMu   sync.RWMutex
	hold     *holdings    // nil until something needs it
	keepLate bool         // while somebody loads
	late     []index.Pack // that became durable meanwhile
	noFlat   atomic.Bool  // a flat index object was wrong: none is believed any more
	copies   *copies.Dir  // of the index; nil if the store is near
	noClaims atomic.Bool  // the store keeps none

	recMu   sync.Mutex
	records map[string]*record // restore points read so far, by object name
	strays  []string           // records, when they were last listed, that no session stored under their name

	plains, sealed spares // of chunks and records that are read one by one

	epochMu sync.Mutex
	epochs  map[int64]*epoch // read lately

	spared atomic.Int64 // objects that the store did not let a vacuum delete yet
}

// Open opens the repository in st. It gives fault.ErrNotFound where there is
// none, fault.ErrKey if k does not fit, fault.ErrUnsupported for a newer
// format.
func Open(ctx context.Context, st blob.Store, k Key) (*Repository, error) {
	r, raw, err := open(ctx, st)
	if err != nil {
		return nil, err
	}
	got, err := unwrap(ctx, st, r.id, raw, k)
	if err != nil {
		return nil, err
	}
	r.keys, r.overlays = got.derived, got.derived.Meta.Overlays()
	return r, nil
}

// OpenKeyless opens the repository for what needs no keys: Check without
// ReadData, Vacuum and Info. Everything else gives fault.ErrKey.
func OpenKeyless(ctx context.Context, st blob.Store) (*Repository, error) {
	r, _, err := open(ctx, st)
	return r, err
}

func open(ctx context.Context, st blob.Store) (*Repository, []byte, error) {
	raw, err := readObject(ctx, st, configName)
	if errors.Is(err, fault.ErrNotFound) {
		return nil, nil, fmt.Errorf("%s holds no repository: %w", st, fault.ErrNotFound)
	}
	if err != nil {
		return nil, nil, err
	}
	conf, id, err := parseConfig(raw)
	if err != nil {
		return nil, nil, err
	}
	if st, err = retain(ctx, st, time.Duration(conf.Immutable)*time.Second); err != nil && !errors.Is(err, fault.ErrUnsupported) {
		return nil, nil, err
	}
	return &Repository{
		st: st, id: id, conf: conf,
		mem:     pack.NewMemory(packMemory),
		flight:  make(chan struct{}, packsInFlight),
		loading: make(chan struct{}, 1),
		slots:   map[*slot]struct{}{},
		workers: map[int][]*pack.Worker{},
		records: map[string]*record{},
		epochs:  map[int64]*epoch{},
	}, raw, nil
}

// ID is the repository's name for itself, hexadecimal and stable.
func (r *Repository) ID() string { return hex.EncodeToString(r.id[:]) }

// ChunkBytes is the size of all chunks but a disk's last.
func (r *Repository) ChunkBytes() int64 { return r.conf.ChunkBytes }

// ChunkID names the chunk that holds plain. It is the zero ID in a repository
// that was opened without keys.
func (r *Repository) ChunkID(plain []byte) chunk.ID {
	if r.keys == nil {
		return chunk.ID{}
	}
	w := r.worker(readLevel)
	defer r.idle(readLevel, w)
	return w.ID(plain)
}

// Close ends the repository's use of memory, not the store. It may be called
// twice.
func (r *Repository) Close() error {
	r.loadMu.Lock()
	defer r.loadMu.Unlock()
	r.hold = nil
	if r.copies != nil {
		r.copies.Close()
	}
	r.workMu.Lock()
	defer r.workMu.Unlock()
	clear(r.workers)
	return nil
}

// needKeys says why something cannot be done without keys.
func (r *Repository) needKeys() error {
	if r.keys == nil {
		return fmt.Errorf("the repository was opened without keys: %w", fault.ErrKey)
	}
	return nil
}

// readLevel is the level of workers that only read.
const readLevel = 1

// worker gives a worker that nobody else uses; idle takes it back.
func (r *Repository) worker(level int) *pack.Worker {
	r.workMu.Lock()
	defer r.workMu.Unlock()
	if idle := r.workers[level]; len(idle) > 0 {
		w := idle[len(idle)-1]
		r.workers[level] = idle[:len(idle)-1]
		return w
	}
	return pack.NewWorker(r.id, r.keys, level)
}

func (r *Repository) idle(level int, w *pack.Worker) {
	r.workMu.Lock()
	defer r.workMu.Unlock()
	r.workers[level] = append(r.workers[level], w)
}

// Info says what the repository is and what it holds.
type Info struct {
	ID         string `json:"id"`
	Format     int    `json:"format"`
	ChunkBytes int64  `json:"chunk_bytes"`
	// ImmutableSeconds is how long each new restore point stays whatever anybody
	// asks; 0 for not at all.
	ImmutableSeconds int64 `json:"immutable_seconds,omitempty"`
	Parity           bool  `json:"parity"` // writers store it
	KeyCounts
	Points      int64 `json:"points"`
	Unreadable  int64 `json:"unreadable_points,omitempty"` // whose records are damaged; not among Points
	Packs       int64 `json:"packs"`
	Chunks      int64 `json:"chunks"`       // unique
	StoredBytes int64 `json:"stored_bytes"` // all objects
	IndexBytes  int64 `json:"index_bytes"`  // memory that the index takes
}

// Info counts what is in the store; it lists every object. If records of
// restore points are damaged it gives all the rest together with an error.
func (r *Repository) Info(ctx context.Context) (Info, error) {
	in := Info{ID: r.ID(), ImmutableSeconds: r.conf.Immutable, Format: r.conf.Format, ChunkBytes: r.conf.ChunkBytes, Parity: r.keepsParity()}
	for o, err := range r.st.List(ctx, "") {
		if err != nil {
			return in, err
		}
		in.StoredBytes += o.Bytes
		if strings.HasPrefix(o.Name, packPrefix) {
			in.Packs++
		}
	}
	var err error
	if in.KeyCounts, err = r.KeyCounts(ctx); err != nil {
		return in, err
	}
	recs, unread := r.list(ctx)
	if unread != nil && !errors.Is(unread, fault.ErrCorrupt) {
		return in, unread
	}
	in.Points, in.Unreadable = int64(len(recs)), int64(len(UnreadRecords(unread)))
	h, err := r.held(ctx)
	if err != nil {
		return in, errors.Join(unread, err)
	}
	in.Chunks, in.IndexBytes = h.table.Len(), h.table.Bytes()
	return in, unread
}

// KeyCounts says how many keys of each kind open the repository.
type KeyCounts struct {
	Passphrases int `json:"passphrases"`
	Recovery    int `json:"recovery_keys"` // typed like a passphrase
	Recipients  int `json:"recipients"`    // of age
	Commands    int `json:"key_commands"`
}

// KeyCounts counts keys. Damaged ones, and those of unknown kinds, are not
// counted.
func (r *Repository) KeyCounts(ctx context.Context) (c KeyCounts, err error) {
	keys, err := r.Keys(ctx)
	for _, k := range keys {
		switch {
		case k.State == KeyDamaged:
		case k.Kind == KindAge:
			c.Recipients++
		case k.Kind == KindCommand:
			c.Commands++
		case k.Kind == KindRecovery:
			c.Recovery++
		case k.Kind == KindPassphrase:
			c.Passphrases++
		}
	}
	return c, err
}
