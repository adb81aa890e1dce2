// Package seal turns the repository's master key into the keys of single
// things, and closes and opens what is stored with them.
//
// docs/format/repository.md is the specification.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/zeebo/blake3"
)

// Lengths in bytes.
const (
	KeyBytes   = 32
	NonceBytes = 12
	TagBytes   = 16
	Overhead   = NonceBytes + TagBytes // what sealing adds
)

// A Key is 32 secret bytes. Every way of formatting it gives "[redacted]".
type Key [KeyBytes]byte

// Format answers for every verb of fmt.
func (k Key) Format(f fmt.State, _ rune) { io.WriteString(f, "[redacted]") }

// MarshalText answers for JSON, its kin and log/slog.
func (k Key) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// Keys are the four keys that come from a master key.
type Keys struct {
	ID   Key // names chunks
	Data Key // seals chunks, through a key for each
	Meta Key // seals manifests and restore points
	Sign Key // vouches for repo.json
}

// Derive makes the keys of the repository with this id.
func Derive(master Key, repo [16]byte) (*Keys, error) {
	var k Keys
	for _, d := range []struct {
		key  *Key
		info string
	}{
		{&k.ID, "backstay v1 chunk id"},
		{&k.Data, "backstay v1 chunk data"},
		{&k.Meta, "backstay v1 metadata"},
		{&k.Sign, "backstay v1 signature"},
	} {
		b, err := hkdf.Key(sha256.New, master[:], repo[:], d.info, KeyBytes)
		if err != nil {
			return nil, err
		}
		copy(d.key[:], b)
	}
	return &k, nil
}

// Hash is BLAKE3 of the parts, one behind the other.
func Hash(parts ...[]byte) (sum [32]byte) {
	h := blake3.New()
	for _, p := range parts {
		h.Write(p)
	}
	h.Sum(sum[:0])
	return sum
}

// KeyedHash is keyed BLAKE3 of the parts, one behind the other.
func (k *Key) KeyedHash(parts ...[]byte) (sum [32]byte) {
	h := k.Hasher()
	for _, p := range parts {
		h.Write(p)
	}
	h.Sum(sum[:0])
	return sum
}

// Overlays names the records of overlays. It is safe for concurrent use.
type Overlays struct {
	meta *Key
	idle sync.Pool // of *blake3.Hasher: one takes longer to make than to use
}

// Overlays names records with the metadata key k.
func (k *Key) Overlays() *Overlays { return &Overlays{meta: k} }

// ID gives the id of the record that holds chunk id as an overlay on base, and
// of that record's id the chunk's again. Only who has the metadata key can tell
// which chunk an overlay is of.
func (o *Overlays) ID(id, base [32]byte) [32]byte {
	h, ok := o.idle.Get().(*blake3.Hasher)
	if !ok {
		h = o.meta.Hasher()
	}
	defer o.idle.Put(h)
	h.Reset()
	h.WriteString("backstay v1 overlay")
	h.Write(base[:])
	var mask [32]byte
	h.Sum(mask[:0])
	for i := range id {
		id[i] ^= mask[i]
	}
	return id
}

// Hasher hashes with the key k; it can be reset and used again.
func (k *Key) Hasher() *blake3.Hasher {
	h, err := blake3.NewKeyed(k[:])
	if err != nil {
		panic(err) // only for another length than 32
	}
	return h
}

// ErrOpen says that a key, what is bound to the sealed bytes or the bytes
// themselves are not those that were sealed.
var ErrOpen = errors.New("does not open with this key")

func (k *Key) aead() cipher.AEAD {
	block, err := aes.NewCipher(k[:])
	if err != nil {
		panic(err) // only for a wrong length
	}
	g, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return g
}

// Seal appends nonce, ciphertext and tag of plain to dst.
func (k *Key) Seal(dst, plain, aad []byte) []byte {
	var nonce [NonceBytes]byte
	rand.Read(nonce[:]) // never fails: crypto/rand ends the program instead
	return k.SealWith(dst, nonce, plain, aad)
}

// SealWith is Seal with a nonce that the caller chose and never uses again
// with this key.
func (k *Key) SealWith(dst []byte, nonce [NonceBytes]byte, plain, aad []byte) []byte {
	dst = append(dst, nonce[:]...)
	return k.aead().Seal(dst, nonce[:], plain, aad)
}

// Open appends the plaintext of sealed to dst.
func (k *Key) Open(dst, sealed, aad []byte) ([]byte, error) {
	if len(sealed) < Overhead {
		return nil, fmt.Errorf("%d bytes are too few to be sealed", len(sealed))
	}
	out, err := k.aead().Open(dst, sealed[:NonceBytes], sealed[NonceBytes:], aad)
	if err != nil {
		return nil, ErrOpen
	}
	return out, nil
}
