package qcow2

import (
	"encoding/binary"
	"math/bits"
)

// A deflateEncoder writes raw deflate (RFC 1951) of one cluster at a time,
// with matches that reach back less than 4 KiB: QEMU writes its clusters so,
// and readers may give their decoder no more room. Ready encoders have a fast
// mode for windows this small or a good one for larger ones; this is a good
// one for small ones.
//
// It finds matches by chains of earlier places with the same four bytes, and
// takes a later match instead of a first one if it is longer.
type deflateEncoder struct {
	depth int // how many earlier places are tried
	lazy  int // a match this long is taken without looking further
	nice  int // and one this long without trying other places

	head4 [1 << hash4Bits]int32 // last place of a hash of four bytes
	head3 [1 << hash3Bits]int32 // the same of three
	prev  [deflateWindow]int32  // the place before a place, by its low bits
	base  int32                 // place of src[0]; places of earlier clusters are far behind
	next  int                   // src[:next] is in the tables
	src   []byte
	block []uint32 // symbols of the block that is being collected

	huffman huffmanBlock
}

const (
	deflateWindow = 4 << 10
	hash4Bits     = 14
	hash3Bits     = 12
	minMatch      = 3
	maxMatch      = 258
	blockSymbols  = 16 << 10
	matchFlag     = 1 << 31
)

// newDeflateEncoder makes an encoder of a zlib-like level from 1 to 9.
func newDeflateEncoder(level int) *deflateEncoder {
	e := &deflateEncoder{base: 2 * deflateWindow, block: make([]uint32, 0, blockSymbols+1)}
	tuning := [...][3]int{1: {2, 4, 16}, {3, 6, 32}, {4, 8, 32}, {6, 12, 64}, {10, 16, 128}, {20, 32, 128}, {32, 64, 192}, {64, 128, 258}, {256, 258, 258}}[level]
	e.depth, e.lazy, e.nice = tuning[0], tuning[1], tuning[2]
	return e
}

// encode appends the compressed form of src, at most 2 MiB, to dst.
func (e *deflateEncoder) encode(dst, src []byte) []byte {
	if e.base > 1<<30 {
		clear(e.head4[:])
		clear(e.head3[:])
		e.base = 2 * deflateWindow
	}
	e.src, e.next = src, 0
	out := bitWriter{p: dst}
	misses := 0
	for i := 0; i < len(src); {
		if len(e.block) >= blockSymbols {
			e.flush(&out, false)
		}
		n, dist := e.find(i, minMatch-1, e.depth)
		if n < minMatch {
			// What has not matched for long will not match soon.
			step := 1 + misses>>9
			misses++
			for ; step > 0 && i < len(src); step-- {
				e.literal(src[i])
				i++
			}
			continue
		}
		misses = 0
		for n < e.lazy && i+1 < len(src) {
			depth := e.depth
			if n >= 8 {
				depth >>= 2
			}
			n2, dist2 := e.find(i+1, n, depth)
			if n2 <= n {
				break
			}
			e.literal(src[i])
			i++
			n, dist = n2, dist2
		}
		e.block = append(e.block, matchFlag|uint32(n-minMatch)<<16|uint32(dist-1))
		e.huffman.lit[lengthSymbol[n-minMatch]]++
		e.huffman.dist[distSymbol(uint32(dist-1))]++
		i += n
	}
	e.flush(&out, true)
	e.base += int32(len(src)) + deflateWindow
	e.src = nil
	return out.end()
}

func (e *deflateEncoder) literal(b byte) {
	e.block = append(e.block, uint32(b))
	e.huffman.lit[b]++
}

func hash4(x uint32) uint32 { return x * 0x9e3779b1 >> (32 - hash4Bits) }
func hash3(x uint32) uint32 { return x << 8 * 0x9e3779b1 >> (32 - hash3Bits) }

// find looks for a match of what is at i that is longer than best.
func (e *deflateEncoder) find(i, best, depth int) (n, dist int) {
	src := e.src
	if i+4 > len(src) {
		return 0, 0
	}
	for ; e.next < i; e.next++ {
		x := binary.LittleEndian.Uint32(src[e.next:])
		place := e.base + int32(e.next)
		h := &e.head4[hash4(x)]
		e.prev[place%deflateWindow] = *h
		*h = place
		e.head3[hash3(x)] = place
	}
	x := binary.LittleEndian.Uint32(src[i:])
	limit := min(len(src)-i, maxMatch)
	here := e.base + int32(i)
	oldest := max(here-deflateWindow, e.base-1) // places must be behind it
	if best < minMatch {
		if c := e.head3[hash3(x)]; c > oldest {
			y := binary.LittleEndian.Uint32(src[c-e.base:])
			if (x^y)<<8 == 0 && here-c < 1<<10 {
				best, n, dist = 3, 3, int(here-c)
			}
		}
	}
	if best >= limit {
		return n, dist
	}
	for c := e.head4[hash4(x)]; c > oldest && depth > 0; depth-- {
		at := int(c - e.base)
		if src[at+best] == src[i+best] && binary.LittleEndian.Uint32(src[at:]) == x {
			if m := matchLength(src[at:], src[i:i+limit]); m > best {
				best, n, dist = m, m, i-at
				if m >= e.nice || m == limit {
					break
				}
			}
		}
		c = e.prev[c%deflateWindow]
	}
	return n, dist
}

// matchLength is how many bytes of b are the same in a, which is longer.
func matchLength(a, b []byte) int {
	n := 0
	for ; n+8 <= len(b); n += 8 {
		if x := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
	}
	for ; n < len(b) && a[n] == b[n]; n++ {
	}
	return n
}

// flush writes the block that was collected.
func (e *deflateEncoder) flush(out *bitWriter, last bool) {
	e.huffman.write(out, e.block, last)
	e.block = e.block[:0]
}

// A bitWriter appends bits to p, the least significant first.
type bitWriter struct {
	p    []byte
	bits uint64
	n    uint // how many of bits are waiting, less than 8 between calls
}

// put appends the low n bits of x, at most 48; the others are zero.
func (w *bitWriter) put(x uint64, n uint) {
	w.bits |= x << w.n
	w.n += n
	if len(w.p)+8 > cap(w.p) {
		grown := make([]byte, len(w.p), 2*cap(w.p)+64<<10)
		copy(grown, w.p)
		w.p = grown
	}
	binary.LittleEndian.PutUint64(w.p[len(w.p):len(w.p)+8], w.bits)
	w.p = w.p[:len(w.p)+int(w.n>>3)]
	w.bits >>= w.n &^ 7
	w.n &= 7
}

// end fills the last byte with zeros and gives everything.
func (w *bitWriter) end() []byte {
	if w.n > 0 {
		w.put(0, 8-w.n)
	}
	return w.p
}
