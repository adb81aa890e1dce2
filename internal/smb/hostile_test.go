package smb

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
)

// serve answers every frame of every connection with what reply gives, until
// that is nil, which closes the connection.
func serve(t *testing.T, reply func(request []byte, n int) []byte) Target {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for n := 0; ; n++ {
					var head [4]byte
					if _, err := io.ReadFull(conn, head[:]); err != nil {
						return
					}
					request := make([]byte, binary.BigEndian.Uint32(head[:])&0xffffff)
					if _, err := io.ReadFull(conn, request); err != nil {
						return
					}
					p := reply(request, n)
					if p == nil {
						return
					}
					conn.Write(p)
				}
			}()
		}
	}()
	addr := l.Addr().(*net.TCPAddr)
	return Target{Host: "127.0.0.1", Port: addr.Port, User: "backup", Password: secret.New([]byte("x")), Patience: 300 * time.Millisecond, Outage: 300 * time.Millisecond}
}

// frame puts the length before a message.
func frame(p []byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(p))), p...) }

// answer is a message that answers request.
func answer(request []byte, status uint32, body []byte) []byte {
	p := make([]byte, headerBytes, headerBytes+len(body))
	copy(p, "\xfeSMB\x40\x00")
	le.PutUint32(p[8:], status)
	copy(p[12:14], request[12:14])
	le.PutUint16(p[14:], 64)   // credits
	p[16] = 1                  // an answer
	copy(p[24:], request[24:]) // message, process, tree and session
	p = p[:headerBytes]
	return frame(append(p, body...))
}

// negotiation settles for a dialect with the given capabilities.
func negotiation(request []byte, dialect uint16, capabilities uint32) []byte {
	body := make([]byte, 64)
	le.PutUint16(body, 65)
	le.PutUint16(body[2:], 1)
	le.PutUint16(body[4:], dialect)
	le.PutUint32(body[24:], capabilities)
	for i := 28; i < 40; i += 4 {
		le.PutUint32(body[i:], 1<<20)
	}
	le.PutUint16(body[56:], headerBytes+64)
	return answer(request, 0, body)
}

func dialOnce(t *testing.T, target Target) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := Dial(ctx, target)
	if err == nil {
		c.Close()
		t.Fatal("signed in")
	}
	return err
}

func TestHostsThatAreNone(t *testing.T) {
	const more = 0xC0000016
	for _, c := range []struct {
		name  string
		class error
		reply func(request []byte, n int) []byte
	}{
		{"closes", nil, func([]byte, int) []byte { return nil }},
		{"says nothing", nil, func([]byte, int) []byte { return []byte{} }},
		{"speaks HTTP", nil, func([]byte, int) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n") }},
		{"frame of 16 MB", nil, func([]byte, int) []byte { return []byte("\x00\xff\xff\xff\xfeSMB") }},
		{"frame of 4 GB", nil, func([]byte, int) []byte { return []byte("\xff\xff\xff\xff\xfeSMB") }},
		{"empty frame", nil, func([]byte, int) []byte { return frame(nil) }},
		{"half a header", nil, func([]byte, int) []byte { return frame([]byte("\xfeSMB\x40\x00")) }},
		{"SMB 1", nil, func([]byte, int) []byte { return frame(append([]byte("\xffSMB"), make([]byte, 100)...)) }},
		{"a header alone", nil, func(r []byte, _ int) []byte { return answer(r, 0, nil) }},
		{"another command", nil, func(r []byte, _ int) []byte { r[12] = 8; return answer(r, 0, make([]byte, 100)) }},
		{"SMB 2.1", fault.ErrUnsupported, func(r []byte, _ int) []byte { return negotiation(r, 0x0210, 0) }},
		{"SMB 2 of whatever version", fault.ErrUnsupported, func(r []byte, _ int) []byte { return negotiation(r, 0x02ff, 0) }},
		{"SMB 3.0 without encryption", fault.ErrUnsupported, func(r []byte, _ int) []byte { return negotiation(r, 0x0302, 0x4) }},
		{"SMB 3.1.1 without a cipher", fault.ErrUnsupported, func(r []byte, _ int) []byte { return negotiation(r, 0x0311, 0x44) }},
		{"a session out of nothing", nil, func(r []byte, n int) []byte {
			if n == 0 {
				return negotiation(r, 0x0302, 0x44)
			}
			return answer(r, 0, []byte{9, 0, 0, 0, 72, 0, 0, 0, 0})
		}},
		{"a guest", fault.ErrDenied, func(r []byte, n int) []byte {
			if n == 0 {
				return negotiation(r, 0x0302, 0x44)
			}
			return answer(r, 0, []byte{9, 0, sessionGuest, 0, 72, 0, 0, 0, 0})
		}},
		{"a challenge without end", nil, func(r []byte, n int) []byte {
			if n == 0 {
				return negotiation(r, 0x0302, 0x44)
			}
			return answer(r, more, []byte{9, 0, 0, 0, 72, 0, 1, 0, 0})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			target := serve(t, c.reply)
			if c.class != nil {
				target.Patience = time.Minute // the answer counts, however late
			}
			err := dialOnce(t, target)
			if c.class != nil && !errors.Is(err, c.class) {
				t.Error(err)
			}
			t.Log(err)
		})
	}
}

// Whatever a host answers, there is an error, no panic, and no more memory than
// a few frames.
func TestRandomHosts(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		script := make([]uint64, 4)
		for i := range script {
			script[i] = r.Uint64()
		}
		dialOnce(t, serve(t, func(request []byte, n int) []byte {
			if n >= len(script) {
				return nil
			}
			r := rand.New(rand.NewPCG(script[n], 2))
			if n == 0 && r.IntN(2) == 0 {
				return negotiation(request, 0x0302, 0x44)
			}
			body := make([]byte, r.IntN(400))
			for i := range body {
				body[i] = byte(r.Uint32())
				if r.IntN(3) > 0 {
					body[i] = 0
				}
			}
			status := []uint32{0, 0xC0000016, 0x103, 0xC000006D, r.Uint32()}[r.IntN(5)]
			return answer(request, status, body)
		}))
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) / uint64(rounds); n > 4<<20 {
		t.Errorf("%d bytes were allocated for each", n)
	}
}

// The negotiation is the one thing that is read before anybody is known.
func FuzzSetup(f *testing.F) {
	request := make([]byte, headerBytes)
	f.Add(negotiation(request, 0x0302, 0x44)[4:], true)
	f.Add(negotiation(request, 0x0311, 0x44)[4:], true)
	f.Add(answer(request, 0, []byte{9, 0, 0, 0, 72, 0, 0, 0, 0})[4:], false)
	contexts := negotiation(request, 0x0311, 0x44)[4:]
	le.PutUint32(contexts[headerBytes+60:], headerBytes+64)
	le.PutUint16(contexts[headerBytes+6:], 2)
	contexts = append(contexts, "\x01\x00\x04\x00\x00\x00\x00\x00abcd\x00\x00\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x01\x00\x02\x00"...)
	f.Add(contexts, true)
	if !encrypts(contexts) {
		f.Fatal("a cipher was not seen")
	}
	f.Fuzz(func(t *testing.T, p []byte, encrypted bool) {
		if len(p) < headerBytes {
			return // frame refuses it
		}
		g := &gate{protection: SignedOnly}
		if encrypted {
			g.protection = Encrypted
		}
		err := g.setup(p)
		if g.up.Load() && (err != nil || le.Uint16(p[headerBytes+2:])&(sessionGuest|sessionNull) != 0) {
			t.Fatal("up in spite of", err)
		}
		if g.up.Load() && encrypted && le.Uint16(p[headerBytes+2:])&sessionEncrypt == 0 {
			t.Fatal("up without encryption")
		}
	})
}
