// Package ntlmtest is the host's half of NTLM, for tests. It shares no code
// with the client's, and checks all that a strict host checks.
package ntlmtest

import (
	"bytes"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rc4"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"

	//lint:ignore SA1019 the hash of a password in NTLM is MD4
	"golang.org/x/crypto/md4"
)

// A Host knows one user.
type Host struct {
	Domain, User, Password string

	// Binding is what the channel binding has to be.
	Binding [16]byte
	// Without are flags that are taken out of those that the host offers.
	Without uint32
}

// A Context is one sign-in.
type Context struct {
	host      *Host
	negotiate []byte
	challenge []byte
	Session   *Session // when Accept has accepted
}

// A Session seals and opens on the host's side.
type Session struct {
	in, out         *rc4.Cipher
	inSign, outSign []byte
	inSeq, outSeq   uint32
}

func hash(key []byte, data ...[]byte) []byte {
	h := hmac.New(md5.New, key)
	h.Write(bytes.Join(data, nil))
	return h.Sum(nil)
}

func utf(s string) []byte {
	b := new(bytes.Buffer)
	binary.Write(b, binary.LittleEndian, utf16.Encode([]rune(s)))
	return b.Bytes()
}

// Challenge answers the first message.
func (h *Host) Challenge(negotiate []byte) (*Context, []byte, error) {
	if len(negotiate) < 32 || string(negotiate[:8]) != "NTLMSSP\x00" || negotiate[8] != 1 {
		return nil, nil, errors.New("not a NEGOTIATE message")
	}
	flags := binary.LittleEndian.Uint32(negotiate[12:])&^h.Without | 0x10000
	info := new(bytes.Buffer)
	av := func(id uint16, v []byte) {
		binary.Write(info, binary.LittleEndian, []uint16{id, uint16(len(v))})
		info.Write(v)
	}
	av(2, utf("LAB"))
	av(1, utf("HV01"))
	av(4, utf("lab.example"))
	av(3, utf("hv01.lab.example"))
	av(7, []byte{0, 0x80, 0x3e, 0xd5, 0xde, 0xb1, 0x9d, 1})
	av(0, nil)
	name := utf("LAB")
	msg := bytes.NewBufferString("NTLMSSP\x00")
	put := func(v any) { binary.Write(msg, binary.LittleEndian, v) }
	put(uint32(2))
	put([]uint16{uint16(len(name)), uint16(len(name))})
	put(uint32(56))
	put(flags)
	msg.WriteString("\xde\xad\xbe\xef\x01\x02\x03\x04")
	msg.Write(make([]byte, 8))
	put([]uint16{uint16(info.Len()), uint16(info.Len())})
	put(uint32(56 + len(name)))
	msg.Write([]byte{10, 0, 0x7c, 0x4f, 0, 0, 0, 15})
	msg.Write(name)
	msg.Write(info.Bytes())
	c := &Context{host: h, negotiate: bytes.Clone(negotiate), challenge: msg.Bytes()}
	return c, c.challenge, nil
}

// ErrRefused says that it is not the user, or not the right password.
var ErrRefused = errors.New("refused")

// Accept checks the last message. All but ErrRefused is a message that no
// client may send.
func (c *Context) Accept(msg []byte) error {
	if len(msg) < 88 || string(msg[:8]) != "NTLMSSP\x00" || msg[8] != 3 {
		return errors.New("not an AUTHENTICATE message")
	}
	var fields [6][]byte
	for i := range fields {
		at := 12 + 8*i
		n, off := int(binary.LittleEndian.Uint16(msg[at:])), int(binary.LittleEndian.Uint32(msg[at+4:]))
		if off < 88 || off+n > len(msg) {
			return fmt.Errorf("field %d lies outside", i)
		}
		fields[i] = msg[off : off+n]
	}
	lm, nt, domain, user, key := fields[0], fields[1], fields[2], fields[3], fields[5]
	if len(nt) < 48 || len(key) != 16 || !bytes.Equal(lm, make([]byte, 24)) {
		return errors.New("a response has a wrong size, or the LM response is not empty though the host gave its time")
	}
	if f := binary.LittleEndian.Uint32(msg[60:]); f&^binary.LittleEndian.Uint32(c.challenge[20:]) != 0 {
		return fmt.Errorf("flags %#x that were not offered", f)
	}
	h := c.host
	pw := md4.New()
	pw.Write(utf(h.Password))
	owf := hash(pw.Sum(nil), utf(strings.ToUpper(h.User)), domain)
	if !strings.EqualFold(decode(user), h.User) || !strings.EqualFold(decode(domain), h.Domain) || !bytes.Equal(hash(owf, c.challenge[24:32], nt[16:]), nt[:16]) {
		return ErrRefused
	}
	exported := make([]byte, 16)
	cipher(hash(owf, nt[:16])).XORKeyStream(exported, key)
	zeroed := bytes.Clone(msg)
	clear(zeroed[72:88])
	if !bytes.Equal(hash(exported, c.negotiate, c.challenge, zeroed), msg[72:88]) {
		return errors.New("the MIC is wrong")
	}
	if !bytes.Equal(nt[24:32], []byte{0, 0x80, 0x3e, 0xd5, 0xde, 0xb1, 0x9d, 1}) {
		return errors.New("the time is not the host's")
	}
	var flags, binding, target []byte
	for info := nt[44:]; ; {
		if len(info) < 4 {
			return errors.New("the target information has no end")
		}
		id, n := binary.LittleEndian.Uint16(info), int(binary.LittleEndian.Uint16(info[2:]))
		v := info[4 : 4+n]
		info = info[4+n:]
		switch id {
		case 6:
			flags = v
		case 9:
			target = v
		case 10:
			binding = v
		}
		if id == 0 {
			break
		}
	}
	if len(flags) != 4 || flags[0]&2 == 0 {
		return errors.New("no flag says that there is a MIC")
	}
	if !bytes.Equal(binding, h.Binding[:]) {
		return fmt.Errorf("channel binding %x is not %x", binding, h.Binding)
	}
	if !strings.HasPrefix(decode(target), "HTTP/") {
		return fmt.Errorf("target %q", decode(target))
	}
	c.Session = newSession(exported)
	return nil
}

func cipher(key []byte) *rc4.Cipher {
	c, err := rc4.NewCipher(key)
	if err != nil {
		panic(err)
	}
	return c
}

func decode(b []byte) string {
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	return string(utf16.Decode(u))
}

func newSession(key []byte) *Session {
	derive := func(s string) []byte {
		sum := md5.Sum([]byte(string(key) + s + "\x00"))
		return sum[:]
	}
	return &Session{
		in:      cipher(derive("session key to client-to-server sealing key magic constant")),
		out:     cipher(derive("session key to server-to-client sealing key magic constant")),
		inSign:  derive("session key to client-to-server signing key magic constant"),
		outSign: derive("session key to server-to-client signing key magic constant"),
	}
}

func seal(c *rc4.Cipher, key []byte, seq uint32, plain []byte) (sig, sealed []byte) {
	n := binary.LittleEndian.AppendUint32(nil, seq)
	sealed = make([]byte, len(plain))
	c.XORKeyStream(sealed, plain)
	sum := hash(key, n, plain)[:8]
	c.XORKeyStream(sum, sum)
	return bytes.Join([][]byte{{1, 0, 0, 0}, sum, n}, nil), sealed
}

// Seal gives the signature and the sealed message.
func (s *Session) Seal(plain []byte) (sig, sealed []byte) {
	sig, sealed = seal(s.out, s.outSign, s.outSeq, plain)
	s.outSeq++
	return sig, sealed
}

// Open gives a sealed message in clear.
func (s *Session) Open(sig, sealed []byte) ([]byte, error) {
	plain := make([]byte, len(sealed))
	s.in.XORKeyStream(plain, sealed)
	n := binary.LittleEndian.AppendUint32(nil, s.inSeq)
	sum := hash(s.inSign, n, plain)[:8]
	s.in.XORKeyStream(sum, sum)
	s.inSeq++
	if !bytes.Equal(sig, bytes.Join([][]byte{{1, 0, 0, 0}, sum, n}, nil)) {
		return nil, errors.New("the seal is broken")
	}
	return plain, nil
}
