// Package nbd speaks the Network Block Device protocol: fixed newstyle
// negotiation, structured replies, block status, TLS.
//
// Client is the side that reads and writes an export. It believes nothing that
// it reads from the wire: every length is bounded before memory is taken, and
// a reply that leaves a byte of a read unsaid is an error and never zeros.
package nbd

import (
	"errors"
	"fmt"

	"github.com/backstay/backstay/internal/fault"
)

// Numbers of the protocol, as in the NBD specification.
const (
	magicGreeting = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOldstyle = 0x00420281861253
	magicReply    = 0x0003e889045565a9 // to an option
	magicRequest  = 0x25609513
	magicSimple   = 0x67446698
	magicChunk    = 0x668e33ef // of a structured reply

	handshakeFixed    = 1 << 0 // flags of the greeting
	handshakeNoZeroes = 1 << 1

	optExportName     = 1
	optAbort          = 2
	optList           = 3
	optStartTLS       = 5
	optGo             = 7
	optStructured     = 8
	optListMeta       = 9
	optSetMeta        = 10
	repAck            = 1
	repServer         = 2
	repInfo           = 3
	repMeta           = 4
	repError          = 1 << 31 // set in every reply that is an error
	repErrUnsupported = repError + 1
	repErrPolicy      = repError + 2
	repErrTLSRequired = repError + 5
	repErrUnknown     = repError + 6

	infoExport    = 0
	infoBlockSize = 3

	flagHasFlags        = 1 << 0 // transmission flags
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagCanMultiConn    = 1 << 8

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagNoHole = 1 << 1

	chunkFlagDone    = 1 << 0
	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkIsError     = 1 << 15
	chunkErrorOffset = chunkIsError + 2
)

// Bounds in bytes on what a server may make us hold.
const (
	maxString      = 4096    // names and messages, as the specification has it
	maxOptionReply = 8 << 10 // one reply to an option
	maxPayload     = 4 << 20 // of one read or write request
	maxStatus      = 8 << 20 // one block status chunk
	maxReplies     = 10_000  // replies to one option
)

// Error is an error that the server answered to one request or option. The
// connection goes on.
type Error struct {
	Op      string // what was asked: "read", "write zeroes", …
	Errno   uint32 // the protocol's number, 5 for EIO; 0 for a refused option
	Message string // the server's own words; may be empty and is not to be trusted
}

var errnos = map[uint32]string{
	1: "operation not permitted", 5: "input/output error", 12: "out of memory", 22: "invalid argument",
	28: "no space left", 75: "value too large", 95: "not supported", 108: "server is shutting down",
}

func (e *Error) Error() string {
	what, known := errnos[e.Errno]
	switch {
	case e.Errno == 0:
		what = "refused"
	case !known:
		what = fmt.Sprintf("error %d", e.Errno)
	}
	if e.Message != "" {
		return fmt.Sprintf("nbd %s: %s (server says %q)", e.Op, what, e.Message)
	}
	return fmt.Sprintf("nbd %s: %s", e.Op, what)
}

// Is puts the error into the classes that every layer knows.
func (e *Error) Is(target error) bool {
	switch target {
	case fault.ErrNoSpace:
		return e.Errno == 28
	case fault.ErrReadOnly:
		return e.Errno == 1
	case fault.ErrUnsupported:
		return e.Errno == 95
	}
	return false
}

// ErrProtocol says that a server broke the protocol. The connection is dead.
var ErrProtocol = errors.New("nbd server breaks the protocol")

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}
