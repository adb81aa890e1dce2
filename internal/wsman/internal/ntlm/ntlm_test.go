package ntlm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func eight(b byte) (a [8]byte) {
	for i := range a {
		a[i] = b
	}
	return a
}

// The example of [MS-NLMP] 4.2.4, from the password to a sealed message.
func TestExampleOfTheSpecification(t *testing.T) {
	is := func(what string, got []byte, want string) {
		t.Helper()
		if !bytes.Equal(got, unhex(t, want)) {
			t.Errorf("%s is %x, not %s", what, got, want)
		}
	}
	server := [8]byte(unhex(t, "0123456789abcdef"))
	info := unhex(t, "02000c00 44006f006d00610069006e00 01000c00 530065007200760065007200 00000000")

	hash := ntowf([]byte("Password"), "User", "Domain")
	is("NTOWFv2", hash, "0c868a403bfd7a93a3001ef22ef02e3f")
	response, base := respond(hash, server, eight(0xaa), [8]byte{}, info)
	is("NTProofStr", response[:16], "68cd0ab851e51c96aabc927bebef6a1c")
	is("the session's base key", base, "8de40ccadbc14a82f15cb0ad0de95ca3")
	is("the LMv2 response", mac(hash, server[:], unhex(t, "aaaaaaaaaaaaaaaa")), "86c35097ac9cec102554764a57cccc19")

	random := bytes.Repeat([]byte{0x55}, 16)
	exchanged := make([]byte, 16)
	encrypt(base, exchanged, random)
	is("the exchanged key", exchanged, "c5dad2544fc9799094ce1ce90bc9d03e")

	s := newSession(random, clientKeys, serverKeys)
	is("the signing key", s.out.sign, "4788dc861b4782f35d43fd98fe1a2d39")
	msg := encode("Plaintext")
	sig := s.Seal(msg)
	is("the sealed message", msg, "54e50165bf1936dc996020c1811b0f06fb5f")
	is("its signature", sig[:], "01000000 7fb38ec5c55d4976 00000000")
}

// testChallenge is what a host of today sends.
func testChallenge(stamp []byte, flags uint32, more ...pair) []byte {
	var info []byte
	add := func(p pair) {
		info = binary.LittleEndian.AppendUint16(info, uint16(p.id))
		info = binary.LittleEndian.AppendUint16(info, uint16(len(p.value)))
		info = append(info, p.value...)
	}
	add(pair{2, encode("LAB")})
	add(pair{1, encode("HV01")})
	if stamp != nil {
		add(pair{avTimestamp, stamp})
	}
	for _, p := range more {
		add(p)
	}
	add(pair{avEnd, nil})
	b := append([]byte(nil), signature...)
	b = binary.LittleEndian.AppendUint32(b, 2)
	b = append(b, make([]byte, 8)...)
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = append(b, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef)
	b = append(b, make([]byte, 8)...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(info)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(info)))
	b = binary.LittleEndian.AppendUint32(b, 56)
	b = append(b, version...)
	return append(b, info...)
}

const flagsOfHosts = flagsAsked | 0x00010000 // TARGET_TYPE_DOMAIN

// What a strict host checks of the last message: the proof, the integrity
// code over all three, the binding and the flags. It reads it with offsets of
// its own.
func TestLastMessageIsWhatAStrictHostChecks(t *testing.T) {
	for _, tc := range []struct {
		name  string
		stamp []byte
	}{{"host sends its time", []byte{1, 2, 3, 4, 5, 6, 7, 8}}, {"host sends no time", nil}} {
		t.Run(tc.name, func(t *testing.T) {
			c := &Client{Domain: "LAB", User: "jörg", Password: []byte("pä$$wörd"), Target: "HTTP/hv01", ChannelBinding: Binding([]byte("hash")),
				Now: func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC) }}
			neg := bytes.Clone(c.Negotiate())
			ch := testChallenge(tc.stamp, flagsOfHosts, pair{avFlags, []byte{1, 0, 0, 0}}, pair{avTargetName, encode("evil")})
			msg, s, err := c.Authenticate(ch)
			if err != nil {
				t.Fatal(err)
			}
			get := func(at int) []byte {
				n, off := binary.LittleEndian.Uint16(msg[at:]), binary.LittleEndian.Uint32(msg[at+4:])
				return msg[off : off+uint32(n)]
			}
			lm, nt, domain, user, key := get(12), get(20), get(28), get(36), get(52)
			if string(domain) != string(encode("LAB")) || string(user) != string(encode("jörg")) {
				t.Errorf("user %q of %q", user, domain)
			}
			hash := ntowf([]byte("pä$$wörd"), "JÖRG", "LAB")
			proof := mac(hash, unhex(t, "0123456789abcdef"), nt[16:])
			if !bytes.Equal(proof, nt[:16]) {
				t.Error("the proof is wrong")
			}
			exported := make([]byte, 16)
			encrypt(mac(hash, proof), exported, key)
			mic := bytes.Clone(msg[72:88])
			zeroed := bytes.Clone(msg)
			clear(zeroed[72:88])
			if !bytes.Equal(mic, mac(exported, neg, ch, zeroed)) {
				t.Error("the integrity code is wrong")
			}
			info, stamp := nt[44:], nt[24:32]
			for _, want := range [][]byte{{6, 0, 4, 0, 3, 0, 0, 0}, append([]byte{10, 0, 16, 0}, c.ChannelBinding[:]...), append([]byte{9, 0, 18, 0}, encode("HTTP/hv01")...)} {
				if bytes.Count(info, want) != 1 {
					t.Errorf("target information %x has no %x", info, want)
				}
			}
			if bytes.Contains(info, encode("evil")) || !bytes.HasSuffix(info, make([]byte, 8)) {
				t.Errorf("target information %x", info)
			}
			if tc.stamp != nil && (!bytes.Equal(stamp, tc.stamp) || !bytes.Equal(lm, make([]byte, 24))) {
				t.Errorf("with the host's time: stamp %x, LM response %x", stamp, lm)
			}
			if tc.stamp == nil && (binary.LittleEndian.Uint64(stamp) != 134117966450000006 || bytes.Equal(lm, make([]byte, 24))) {
				t.Errorf("without the host's time: stamp %d, LM response %x", binary.LittleEndian.Uint64(stamp), lm)
			}
			// Both sides have the same session.
			host := newSession(exported, serverKeys, clientKeys)
			talk(t, s, host)
			talk(t, host, s)
		})
	}
}

func talk(t *testing.T, from, to *Session) {
	t.Helper()
	for _, text := range []string{"", "one", strings.Repeat("x", 70000)} {
		b := []byte(text)
		sig := from.Seal(b)
		if text != "" && string(b) == text {
			t.Error("sealing changes nothing")
		}
		if err := to.Open(b, sig); err != nil || string(b) != text {
			t.Errorf("opened %d bytes: %v", len(b), err)
		}
	}
}

func TestTamperedAndRepeatedMessagesAreRefused(t *testing.T) {
	key := bytes.Repeat([]byte{7}, 16)
	for _, tc := range []struct {
		name   string
		change func(msg []byte, sig *[SignatureSize]byte)
	}{
		{"a bit of the message", func(m []byte, s *[SignatureSize]byte) { m[3] ^= 1 }},
		{"a bit of the checksum", func(m []byte, s *[SignatureSize]byte) { s[5] ^= 1 }},
		{"the sequence number", func(m []byte, s *[SignatureSize]byte) { s[12]++ }},
		{"the version", func(m []byte, s *[SignatureSize]byte) { s[0]++ }},
	} {
		a, b := newSession(key, clientKeys, serverKeys), newSession(key, serverKeys, clientKeys)
		msg := []byte("hello")
		sig := a.Seal(msg)
		tc.change(msg, &sig)
		if err := b.Open(msg, sig); !errors.Is(err, ErrSeal) || strings.Contains(string(msg), "llo") {
			t.Errorf("%s: %v, %q", tc.name, err, msg)
		}
	}
	a, b := newSession(key, clientKeys, serverKeys), newSession(key, serverKeys, clientKeys)
	msg := []byte("hello")
	sig := a.Seal(msg)
	again := bytes.Clone(msg)
	if err := b.Open(msg, sig); err != nil {
		t.Fatal(err)
	}
	if err := b.Open(again, sig); !errors.Is(err, ErrSeal) {
		t.Errorf("a repeated message: %v", err)
	}
}

func TestHostsThatOfferLessAreRefused(t *testing.T) {
	for name, missing := range map[string]uint32{"no sealing": flagSeal, "no 128-bit keys": flag128, "no extended security": flagExtendedSecurity, "no key exchange": flagKeyExchange, "no target information": flagTargetInfo} {
		c := &Client{User: "u"}
		c.Negotiate()
		if _, _, err := c.Authenticate(testChallenge(nil, flagsOfHosts&^missing)); !errors.Is(err, fault.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// RFC 5929 and the structure that NTLM hashes, byte by byte.
func TestBindingHashesTheStructure(t *testing.T) {
	c := &Client{}
	if c.ChannelBinding != [16]byte{} {
		t.Error("no TLS is not zero")
	}
	// MD5 of 16 zero bytes, the length 25 and "tls-server-end-point:hash".
	if got := hex.EncodeToString(func() []byte { b := Binding([]byte("hash")); return b[:] }()); got != "ebd7d15f01284b358388c3231531a4f4" {
		t.Errorf("binding %s", got)
	}
}

// Challenges come from whoever answers at the address.
func FuzzChallenge(f *testing.F) {
	f.Add(testChallenge([]byte{1, 2, 3, 4, 5, 6, 7, 8}, flagsOfHosts))
	f.Add(testChallenge(nil, flagsOfHosts, pair{avFlags, []byte{1}}))
	f.Add(signature)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &Client{User: "u", Password: []byte("p")}
		c.Negotiate()
		msg, s, err := c.Authenticate(b)
		if (err == nil) != (s != nil && len(msg) > 88) {
			t.Errorf("%d bytes, %v", len(msg), err)
		}
	})
}
