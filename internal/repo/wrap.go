package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"filippo.io/age"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/secret"
)

// Kinds of wrapped keys, as they are stored.
const (
	KindPassphrase = "passphrase"
	KindRecovery   = "recovery"
	KindAge        = "age"
	KindCommand    = "command"
)

// maxCommandKeys is how many keys of that kind are tried: the store may hold
// any number, and each runs a program.
const maxCommandKeys = 16

// maxWrappedBytes is the longest that a Keeper may make of the master key.
const maxWrappedBytes = 64 << 10

// maxLabel is the longest label, in characters.
const maxLabel = 64

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

// keyNote is the sealed part of one of keys/: for people, and to vouch for the
// rest.
type keyNote struct {
	Label   string    `json:"label"`
	Created time.Time `json:"created"`
	Proven  bool      `json:"proven"` // somebody opened it when it was made
}

// A NewKey is another way into a repository: exactly one of Passphrase,
// Recovery, Recipient and Keeper.
type NewKey struct {
	Label      string // for people: whose it is, or where it lies
	Passphrase secret.Bytes
	Recovery   secret.Bytes // of secret.NewRecovery
	Recipient  age.Recipient
	Identities []age.Identity // to prove that Recipient can open it, where they are at hand
	Keeper     Keeper
	KDF        KDF       // of Passphrase and Recovery
	Created    time.Time // zero means now
	// Before, if not nil, is called when the key is made and proven and not yet
	// stored; if it fails nothing is stored.
	Before func(KeyObjects) error
}

// KeyObjects are the objects that a way into the repository needs, besides its
// secret.
type KeyObjects struct {
	Repo    string // the repository's id
	Key     string // the key's
	Created time.Time
	Config  []byte // repo.json
	Wrapped []byte // keys/<Key>
}

func checkLabel(label string) error {
	if !utf8.ValidString(label) || utf8.RuneCountInString(label) > maxLabel {
		return fmt.Errorf("label %q: want at most %d characters", label, maxLabel)
	}
	for _, r := range label {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("label %q has characters that cannot be printed", label)
		}
	}
	return nil
}

// wrap closes the master key with k.
func (k *NewKey) wrap(ctx context.Context, master seal.Key, id [16]byte) (wrappedKey, error) {
	w := wrappedKey{Format: formatVersion}
	pass := k.Passphrase
	var wrapped []byte
	var err error
	switch {
	case !k.Passphrase.Empty():
		w.Kind = KindPassphrase
	case !k.Recovery.Empty():
		w.Kind, pass = KindRecovery, k.Recovery
	case k.Recipient != nil:
		w.Kind = KindAge
		if s, ok := k.Recipient.(fmt.Stringer); ok {
			w.Recipient = s.String()
		}
		wrapped, err = seal.WrapAge(master, id, k.Recipient)
	case k.Keeper != nil:
		w.Kind = KindCommand
		plain := append(append([]byte(nil), id[:]...), master[:]...)
		wrapped, err = k.Keeper.Wrap(ctx, hex.EncodeToString(id[:]), plain)
		clear(plain)
		if err == nil && (len(wrapped) == 0 || len(wrapped) > maxWrappedBytes || bytes.Contains(wrapped, master[:])) {
			err = fmt.Errorf("what the key command made of the key is %d bytes long or no secret", len(wrapped))
		}
	default:
		err = fmt.Errorf("nothing to wrap the key with: %w", fault.ErrKey)
	}
	if err == nil && !pass.Empty() {
		kdf := k.KDF
		if kdf == (KDF{}) {
			kdf = seal.DefaultKDF
		}
		var salt [16]byte
		rand.Read(salt[:])
		w.KDF, w.Passes, w.MemoryKiB, w.Threads, w.Salt = "argon2id", kdf.Passes, kdf.MemoryKiB, kdf.Threads, hex.EncodeToString(salt[:])
		wrapped, err = kdf.Wrap(master, pass.Reveal(), salt, id)
	}
	w.Wrapped = hex.EncodeToString(wrapped)
	return w, err
}

// opens is what opens a key that was made of k.
func (k *NewKey) opens() Key {
	if !k.Recovery.Empty() {
		return Key{Passphrase: k.Recovery}
	}
	return Key{Passphrase: k.Passphrase, Identities: k.Identities, Keeper: k.Keeper}
}

// unwrap gives the master key, and fault.ErrKey if k is of another kind or does
// not fit.
func (w *wrappedKey) unwrap(ctx context.Context, name string, id [16]byte, k Key) (master seal.Key, err error) {
	wrapped, err := hex.DecodeString(w.Wrapped)
	if err != nil {
		return master, &fault.CorruptError{Object: name, Offset: -1, Err: err}
	}
	if w.Format > formatVersion {
		return master, fmt.Errorf("%s has format %d, this version reads up to %d: %w", name, w.Format, formatVersion, fault.ErrUnsupported)
	}
	pass := k.Passphrase
	switch w.Kind {
	case KindAge:
		return seal.UnwrapAge(wrapped, id, k.Identities...)
	case KindCommand:
		return unwrapKept(ctx, name, wrapped, id, k.Keeper)
	case KindRecovery:
		if pass, err = secret.ParseRecovery(k.Passphrase.Reveal()); err != nil {
			return master, fault.ErrKey
		}
		defer pass.Wipe()
	case KindPassphrase:
	default:
		return master, fmt.Errorf("%s: key of kind %q: %w", name, w.Kind, fault.ErrUnsupported)
	}
	if w.KDF != "argon2id" {
		return master, fmt.Errorf("%s: key with %q: %w", name, w.KDF, fault.ErrUnsupported)
	}
	if pass.Empty() {
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
	return kdf.Unwrap(wrapped, pass.Reveal(), salt, id)
}

func unwrapKept(ctx context.Context, name string, wrapped []byte, id [16]byte, by Keeper) (master seal.Key, err error) {
	if by == nil {
		return master, fault.ErrKey
	}
	if len(wrapped) > maxWrappedBytes {
		return master, fault.Corrupt(name, -1, "%d wrapped bytes are too many", len(wrapped))
	}
	plain, err := by.Unwrap(ctx, hex.EncodeToString(id[:]), wrapped)
	defer clear(plain)
	if err != nil {
		return master, fmt.Errorf("%s: %w", name, err)
	}
	if len(plain) != len(id)+len(master) || subtle.ConstantTimeCompare(plain[:len(id)], id[:]) != 1 {
		return master, fmt.Errorf("%s: what the key command gave is no key of this repository: %w", name, fault.ErrKey)
	}
	copy(master[:], plain[len(id):])
	return master, nil
}

func readKey(ctx context.Context, st blob.Store, name string) (w wrappedKey, raw []byte, err error) {
	if raw, err = readObject(ctx, st, name); err != nil {
		return w, nil, err
	}
	return w, raw, object.Decode(name, raw, &w)
}

// An opened key is the master key and which of keys/ gave it.
type opened struct {
	by      string
	master  seal.Key
	derived *seal.Keys
}

// unwrap finds the master key with whatever fits. One that is not that of
// repo.json is no key of this repository: whoever can write to the store can
// wrap some other for a recipient.
func unwrap(ctx context.Context, st blob.Store, id [16]byte, config []byte, k Key) (opened, error) {
	for again := 0; ; again++ {
		got, removed, err := tryKeys(ctx, st, id, config, k)
		// What was removed while it was tried may have been rotated: the one in its
		// place is in the next list.
		if err == nil || !removed || again == 2 {
			return got, err
		}
	}
}

// tryKeys tries each key once, and says whether one was removed meanwhile.
func tryKeys(ctx context.Context, st blob.Store, id [16]byte, config []byte, k Key) (_ opened, removed bool, err error) {
	var trouble error
	n, commands := 0, 0
	for o, err := range st.List(ctx, keysPrefix) {
		if err != nil {
			return opened{}, removed, err
		}
		w, _, err := readKey(ctx, st, o.Name)
		if errors.Is(err, fault.ErrNotFound) {
			removed = true
			continue
		}
		if err == nil {
			n++
			if w.Kind == KindCommand {
				if commands++; commands > maxCommandKeys {
					continue
				}
			}
			got := opened{by: strings.TrimPrefix(o.Name, keysPrefix)}
			if got.master, err = w.unwrap(ctx, o.Name, id, k); err == nil {
				if got.derived, err = seal.Derive(got.master, id); err != nil {
					return opened{}, removed, err
				}
				if err = checkConfigMAC(config, got.derived); err == nil {
					return got, removed, nil
				}
			}
		}
		if !errors.Is(err, fault.ErrKey) {
			trouble = err // another key may fit
		}
	}
	if trouble != nil {
		return opened{}, removed, trouble
	}
	if n == 0 {
		return opened{}, removed, fmt.Errorf("%s: no key objects: %w", st, fault.ErrNotFound)
	}
	return opened{}, removed, fmt.Errorf("repository %s: %w", hex.EncodeToString(id[:4]), fault.ErrKey)
}
