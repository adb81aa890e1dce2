// Package ntlm is the server's side of NTLM version 2 (MS-NLMP), bare or within
// SPNEGO: challenge, proof, integrity code, channel binding, and sealing.
package ntlm

import (
	"bytes"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/rc4"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf16"

	//lint:ignore SA1019 the hash of a password in NTLM is MD4
	"golang.org/x/crypto/md4"
)

// ErrDenied says that the client has not proved that it knows the password.
var ErrDenied = errors.New("access denied")

// Flags of MS-NLMP 2.2.2.5.
const (
	flagUnicode     = 1 << 0
	flagTarget      = 1 << 2
	flagSign        = 1 << 4
	flagSeal        = 1 << 5
	flagNTLM        = 1 << 9
	flagAlwaysSign  = 1 << 15
	flagServer      = 1 << 17
	flagExtended    = 1 << 19
	flagTargetInfo  = 1 << 23
	flagVersion     = 1 << 25
	flag128         = 1 << 29
	flagKeyExchange = 1 << 30
	flag56          = 1 << 31
	offered         = flagUnicode | flagTarget | flagSign | flagSeal | flagNTLM | flagAlwaysSign | flagServer | flagExtended | flagTargetInfo | flagVersion | flag128 | flagKeyExchange | flag56
	onlyIfAsked     = flagSign | flagSeal | flag128 | flagKeyExchange | flag56 | flagVersion
	avEnd           = 0
	avComputer      = 1
	avDomain        = 2
	avDNSComputer   = 3
	avDNSDomain     = 4
	avFlags         = 6
	avTime          = 7
	avChannel       = 10
	avFlagMIC       = 2
	maxMessage      = 64 << 10
	offsetMIC       = 72
	bytesWithMIC    = offsetMIC + 16
	challengeHeader = 56
	secondsTo1970   = 11644473600
)

// An Account is who may come in.
type Account struct {
	User     string
	Password string
}

// A Server checks the proofs of clients. It is safe for concurrent use.
type Server struct {
	Computer string // its NetBIOS name; also the domain of local accounts
	Account  Account
	// Binding is the hash of the TLS certificate, by its signature's hash
	// ("tls-server-end-point"), or nil without TLS. A client that sends a
	// binding must send this one.
	Binding []byte
	// RequireBinding refuses clients that send none over TLS.
	RequireBinding bool
	Now            func() time.Time
}

// A Handshake is one client's authentication: a negotiate message, then an
// authenticate message.
type Handshake struct {
	server    *Server
	negotiate []byte
	challenge []byte
	nonce     [8]byte
}

// Begin answers a negotiate message with a challenge.
func (s *Server) Begin(negotiate []byte) (*Handshake, []byte, error) {
	if kind, err := messageKind(negotiate); err != nil || kind != 1 || len(negotiate) < 16 {
		return nil, nil, fmt.Errorf("%w: no negotiate message", ErrDenied)
	}
	asked := binary.LittleEndian.Uint32(negotiate[12:])
	flags := uint32(offered) &^ onlyIfAsked
	flags |= offered & onlyIfAsked & asked
	if asked&flagExtended == 0 {
		return nil, nil, fmt.Errorf("%w: the client knows no NTLM version 2", ErrDenied)
	}
	h := &Handshake{server: s, negotiate: bytes.Clone(negotiate)}
	rand.Read(h.nonce[:])

	name := encode(s.Computer)
	var info []byte
	av := func(id uint16, v []byte) {
		info = binary.LittleEndian.AppendUint16(info, id)
		info = binary.LittleEndian.AppendUint16(info, uint16(len(v)))
		info = append(info, v...)
	}
	av(avDomain, name)
	av(avComputer, name)
	av(avDNSDomain, encode(strings.ToLower(s.Computer)))
	av(avDNSComputer, encode(strings.ToLower(s.Computer)))
	av(avTime, binary.LittleEndian.AppendUint64(nil, fileTime(s.Now())))
	av(avEnd, nil)

	m := make([]byte, challengeHeader, challengeHeader+len(name)+len(info))
	copy(m, "NTLMSSP\x00")
	binary.LittleEndian.PutUint32(m[8:], 2)
	putField(m[12:], len(name), challengeHeader)
	binary.LittleEndian.PutUint32(m[20:], flags)
	copy(m[24:], h.nonce[:])
	putField(m[40:], len(info), challengeHeader+len(name))
	copy(m[48:], []byte{10, 0, 0x7c, 0x4f, 0, 0, 0, 15}) // Windows 10.0, build 20348; NTLMSSP revision 15
	m = append(append(m, name...), info...)
	h.challenge = m
	return h, bytes.Clone(m), nil
}

// Finish checks an authenticate message. Every reason to refuse is ErrDenied.
func (h *Handshake) Finish(authenticate []byte) (*Session, error) {
	denied := func(why string) (*Session, error) { return nil, fmt.Errorf("%w: %s", ErrDenied, why) }
	m := authenticate
	if kind, err := messageKind(m); err != nil || kind != 3 || len(m) < 64 {
		return denied("no authenticate message")
	}
	response, ok1 := fieldOf(m, 20)
	domain, ok2 := fieldOf(m, 28)
	user, ok3 := fieldOf(m, 36)
	sealedKey, ok4 := fieldOf(m, 52)
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return denied("a field lies outside of the message")
	}
	flags := binary.LittleEndian.Uint32(m[60:])
	if flags&flagUnicode == 0 || flags&flagExtended == 0 {
		return denied("no Unicode, or no extended session security")
	}
	if len(response) < 16+28+4 || response[16] != 1 {
		return denied("no response of version 2")
	}
	pairs, err := parsePairs(response[16+28:])
	if err != nil {
		return denied(err.Error())
	}
	if !strings.EqualFold(decode(user), h.server.Account.User) {
		return denied("unknown user")
	}
	key := mac(ntHash(h.server.Account.Password), encode(strings.ToUpper(decode(user))), domain)
	proof := mac(key, h.nonce[:], response[16:])
	if !hmac.Equal(proof, response[:16]) {
		return denied("wrong password")
	}
	exported := mac(key, proof)
	if flags&flagKeyExchange != 0 {
		if len(sealedKey) != 16 {
			return denied("no session key")
		}
		exported = crypt(exported, sealedKey)
	}

	// Clients that say they send the code over all three messages must send the
	// right one; there are some that don't, and Windows lets them in.
	if f := pairs[avFlags]; len(f) >= 4 && binary.LittleEndian.Uint32(f)&avFlagMIC != 0 {
		if len(m) < bytesWithMIC {
			return denied("no room for a message integrity code")
		}
		zeroed := bytes.Clone(m)
		clear(zeroed[offsetMIC:bytesWithMIC])
		if !hmac.Equal(mac(exported, h.negotiate, h.challenge, zeroed), m[offsetMIC:bytesWithMIC]) {
			return denied("wrong message integrity code")
		}
	}

	binding := pairs[avChannel]
	if h.server.Binding != nil && (h.server.RequireBinding || len(binding) > 0 && !allZero(binding)) {
		if !hmac.Equal(binding, channelHash(h.server.Binding)) {
			return denied("channel binding of another certificate")
		}
	}
	return newSession(flags, exported, decode(user)), nil
}

// channelHash is the MD5 of a gss_channel_bindings_struct without addresses.
func channelHash(certificate []byte) []byte {
	data := append([]byte("tls-server-end-point:"), certificate...)
	b := make([]byte, 16, 20+len(data))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	sum := md5.Sum(append(b, data...))
	return sum[:]
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

func ntHash(password string) []byte {
	h := md4.New()
	h.Write(encode(password))
	return h.Sum(nil)
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(md5.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func crypt(key, p []byte) []byte {
	c, err := rc4.NewCipher(key)
	if err != nil {
		panic(err) // keys are 16 bytes
	}
	out := make([]byte, len(p))
	c.XORKeyStream(out, p)
	return out
}

func messageKind(m []byte) (uint32, error) {
	if len(m) < 12 || len(m) > maxMessage || string(m[:8]) != "NTLMSSP\x00" {
		return 0, errors.New("no NTLM message")
	}
	return binary.LittleEndian.Uint32(m[8:]), nil
}

func putField(p []byte, length, offset int) {
	binary.LittleEndian.PutUint16(p, uint16(length))
	binary.LittleEndian.PutUint16(p[2:], uint16(length))
	binary.LittleEndian.PutUint32(p[4:], uint32(offset))
}

func fieldOf(m []byte, at int) ([]byte, bool) {
	length := int64(binary.LittleEndian.Uint16(m[at:]))
	offset := int64(binary.LittleEndian.Uint32(m[at+4:]))
	if length == 0 {
		return nil, true
	}
	if offset+length > int64(len(m)) {
		return nil, false
	}
	return m[offset : offset+length], true
}

func parsePairs(p []byte) (map[uint16][]byte, error) {
	pairs := map[uint16][]byte{}
	for len(p) >= 4 {
		id, n := binary.LittleEndian.Uint16(p), int(binary.LittleEndian.Uint16(p[2:]))
		if id == avEnd {
			return pairs, nil
		}
		if len(p) < 4+n {
			break
		}
		pairs[id] = p[4 : 4+n]
		p = p[4+n:]
	}
	return nil, errors.New("target information without an end")
}

func encode(s string) []byte {
	var out []byte
	for _, u := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, u)
	}
	return out
}

func decode(p []byte) string {
	u := make([]uint16, len(p)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(p[2*i:])
	}
	return string(utf16.Decode(u))
}

// fileTime counts 100 ns since 1601.
func fileTime(t time.Time) uint64 {
	return uint64(t.Unix()+secondsTo1970)*1e7 + uint64(t.Nanosecond()/100)
}
