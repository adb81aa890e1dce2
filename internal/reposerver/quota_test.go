package reposerver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/backstay/backstay/internal/fault"
)

// Backup clients store as much as the quota allows, also many at once, and what
// is deleted makes room again.
func TestQuota(t *testing.T) {
	const max = 100_000
	g := serve(t, Options{ImmutableFor: -1, Quota: max})
	admin := g.open("root", Admin, "r")
	web := g.openAs(g.token("web01", Backup, "r"), "r")
	if err := putIn(t, admin, "man/aa/before", strings.Repeat("x", 40_000)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	stored := 0
	for i := range 20 {
		wg.Go(func() {
			body := strings.Repeat(string(rune('a'+i)), 10_000)
			err := putIn(t, web, hashed("data/", body), body)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				stored++
			} else if !errors.Is(err, fault.ErrNoSpace) || !strings.Contains(err.Error(), "quota") {
				t.Errorf("%v, want fault.ErrNoSpace", err)
			}
		})
	}
	wg.Wait()
	if stored != 6 {
		t.Errorf("%d of 10,000 bytes each were stored beside 40,000", stored)
	}
	if err := createIn(t, web, "session/"+mine, "x"); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("a session where all is full: %v", err)
	}
	// What is there already needs no room.
	first := strings.Repeat("z", 30_000)
	if err := putIn(t, admin, hashed("data/", first), first); err != nil {
		t.Errorf("an admin: %v", err)
	}
	if err := putIn(t, web, hashed("data/", first), first); err != nil {
		t.Errorf("the same bytes again: %v", err)
	}
	for _, name := range []string{"man/aa/before", hashed("data/", first)} {
		if err := admin.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	// What replaces counts for what it replaces.
	for range 50 {
		if err := putIn(t, web, "session/"+mine, strings.Repeat("s", 9_000)); err != nil {
			t.Fatal(err)
		}
	}
}

// Room that was made on the server itself, past the server, is found.
func TestQuotaIsCountedAgain(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1, Quota: 1000})
	web := g.open("web01", Backup, "r")
	body := strings.Repeat("x", 900)
	if err := putIn(t, web, hashed("data/", body), body); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(g.dir, "r", hashed("data/", body))); err != nil {
		t.Fatal(err)
	}
	if err := putIn(t, web, "man/aa/x", body); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("before it is counted again: %v", err)
	}
	u := g.srv.quota.of("r")
	u.mu.Lock()
	u.counted = u.counted.Add(-2 * recountAfter)
	u.mu.Unlock()
	if err := putIn(t, web, "man/aa/x", body); err != nil {
		t.Error(err)
	}
}
