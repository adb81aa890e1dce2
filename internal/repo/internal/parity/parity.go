// Package parity computes and uses what an object needs beside it to heal from
// damage: two rows of Reed-Solomon code for each 64 rows of the object, and a
// checksum for each 4 KiB of all of them.
//
// Code words run across the rows, so any run of a little less than two rows
// heals, and so does damage that hits at most two of the 66 blocks of each
// column. Parity is never believed: who heals checks what came out.
//
// docs/format/parity.md is the specification. Where the two disagree, this
// package has the bug.
package parity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"github.com/klauspost/reedsolomon"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// MaxBytes is the longest object that can have parity.
const MaxBytes = 1 << 32

const (
	dataRows    = 64
	rows        = dataRows + 2
	blockBytes  = 4096
	headerBytes = 80
	columnBytes = rows*4 + 4 // of the table
	sumBytes    = 32

	// stripeBytes is how much of each row is worked on at once: all rows of it
	// fit a processor's second cache.
	stripeBytes = 4 * blockBytes
)

var (
	magic      = []byte("BSTYPAR1")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// code is the code of docs/format/parity.md: row 64 is the sum of all rows, row
// 65 that of all rows times the powers of 2.
var code = sync.OnceValue(func() reedsolomon.Encoder {
	sum, powers := make([]byte, dataRows), make([]byte, dataRows)
	for i, x := 0, 1; i < dataRows; i++ {
		sum[i], powers[i] = 1, byte(x)
		if x <<= 1; x > 0xff {
			x ^= 0x11d
		}
	}
	c, err := reedsolomon.New(dataRows, rows-dataRows, reedsolomon.WithCustomMatrix([][]byte{sum, powers}), reedsolomon.WithMaxGoroutines(1))
	if err != nil {
		panic(err) // nothing in this depends on anything
	}
	return c
})

// rowBytes is how long the rows of an object of size bytes are.
func rowBytes(size int64) int64 {
	if size <= blockBytes {
		return size
	}
	const all = dataRows * blockBytes
	return (size + all - 1) / all * blockBytes
}

func columns(row int64) int64 { return (row + blockBytes - 1) / blockBytes }

// Bytes is the length of the parity of an object of size bytes.
func Bytes(size int64) int64 {
	row := rowBytes(size)
	return 2*headerBytes + 2*row + 2*columns(row)*columnBytes + sumBytes
}

// HealsRun is how long a run of damage in an object of size bytes can be and
// still heal, wherever it lies.
func HealsRun(size int64) int64 {
	if row := rowBytes(size); 2*row < size {
		return 2*row - blockBytes + 1
	}
	return size
}

// A Lender is a source that has what it holds in memory.
type Lender interface {
	// View gives n bytes from off on to read, or nil where they do not lie
	// together.
	View(off, n int64) []byte
}

// Encode gives the parity of the size bytes of src, whose hash is sum. In
// memory are what it gives and a mebibyte; of a Lender nothing is copied.
func Encode(repo [16]byte, sum [32]byte, src io.ReaderAt, size int64) ([]byte, error) {
	if size < 1 || size > MaxBytes {
		return nil, fmt.Errorf("an object of %d bytes can have no parity", size)
	}
	p := layout(size)
	out := make([]byte, Bytes(size))
	putHeader(out, repo, sum, size)
	table := out[headerBytes:][:p.cols*columnBytes]
	buf := make([]byte, dataRows*min(stripeBytes, p.row))
	var shards [rows][]byte
	lender, lends := src.(Lender)
	for at := int64(0); at < p.row; at += stripeBytes {
		n := min(stripeBytes, p.row-at)
		for i := range int64(dataRows) {
			if off := i*p.row + at; lends && off+n <= size {
				if shards[i] = lender.View(off, n); shards[i] != nil {
					continue
				}
			}
			shards[i] = buf[i*n : (i+1)*n]
			if err := p.read(src, shards[i], i, at); err != nil {
				return nil, err
			}
		}
		for i := int64(dataRows); i < rows; i++ {
			shards[i] = out[p.rowOff(i)+at:][:n]
		}
		if err := code().Encode(shards[:]); err != nil {
			return nil, err
		}
		for off := int64(0); off < n; off += blockBytes {
			col := table[(at+off)/blockBytes*columnBytes:][:columnBytes]
			for i, s := range shards {
				le.PutUint32(col[4*i:], crc32.Checksum(s[off:min(off+blockBytes, n)], castagnoli))
			}
			le.PutUint32(col[rows*4:], crc32.Checksum(col[:rows*4], castagnoli))
		}
	}
	copy(out[p.secondTable():], table)
	copy(out[p.secondHeader():], out[:headerBytes])
	end := len(out) - sumBytes
	h := seal.Hash(out[:end])
	copy(out[end:], h[:])
	return out, nil
}

// dims is where things lie in an object and in its parity.
type dims struct{ size, row, cols int64 }

func layout(size int64) dims {
	row := rowBytes(size)
	return dims{size, row, columns(row)}
}

// rowOff is where row i, of 64 and 65, lies in the parity.
func (d dims) rowOff(i int64) int64 {
	return headerBytes + d.cols*columnBytes + (i-dataRows)*d.row
}

func (d dims) secondTable() int64  { return d.rowOff(rows) }
func (d dims) secondHeader() int64 { return d.secondTable() + d.cols*columnBytes }

// read fills b with row i of the object from its byte at on: with zeros where
// src ends.
func (d dims) read(src io.ReaderAt, b []byte, i, at int64) error {
	n, err := 0, error(nil)
	if off := i*d.row + at; off < d.size {
		n, err = src.ReadAt(b[:min(int64(len(b)), d.size-off)], off)
		if errors.Is(err, io.EOF) {
			err = nil
		}
	}
	clear(b[n:])
	return err
}

func putHeader(b []byte, repo [16]byte, sum [32]byte, size int64) {
	copy(b, magic)
	copy(b[8:], repo[:])
	copy(b[24:], sum[:])
	le.PutUint64(b[56:], uint64(size))
	le.PutUint32(b[76:], crc32.Checksum(b[:76], castagnoli))
}

func parseHeader(b []byte, repo [16]byte) (sum [32]byte, size int64, err error) {
	switch {
	case len(b) < headerBytes || !bytes.Equal(b[:8], magic):
		return sum, 0, errors.New("it does not begin like parity")
	case crc32.Checksum(b[:76], castagnoli) != le.Uint32(b[76:]):
		return sum, 0, errors.New("header checksum does not match")
	case !bytes.Equal(b[8:24], repo[:]):
		return sum, 0, fmt.Errorf("it belongs to repository %x", b[8:24])
	case !bytes.Equal(b[64:76], make([]byte, 12)):
		return sum, 0, errors.New("header has bytes that must be zero")
	}
	if n := le.Uint64(b[56:]); n < 1 || n > MaxBytes {
		return sum, 0, fmt.Errorf("it speaks of an object of %d bytes", n)
	} else {
		size = int64(n)
	}
	return [32]byte(b[24:56]), size, nil
}
