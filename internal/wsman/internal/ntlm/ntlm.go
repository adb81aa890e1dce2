// Package ntlm is the client's half of NTLMv2: it signs in to a Windows host,
// and seals messages with the key that both then share.
//
// It follows [MS-NLMP], always with extended session security, a key of 128
// bits that is exchanged, a message integrity code and channel bindings. A host
// that offers less is refused: the weaker forms are what attackers ask for.
package ntlm

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/rc4"
	"encoding/binary"
	"fmt"
	"strings"
	"time"
	"unicode/utf16"

	//lint:ignore SA1019 the hash of a password in NTLM is MD4
	"golang.org/x/crypto/md4"

	"github.com/backstay/backstay/internal/fault"
)

// Flags that both sides negotiate.
const (
	flagUnicode          = 0x00000001
	flagRequestTarget    = 0x00000004
	flagSign             = 0x00000010
	flagSeal             = 0x00000020
	flagNTLM             = 0x00000200
	flagAlwaysSign       = 0x00008000
	flagExtendedSecurity = 0x00080000
	flagTargetInfo       = 0x00800000
	flagVersion          = 0x02000000
	flag128              = 0x20000000
	flagKeyExchange      = 0x40000000
)

const (
	flagsAsked = flagUnicode | flagRequestTarget | flagSign | flagSeal | flagNTLM | flagAlwaysSign |
		flagExtendedSecurity | flagTargetInfo | flagVersion | flag128 | flagKeyExchange
	// Without one of these there would be no sound key.
	flagsNeeded = flagUnicode | flagSign | flagSeal | flagExtendedSecurity | flagTargetInfo | flag128 | flagKeyExchange
)

// Kinds of AV_PAIR in a target information.
const (
	avEnd             = 0
	avFlags           = 6
	avTimestamp       = 7
	avTargetName      = 9
	avChannelBindings = 10
)

// avFlagMIC in avFlags says that the message holds an integrity code.
const avFlagMIC = 0x2

// maxChallenge bounds what is read of a challenge, in bytes. Real ones have
// some hundred.
const maxChallenge = 1 << 16

var signature = []byte("NTLMSSP\x00")

// version is what we say we are, as every implementation does: Windows 10,
// NTLM revision 15. Hosts only log it.
var version = []byte{10, 0, 0, 0, 0, 0, 0, 15}

// A Client signs in once. It is not safe for concurrent use, and a new
// connection needs a new one.
type Client struct {
	Domain   string // or empty for a local account and for name@domain
	User     string
	Password []byte // UTF-8

	// Target is the service's principal name: "HTTP/hv01".
	Target string
	// ChannelBinding is the hash that ties the sign-in to the TLS connection
	// under it; zero where there is none.
	ChannelBinding [16]byte

	// Now and Random are time.Now and crypto/rand.Read where nil.
	Now    func() time.Time
	Random func([]byte)

	negotiate []byte
}

// Binding gives the ChannelBinding for the end point of a TLS connection: the
// hash of its certificate, as RFC 5929 defines tls-server-end-point.
func Binding(endPoint []byte) [16]byte {
	// A gss_channel_bindings_struct without addresses.
	data := append([]byte("tls-server-end-point:"), endPoint...)
	b := make([]byte, 16, 20+len(data))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return md5.Sum(append(b, data...))
}

// Negotiate gives the first message.
func (c *Client) Negotiate() []byte {
	b := append([]byte(nil), signature...)
	b = binary.LittleEndian.AppendUint32(b, 1)
	b = binary.LittleEndian.AppendUint32(b, flagsAsked)
	b = append(b, make([]byte, 16)...) // no domain, no workstation
	c.negotiate = append(b, version...)
	return c.negotiate
}

// Authenticate answers the host's challenge with the last message and the
// session that its acceptance begins. A host that cannot have a sound session
// gives fault.ErrUnsupported.
func (c *Client) Authenticate(challenge []byte) ([]byte, *Session, error) {
	ch, err := parseChallenge(challenge)
	if err != nil {
		return nil, nil, err
	}
	var clientChallenge [8]byte
	key := make([]byte, 16)
	c.random(clientChallenge[:])
	c.random(key)

	stamp, fromHost := ch.timestamp()
	if !fromHost {
		stamp = fileTime(c.now())
	}
	hash := ntowf(c.Password, c.User, c.Domain)
	nt, base := respond(hash, ch.server, clientChallenge, stamp, c.targetInfo(ch.target))
	lm := make([]byte, 24)
	if !fromHost {
		lm = append(mac(hash, ch.server[:], clientChallenge[:]), clientChallenge[:]...)
	}
	exchanged := make([]byte, 16)
	encrypt(base, exchanged, key)

	const header = 88
	msg := append([]byte(nil), signature...)
	msg = binary.LittleEndian.AppendUint32(msg, 3)
	var payload []byte
	field := func(b []byte) {
		msg = binary.LittleEndian.AppendUint16(msg, uint16(len(b)))
		msg = binary.LittleEndian.AppendUint16(msg, uint16(len(b)))
		msg = binary.LittleEndian.AppendUint32(msg, uint32(header+len(payload)))
		payload = append(payload, b...)
	}
	if len(nt)+2*(len(c.Domain)+len(c.User)) > 1<<15 {
		return nil, nil, fmt.Errorf("ntlm: the challenge or the user's name is too long")
	}
	field(lm)
	field(nt)
	field(encode(c.Domain))
	field(encode(c.User))
	field(nil) // a workstation's name, which hosts only log
	field(exchanged)
	msg = binary.LittleEndian.AppendUint32(msg, flagsAsked&ch.flags)
	msg = append(msg, version...)
	msg = append(msg, make([]byte, 16)...)
	msg = append(msg, payload...)
	copy(msg[72:], mac(key, c.negotiate, challenge, msg))
	return msg, newSession(key, clientKeys, serverKeys), nil
}

func (c *Client) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

func (c *Client) random(b []byte) {
	if c.Random != nil {
		c.Random(b)
		return
	}
	rand.Read(b)
}

// targetInfo is the host's with what we have to add: that there is an
// integrity code, which connection this is and whom we mean.
func (c *Client) targetInfo(pairs []pair) []byte {
	var b []byte
	add := func(id int, v []byte) {
		b = binary.LittleEndian.AppendUint16(b, uint16(id))
		b = binary.LittleEndian.AppendUint16(b, uint16(len(v)))
		b = append(b, v...)
	}
	flags := uint32(avFlagMIC)
	for _, p := range pairs {
		switch p.id {
		case avFlags:
			if len(p.value) == 4 {
				flags |= binary.LittleEndian.Uint32(p.value)
			}
		case avChannelBindings, avTargetName: // ours to say
		default:
			add(p.id, p.value)
		}
	}
	add(avFlags, binary.LittleEndian.AppendUint32(nil, flags))
	add(avChannelBindings, c.ChannelBinding[:])
	add(avTargetName, encode(c.Target))
	add(avEnd, nil)
	return b
}

type pair struct {
	id    int
	value []byte
}

type challenge struct {
	flags  uint32
	server [8]byte
	target []pair
}

// timestamp is the host's clock, as a FILETIME.
func (c *challenge) timestamp() ([8]byte, bool) {
	for _, p := range c.target {
		if p.id == avTimestamp && len(p.value) == 8 {
			return [8]byte(p.value), true
		}
	}
	return [8]byte{}, false
}

func parseChallenge(b []byte) (*challenge, error) {
	if len(b) < 48 || len(b) > maxChallenge || string(b[:8]) != string(signature) || binary.LittleEndian.Uint32(b[8:]) != 2 {
		return nil, fmt.Errorf("ntlm: not a challenge")
	}
	c := &challenge{flags: binary.LittleEndian.Uint32(b[20:]), server: [8]byte(b[24:32])}
	if missing := flagsNeeded &^ c.flags; missing != 0 {
		return nil, fmt.Errorf("ntlm: the host does not offer NTLMv2 with sealing and a 128-bit key (flags %#x): %w", missing, fault.ErrUnsupported)
	}
	n, at := int(binary.LittleEndian.Uint16(b[40:])), int64(binary.LittleEndian.Uint32(b[44:]))
	if at+int64(n) > int64(len(b)) {
		return nil, fmt.Errorf("ntlm: the challenge's target information lies outside of it")
	}
	for info := b[at : at+int64(n)]; ; {
		if len(info) < 4 {
			return nil, fmt.Errorf("ntlm: the challenge's target information has no end")
		}
		id, size := int(binary.LittleEndian.Uint16(info)), int(binary.LittleEndian.Uint16(info[2:]))
		if info = info[4:]; size > len(info) {
			return nil, fmt.Errorf("ntlm: the challenge's target information is cut off")
		}
		if id == avEnd {
			return c, nil
		}
		c.target = append(c.target, pair{id, info[:size]})
		info = info[size:]
	}
}

// ntowf is the hash that stands for the user's password.
func ntowf(password []byte, user, domain string) []byte {
	h := md4.New()
	h.Write(encode(string(password)))
	return mac(h.Sum(nil), encode(strings.ToUpper(user)+domain))
}

// respond gives the NTLMv2 response and the session's base key.
func respond(hash []byte, server, client, stamp [8]byte, targetInfo []byte) (response, base []byte) {
	temp := []byte{1, 1, 0, 0, 0, 0, 0, 0}
	temp = append(temp, stamp[:]...)
	temp = append(temp, client[:]...)
	temp = append(temp, 0, 0, 0, 0)
	temp = append(temp, targetInfo...)
	temp = append(temp, 0, 0, 0, 0)
	proof := mac(hash, server[:], temp)
	return append(proof, temp...), mac(hash, proof)
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(md5.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func encrypt(key, dst, src []byte) {
	c, err := rc4.NewCipher(key)
	if err != nil {
		panic(err) // keys here have 16 bytes
	}
	c.XORKeyStream(dst, src)
}

func encode(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// fileTime counts 100 ns from 1601.
func fileTime(t time.Time) (b [8]byte) {
	const to1970 = 11644473600
	binary.LittleEndian.PutUint64(b[:], uint64(t.Unix()+to1970)*1e7+uint64(t.Nanosecond())/100)
	return b
}
