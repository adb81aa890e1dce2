package remote

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"

	"github.com/backstay/backstay/internal/blob"
)

// Lengths in bytes of what is said of claims; docs/design/serve.md has the
// bodies.
const (
	ticketBytes = 16
	keyBytes    = 16
	hashBytes   = 32
	stateBytes  = 4
	// MaxClaimBytes bounds a request that claims.
	MaxClaimBytes = ticketBytes + blob.MaxClaims*keyBytes
)

// The states of a key in an answer; a larger one is 2 and the number of a pack.
const (
	claimFree uint32 = iota
	claimBusy
	claimIn
)

var _ blob.Claimer = (*Store)(nil)

// AppendClaim appends the body of a request that claims.
func AppendClaim(b []byte, t blob.Ticket, keys []blob.ClaimKey) []byte {
	b = append(b, t[:]...)
	for _, k := range keys {
		b = append(b, k[:]...)
	}
	return b
}

// ParseClaim is the inverse of AppendClaim.
func ParseClaim(b []byte) (t blob.Ticket, keys []blob.ClaimKey, err error) {
	if len(b) <= ticketBytes || len(b) > MaxClaimBytes || (len(b)-ticketBytes)%keyBytes != 0 {
		return t, nil, fmt.Errorf("a claim of %d bytes: want a ticket and 1 to %d keys", len(b), blob.MaxClaims)
	}
	t = blob.Ticket(b[:ticketBytes])
	keys = make([]blob.ClaimKey, 0, len(b)/keyBytes-1)
	for b = b[ticketBytes:]; len(b) > 0; b = b[keyBytes:] {
		keys = append(keys, blob.ClaimKey(b[:keyBytes]))
	}
	return t, keys, nil
}

// A Claimed is the answer to a claim: what each key is.
type Claimed struct {
	packs  [][hashBytes]byte
	number map[[hashBytes]byte]uint32
	states []uint32
}

// Free says that the next key is stored by nobody.
func (c *Claimed) Free() { c.states = append(c.states, claimFree) }

// Busy says that somebody else is storing the next key.
func (c *Claimed) Busy() { c.states = append(c.states, claimBusy) }

// In says that the next key is stored in that object.
func (c *Claimed) In(pack [hashBytes]byte) {
	n, ok := c.number[pack]
	if !ok {
		if c.number == nil {
			c.number = map[[hashBytes]byte]uint32{}
		}
		n = uint32(len(c.packs))
		c.number[pack] = n
		c.packs = append(c.packs, pack)
	}
	c.states = append(c.states, claimIn+n)
}

// Append appends the answer as it is sent.
func (c *Claimed) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(c.packs)))
	for _, p := range c.packs {
		b = append(b, p[:]...)
	}
	for _, s := range c.states {
		b = binary.LittleEndian.AppendUint32(b, s)
	}
	return b
}

// parseClaimed reads the answer to a claim of so many keys.
func parseClaimed(b []byte, keys int) (busy int, in map[int][hashBytes]byte, err error) {
	packs := -1
	if len(b) >= 4 {
		packs = int(binary.LittleEndian.Uint32(b))
	}
	if packs < 0 || packs > keys || len(b) != 4+packs*hashBytes+keys*stateBytes {
		return 0, nil, fmt.Errorf("the server answered a claim of %d keys with %d bytes", keys, len(b))
	}
	names, states := b[4:4+packs*hashBytes], b[4+packs*hashBytes:]
	for i := range keys {
		switch s := binary.LittleEndian.Uint32(states[i*stateBytes:]); {
		case s == claimFree:
		case s == claimBusy:
			busy++
		case int64(s-claimIn) < int64(packs):
			if in == nil {
				in = map[int][hashBytes]byte{}
			}
			in[i] = [hashBytes]byte(names[(s-claimIn)*hashBytes:])
		default:
			return 0, nil, fmt.Errorf("the server named pack %d of %d", s-claimIn, packs)
		}
	}
	return busy, in, nil
}

// Claim implements blob.Claimer.
func (s *Store) Claim(ctx context.Context, t blob.Ticket, keys []blob.ClaimKey) (busy int, in map[int][32]byte, err error) {
	if len(keys) == 0 || len(keys) > blob.MaxClaims {
		return 0, nil, fmt.Errorf("a claim of %d keys: want 1 to %d", len(keys), blob.MaxClaims)
	}
	res, err := s.post(ctx, Target{Repo: s.at.Repo, Claims: true}, AppendClaim(nil, t, keys))
	if err != nil {
		return 0, nil, fmt.Errorf("claim: %w", err)
	}
	defer res.Body.Close()
	most := 4 + len(keys)*(hashBytes+stateBytes)
	b, err := io.ReadAll(io.LimitReader(res.Body, int64(most)+1))
	if err != nil {
		return 0, nil, fmt.Errorf("claim: the answer broke off: %w", err)
	}
	return parseClaimed(b, len(keys))
}

// AppendSettle appends the body of a request that ends a claim.
func AppendSettle(b []byte, t blob.Ticket, in *[hashBytes]byte) []byte {
	b = append(b, t[:]...)
	if in != nil {
		b = append(b, in[:]...)
	}
	return b
}

// ParseSettle is the inverse of AppendSettle.
func ParseSettle(b []byte) (t blob.Ticket, in *[hashBytes]byte, err error) {
	switch len(b) {
	case ticketBytes:
		return blob.Ticket(b), nil, nil
	case ticketBytes + hashBytes:
		sum := [hashBytes]byte(b[ticketBytes:])
		return blob.Ticket(b[:ticketBytes]), &sum, nil
	}
	return t, nil, fmt.Errorf("the end of a claim has %d bytes: want a ticket, and a hash or none", len(b))
}

// Settle implements blob.Claimer.
func (s *Store) Settle(ctx context.Context, t blob.Ticket, in *[32]byte) error {
	res, err := s.post(ctx, Target{Repo: s.at.Repo, Settled: true}, AppendSettle(nil, t, in))
	if err != nil {
		return fmt.Errorf("end a claim: %w", err)
	}
	return drain(res)
}

func (s *Store) post(ctx context.Context, t Target, body []byte) (*http.Response, error) {
	r, err := s.request(ctx, http.MethodPost, t, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	return s.send(ctx, r)
}
