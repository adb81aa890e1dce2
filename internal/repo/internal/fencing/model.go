// Package fencing is a model of how writers and vacuums keep out of each
// other's way, and a search through everything that can happen in it.
//
// The model is docs/format/repository.md, "Vacuum and writers", with each call
// of the store as one step: two writers, two vacuums of which either may take
// the other, or a writer, for dead at any moment, and people who delete
// restore points. Every process may stop for ever before any of its steps. The
// search visits every state that any order of steps can lead to, and in each
// asks whether some restore point that exists misses something.
//
// A rule that is left out on purpose (a Fault) must make the search find a
// point that lost data: that is how we know that it looks.
package fencing

import (
	"fmt"
	"math/bits"
)

// A Fault is a rule of the protocol that somebody forgot.
type Fault int

// The faults.
const (
	None              Fault = iota
	NoSecondLook            // a writer does not look for the epoch again after it announced itself
	NoPacksInAdoption       // a writer adopts an epoch without saying what it relies on
	NoHold                  // a writer builds on a point without naming its manifest first
	CheckBeforeHold         // a writer sees its point before it names the manifest
	NoOwnManifest           // a writer stores a manifest that it did not name
	SessionsGoAtOnce        // a writer takes its session away when it has committed
	SessionsFirst           // a vacuum reads sessions before it lists points
	NoWait                  // a vacuum does not wait for writers of older epochs
	NoRescue                // a vacuum does not look at points again
	NoFence                 // a vacuum that was revoked deletes nevertheless
	NoOutcome               // a writer that was revoked commits nevertheless
	NewestOnly              // a writer asks the newest epoch alone
	Faults                  // how many there are
)

var faultNames = [...]string{"none", "no second look", "no packs in adoption", "no hold", "check before hold", "no own manifest",
	"sessions go at once", "sessions first", "no wait", "no rescue", "no fence", "no outcome", "newest only"}

func (f Fault) String() string { return faultNames[f] }

// Chunks. Pack A holds a, which point 0 needs, and d, which nobody does; pack B
// holds only b, which nobody needs.
const (
	chunkA = 1 << iota
	chunkD
	chunkB
	chunkC0 // new in writer 0
	chunkC1 // new in writer 1
)

// Packs.
const (
	packA = iota
	packB
	packC0 // of writer 0
	packC1
	packF0 // what vacuum 0 copied
	packF1
	packs
)

// Points, and the manifests of the same numbers: 0 is there from the start,
// 1 and 2 are those that the writers make.
const points = 3

const (
	writers = 2
	vacuums = 2
)

// A Plan is what the writers do beyond storing a chunk of their own.
type Plan struct {
	Base    [writers]int8  // the point that it builds on, -1 for none
	Lookup  [writers]uint8 // chunks that it looks up, as a mask
	Writers int
	Vacuums int
	Deletes uint8 // how many points people delete
	Fault   Fault
}

func (p Plan) String() string {
	return fmt.Sprintf("%d writers, bases %v, lookups %05b, %d vacuums, %d deletions, fault %q",
		p.Writers, p.Base[:p.Writers], p.Lookup[:p.Writers], p.Vacuums, p.Deletes, p.Fault)
}

// The outcome of a writer or a vacuum.
const (
	open = iota
	committed
	revoked
)

// A writer's steps.
const (
	wIdle     = iota // reads the newest epoch
	wAnnounce        // creates its session
	wLook            // reads the newest epoch again
	wAdopt           // writes its session, if there is a newer one
	wLoad            // loads the index
	wHold            // names the manifest of its base
	wCheck           // sees whether a point has it
	wLookup          // looks chunks up
	wStore           // stores its own pack
	wName            // names its own manifest
	wManifest        // stores it
	wCommit          // creates its outcome, its record being stored
	wDone
)

type writer struct {
	pc        uint8
	outcome   uint8
	epoch     uint8 // adopted
	pending   bool  // adopted, and not yet written
	condemned uint8 // packs that it treats as absent
	view      uint8 // packs that its index names
	used      uint8 // packs
	needs     uint8 // chunks
	looked    uint8 // chunks
	based     bool
	// Its session objects, as everybody sees them together.
	shown      bool
	sEpoch     uint8
	sManifests uint8
	sPacks     uint8
}

// A vacuum's steps.
const (
	vIdle      = iota // ends the earlier one
	vOver             // reads outcomes of sessions
	vLoad             // lists packs and manifests
	vPoints           // lists points
	vSessions         // reads sessions
	vCopy             // copies what lives
	vCondemn          // publishes an epoch
	vList             // lists sessions
	vWait             // waits for them
	vPoints2          // lists points again
	vSessions2        // reads sessions again
	vDecide           // creates its outcome
	vDelete           // deletes
	vDone
)

type vacuum struct {
	pc      uint8
	outcome uint8
	over    uint8 // writers
	view    uint8 // packs
	mans    uint8 // manifests
	alive   uint8 // chunks
	named   uint8 // manifests that something alive is or names
	goes    uint8 // packs
	dies    uint8 // manifests
	waits   uint8 // writers
	epoch   uint8
	held    uint8 // manifests, of sessions read too early
}

// state is all there is. It is a value: equal states are the same.
type state struct {
	packs     uint8
	fresh     [vacuums]uint8 // chunks in the packs that vacuums made
	manifests uint8
	mNeeds    [points]uint8
	points    uint8
	deletes   uint8
	epochs    uint8 // the newest
	gone      uint8 // epochs that were deleted again, as a mask
	condemned [vacuums + 1]uint8
	by        [vacuums + 1]uint8
	w         [writers]writer
	v         [vacuums]vacuum
}

func (s *state) content(pack int) uint8 {
	switch pack {
	case packA:
		return chunkA | chunkD
	case packB:
		return chunkB
	case packC0:
		return chunkC0
	case packC1:
		return chunkC1
	}
	return s.fresh[pack-packF0]
}

// holds are the chunks in packs.
func (s *state) holds(packs uint8) (chunks uint8) {
	for m := packs; m != 0; m &= m - 1 {
		chunks |= s.content(bits.TrailingZeros8(m))
	}
	return chunks
}

// lost is the first point that exists and misses something.
func (s *state) lost() (int, bool) {
	for p := range points {
		if s.points&(1<<p) != 0 && (s.manifests&(1<<p) == 0 || s.mNeeds[p]&^s.holds(s.packs) != 0) {
			return p, true
		}
	}
	return 0, false
}

func start(p Plan) state {
	s := state{packs: 1<<packA | 1<<packB, manifests: 1, points: 1, deletes: p.Deletes}
	s.mNeeds[0] = chunkA
	return s
}

// binding is what the epochs above after condemn.
func (p Plan) binding(s *state, after uint8) (packs uint8) {
	if p.Fault == NewestOnly && s.epochs > 0 {
		after = max(after, s.epochs-1)
	}
	for n := after + 1; n <= s.epochs; n++ {
		if s.gone&(1<<n) == 0 && s.v[s.by[n]].outcome != revoked {
			packs |= s.condemned[n]
		}
	}
	return packs
}
