package vmdk_test

import (
	"os"
	"testing"
)

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	p, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, p, 0o600); err != nil {
		t.Fatal(err)
	}
}
