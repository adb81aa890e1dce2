package ntlm

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/rc4"
	"encoding/binary"
	"errors"
)

// SignatureSize is the length of every signature, in bytes.
const SignatureSize = 16

// ErrSeal says that a sealed message is not what the other side sent next:
// changed, lost, repeated or out of order. The session is of no use any more.
var ErrSeal = errors.New("ntlm: a sealed message was tampered with or is out of order")

// A Session seals what we send and opens what the host sends, in the order of
// the connection. It is not safe for concurrent use.
type Session struct {
	out, in half
}

// A half is one direction: its cipher runs on from message to message.
type half struct {
	sign   []byte
	cipher *rc4.Cipher
	seq    uint32
}

// Whose keys: the constants that are hashed with the session's key.
const (
	clientKeys = "client-to-server"
	serverKeys = "server-to-client"
)

func newSession(key []byte, out, in string) *Session {
	return &Session{newHalf(key, out), newHalf(key, in)}
}

func newHalf(key []byte, direction string) half {
	derive := func(what string) []byte {
		sum := md5.Sum(append(append([]byte(nil), key...), "session key to "+direction+" "+what+" key magic constant\x00"...))
		return sum[:]
	}
	c, err := rc4.NewCipher(derive("sealing"))
	if err != nil {
		panic(err) // a hash has 16 bytes
	}
	return half{sign: derive("signing"), cipher: c}
}

// Seal encrypts a message in place and gives its signature.
func (s *Session) Seal(message []byte) [SignatureSize]byte {
	sum := s.out.checksum(message)
	s.out.cipher.XORKeyStream(message, message)
	return s.out.signature(sum)
}

// Open decrypts a message in place. If the signature is not of that message
// at this place it gives ErrSeal, and the message must not be used.
func (s *Session) Open(message []byte, signature [SignatureSize]byte) error {
	s.in.cipher.XORKeyStream(message, message)
	want := s.in.signature(s.in.checksum(message))
	if !hmac.Equal(want[:], signature[:]) {
		clear(message)
		return ErrSeal
	}
	return nil
}

func (h *half) checksum(message []byte) []byte {
	return mac(h.sign, binary.LittleEndian.AppendUint32(nil, h.seq), message)[:8]
}

// signature finishes a message: the checksum is encrypted after it.
func (h *half) signature(checksum []byte) (s [SignatureSize]byte) {
	binary.LittleEndian.PutUint32(s[:], 1)
	h.cipher.XORKeyStream(s[4:12], checksum)
	binary.LittleEndian.PutUint32(s[12:], h.seq)
	h.seq++
	return s
}
