package secret

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestRecoveryKeysAsPeopleTypeThem(t *testing.T) {
	for range 50 {
		k := NewRecovery()
		printed := PrintRecovery(k)
		if len(printed) != 47 || len(k.Reveal()) != 40 {
			t.Fatalf("%d letters, printed %d", len(k.Reveal()), len(printed))
		}
		for _, typed := range []string{printed, strings.ToLower(printed), strings.ReplaceAll(printed, "-", " "), string(k.Reveal()),
			strings.ReplaceAll(printed, "0", "o"), strings.ReplaceAll(printed, "1", "l"), " " + strings.ReplaceAll(printed, "1", "I") + "\t"} {
			if got, err := ParseRecovery([]byte(typed)); err != nil || !got.Equal(k) {
				t.Fatalf("typed %q: %v", typed, err)
			}
		}
	}
	if NewRecovery().Equal(NewRecovery()) {
		t.Error("two are the same")
	}
}

// Every slip of one symbol, of two neighbours and of two groups is found, and
// its group named.
func TestSlipsInARecoveryKeyAreFound(t *testing.T) {
	k := NewRecovery().Reveal()
	group := func(b []byte) int {
		_, err := ParseRecovery(b)
		var re *RecoveryError
		if !errors.As(err, &re) {
			return -1
		}
		return re.Group
	}
	for i := range k {
		for _, c := range []byte(symbols + "U!") {
			b := bytes.Clone(k)
			if b[i] == c {
				continue
			}
			if b[i] = c; group(b) != i/5+1 {
				t.Fatalf("symbol %d as %c is not found", i, c)
			}
		}
		if i%5 < 4 && k[i] != k[i+1] {
			b := bytes.Clone(k)
			if b[i], b[i+1] = b[i+1], b[i]; group(b) != i/5+1 {
				t.Fatalf("symbols %d and %d change places unseen", i, i+1)
			}
		}
	}
	for g := range recoveryGroups - 1 {
		b := bytes.Clone(k)
		copy(b[5*g:], k[5*g+5:5*g+10])
		copy(b[5*g+5:], k[5*g:5*g+5])
		if group(b) != g+1 {
			t.Fatalf("groups %d and %d change places unseen", g+1, g+2)
		}
	}
	for _, s := range []string{"", "correct horse battery staple", string(k[:39]), string(k) + "0", strings.Repeat("\x00", 40), strings.Repeat("ä", 20)} {
		if _, err := ParseRecovery([]byte(s)); err == nil {
			t.Errorf("%q is taken for a recovery key", s)
		}
	}
}

// The bytes that docs/format shows.
func TestRecoveryVector(t *testing.T) {
	const key = "012314567Q89AB8CDEFYGHJKKMNPQ5RSTVTWXYZC"
	if _, err := ParseRecovery([]byte(key)); err != nil {
		t.Error(err)
	}
}

// Whatever is typed, what is taken for a recovery key has one canonical form.
func FuzzParseRecovery(f *testing.F) {
	f.Add([]byte("012314567Q89AB8CDEFYGHJKKMNPQ5RSTVTWXYZC"))
	f.Add([]byte("correct horse"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := ParseRecovery(b)
		if err != nil {
			return
		}
		again, err := ParseRecovery([]byte(PrintRecovery(k)))
		if err != nil || !again.Equal(k) || len(k.Reveal()) != recoverySymbols {
			t.Errorf("%q gives %q, and that %v", b, k.Reveal(), err)
		}
	})
}
