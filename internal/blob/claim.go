package blob

import "context"

// MaxClaims is how many keys one call of Claim may name.
const MaxClaims = 1 << 16

// A ClaimKey names something that two writers might store twice, and a Ticket
// what one of them claims at a time; nobody uses one ticket for two things.
type (
	ClaimKey [16]byte
	Ticket   [16]byte
)

// A Claimer is a Store through which writers at the same moment tell each other
// what they are about to store. Claims are a courtesy: they may be lost at any
// time, and nobody may rely on anything but on an object that is there.
//
// Both calls give fault.ErrUnsupported where nobody keeps claims. Trouble with
// them is none: who hears of it stores what he has.
type Claimer interface {
	// Claim claims all keys that nobody else has stored, or none of them: busy
	// is how many others are storing right now, and unless it is zero nothing
	// was claimed. In are the keys, by their number, that somebody else says to
	// have stored, with the hash that names the object. What the ticket had
	// claimed before is let go.
	Claim(ctx context.Context, t Ticket, keys []ClaimKey) (busy int, in map[int][32]byte, err error)

	// Settle ends a claim: what it named is stored in the object with that
	// hash, or not at all where that is nil.
	Settle(ctx context.Context, t Ticket, in *[32]byte) error
}
