package smb_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
)

// middle puts somebody between client and server who hands each frame of the
// server on as change gives it, with its length; nil ends the connection.
func middle(t *testing.T, to smb.Target, address string, change func(frame []byte) []byte) smb.Target {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer client.Close()
				server, err := net.Dial("tcp", address)
				if err != nil {
					return
				}
				defer server.Close()
				go func() { io.Copy(server, client); server.Close() }()
				for {
					frame := make([]byte, 4)
					if _, err := io.ReadFull(server, frame); err != nil {
						return
					}
					frame = append(frame, make([]byte, binary.BigEndian.Uint32(frame)&0xffffff)...)
					if _, err := io.ReadFull(server, frame[4:]); err != nil {
						return
					}
					if frame = change(frame); frame == nil {
						return
					}
					if _, err := client.Write(frame); err != nil {
						return
					}
				}
			}()
		}
	}()
	to.Port = l.Addr().(*net.TCPAddr).Port
	return to
}

// Somebody on the network flips bits, cuts frames short, answers in the clear,
// answers nothing: a reader gets the right bytes or an error.
func TestSomebodyInTheMiddle(t *testing.T) {
	long(t)
	s := server(t)
	content := put(t, s, "disk.vhdx", 4<<20)
	for name, spoil := range map[string]func(frame []byte) []byte{
		"flips a bit":         func(p []byte) []byte { p[len(p)-1] ^= 1; return p },
		"flips a length":      func(p []byte) []byte { p[2] ^= 0x40; return p },
		"ends the connection": func([]byte) []byte { return nil },
		"holds answers back":  func([]byte) []byte { return []byte{} },
		"answers in the clear": func(p []byte) []byte {
			clear(p[4:])
			copy(p[4:], "\xfeSMB\x40\x00")
			return p
		},
		"answers something else": func(p []byte) []byte { copy(p[4:], "GET "); return p },
		"cuts a frame short":     func(p []byte) []byte { return p[:len(p)/2] },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // they wait more than they work
			var large, armed atomic.Int64
			to := target(s)
			to.Patience = 2 * time.Second // long enough for a sign-in on a busy machine
			to.Outage = time.Minute
			to = middle(t, to, s.Addr(), func(p []byte) []byte {
				// Every third answer with data, until it has been enough.
				if len(p) > 64<<10 && armed.Load() > 0 && large.Add(1)%3 == 1 && armed.Add(-1) >= 0 {
					return spoil(p)
				}
				return p
			})
			c, err := smb.Dial(t.Context(), to)
			for err != nil { // by a machine that is too busy
				c, err = smb.Dial(t.Context(), to)
			}
			t.Cleanup(func() { c.Close() })
			f := openFile(t, c, "disk.vhdx")
			armed.Store(1)
			p := make([]byte, len(content))
			for off := 0; off < len(p); off += 512 << 10 {
				if n, err := f.ReadAtContext(context.Background(), p[off:off+512<<10], int64(off)); err != nil {
					t.Fatalf("%d bytes at %d: %v", n, off, err)
				}
			}
			if !bytes.Equal(p, content) {
				t.Error("other bytes than the file's")
			}
			if armed.Load() > 0 {
				t.Error("nothing was spoiled")
			}
		})
	}
}

// Who gives up on a change that is under way still learns what became of it: a
// directory that comes into being after somebody was told that it did not would
// be nobody's.
func TestChangeIsSeenToItsEnd(t *testing.T) {
	s := server(t)
	var armed atomic.Bool
	held, release := make(chan struct{}), make(chan struct{})
	to := middle(t, target(s), s.Addr(), func(p []byte) []byte {
		if armed.CompareAndSwap(true, false) {
			close(held)
			<-release
		}
		return p
	})
	c := dial(t, to)
	at := smb.Path{Share: smbtest.Share, Name: "cancelled"}
	if _, err := c.Stat(t.Context(), smb.Path{Share: smbtest.Share}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	armed.Store(true)
	done := make(chan error, 1)
	go func() { done <- c.Mkdir(ctx, at) }()
	<-held // the host has made it, and its answer is on the way
	cancel()
	select {
	case err := <-done:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	if err := <-done; err != nil {
		t.Errorf("the directory was made: %v", err)
	}
	if i, err := c.Stat(t.Context(), at); err != nil || !i.Dir {
		t.Errorf("%+v, %v", i, err)
	}
	never := smb.Path{Share: smbtest.Share, Name: "never"}
	if err := c.Mkdir(ctx, never); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before it began: %v", err)
	}
	if _, err := c.Stat(t.Context(), never); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("what was never asked for: %v", err)
	}
	if err := c.Remove(t.Context(), at); err != nil {
		t.Error(err)
	}
}
