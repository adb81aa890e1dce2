// Package secret holds passphrases and keys in a type that cannot be printed
// by accident.
package secret

import (
	"crypto/subtle"
	"log/slog"
)

const redacted = "[redacted]"

// Bytes is a passphrase or a key. Every way of formatting it gives
// "[redacted]"; only Reveal gives the bytes. They lie behind a pointer because
// fmt does not ask the methods of unexported fields, and follows no pointers in
// them.
type Bytes struct{ b *[]byte }

// New takes a copy of b.
func New(b []byte) Bytes {
	c := append([]byte(nil), b...)
	return Bytes{&c}
}

// Reveal gives the bytes themselves; the caller must not keep or print them.
func (s Bytes) Reveal() []byte {
	if s.b == nil {
		return nil
	}
	return *s.b
}

// Empty says whether there are no bytes.
func (s Bytes) Empty() bool { return len(s.Reveal()) == 0 }

// Equal compares in constant time for secrets of one length.
func (s Bytes) Equal(t Bytes) bool { return subtle.ConstantTimeCompare(s.Reveal(), t.Reveal()) == 1 }

// Wipe overwrites the bytes. Copies that the runtime made are out of reach.
func (s Bytes) Wipe() { clear(s.Reveal()) }

// String, GoString, MarshalText and LogValue keep the bytes out of every
// log line, error text and JSON document.
func (s Bytes) String() string { return redacted }

// GoString answers for %#v.
func (s Bytes) GoString() string { return redacted }

// MarshalText answers for JSON and its kin.
func (s Bytes) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue answers for log/slog.
func (s Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }
