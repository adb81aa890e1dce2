package claims

import (
	"bytes"
	"testing"

	"github.com/backstay/backstay/internal/blob"
)

// What a record says has one spelling, and none says more than its bytes.
func FuzzParseRecord(f *testing.F) {
	of := ticket{7, blob.Ticket{1}}
	f.Add((&record{kind: kindClaim, of: of, keys: []blob.ClaimKey{{1}, {2}}}).append(nil))
	f.Add((&record{kind: kindStored, of: of, pack: [32]byte{3}}).append(nil))
	f.Add((&record{kind: kindEnd, of: of}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, n := parseRecord(b)
		if n == 0 {
			return
		}
		if again := r.append(nil); !bytes.Equal(again, b[:n]) {
			t.Errorf("%x is read as %+v, which is %x", b[:n], r, again)
		}
	})
}
