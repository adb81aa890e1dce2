package ntlm

import (
	"crypto/hmac"
	"crypto/md5"
	"crypto/rc4"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
)

// SignatureBytes is the length of a message's signature.
const SignatureBytes = 16

// A Session is an authenticated connection's keys and counters. Messages must
// be opened and sealed in the order in which they travel; it is safe for
// concurrent use otherwise.
type Session struct {
	User string

	mu       sync.Mutex
	exchange bool
	seals    bool
	in, out  direction
}

type direction struct {
	sign, seal []byte
	stream     *rc4.Cipher
	number     uint32
}

func newSession(flags uint32, exported []byte, user string) *Session {
	weak := exported
	switch {
	case flags&flag128 != 0:
	case flags&flag56 != 0:
		weak = exported[:7]
	default:
		weak = exported[:5]
	}
	side := func(name string) direction {
		sign := md5.Sum(append(append([]byte{}, exported...), "session key to "+name+" signing key magic constant\x00"...))
		seal := md5.Sum(append(append([]byte{}, weak...), "session key to "+name+" sealing key magic constant\x00"...))
		d := direction{sign: sign[:], seal: seal[:]}
		d.reset()
		return d
	}
	return &Session{
		User:     user,
		exchange: flags&flagKeyExchange != 0,
		seals:    flags&flagSeal != 0,
		in:       side("client-to-server"),
		out:      side("server-to-client"),
	}
}

// reset begins the key stream again; the number goes on.
func (d *direction) reset() {
	c, err := rc4.NewCipher(d.seal)
	if err != nil {
		panic(err) // keys are 16 bytes
	}
	d.stream = c
}

// signature is that of message, and takes the next number.
func (d *direction) signature(message []byte, exchange bool) []byte {
	s := make([]byte, 4, SignatureBytes)
	binary.LittleEndian.PutUint32(s, 1)
	number := binary.LittleEndian.AppendUint32(nil, d.number)
	sum := mac(d.sign, number, message)[:8]
	if exchange {
		d.stream.XORKeyStream(sum, sum)
	}
	d.number++
	return append(append(s, sum...), number...)
}

// Seals says whether the client negotiated sealing.
func (s *Session) Seals() bool { return s.seals }

// Seal gives the signature of message and its sealed bytes.
func (s *Session) Seal(message []byte) (signature, sealed []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sealed = make([]byte, len(message))
	s.out.stream.XORKeyStream(sealed, message)
	return s.out.signature(message, s.exchange), sealed
}

// Open is the message of sealed bytes.
func (s *Session) Open(signature, sealed []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.seals {
		return nil, errors.New("a sealed message, and sealing was not negotiated")
	}
	message := make([]byte, len(sealed))
	s.in.stream.XORKeyStream(message, sealed)
	number := s.in.number
	if !hmac.Equal(s.in.signature(message, s.exchange), signature) {
		return nil, fmt.Errorf("wrong signature of message %d", number)
	}
	return message, nil
}

// checkList checks the client's signature of the list of mechanisms and gives
// ours. The key stream then begins again (MS-SPNG 3.2.5.1).
func (s *Session) checkList(list, signature []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.in.reset()
	if !hmac.Equal(s.in.signature(list, s.exchange), signature) {
		return nil, fmt.Errorf("%w: wrong signature of the list of mechanisms", ErrDenied)
	}
	defer s.out.reset()
	return s.out.signature(list, s.exchange), nil
}
