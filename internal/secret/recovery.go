package secret

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"strings"
)

// A recovery key is 160 random bits for people to print and to type: eight
// groups of five symbols. Four symbols of a group carry 20 bits; the fifth
// checks them and the group's place, so that a mistyped symbol, two that
// changed places and groups that did are found, and in which group.
//
// docs/format/objects.md is the specification.
const (
	recoveryGroups  = 8
	recoverySymbols = recoveryGroups * 5
)

// Crockford's base 32: no I, L, O and U.
const symbols = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// NewRecovery makes a recovery key in its canonical form: 40 symbols and
// nothing between them.
func NewRecovery() Bytes {
	var random [recoveryGroups * 4]byte
	rand.Read(random[:])
	b := make([]byte, 0, recoverySymbols)
	for g := range recoveryGroups {
		check := byte(g)
		for i := range 4 {
			v := random[4*g+i] & 31
			check ^= times(v, i+1)
			b = append(b, symbols[v])
		}
		b = append(b, symbols[check])
	}
	clear(random[:])
	return Bytes{&b}
}

// times is v·xⁿ in the field of 32 elements modulo x⁵+x²+1.
func times(v byte, n int) byte {
	for range n {
		if v <<= 1; v&32 != 0 {
			v ^= 0b100101
		}
	}
	return v
}

// A RecoveryError says why what looks like a recovery key is none. It never
// holds a symbol of it.
type RecoveryError struct {
	Group int // that is mistyped, counted from 1; 0 where the length is wrong
	Found int // how many symbols there are
}

func (e *RecoveryError) Error() string {
	if e.Group == 0 {
		return fmt.Sprintf("a recovery key has %d letters and digits, this has %d", recoverySymbols, e.Found)
	}
	return fmt.Sprintf("group %d of the recovery key is mistyped", e.Group)
}

// ParseRecovery reads a recovery key as people type it: in any case, with
// spaces and dashes anywhere, O for 0, I and L for 1. It gives the canonical
// form, or a RecoveryError.
func ParseRecovery(text []byte) (Bytes, error) {
	b := make([]byte, 0, recoverySymbols)
	bad := 0
	for _, c := range bytes.ToUpper(text) {
		switch c {
		case ' ', '\t', '-':
			continue
		case 'O':
			c = '0'
		case 'I', 'L':
			c = '1'
		}
		if strings.IndexByte(symbols, c) < 0 && bad == 0 {
			bad = len(b)/5 + 1
		}
		b = append(b, c)
	}
	if len(b) != recoverySymbols {
		clear(b)
		return Bytes{}, &RecoveryError{Found: len(b)}
	}
	for g := 0; g < recoveryGroups && bad == 0; g++ {
		check := byte(g)
		for i := range 4 {
			check ^= times(byte(strings.IndexByte(symbols, b[5*g+i])), i+1)
		}
		if symbols[check] != b[5*g+4] {
			bad = g + 1
		}
	}
	if bad > 0 {
		clear(b)
		return Bytes{}, &RecoveryError{Group: bad, Found: recoverySymbols}
	}
	return Bytes{&b}, nil
}

// PrintRecovery is a recovery key as people read it, in groups. It is the one
// way to print a secret, and for the recovery kit alone.
func PrintRecovery(key Bytes) string {
	var s strings.Builder
	for i, c := range key.Reveal() {
		if i > 0 && i%5 == 0 {
			s.WriteByte('-')
		}
		s.WriteByte(c)
	}
	return s.String()
}
