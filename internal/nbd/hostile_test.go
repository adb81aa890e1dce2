package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
)

// wire builds what a scripted server says.
type wire []byte

func (w wire) u16(v uint16) wire { return be.AppendUint16(w, v) }
func (w wire) u32(v uint32) wire { return be.AppendUint32(w, v) }
func (w wire) u64(v uint64) wire { return be.AppendUint64(w, v) }
func (w wire) str(s string) wire { return append(w, s...) }
func greeting() wire             { return wire{}.u64(magicGreeting).u64(magicOption).u16(3) }
func (w wire) reply(o, t uint32, b wire) wire {
	return append(w.u64(magicReply).u32(o).u32(t).u32(uint32(len(b))), b...)
}

// opened is a whole good negotiation of an export of 1 MiB with one context.
func opened() wire {
	return greeting().reply(optStructured, repAck, nil).
		reply(optSetMeta, repMeta, wire{}.u32(7).str("base:allocation")).reply(optSetMeta, repAck, nil).
		reply(optGo, repInfo, wire{}.u16(infoExport).u64(1<<20).u16(flagHasFlags)).
		reply(optGo, repAck, nil)
}

func (w wire) chunk(flags, typ uint16, body wire) wire {
	return append(w.u32(magicChunk).u16(flags).u16(typ).u64(1).u32(uint32(len(body))), body...)
}

// A script is a connection to a server that says what it always says.
type script struct {
	r      io.Reader
	closed chan struct{}
}

func (s *script) Read(p []byte) (int, error) { return s.r.Read(p) }
func (s *script) Write(p []byte) (int, error) {
	select {
	case <-s.closed:
		return 0, net.ErrClosed
	default:
		return len(p), nil
	}
}
func (s *script) Close() error                     { close(s.closed); return nil }
func (s *script) LocalAddr() net.Addr              { return nil }
func (s *script) RemoteAddr() net.Addr             { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func scripted(p []byte) *script {
	return &script{r: bytes.NewReader(p), closed: make(chan struct{})}
}

// talk negotiates with the scripted server, sends k and takes its answer.
func talk(p []byte, k *call) error {
	s := scripted(p)
	n, err := greet(context.Background(), s, nil)
	if err != nil {
		return err
	}
	e, err := n.open("", []string{"base:allocation"})
	if err != nil {
		return err
	}
	c := newConn(n, e)
	k.release = func() {}
	if err := c.start(context.Background(), k); err != nil {
		return err
	}
	c.receive()
	return c.wait(context.Background(), k)
}

func read(n int) *call {
	return &call{cmd: cmdRead, off: 4096, length: uint32(n), buf: make([]byte, n)}
}

func TestNegotiationOfLiars(t *testing.T) {
	structured := greeting().reply(optStructured, repErrUnsupported, nil)
	for name, w := range map[string]wire{
		"silence":                    {},
		"another protocol":           wire{}.str("SSH-2.0-OpenSSH_9.2p1 Debian-2"),
		"oldstyle":                   wire{}.u64(magicGreeting).u64(magicOldstyle).u64(1),
		"not fixed":                  wire{}.u64(magicGreeting).u64(magicOption).u16(0),
		"ends in the greeting":       greeting()[:17],
		"reply of 4 GiB":             greeting().u64(magicReply).u32(optStructured).u32(repAck).u32(1<<32 - 1),
		"reply to another option":    greeting().reply(optList, repAck, nil),
		"reply of unasked type":      greeting().reply(optStructured, repServer, nil),
		"opened without size":        structured.reply(optGo, repAck, nil),
		"size of 2^63":               structured.reply(optGo, repInfo, wire{}.u16(infoExport).u64(1<<63).u16(1)).reply(optGo, repAck, nil),
		"flags without the flag":     structured.reply(optGo, repInfo, wire{}.u16(infoExport).u64(1).u16(0)).reply(optGo, repAck, nil),
		"short export information":   structured.reply(optGo, repInfo, wire{}.u16(infoExport).u64(1)),
		"information of one byte":    structured.reply(optGo, repInfo, wire{1}),
		"block size 3":               structured.reply(optGo, repInfo, wire{}.u16(infoExport).u64(9).u16(1)).reply(optGo, repInfo, wire{}.u16(infoBlockSize).u32(3).u32(3).u32(3)).reply(optGo, repAck, nil),
		"block size above maximum":   structured.reply(optGo, repInfo, wire{}.u16(infoExport).u64(9).u16(1)).reply(optGo, repInfo, wire{}.u16(infoBlockSize).u32(4096).u32(4096).u32(512)).reply(optGo, repAck, nil),
		"no such export":             structured.reply(optGo, repErrUnknown, nil),
		"old open, hangs up":         structured.reply(optGo, repErrUnsupported, nil),
		"endless informations":       append(structured, bytes.Repeat(wire{}.reply(optGo, repInfo, wire{}.u16(9)), maxReplies+1)...),
		"context without a name":     greeting().reply(optStructured, repAck, nil).reply(optSetMeta, repMeta, wire{}.u32(1)),
		"context name of 8000 bytes": greeting().reply(optStructured, repAck, nil).reply(optSetMeta, repMeta, wire{}.u32(1).str(string(make([]byte, 8000)))),
	} {
		if err := talk(w, read(512)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestRepliesOfLiars(t *testing.T) {
	data := func(off uint64, n int) wire { return append(wire{}.u64(off), make([]byte, n)...) }
	status := func() *call { return &call{cmd: cmdBlockStatus, length: 1 << 20, meta: "base:allocation"} }
	for name, c := range map[string]struct {
		k *call
		w wire
	}{
		"hangs up":                      {read(512), opened()},
		"unknown magic":                 {read(512), opened().u32(1).u64(0)},
		"answers another request":       {read(512), opened().u32(magicChunk).u16(1).u16(chunkData).u64(2).u32(0)},
		"simple reply to a read":        {read(512), opened().u32(magicSimple).u32(0).u64(1).str(string(make([]byte, 512)))},
		"less than asked":               {read(512), opened().chunk(1, chunkData, data(4096, 511))},
		"nothing at all":                {read(512), opened().chunk(1, chunkNone, nil)},
		"more than asked":               {read(512), opened().chunk(1, chunkData, data(4096, 513))},
		"before what was asked":         {read(512), opened().chunk(1, chunkData, data(4095, 512))},
		"far behind":                    {read(512), opened().chunk(1, chunkData, data(1<<63, 512))},
		"offset that overflows":         {read(512), opened().chunk(1, chunkData, data(1<<64-1, 512))},
		"4 GiB chunk":                   {read(512), opened().u32(magicChunk).u16(1).u16(chunkData).u64(1).u32(1<<32 - 1).u64(4096)},
		"the same bytes twice":          {read(512), opened().chunk(0, chunkData, data(4096, 256)).chunk(1, chunkData, data(4096, 256))},
		"hole too long":                 {read(512), opened().chunk(1, chunkHole, wire{}.u64(4096).u32(1<<32-1))},
		"hole of nothing":               {read(512), opened().chunk(1, chunkHole, wire{}.u64(4096).u32(0))},
		"chunk of no known type":        {read(512), opened().chunk(1, 77, nil)},
		"status for a read":             {read(512), opened().chunk(1, chunkBlockStatus, wire{}.u32(7).u32(1).u32(1))},
		"no more after the first chunk": {read(512), opened().chunk(0, chunkData, data(4096, 256))},
		"ends inside the payload":       {read(512), opened().chunk(1, chunkData, data(4096, 512))[:len(opened())+100]},
		"error of 0":                    {read(512), opened().chunk(1, chunkIsError+1, wire{}.u32(0).u16(0))},
		"error whose message is short":  {read(512), opened().chunk(1, chunkIsError+1, wire{}.u32(5).u16(9).str("x"))},
		"error of 4 GiB":                {read(512), opened().u32(magicChunk).u16(1).u16(chunkIsError + 1).u64(1).u32(1<<32 - 1)},
		"cut into single bytes": {read(4096), func() wire {
			w := opened()
			for i := range uint64(4096) {
				w = w.chunk(0, chunkData, data(4096+i, 1))
			}
			return w.chunk(1, chunkNone, nil)
		}()},
		"status without descriptor":     {status(), opened().chunk(1, chunkBlockStatus, wire{}.u32(7))},
		"status of half a descriptor":   {status(), opened().chunk(1, chunkBlockStatus, wire{}.u32(7).u32(1))},
		"status of another context":     {status(), opened().chunk(1, chunkBlockStatus, wire{}.u32(8).u32(1).u32(1))},
		"status twice":                  {status(), opened().chunk(0, chunkBlockStatus, wire{}.u32(7).u32(1).u32(1)).chunk(1, chunkBlockStatus, wire{}.u32(7).u32(1).u32(1))},
		"status of 4 GiB":               {status(), opened().u32(magicChunk).u16(1).u16(chunkBlockStatus).u64(1).u32(1<<32 - 4)},
		"status that is never answered": {status(), opened().chunk(1, chunkNone, nil)},
	} {
		if err := talk(c.w, c.k); err == nil {
			t.Errorf("%s: no error", name)
		} else if len(c.w) == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReplyInManyPieces(t *testing.T) {
	k := read(1024)
	k.buf[0], k.buf[600] = 9, 9
	w := opened().
		chunk(0, chunkData, wire{}.u64(4096+512).str(string(bytes.Repeat([]byte{5}, 512)))).
		chunk(1, chunkHole, wire{}.u64(4096).u32(512))
	// The server hangs up afterwards, which is no matter to an answered call.
	if err := talk(w, k); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(k.buf, append(make([]byte, 512), bytes.Repeat([]byte{5}, 512)...)) {
		t.Error("wrong bytes")
	}
	k = read(1024)
	w = opened().chunk(0, chunkData, wire{}.u64(4096).str("abc")).chunk(1, chunkErrorOffset, wire{}.u32(5).u16(2).str("no").u64(4099))
	var ne *Error
	if err := talk(w, k); !errors.As(err, &ne) || ne.Errno != 5 || ne.Message != "no" {
		t.Errorf("error chunk gave %v", err)
	}
}

func TestStatusAnswers(t *testing.T) {
	within := extent.Extent{Off: 100, Len: 1000}
	for name, c := range map[string]struct {
		w    wire
		want []Status
	}{
		"partial":         {wire{}.u32(10).u32(3), []Status{{extent.Extent{Off: 100, Len: 10}, 3}}},
		"over-long":       {wire{}.u32(10).u32(3).u32(1<<32 - 1).u32(0), []Status{{extent.Extent{Off: 100, Len: 10}, 3}, {extent.Extent{Off: 110, Len: 990}, 0}}},
		"empty":           {nil, nil},
		"empty extent":    {wire{}.u32(10).u32(3).u32(0).u32(0), nil},
		"goes on too far": {wire{}.u32(1000).u32(3).u32(1).u32(0), nil},
	} {
		got, err := parseStatus(c.w, within)
		if (err == nil) != (c.want != nil) || len(got) != len(c.want) {
			t.Errorf("%s: %v, %v", name, got, err)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%s: %v, want %v", name, got, c.want)
			}
		}
	}
}

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]string{
		"nbd://host":                           "tcp host:10809 ",
		"nbd://[::1]:99/disk":                  "tcp [::1]:99 disk",
		"nbd://h/a%2Fb/c":                      "tcp h:10809 a/b/c",
		"nbd+unix:///?socket=/tmp/s":           "unix /tmp/s ",
		"nbd+unix:///my%20vm?socket=/tmp/a%3F": "unix /tmp/a? my vm",
		"nbds://h:5/x":                         "tcp h:5 x tls h",
		"nbds+unix:///x?socket=s":              "unix s x tls localhost",
		"nbd+unix:///x":                        "",
		"nbd://":                               "",
		"http://h/x":                           "",
		"nbd+vsock://1/":                       "",
	} {
		got, err := ParseURI(uri)
		s := got.Network + " " + got.Address + " " + got.Export
		if got.TLS != nil {
			s += " tls " + got.TLS.ServerName
		}
		if err != nil {
			s = ""
		}
		if s != want {
			t.Errorf("%s gave %q, %v, want %q", uri, s, err, want)
		}
	}
}

// Servers may be strangers' too. Whatever one says, we must not panic, hang,
// or take more memory than what it sent could justify, and a read that was
// called good has all its bytes.
func FuzzServer(f *testing.F) {
	f.Add([]byte(opened().chunk(0, chunkData, append(wire{}.u64(4096), make([]byte, 256)...)).chunk(1, chunkHole, wire{}.u64(4352).u32(256))), true)
	f.Add([]byte(opened().chunk(1, chunkBlockStatus, wire{}.u32(7).u32(1<<19).u32(1).u32(1<<19).u32(0))), false)
	f.Add([]byte(opened().chunk(1, chunkErrorOffset, wire{}.u32(5).u16(2).str("no").u64(4099))), true)
	f.Add([]byte(greeting().reply(optStructured, repErrUnsupported, wire{}.str("no")).reply(optGo, repErrUnsupported, nil).u64(1<<20).u16(1).u32(magicSimple).u32(0).u64(1).str(string(make([]byte, 512)))), true)
	f.Fuzz(func(t *testing.T, p []byte, reading bool) {
		k := &call{cmd: cmdBlockStatus, length: 1 << 20, meta: "base:allocation"}
		if reading {
			k = read(512)
			for i := range k.buf {
				k.buf[i] = 0xaa
			}
		}
		if err := talk(p, k); err != nil {
			return
		}
		if reading && bytes.Equal(k.buf, bytes.Repeat([]byte{0xaa}, 512)) && !bytes.Contains(p, k.buf) {
			t.Fatal("a good read left its buffer as it was")
		}
		if !reading {
			parseStatus(k.status, extent.Extent{Len: 1 << 20})
		}
	})
}
