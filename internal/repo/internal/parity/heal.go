package parity

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// A Parity is a parity object as it was read, perhaps damaged itself.
type Parity struct {
	Sum   [32]byte // hash of the object that it is for
	Size  int64    // of that object, bytes
	whole bool
	b     []byte
	dims
}

// Open reads parity of the repository. Where the checksum at its end does not
// match, it makes do with what is left; there is an error only if nothing can
// be made of it.
func Open(repo [16]byte, b []byte) (*Parity, error) {
	sum, size, err := parseHeader(b, repo)
	if err != nil && len(b) >= 2*headerBytes+sumBytes {
		var again error
		if sum, size, again = parseHeader(b[len(b)-sumBytes-headerBytes:], repo); again == nil {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	p := &Parity{Sum: sum, Size: size, b: b, dims: layout(size)}
	// Everything else is bounded by what is really there.
	if want := Bytes(size); int64(len(b)) > want || int64(len(b)) < want/2 {
		return nil, fmt.Errorf("%d bytes of parity for an object of %d: want %d", len(b), size, want)
	} else if int64(len(b)) == want {
		h := seal.Hash(b[:want-sumBytes])
		p.whole = h == [32]byte(b[want-sumBytes:])
	}
	return p, nil
}

// Whole says whether the parity is as it was written.
func (p *Parity) Whole() bool { return p.whole }

// A Range is bytes of an object.
type Range struct{ Off, Len int64 }

// A Result says what Heal found.
type Result struct {
	Damaged int64   // blocks of the object that were not as they were written
	Healed  int64   // of those
	Lost    []Range // the others, ascending, neighbours joined
	Unknown int64   // columns of which nothing can be said, as their checksums are lost
}

// Heal copies the object from src, of which parts may be wrong or its end
// missing, to dst, and puts right what it can. Errors are those of src and dst.
// Only the object's hash, or a checksum within it, says whether what is in dst
// is what was written.
func (p *Parity) Heal(src io.ReaderAt, dst io.WriterAt) (Result, error) {
	var res Result
	n := min(stripeBytes, p.row)
	h := &healer{Parity: p, res: &res, lost: map[int64][]Range{}}
	h.spare = make([]byte, rows*min(blockBytes, p.row))
	buf := make([]byte, dataRows*n)
	var shards [dataRows][]byte
	for at := int64(0); at < p.row; at += stripeBytes {
		n := min(stripeBytes, p.row-at)
		for i := range int64(dataRows) {
			shards[i] = buf[i*n : (i+1)*n]
			if err := p.read(src, shards[i], i, at); err != nil {
				return res, err
			}
		}
		for off := int64(0); off < n; off += blockBytes {
			if err := h.column(shards[:], at, off); err != nil {
				return res, err
			}
		}
		for i := range int64(dataRows) {
			off := i*p.row + at
			if off >= p.size {
				break
			}
			if _, err := dst.WriteAt(shards[i][:min(n, p.size-off)], off); err != nil {
				return res, err
			}
		}
	}
	for i := range int64(dataRows) {
		for _, r := range h.lost[i] {
			if k := len(res.Lost) - 1; k >= 0 && res.Lost[k].Off+res.Lost[k].Len == r.Off {
				res.Lost[k].Len += r.Len
			} else {
				res.Lost = append(res.Lost, r)
			}
		}
	}
	return res, nil
}

type healer struct {
	*Parity
	res   *Result
	lost  map[int64][]Range // by row
	spare []byte            // a column that is being computed
}

// at gives n bytes of the parity object from off on, or nil if they are not
// there.
func (p *Parity) at(off, n int64) []byte {
	if off+n > int64(len(p.b)) {
		return nil
	}
	return p.b[off : off+n]
}

// checksums gives the checksums of column c, or nil.
func (p *Parity) checksums(c int64) []byte {
	for _, table := range []int64{headerBytes, p.secondTable()} {
		b := p.at(table+c*columnBytes, columnBytes)
		if b != nil && crc32.Checksum(b[:rows*4], castagnoli) == le.Uint32(b[rows*4:]) {
			return b
		}
	}
	return nil
}

// column heals the column at off of a stripe that begins at at, in place.
func (h *healer) column(stripe [][]byte, at, off int64) error {
	sums := h.checksums((at + off) / blockBytes)
	if sums == nil {
		h.res.Unknown++
		return nil
	}
	width := min(blockBytes, h.row-at-off)
	var shards [rows][]byte
	var bad, data []int
	for i := range shards {
		if i < dataRows {
			shards[i] = stripe[i][off : off+width]
		} else {
			shards[i] = h.at(h.rowOff(int64(i))+at+off, width)
		}
		if shards[i] == nil || crc32.Checksum(shards[i], castagnoli) != le.Uint32(sums[4*i:]) {
			bad = append(bad, i)
			if i < dataRows {
				data = append(data, i)
			}
		}
	}
	if len(data) == 0 {
		return nil
	}
	h.res.Damaged += int64(len(data))
	if len(bad) <= rows-dataRows {
		for k, i := range bad {
			shards[i] = h.spare[int64(k)*width:][:0:width] // to be computed
		}
		if err := code().ReconstructData(shards[:]); err != nil {
			return fmt.Errorf("reconstruct: %w", err)
		}
	}
	for _, i := range data {
		if len(bad) <= rows-dataRows && crc32.Checksum(shards[i], castagnoli) == le.Uint32(sums[4*i:]) {
			copy(stripe[i][off:off+width], shards[i])
			h.res.Healed++
			continue
		}
		if first := int64(i)*h.row + at + off; first < h.size {
			h.lost[int64(i)] = append(h.lost[int64(i)], Range{first, min(width, h.size-first)})
		}
	}
	return nil
}

// ErrShort says that a Window was written outside of itself.
var ErrShort = errors.New("written outside of the memory")

// A Window is memory to heal into.
type Window []byte

// WriteAt implements io.WriterAt.
func (w Window) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(w)) {
		return 0, ErrShort
	}
	return copy(w[off:], p), nil
}
