package seal

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"

	"filippo.io/age"
	"golang.org/x/crypto/argon2"

	"github.com/backstay/backstay/internal/fault"
)

// A KDF is the cost of turning a passphrase into a key with Argon2id.
type KDF struct {
	Passes    uint32
	MemoryKiB uint32
	Threads   uint8
}

// DefaultKDF is the second recommendation of RFC 9106: safe, and small enough
// to run beside a backup.
var DefaultKDF = KDF{Passes: 3, MemoryKiB: 64 << 10, Threads: 4}

// Check refuses costs that no honest writer chose, before anything is
// allocated for them.
func (c KDF) Check() error {
	if c.Passes < 1 || c.Passes > 64 || c.Threads < 1 || c.Threads > 64 ||
		c.MemoryKiB > 1<<20 || c.MemoryKiB < 8*uint32(c.Threads) {
		return fmt.Errorf("key derivation with %d passes over %d KiB by %d threads is out of bounds", c.Passes, c.MemoryKiB, c.Threads)
	}
	return nil
}

func (c KDF) kek(passphrase []byte, salt [16]byte) *Key {
	var k Key
	copy(k[:], argon2.IDKey(passphrase, salt[:], c.Passes, c.MemoryKiB, c.Threads, KeyBytes))
	return &k
}

func wrapAAD(repo [16]byte) []byte { return append([]byte("backstay v1 key"), repo[:]...) }

// Wrap closes the master key with a passphrase.
func (c KDF) Wrap(master Key, passphrase []byte, salt, repo [16]byte) ([]byte, error) {
	var nonce [NonceBytes]byte
	rand.Read(nonce[:])
	return c.WrapWith(nonce, master, passphrase, salt, repo)
}

// WrapWith is Wrap with a nonce that the caller chose.
func (c KDF) WrapWith(nonce [NonceBytes]byte, master Key, passphrase []byte, salt, repo [16]byte) ([]byte, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	return c.kek(passphrase, salt).SealWith(nil, nonce, master[:], wrapAAD(repo)), nil
}

// Unwrap gives fault.ErrKey if the passphrase does not fit.
func (c KDF) Unwrap(wrapped, passphrase []byte, salt, repo [16]byte) (master Key, err error) {
	if err := c.Check(); err != nil {
		return master, err
	}
	b, err := c.kek(passphrase, salt).Open(nil, wrapped, wrapAAD(repo))
	if err != nil || len(b) != KeyBytes {
		return master, fault.ErrKey
	}
	copy(master[:], b)
	return master, nil
}

// WrapAge closes the master key for an age recipient.
func WrapAge(master Key, repo [16]byte, to age.Recipient) ([]byte, error) {
	var out bytes.Buffer
	w, err := age.Encrypt(&out, to)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(append(repo[:], master[:]...)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// UnwrapAge gives fault.ErrKey if none of the identities fits.
func UnwrapAge(wrapped []byte, repo [16]byte, ids ...age.Identity) (master Key, err error) {
	if len(ids) == 0 {
		return master, fault.ErrKey
	}
	r, err := age.Decrypt(bytes.NewReader(wrapped), ids...)
	if err != nil {
		return master, fault.ErrKey
	}
	var b [16 + KeyBytes]byte
	if _, err := io.ReadFull(r, b[:]); err != nil || !bytes.Equal(b[:16], repo[:]) {
		return master, fault.ErrKey
	}
	copy(master[:], b[16:])
	return master, nil
}
