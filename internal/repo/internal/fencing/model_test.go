package fencing

import (
	"os"
	"testing"
)

var (
	// One of everything.
	small = Plan{Writers: 1, Base: [2]int8{0}, Lookup: [2]uint8{chunkB}, Vacuums: 1, Deletes: 2}
	// Vacuums that take each other for dead.
	rivals = Plan{Writers: 1, Base: [2]int8{-1}, Lookup: [2]uint8{chunkB}, Vacuums: 2}
	// A writer that builds on what another one has just stored.
	chain = Plan{Writers: 2, Base: [2]int8{0, 1}, Vacuums: 1, Deletes: 2}
	// A writer that finds what another one has stored, which may never commit.
	share = Plan{Writers: 2, Base: [2]int8{-1, -1}, Lookup: [2]uint8{chunkD, chunkC0}, Vacuums: 1, Deletes: 1}
	// The same with more at once, for those who have the time.
	large = []Plan{
		{Writers: 1, Base: [2]int8{0}, Lookup: [2]uint8{chunkB}, Vacuums: 2, Deletes: 1},
		{Writers: 2, Base: [2]int8{0, 1}, Lookup: [2]uint8{chunkB, 0}, Vacuums: 1, Deletes: 2},
	}
)

// Whatever order all steps come in, no restore point that exists misses
// anything.
func TestNothingIsLost(t *testing.T) {
	plans := []Plan{small}
	if !testing.Short() {
		plans = append(plans, rivals, chain, share)
	}
	if os.Getenv("BACKSTAY_SOAK") != "" {
		plans = append(plans, large...)
	}
	for _, p := range plans {
		n, err := Search(p)
		if err != nil {
			t.Error(err)
		}
		t.Logf("%v: %d states", p, n)
		if n < 5000 {
			t.Errorf("%v: only %d states: that cannot be all", p, n)
		}
	}
}

// Each rule is needed: without it the search finds data that is lost.
func TestEveryRuleIsNeeded(t *testing.T) {
	where := map[Fault]Plan{NoFence: rivals, NewestOnly: rivals, SessionsFirst: chain}
	for f := None + 1; f < Faults; f++ {
		p, long := where[f]
		if !long {
			p = small
		} else if testing.Short() {
			continue
		}
		p.Fault = f
		if n, err := Search(p); err == nil {
			t.Errorf("%v: nothing was lost in %d states", p, n)
		}
	}
}
