package claims

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/backstay/backstay/internal/blob"
)

// The file is a head, and records, each length ‖ CRC-32C ‖ body, all numbers
// little-endian. docs/design/stores.md, "Claims in a directory", has it as tables.
// It is written anew when it is large, with another number in the head.
const (
	magic       = "bstclm01"
	headBytes   = len(magic) + 8
	frameBytes  = 4 + 4
	ticketBytes = 8 + len(blob.Ticket{})
	keyBytes    = len(blob.ClaimKey{})
	bodyLeast   = 1 + ticketBytes
	bodyMost    = bodyLeast + blob.MaxClaims*keyBytes
)

// Kinds of record.
const (
	kindClaim  = 1 // the keys follow
	kindStored = 2 // the pack follows
	kindEnd    = 3
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A ticket is one of an owner's.
type ticket struct {
	owner  uint64
	ticket blob.Ticket
}

// A record is one thing that happened.
type record struct {
	kind byte
	of   ticket
	keys []blob.ClaimKey // of kindClaim
	pack [32]byte        // of kindStored
}

func appendHead(b []byte, number uint64) []byte {
	return binary.LittleEndian.AppendUint64(append(b, magic...), number)
}

// parseHead gives the number of the head, and false if it is none.
func parseHead(b []byte) (number uint64, ok bool) {
	if len(b) < headBytes || string(b[:len(magic)]) != magic {
		return 0, false
	}
	return binary.LittleEndian.Uint64(b[len(magic):]), true
}

func (r *record) append(b []byte) []byte {
	at := len(b)
	b = append(b, make([]byte, frameBytes)...)
	b = append(b, r.kind)
	b = binary.LittleEndian.AppendUint64(b, r.of.owner)
	b = append(b, r.of.ticket[:]...)
	switch r.kind {
	case kindClaim:
		for i := range r.keys {
			b = append(b, r.keys[i][:]...)
		}
	case kindStored:
		b = append(b, r.pack[:]...)
	}
	body := b[at+frameBytes:]
	binary.LittleEndian.PutUint32(b[at:], uint32(len(body)))
	binary.LittleEndian.PutUint32(b[at+4:], crc32.Checksum(body, castagnoli))
	return b
}

// parseRecord reads the record that b begins with, and says how long it is; 0 if
// there is none: half of one, whose writer died, or something else.
func parseRecord(b []byte) (r record, n int) {
	if len(b) < frameBytes {
		return r, 0
	}
	size := binary.LittleEndian.Uint32(b)
	if size < uint32(bodyLeast) || size > uint32(bodyMost) || int(size) > len(b)-frameBytes {
		return r, 0
	}
	n = frameBytes + int(size)
	body := b[frameBytes:n]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
		return r, 0
	}
	r.kind = body[0]
	r.of = ticket{binary.LittleEndian.Uint64(body[1:]), blob.Ticket(body[9:])}
	rest := body[bodyLeast:]
	switch {
	case r.kind == kindClaim && len(rest) > 0 && len(rest)%keyBytes == 0:
		for ; len(rest) > 0; rest = rest[keyBytes:] {
			r.keys = append(r.keys, blob.ClaimKey(rest))
		}
	case r.kind == kindStored && len(rest) == len(r.pack):
		r.pack = [32]byte(rest)
	case r.kind == kindEnd && len(rest) == 0:
	default:
		return r, 0
	}
	return r, n
}
