package remote

import (
	"bytes"
	"maps"
	"testing"

	"github.com/backstay/backstay/internal/blob"
)

func TestAnswersToClaims(t *testing.T) {
	var c Claimed
	a, b := [32]byte{1}, [32]byte{2}
	c.In(b)
	c.Free()
	c.In(a)
	c.Busy()
	c.In(b)
	busy, in, err := parseClaimed(c.Append(nil), 5)
	if busy != 1 || !maps.Equal(in, map[int][32]byte{0: b, 2: a, 4: b}) || err != nil {
		t.Errorf("%d busy, in %x, %v", busy, in, err)
	}
	for _, keys := range []int{0, 4, 6} {
		if _, _, err := parseClaimed(c.Append(nil), keys); err == nil {
			t.Errorf("an answer for 5 keys was taken for one of %d", keys)
		}
	}
}

// Whatever a client says, what is taken is what was said.
func FuzzParseClaim(f *testing.F) {
	f.Add([]byte{})
	f.Add(AppendClaim(nil, blob.Ticket{1}, []blob.ClaimKey{{2}, {3}}))
	f.Add(AppendClaim(nil, blob.Ticket{1}, nil))
	f.Add(AppendSettle(nil, blob.Ticket{1}, &[32]byte{2}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ticket, keys, err := ParseClaim(b); err == nil && (len(keys) == 0 || !bytes.Equal(AppendClaim(nil, ticket, keys), b)) {
			t.Errorf("%x became %x, %x", b, ticket, keys)
		}
		if ticket, in, err := ParseSettle(b); err == nil && !bytes.Equal(AppendSettle(nil, ticket, in), b) {
			t.Errorf("%x became %x, %x", b, ticket, in)
		}
	})
}

// Whatever a server says, each key is at most one thing.
func FuzzParseClaimed(f *testing.F) {
	var c Claimed
	c.Free()
	c.Busy()
	c.In([32]byte{1})
	f.Add(c.Append(nil), 3)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, 1<<16)
	f.Add([]byte{0, 0, 0, 0, 2, 0, 0, 0}, 1)
	f.Fuzz(func(t *testing.T, b []byte, keys int) {
		if keys < 0 || keys > blob.MaxClaims {
			return
		}
		busy, in, err := parseClaimed(b, keys)
		if err == nil && busy+len(in) > keys {
			t.Errorf("%d keys: %d busy, %d in packs", keys, busy, len(in))
		}
		for i := range in {
			if i < 0 || i >= keys {
				t.Errorf("key %d of %d", i, keys)
			}
		}
	})
}
