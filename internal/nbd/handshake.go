package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"

	"github.com/backstay/backstay/internal/fault"
)

var be = binary.BigEndian

// export is what a server says of an export when it is opened.
type export struct {
	size      int64
	flags     uint16
	min       int64 // block sizes in bytes; min is what requests must be aligned to
	preferred int64
	max       int64 // of one read or write
	structure bool  // structured replies were agreed on
	contexts  map[string]uint32
}

// A negotiation is the first half of a connection, before transmission.
type negotiation struct {
	conn     net.Conn
	r        *bufio.Reader
	noZeroes bool
}

// greet reads the server's greeting and answers it, then switches to TLS if
// cfg is given. It never goes on in the clear where TLS was wanted.
func greet(ctx context.Context, conn net.Conn, cfg *tls.Config) (*negotiation, error) {
	n := &negotiation{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	var b [18]byte
	if _, err := io.ReadFull(n.r, b[:16]); err != nil {
		return nil, short(err)
	}
	if be.Uint64(b[:]) != magicGreeting {
		return nil, protocolError("greeting starts with %x", b[:8])
	}
	switch be.Uint64(b[8:]) {
	case magicOption:
	case magicOldstyle:
		return nil, fmt.Errorf("nbd server speaks the oldstyle protocol: %w", fault.ErrUnsupported)
	default:
		return nil, protocolError("greeting goes on with %x", b[8:16])
	}
	if _, err := io.ReadFull(n.r, b[16:]); err != nil {
		return nil, short(err)
	}
	flags := be.Uint16(b[16:])
	if flags&handshakeFixed == 0 {
		return nil, fmt.Errorf("nbd server does not speak fixed newstyle: %w", fault.ErrUnsupported)
	}
	n.noZeroes = flags&handshakeNoZeroes != 0
	if err := n.write(be.AppendUint32(nil, uint32(flags&(handshakeFixed|handshakeNoZeroes)))); err != nil {
		return nil, err
	}
	if cfg == nil {
		return n, nil
	}
	if err := n.ask(optStartTLS, nil, nil); err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	if n.r.Buffered() > 0 {
		// What follows the acknowledgement in the clear was injected.
		return nil, protocolError("%d bytes in the clear after agreeing on TLS", n.r.Buffered())
	}
	tc := tls.Client(conn, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	n.conn, n.r = tc, bufio.NewReaderSize(tc, 64<<10)
	return n, nil
}

func (n *negotiation) write(p []byte) error {
	_, err := n.conn.Write(p)
	return err
}

// An optionError is a refused option, with the reply type that says why.
type optionError struct {
	answer Error
	reply  uint32
}

func (e *optionError) Error() string { return e.answer.Error() }
func (e *optionError) Unwrap() error { return &e.answer }

func refusedAs(err error, reply uint32) bool {
	var oe *optionError
	return errors.As(err, &oe) && oe.reply == reply
}

// refused says whether err is the server's answer to an option and not the end
// of the connection.
func refused(err error) bool {
	var oe *optionError
	return errors.As(err, &oe)
}

// ask sends one option and hands every reply before the acknowledgement to
// each. An answer of "no" is an *optionError, after which more may be asked.
func (n *negotiation) ask(opt uint32, data []byte, each func(typ uint32, body []byte) error) error {
	if err := n.send(opt, data); err != nil {
		return err
	}
	for range maxReplies {
		var h [20]byte
		if _, err := io.ReadFull(n.r, h[:]); err != nil {
			return short(err)
		}
		typ, size := be.Uint32(h[12:]), be.Uint32(h[16:])
		switch {
		case be.Uint64(h[:]) != magicReply:
			return protocolError("option reply starts with %x", h[:8])
		case be.Uint32(h[8:]) != opt:
			return protocolError("reply is to option %d, asked was %d", be.Uint32(h[8:]), opt)
		case size > maxOptionReply:
			return protocolError("option reply of %d bytes", size)
		}
		body := make([]byte, size)
		if _, err := io.ReadFull(n.r, body); err != nil {
			return short(err)
		}
		switch {
		case typ&repError != 0:
			return &optionError{Error{Op: optionName(opt), Message: string(body[:min(len(body), maxString)])}, typ}
		case typ == repAck:
			return nil
		case each == nil:
			return protocolError("unexpected reply of type %d to option %d", typ, opt)
		}
		if err := each(typ, body); err != nil {
			return err
		}
	}
	return protocolError("more than %d replies to option %d", maxReplies, opt)
}

func (n *negotiation) send(opt uint32, data []byte) error {
	p := be.AppendUint64(nil, magicOption)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, uint32(len(data)))
	return n.write(append(p, data...))
}

func optionName(opt uint32) string {
	switch opt {
	case optStartTLS:
		return "starttls"
	case optList:
		return "list"
	case optGo:
		return "open"
	case optStructured:
		return "structured replies"
	case optSetMeta, optListMeta:
		return "meta context"
	}
	return fmt.Sprintf("option %d", opt)
}

// open negotiates the transmission phase for the export called name.
func (n *negotiation) open(name string, contexts []string) (export, error) {
	e := export{contexts: map[string]uint32{}}
	switch err := n.ask(optStructured, nil, nil); {
	case err == nil:
		e.structure = true
		if len(contexts) > 0 {
			if e.contexts, err = n.meta(optSetMeta, name, contexts); err != nil && !refused(err) {
				return e, err
			}
		}
	case refusedAs(err, repErrTLSRequired):
		return e, fmt.Errorf("the server wants TLS: %w", err)
	case !refused(err):
		return e, err
	}

	data := be.AppendUint32(nil, uint32(len(name)))
	data = append(data, name...)
	data = be.AppendUint16(data, 1) // one piece of information wanted
	data = be.AppendUint16(data, infoBlockSize)
	told := false
	err := n.ask(optGo, data, func(typ uint32, body []byte) error {
		if typ != repInfo || len(body) < 2 {
			return protocolError("reply of type %d, %d bytes, to opening an export", typ, len(body))
		}
		switch be.Uint16(body) {
		case infoExport:
			if len(body) != 12 {
				return protocolError("export information of %d bytes", len(body))
			}
			told = true
			return e.describe(be.Uint64(body[2:]), be.Uint16(body[10:]))
		case infoBlockSize:
			if len(body) != 14 {
				return protocolError("block sizes in %d bytes", len(body))
			}
			e.min, e.preferred, e.max = int64(be.Uint32(body[2:])), int64(be.Uint32(body[6:])), int64(be.Uint32(body[10:]))
		}
		return nil // the rest is for people
	})
	switch {
	case refusedAs(err, repErrUnsupported):
		if err := n.openByName(name, &e); err != nil {
			return e, err
		}
	case refusedAs(err, repErrUnknown):
		return e, fmt.Errorf("export %q: %w: %w", name, fault.ErrNotFound, err)
	case refusedAs(err, repErrTLSRequired):
		return e, fmt.Errorf("the server wants TLS: %w", err)
	case err != nil:
		return e, fmt.Errorf("export %q: %w", name, err)
	case !told:
		return e, protocolError("export %q was opened without its size", name)
	}
	return e, e.settle()
}

// openByName is for servers that do not know optGo. A server that knows no
// such export hangs up, so the error can't say more.
func (n *negotiation) openByName(name string, e *export) error {
	if err := n.send(optExportName, []byte(name)); err != nil {
		return err
	}
	b := make([]byte, 10, 134)
	if !n.noZeroes {
		b = b[:134]
	}
	if _, err := io.ReadFull(n.r, b); err != nil {
		return fmt.Errorf("export %q: %w", name, short(err))
	}
	return e.describe(be.Uint64(b), be.Uint16(b[8:]))
}

func (e *export) describe(size uint64, flags uint16) error {
	if size > math.MaxInt64 {
		return protocolError("export of %d bytes", size)
	}
	if flags&flagHasFlags == 0 {
		return protocolError("transmission flags %#x", flags)
	}
	e.size, e.flags = int64(size), flags
	return nil
}

// settle fills in what the server did not say and refuses sizes that are no
// block sizes.
func (e *export) settle() error {
	if e.min == 0 && e.preferred == 0 && e.max == 0 {
		e.min, e.preferred, e.max = 1, 4096, maxPayload
		return nil
	}
	if e.min < 1 || e.min > 64<<10 || e.min&(e.min-1) != 0 || e.preferred < e.min || e.max < e.min {
		return protocolError("block sizes %d, %d, %d", e.min, e.preferred, e.max)
	}
	e.max = min(e.max, maxPayload) / e.min * e.min
	return nil
}

// meta sets or lists the metadata contexts that the queries select.
func (n *negotiation) meta(opt uint32, name string, queries []string) (map[string]uint32, error) {
	data := be.AppendUint32(nil, uint32(len(name)))
	data = append(data, name...)
	data = be.AppendUint32(data, uint32(len(queries)))
	for _, q := range queries {
		data = be.AppendUint32(data, uint32(len(q)))
		data = append(data, q...)
	}
	got := map[string]uint32{}
	err := n.ask(opt, data, func(typ uint32, body []byte) error {
		if typ != repMeta || len(body) < 5 || len(body) > 4+maxString {
			return protocolError("reply of type %d, %d bytes, to a meta context query", typ, len(body))
		}
		got[string(body[4:])] = be.Uint32(body)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return got, nil
}

// list names the server's exports.
func (n *negotiation) list() ([]string, error) {
	var names []string
	err := n.ask(optList, nil, func(typ uint32, body []byte) error {
		if typ != repServer || len(body) < 4 || int64(be.Uint32(body)) > int64(len(body)-4) {
			return protocolError("reply of type %d, %d bytes, to a list", typ, len(body))
		}
		names = append(names, string(body[4:4+be.Uint32(body)]))
		return nil
	})
	return names, err
}

// short turns the end of the stream into what it is at every place where more
// had to come.
func short(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("nbd server hung up: %w", io.ErrUnexpectedEOF)
	}
	return err
}
