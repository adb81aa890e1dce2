package ntlm_test

import (
	"encoding/base64"
	"testing"
	"time"

	"github.com/backstay/backstay/sim/hyperv/ntlm"
)

// Tokens come from whoever reaches the port. Whatever they hold, nobody gets
// in who does not know the password, and nothing panics. The proofs themselves
// are tested by clients of others, in package wsman.
func FuzzStep(f *testing.F) {
	negotiate, _ := base64.StdEncoding.DecodeString("TlRMTVNTUAABAAAAN4II4gAAAAAgAAAAAAAAACAAAAAKAFpHAAAADw==")
	f.Add(negotiate, append([]byte("NTLMSSP\x00\x03\x00\x00\x00"), make([]byte, 200)...))
	f.Add([]byte{0x60, 0x28, 0x06, 0x06, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x02, 0xa0, 0x1e, 0x30, 0x1c, 0xa0, 0x0e, 0x30, 0x0c, 0x06, 0x0a, 0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37, 0x02, 0x02, 0x0a}, []byte{0xa1, 0x02, 0x30, 0x00})
	s := &ntlm.Server{Computer: "HV01", Account: ntlm.Account{User: "a", Password: "b"}, Now: func() time.Time { return time.Unix(1e9, 0) }}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		c := s.NewConversation()
		_, session, err := c.Step(first)
		if err == nil && session == nil {
			_, session, err = c.Step(second)
		}
		if session != nil || err == nil {
			t.Errorf("%x and %x come in", first, second)
		}
	})
}
