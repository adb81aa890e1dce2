package remote

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/secret"
)

// A Token is what a client shows to a server, and by what it knows the server:
//
//	bst1.NAME.SECRET.PIN
//
// NAME is public and says whose token it is. SECRET is 32 random bytes, of
// which the server keeps only a hash. PIN is the server's key; it is here so
// that whoever has a token never has to ask whether it is the right server.
// SECRET and PIN are in base64 for URLs, without padding.
type Token struct {
	Name   string
	Secret secret.Bytes
	Pin    Pin
}

// A Pin is the SHA-256 of a server's public key, as in its certificate
// (SubjectPublicKeyInfo). It is no secret.
type Pin [sha256.Size]byte

const (
	tokenMagic  = "bst1"
	secretBytes = 32
	maxToken    = 300
)

// CheckTokenName says what is wrong with name as the name of a token.
func CheckTokenName(name string) error {
	if name == "" || len(name) > 64 || name[0] == '-' || !plain(name) || strings.Contains(name, ".") {
		return fmt.Errorf("token name %.100q: want 1 to 64 of a-z, 0-9 and \"-\", and no \"-\" in front", name)
	}
	return nil
}

// NewToken makes a token with a fresh secret.
func NewToken(name string, pin Pin) (Token, error) {
	if err := CheckTokenName(name); err != nil {
		return Token{}, err
	}
	var s [secretBytes]byte
	rand.Read(s[:])
	defer clear(s[:])
	return Token{name, secret.New(s[:]), pin}, nil
}

// Reveal is the token in the form that ParseToken reads.
func (t Token) Reveal() string { return t.bearer() + "." + t.Pin.text() }

// bearer is what is sent.
func (t Token) bearer() string {
	return tokenMagic + "." + t.Name + "." + base64.RawURLEncoding.EncodeToString(t.Secret.Reveal())
}

var errToken = errors.New("this is no token of a repository server: want bst1.NAME.SECRET.PIN")

// ParseToken reads a token. Its errors quote nothing of it.
func ParseToken(s string) (Token, error) {
	bearer, pin, ok := cutLast(s, ".")
	if !ok || len(s) > maxToken {
		return Token{}, errToken
	}
	t, err := ParseBearer(bearer)
	if err != nil {
		return Token{}, err
	}
	t.Pin, err = ParsePin(pin)
	if err != nil {
		return Token{}, errToken
	}
	return t, nil
}

// ParseBearer reads what is sent of a token: all but the pin.
func ParseBearer(s string) (Token, error) {
	parts := strings.Split(s, ".")
	if len(s) > maxToken || len(parts) != 3 || parts[0] != tokenMagic || CheckTokenName(parts[1]) != nil {
		return Token{}, errToken
	}
	b, err := decodeBytes(parts[2])
	if err != nil || len(b) != secretBytes {
		return Token{}, errToken
	}
	defer clear(b)
	return Token{Name: parts[1], Secret: secret.New(b)}, nil
}

// decodeBytes is strict base64. The library passes over line ends wherever they
// are; one value then had many spellings.
func decodeBytes(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") {
		return nil, errToken
	}
	return base64.RawURLEncoding.Strict().DecodeString(s)
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

func (p Pin) text() string { return base64.RawURLEncoding.EncodeToString(p[:]) }

// String is the pin in the form that ParsePin reads and people compare.
func (p Pin) String() string { return "sha256:" + p.text() }

// ParsePin reads a pin, with or without "sha256:" before it.
func ParsePin(s string) (Pin, error) {
	b, err := decodeBytes(strings.TrimPrefix(s, "sha256:"))
	if err != nil || len(b) != len(Pin{}) {
		return Pin{}, fmt.Errorf("%.100q is no fingerprint: want sha256: and 43 characters", s)
	}
	return Pin(b), nil
}

// PinOf is the pin of a certificate.
func PinOf(cert *x509.Certificate) Pin { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// is compares in constant time; a pin is no secret, but this costs nothing.
func (p Pin) is(q Pin) bool { return subtle.ConstantTimeCompare(p[:], q[:]) == 1 }
