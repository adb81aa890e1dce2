package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"filippo.io/age"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/secret"
)

const (
	formatVersion = 1
	configName    = "repo.json"
	keysPrefix    = "keys/"
)

// config is repo.json.
type config struct {
	Format     int      `json:"format"`
	ID         string   `json:"id"`
	ChunkBytes int64    `json:"chunk_bytes"`
	Hash       string   `json:"hash"`
	Seal       string   `json:"seal"`
	Features   []string `json:"features"`
	Immutable  int64    `json:"immutable_seconds,omitempty"` // that each new restore point stays
	Parity     string   `json:"parity,omitempty"`            // that writers store; readers need not know it
}

// A Key is what opens a repository: one of these, or several.
type Key struct {
	Passphrase secret.Bytes // or a recovery key as people type it
	Identities []age.Identity
	Keeper     Keeper
}

// A Keeper closes and opens the master key outside of this process: a key
// management service, a hardware module. Repo is the repository's id. What
// Unwrap is given comes from the store and may be anything.
type Keeper interface {
	Wrap(ctx context.Context, repo string, plain []byte) ([]byte, error)
	Unwrap(ctx context.Context, repo string, wrapped []byte) ([]byte, error)
}

// KDF is the cost of turning a passphrase into a key with Argon2id. The zero
// KDF is the default: 3 passes over 64 MiB by 4 threads.
type KDF = seal.KDF

// InitOptions are chosen once in a repository's life.
type InitOptions struct {
	ChunkBytes int64 // 0 means chunk.DefaultBytes
	// There must be at least one of Passphrase, Recipients and Keys.
	Passphrase secret.Bytes
	Recipients []age.Recipient
	Keys       []NewKey
	KDF        KDF // of Passphrase
	// ImmutableFor is how long each restore point stays whatever anybody asks.
	// Where the store could keep objects itself but was not made for it, Init
	// gives fault.ErrUnsupported.
	ImmutableFor time.Duration
	Parity       bool // store what heals damage beside each object: 3.3 % more
}

// keys gives those first that may yet be refused.
func (o *InitOptions) keys() []NewKey {
	keys := slices.Clone(o.Keys)
	if !o.Passphrase.Empty() {
		keys = append(keys, NewKey{Passphrase: o.Passphrase, KDF: o.KDF})
	}
	for _, r := range o.Recipients {
		keys = append(keys, NewKey{Recipient: r})
	}
	return keys
}

// Init makes an empty repository in st. It gives fault.ErrExists where there
// is one. The keys come first and repo.json last, so that a repository either
// is not there or can be opened.
func Init(ctx context.Context, st blob.Store, o InitOptions) error {
	if o.ChunkBytes == 0 {
		o.ChunkBytes = chunk.DefaultBytes
	}
	if err := chunk.CheckBytes(o.ChunkBytes); err != nil {
		return err
	}
	keys := o.keys()
	if len(keys) == 0 {
		return fmt.Errorf("a repository needs a passphrase or a recipient: %w", fault.ErrKey)
	}
	st, err := retain(ctx, st, o.ImmutableFor)
	if err != nil {
		return err
	}
	switch _, err := st.Size(ctx, configName); {
	case err == nil:
		return fmt.Errorf("%s: repository %w", st, fault.ErrExists)
	case !errors.Is(err, fault.ErrNotFound):
		return err
	}
	var id [16]byte
	var master seal.Key
	rand.Read(id[:])
	rand.Read(master[:])
	derived, err := seal.Derive(master, id)
	if err != nil {
		return err
	}
	conf := config{formatVersion, hex.EncodeToString(id[:]), o.ChunkBytes, "blake3-256", "aes-256-gcm", []string{}, int64(o.ImmutableFor / time.Second), ""}
	if o.Parity {
		conf.Parity = parityCode
	}
	b, err := object.EncodeMAC(conf, &derived.Sign)
	if err != nil {
		return err
	}
	ring := &Keyring{st: st, id: id, config: b, master: &master, derived: derived}
	var made []KeyInfo
	for _, k := range keys {
		in, err := ring.store(ctx, k)
		if err != nil {
			ring.unmake(ctx, made)
			return err
		}
		made = append(made, in)
	}
	err = create(ctx, st, configName, b)
	if errors.Is(err, fault.ErrExists) {
		// Somebody else was faster; keys of ours would mean nothing there.
		ring.unmake(ctx, made)
		return fmt.Errorf("%s: repository %w", st, fault.ErrExists)
	}
	if err == nil && o.Parity {
		// The repository is there, whatever becomes of this: Check says what has
		// no parity.
		_ = storeParity(ctx, st, id, configName, seal.Hash(b), bytes.NewReader(b), int64(len(b)))
	}
	return err
}

// unmake deletes keys of a repository that did not come to be.
func (k *Keyring) unmake(ctx context.Context, made []KeyInfo) {
	for _, in := range made {
		k.st.Delete(context.WithoutCancel(ctx), keysPrefix+in.ID)
	}
}

// parseConfig reads repo.json. It asks for the version before anything else,
// because a newer format may look different in every other way.
func parseConfig(raw []byte) (c config, id [16]byte, err error) {
	var v struct {
		Format int `json:"format"`
	}
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(&v); err == nil && v.Format > formatVersion {
		return c, id, fmt.Errorf("repository has format %d, this version reads up to %d: %w", v.Format, formatVersion, fault.ErrUnsupported)
	}
	if err := object.DecodeMAC(configName, raw, nil, &c); err != nil {
		return c, id, err
	}
	if c.Format != formatVersion {
		return c, id, fault.Corrupt(configName, -1, "format %d does not exist", c.Format)
	}
	for _, f := range c.Features {
		return c, id, fmt.Errorf("repository uses %q, which format %d of this version does not have: %w", f, formatVersion, fault.ErrUnsupported)
	}
	if c.Hash != "blake3-256" || c.Seal != "aes-256-gcm" {
		return c, id, fmt.Errorf("repository with hash %q and seal %q: %w", c.Hash, c.Seal, fault.ErrUnsupported)
	}
	if b, err := hex.DecodeString(c.ID); err != nil || len(b) != len(id) {
		return c, id, fault.Corrupt(configName, -1, "id %q is not 16 bytes", c.ID)
	} else {
		copy(id[:], b)
	}
	if err := chunk.CheckBytes(c.ChunkBytes); err != nil {
		return c, id, &fault.CorruptError{Object: configName, Offset: -1, Err: err}
	}
	return c, id, nil
}

func checkConfigMAC(raw []byte, k *seal.Keys) error {
	var c config
	return object.DecodeMAC(configName, raw, &k.Sign, &c)
}

// readObject reads a whole object that is small or whose size was checked.
func readObject(ctx context.Context, st blob.Store, name string) ([]byte, error) {
	// Most are small: one request gets them whole, and says so.
	first := make([]byte, 16<<10)
	k, err := st.ReadAt(ctx, name, first, 0)
	if errors.Is(err, io.EOF) {
		return bytes.Clone(first[:k]), nil
	}
	if err != nil {
		return nil, err
	}
	n, err := st.Size(ctx, name)
	if err != nil {
		return nil, err
	}
	if n > object.MaxBytes {
		return nil, fault.Corrupt(name, -1, "%d bytes are too many", n)
	}
	b := make([]byte, max(n, int64(k)))
	copy(b, first)
	if n > int64(k) {
		var rest int
		rest, err = st.ReadAt(ctx, name, b[k:], int64(k))
		k += rest
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:k], nil
}

func put(ctx context.Context, st blob.Store, name string, b []byte) error {
	return st.Put(ctx, name, bytes.NewReader(b), int64(len(b)))
}

func create(ctx context.Context, st blob.Store, name string, b []byte) error {
	return st.Create(ctx, name, bytes.NewReader(b), int64(len(b)))
}
