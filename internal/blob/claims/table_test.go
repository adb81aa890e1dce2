package claims

import (
	"math/rand/v2"
	"testing"
	"time"
)

func newTestTable(l Limits) (t *Table[int, string, int], clock *time.Duration) {
	clock = new(time.Duration)
	return NewTable[int, string, int](l, func() time.Duration { return *clock }), clock
}

func wantState(t *testing.T, tab *Table[int, string, int], key int, want State) {
	t.Helper()
	if got, _, _ := tab.Get(key); got != want {
		t.Errorf("key %d is in state %d, want %d", key, got, want)
	}
}

// sound fails if the parts of a table do not agree.
func sound(t *testing.T, tab *Table[int, string, int]) {
	t.Helper()
	kept, open, owned, has := 0, 0, 0, 0
	for c := range tab.All() {
		if has += len(c.Keys); c.In == nil {
			open++
		}
	}
	for _, s := range tab.shares {
		kept += s.kept
	}
	for _, o := range tab.owners {
		owned += len(o)
	}
	if kept != tab.kept || has != len(tab.keys) || open != len(tab.open) || owned != open {
		t.Fatalf("%d kept in shares, %d in all; %d keys in claims, %d in all; %d claims open, %d by ticket, %d by owner",
			kept, tab.kept, has, len(tab.keys), open, len(tab.open), owned)
	}
	if kept > tab.limits.Keys {
		t.Fatalf("%d keys are kept, %d may be", kept, tab.limits.Keys)
	}
}

func TestTimeEndsClaims(t *testing.T) {
	tab, clock := newTestTable(Limits{Keys: 100, PerShare: 100})
	tab.Begin("a", 1, "", []int{1, 2})
	*clock = OpenFor - 1
	tab.Expire()
	wantState(t, tab, 1, Busy)
	tab.Begin("b", 1, "", []int{3})
	tab.Settle("b", [32]byte{})
	*clock = OpenFor
	tab.Expire()
	wantState(t, tab, 1, Free)
	wantState(t, tab, 3, In)
	*clock = OpenFor - 1 + SettledFor
	tab.Expire()
	wantState(t, tab, 3, Free)
	if tab.Settle("a", [32]byte{}) {
		t.Error("a claim that was over was settled")
	}
	sound(t, tab)
}

// One share cannot take all the room, and makes room of what it settled.
func TestRoom(t *testing.T) {
	for _, c := range []struct {
		name string
		each int
		keys int
		want bool
	}{
		{"as many as a share may have", 0, 10, true},
		{"one too many", 0, 11, false},
		{"as many, with what a claim counts as", 3, 7, true},
		{"one too many with it", 3, 8, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			tab, _ := newTestTable(Limits{Keys: 15, PerShare: 10, Each: c.each})
			if got := tab.Begin("a", 1, "one", make([]int, c.keys)); got != c.want {
				t.Errorf("%d keys are kept: %v", c.keys, got)
			}
			sound(t, tab)
		})
	}
	tab, _ := newTestTable(Limits{Keys: 15, PerShare: 10})
	ten, six := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, []int{10, 11, 12, 13, 14, 15}
	if !tab.Begin("a", 1, "one", ten) || tab.Begin("b", 1, "two", six) || !tab.Settle("a", [32]byte{}) {
		t.Error("an open claim made room")
	}
	if tab.Begin("b", 1, "two", six) {
		t.Error("what one share settled made room for another")
	}
	if !tab.Begin("b", 1, "one", six) {
		t.Error("what a share settled made no room for it")
	}
	wantState(t, tab, 0, Free)
	wantState(t, tab, 10, Busy)
	sound(t, tab)
}

// Whatever is done in whatever order, the parts of a table agree, and it keeps
// nothing in the end.
func TestTableIsSound(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	tab, clock := newTestTable(Limits{Keys: 60, PerShare: 40, Each: 2})
	tickets, shares := []string{"a", "b", "c", "d", "e"}, []string{"one", "two"}
	steps := 20_000
	if testing.Short() {
		steps = 4000
	}
	for range steps {
		of := tickets[rng.IntN(len(tickets))]
		switch rng.IntN(7) {
		case 0, 1, 2:
			var keys []int
			for range 1 + rng.IntN(8) {
				keys = append(keys, rng.IntN(40)) // also of others, and twice
			}
			tab.End(of)
			tab.Begin(of, rng.IntN(3), shares[rng.IntN(2)], keys)
		case 3:
			tab.Settle(of, [32]byte{byte(rng.IntN(9))})
		case 4:
			tab.End(of)
		case 5:
			if rng.IntN(20) == 0 {
				tab.HangUp(rng.IntN(3))
			}
		case 6:
			*clock += time.Duration(rng.Int64N(int64(time.Minute)))
			tab.Expire()
		}
		sound(t, tab)
	}
	*clock += SettledFor
	tab.Expire()
	sound(t, tab)
	if len(tab.keys)+len(tab.open)+len(tab.owners)+len(tab.shares)+tab.kept > 0 {
		t.Errorf("%d keys, %d tickets, %d owners, %d shares, %d counted are left", len(tab.keys), len(tab.open), len(tab.owners), len(tab.shares), tab.kept)
	}
}
