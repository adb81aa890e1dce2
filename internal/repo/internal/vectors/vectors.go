// Package vectors reads the test vectors of docs/format for the tests of the
// formats.
package vectors

import (
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

var update = flag.Bool("update-vectors", false, "write docs/format/vectors anew; only while the format is not released")

// Hex is bytes that JSON holds in hexadecimal.
type Hex []byte

// MarshalText writes lower case.
func (h Hex) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText reads hexadecimal.
func (h *Hex) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// Load fills v from the vector called name. With -update-vectors it writes v
// instead, as it is.
func Load(t testing.TB, name string, v any) {
	t.Helper()
	_, here, _, _ := runtime.Caller(0)
	file := filepath.Join(filepath.Dir(here), "../../../../docs/format/vectors", name+".json")
	if *update {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// Fill is n bytes that count up from first.
func Fill(first byte, n int) Hex {
	b := make(Hex, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}
