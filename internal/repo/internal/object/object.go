// Package object writes and reads the small objects of a repository: JSON
// that ends in a checksum, some with a sealed part before it.
//
// docs/format/objects.md is the specification.
package object

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// MaxBytes is the longest small object that a reader takes; the longest honest
// one is the delete list of a vacuum.
const MaxBytes = 256 << 20

const sumLen = len(`"blake3":""}`) + 64 + 1

// open is v as JSON without its last brace, ready for one more field.
func open(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	b = b[:len(b)-1]
	if len(b) > 1 {
		b = append(b, ',')
	}
	return b, nil
}

func tail(front []byte) []byte {
	sum := seal.Hash(front)
	return []byte(`"blake3":"` + hex.EncodeToString(sum[:]) + "\"}\n")
}

// Encode writes v, a struct, with its checksum.
func Encode(v any) ([]byte, error) {
	b, err := open(v)
	if err != nil {
		return nil, err
	}
	return append(b, tail(b)...), nil
}

// EncodeMAC is Encode with a MAC over the fields.
func EncodeMAC(v any, key *seal.Key) ([]byte, error) {
	b, err := open(v)
	if err != nil {
		return nil, err
	}
	sum := key.KeyedHash(b)
	b = append(b, `"mac":"`+hex.EncodeToString(sum[:])+`",`...)
	return append(b, tail(b)...), nil
}

// A Binding ties a sealed part to its repository and to its object's name.
type Binding struct {
	Repo [16]byte
	Name string
}

func (b Binding) aad(clear []byte) []byte {
	aad := append([]byte(nil), b.Repo[:]...)
	aad = append(aad, b.Name...)
	aad = append(aad, 0)
	return append(aad, clear...)
}

// EncodeSealed is Encode with secret sealed by key.
func EncodeSealed(v any, key *seal.Key, bind Binding, secret []byte) ([]byte, error) {
	var nonce [seal.NonceBytes]byte
	rand.Read(nonce[:])
	return encodeSealed(v, key, nonce, bind, secret)
}

func encodeSealed(v any, key *seal.Key, nonce [seal.NonceBytes]byte, bind Binding, secret []byte) ([]byte, error) {
	b, err := open(v)
	if err != nil {
		return nil, err
	}
	s := key.SealWith(nil, nonce, secret, bind.aad(b))
	b = append(b, `"sealed":"`+base64.StdEncoding.EncodeToString(s)+`",`...)
	return append(b, tail(b)...), nil
}

// Check says whether the checksum of the object called name holds.
func Check(name string, b []byte) error {
	if len(b) < sumLen+1 {
		return fault.Corrupt(name, -1, "%d bytes are too few", len(b))
	}
	front := b[:len(b)-sumLen]
	if !bytes.Equal(b[len(front):], tail(front)) {
		return fault.Corrupt(name, -1, "checksum does not match")
	}
	return nil
}

// Decode checks the object called name and reads its fields into v.
func Decode(name string, b []byte, v any) error {
	if err := Check(name, b); err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return &fault.CorruptError{Object: name, Offset: -1, Err: err}
	}
	return nil
}

// DecodeMAC is Decode of what EncodeMAC wrote; key may be nil, then the MAC is
// not looked at.
func DecodeMAC(name string, b []byte, key *seal.Key, v any) error {
	if err := Decode(name, b, v); err != nil || key == nil {
		return err
	}
	const macLen = len(`"mac":"",`) + 64
	front := b[:len(b)-sumLen]
	if len(front) < macLen {
		return fault.Corrupt(name, -1, "it has no MAC")
	}
	clear := front[:len(front)-macLen]
	sum := key.KeyedHash(clear)
	if string(front[len(clear):]) != `"mac":"`+hex.EncodeToString(sum[:])+`",` {
		return fault.Corrupt(name, -1, "it was not written with this repository's key")
	}
	return nil
}

// DecodeSealed is Decode of what EncodeSealed wrote, with its secret.
func DecodeSealed(name string, b []byte, key *seal.Key, bind Binding, v any) (secret []byte, err error) {
	if err := Decode(name, b, v); err != nil {
		return nil, err
	}
	const mark = `"sealed":"`
	front := b[:len(b)-sumLen]
	i := bytes.LastIndex(front, []byte(mark))
	if i < 0 || !bytes.HasSuffix(front, []byte(`",`)) || len(front)-2 < i+len(mark) {
		return nil, fault.Corrupt(name, -1, "it has no sealed part")
	}
	s, err := base64.StdEncoding.DecodeString(string(front[i+len(mark) : len(front)-2]))
	if err != nil {
		return nil, &fault.CorruptError{Object: name, Offset: int64(i), Err: err}
	}
	secret, err = key.Open(nil, s, bind.aad(front[:i]))
	if err != nil {
		return nil, &fault.CorruptError{Object: name, Offset: int64(i), Err: fmt.Errorf("its sealed part %w: it is of another repository, or was altered", err)}
	}
	return secret, nil
}
