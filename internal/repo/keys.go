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

	"filippo.io/age"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/secret"
)

const (
	formatVersion  = 1
	configName     = "repo.json"
	keysPrefix     = "keys/"
	kindPassphrase = "passphrase"
	kindAge        = "age"
)

// config is repo.json.
type config struct {
	Format     int      `json:"format"`
	ID         string   `json:"id"`
	ChunkBytes int64    `json:"chunk_bytes"`
	Hash       string   `json:"hash"`
	Seal       string   `json:"seal"`
	Features   []string `json:"features"`
}

// A Key is what opens a repository: a passphrase, age identities, or both.
type Key struct {
	Passphrase secret.Bytes
	Identities []age.Identity
}

// KDF is the cost of turning a passphrase into a key with Argon2id. The zero
// KDF is the default: 3 passes over 64 MiB by 4 threads.
type KDF = seal.KDF

// InitOptions are chosen once in a repository's life.
type InitOptions struct {
	ChunkBytes int64 // 0 means chunk.DefaultBytes
	// At least one of Passphrase and Recipients must be there.
	Passphrase secret.Bytes
	Recipients []age.Recipient
	KDF        KDF
}

// wrappedKey is one of keys/.
type wrappedKey struct {
	Format    int    `json:"format"`
	Kind      string `json:"kind"`
	KDF       string `json:"kdf,omitempty"`
	Passes    uint32 `json:"passes,omitempty"`
	MemoryKiB uint32 `json:"memory_kib,omitempty"`
	Threads   uint8  `json:"threads,omitempty"`
	Salt      string `json:"salt,omitempty"`
	Recipient string `json:"recipient,omitempty"`
	Wrapped   string `json:"wrapped"`
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
	if o.Passphrase.Empty() && len(o.Recipients) == 0 {
		return fmt.Errorf("a repository needs a passphrase or a recipient: %w", fault.ErrKey)
	}
	if o.KDF == (KDF{}) {
		o.KDF = seal.DefaultKDF
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
	keys, err := wrapAll(master, id, o)
	if err != nil {
		return err
	}
	derived, err := seal.Derive(master, id)
	if err != nil {
		return err
	}
	b, err := object.EncodeMAC(config{formatVersion, hex.EncodeToString(id[:]), o.ChunkBytes, "blake3-256", "aes-256-gcm", []string{}}, &derived.Sign)
	if err != nil {
		return err
	}
	for _, k := range keys {
		kb, err := object.Encode(k)
		if err != nil {
			return err
		}
		var name [8]byte
		rand.Read(name[:])
		if err := create(ctx, st, keysPrefix+hex.EncodeToString(name[:]), kb); err != nil {
			return err
		}
	}
	if err := create(ctx, st, configName, b); errors.Is(err, fault.ErrExists) {
		return fmt.Errorf("%s: repository %w", st, fault.ErrExists)
	} else if err != nil {
		return err
	}
	return nil
}

func wrapAll(master seal.Key, id [16]byte, o InitOptions) (keys []wrappedKey, err error) {
	if !o.Passphrase.Empty() {
		var salt [16]byte
		rand.Read(salt[:])
		w, err := o.KDF.Wrap(master, o.Passphrase.Reveal(), salt, id)
		if err != nil {
			return nil, err
		}
		keys = append(keys, wrappedKey{Format: formatVersion, Kind: kindPassphrase, KDF: "argon2id", Passes: o.KDF.Passes,
			MemoryKiB: o.KDF.MemoryKiB, Threads: o.KDF.Threads, Salt: hex.EncodeToString(salt[:]), Wrapped: hex.EncodeToString(w)})
	}
	for _, to := range o.Recipients {
		w, err := seal.WrapAge(master, id, to)
		if err != nil {
			return nil, err
		}
		name := ""
		if s, ok := to.(fmt.Stringer); ok {
			name = s.String()
		}
		keys = append(keys, wrappedKey{Format: formatVersion, Kind: kindAge, Recipient: name, Wrapped: hex.EncodeToString(w)})
	}
	return keys, nil
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

func (r *Repository) readKey(ctx context.Context, name string) (k wrappedKey, err error) {
	b, err := readObject(ctx, r.st, name)
	if err != nil {
		return k, err
	}
	return k, object.Decode(name, b, &k)
}

// unwrap finds the master key with whatever fits.
func (r *Repository) unwrap(ctx context.Context, k Key) (seal.Key, error) {
	var damaged error
	n := 0
	for o, err := range r.st.List(ctx, keysPrefix) {
		if err != nil {
			return seal.Key{}, err
		}
		w, err := r.readKey(ctx, o.Name)
		if err == nil {
			n++
			var master seal.Key
			if master, err = w.unwrap(o.Name, r.id, k); err == nil {
				return master, nil
			}
		}
		if !errors.Is(err, fault.ErrKey) {
			damaged = err // another key may fit
		}
	}
	if damaged != nil {
		return seal.Key{}, damaged
	}
	if n == 0 {
		return seal.Key{}, fmt.Errorf("%s: no key objects: %w", r.st, fault.ErrNotFound)
	}
	return seal.Key{}, fmt.Errorf("repository %s: %w", r.ID()[:8], fault.ErrKey)
}

func (w *wrappedKey) unwrap(name string, id [16]byte, k Key) (master seal.Key, err error) {
	wrapped, err := hex.DecodeString(w.Wrapped)
	if err != nil {
		return master, &fault.CorruptError{Object: name, Offset: -1, Err: err}
	}
	switch {
	case w.Format > formatVersion:
		return master, fmt.Errorf("%s has format %d, this version reads up to %d: %w", name, w.Format, formatVersion, fault.ErrUnsupported)
	case w.Kind == kindAge:
		return seal.UnwrapAge(wrapped, id, k.Identities...)
	case w.Kind != kindPassphrase || w.KDF != "argon2id":
		return master, fmt.Errorf("%s: key of kind %q with %q: %w", name, w.Kind, w.KDF, fault.ErrUnsupported)
	case k.Passphrase.Empty():
		return master, fault.ErrKey
	}
	var salt [16]byte
	if b, err := hex.DecodeString(w.Salt); err != nil || len(b) != len(salt) {
		return master, fault.Corrupt(name, -1, "salt %q is not 16 bytes", w.Salt)
	} else {
		copy(salt[:], b)
	}
	kdf := KDF{Passes: w.Passes, MemoryKiB: w.MemoryKiB, Threads: w.Threads}
	if err := kdf.Check(); err != nil {
		return master, &fault.CorruptError{Object: name, Offset: -1, Err: err}
	}
	return kdf.Unwrap(wrapped, k.Passphrase.Reveal(), salt, id)
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
