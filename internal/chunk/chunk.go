// Package chunk names chunks and cuts a disk into them.
//
// Chunks are fixed and aligned: chunk i of a disk is the bytes from i times
// the chunk size on, and only the last may be short.
package chunk

import (
	"bytes"
	"encoding/hex"
	"fmt"
)

// ID names a chunk by a keyed hash of its plaintext, so equal IDs mean equal
// bytes within one repository and nothing to anyone without its key.
type ID [32]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Short is enough of the ID for people to tell chunks apart.
func (id ID) Short() string { return hex.EncodeToString(id[:4]) }

// Sizes in bytes that a repository may choose at its creation; all are powers
// of two.
const (
	MinBytes     = 64 << 10
	DefaultBytes = 512 << 10
	MaxBytes     = 4 << 20
)

// CheckBytes says what is wrong with n as a chunk size.
func CheckBytes(n int64) error {
	if n < MinBytes || n > MaxBytes || n&(n-1) != 0 {
		return fmt.Errorf("chunk size %d is not a power of two from %d to %d", n, MinBytes, MaxBytes)
	}
	return nil
}

// Count is how many chunks a disk of diskBytes has.
func Count(diskBytes, chunkBytes int64) int64 {
	n := diskBytes / chunkBytes
	if diskBytes%chunkBytes != 0 {
		n++
	}
	return n
}

// Len is the length in bytes of chunk index of a disk of diskBytes.
func Len(index, diskBytes, chunkBytes int64) int64 {
	return min(chunkBytes, diskBytes-index*chunkBytes)
}

var zeros [MaxBytes]byte

// IsZero says whether p holds nothing but zeros; len(p) is at most MaxBytes.
// Comparing with a shared page of zeros runs at the speed of memory.
func IsZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }
