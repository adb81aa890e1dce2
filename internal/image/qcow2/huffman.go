package qcow2

import (
	"math/bits"
	"slices"
)

const (
	litSymbols  = 286
	distSymbols = 30
	endOfBlock  = 256
)

// Length and distance symbols with their extra bits, from RFC 1951, 3.2.5.
var (
	lengthSymbol [256]uint16 // by length - 3
	lengthBase   [29]uint16  // by symbol - 257, length - 3
	lengthExtra  [29]uint8
	distBase     [distSymbols]uint16 // distance - 1
	distExtra    [distSymbols]uint8
	fixedLit     [litSymbols]uint8
	fixedDist    [distSymbols]uint8
)

func init() {
	length := 0
	for s := range 28 {
		if s >= 8 {
			lengthExtra[s] = uint8(s/4 - 1)
		}
		lengthBase[s] = uint16(length)
		for range 1 << lengthExtra[s] {
			lengthSymbol[length] = uint16(257 + s)
			length++
		}
	}
	// The longest match has a symbol of its own.
	lengthBase[28], lengthSymbol[255] = 255, 285
	dist := 0
	for s := range distSymbols {
		if s >= 4 {
			distExtra[s] = uint8(s/2 - 1)
		}
		distBase[s] = uint16(dist)
		dist += 1 << distExtra[s]
		fixedDist[s] = 5
	}
	for s := range litSymbols {
		switch {
		case s < 144, s >= 280:
			fixedLit[s] = 8
		case s < 256:
			fixedLit[s] = 9
		default:
			fixedLit[s] = 7
		}
	}
}

// distSymbol is the symbol of a distance, less 1.
func distSymbol(d uint32) uint32 {
	if d < 4 {
		return d
	}
	n := uint32(bits.Len32(d))
	return 2*(n-1) + d>>(n-2)&1
}

// A huffmanBlock counts the symbols of a deflate block and then writes it.
type huffmanBlock struct {
	lit  [litSymbols]uint32 // frequencies
	dist [distSymbols]uint32

	litLen, distLen   [litSymbols]uint8 // lengths of the codes in bits
	litCode, distCode [litSymbols]uint16
	keys              [litSymbols]uint64
	work              [litSymbols]uint64
}

// write writes symbols as the block that is cheapest, and forgets the counts.
// Stored blocks are not tried: who has a cluster that does not compress keeps
// it as it is.
func (b *huffmanBlock) write(out *bitWriter, symbols []uint32, last bool) {
	b.lit[endOfBlock] = 1
	b.lengths(b.lit[:], b.litLen[:litSymbols], 15)
	b.lengths(b.dist[:], b.distLen[:distSymbols], 15)
	head := b.header()
	var dynamic, fixed uint64 = head.bits(), 0
	for s, n := range b.lit {
		dynamic += uint64(n) * uint64(b.litLen[s])
		fixed += uint64(n) * uint64(fixedLit[s])
	}
	for s, n := range b.dist {
		dynamic += uint64(n) * uint64(b.distLen[s])
		fixed += uint64(n) * uint64(fixedDist[s])
	}
	final := uint64(0)
	if last {
		final = 1
	}
	if fixed <= dynamic {
		copy(b.litLen[:], fixedLit[:])
		copy(b.distLen[:], fixedDist[:])
		// Two more codes are part of the fixed tree, though nobody uses them.
		codes(append(fixedLit[:litSymbols:litSymbols], 8, 8), b.litCode[:])
		codes(append(fixedDist[:distSymbols:distSymbols], 5, 5), b.distCode[:])
		out.put(final|1<<1, 3)
	} else {
		codes(b.litLen[:litSymbols], b.litCode[:])
		codes(b.distLen[:distSymbols], b.distCode[:])
		out.put(final|2<<1, 3)
		head.write(out)
	}
	for _, s := range symbols {
		if s < matchFlag {
			out.put(uint64(b.litCode[s]), uint(b.litLen[s]))
			continue
		}
		length, d := s>>16&0xff, s&0xffff
		ls := lengthSymbol[length]
		ds := distSymbol(d)
		x, n := uint64(b.litCode[ls]), uint(b.litLen[ls])
		x |= uint64(length-uint32(lengthBase[ls-257])) << n
		n += uint(lengthExtra[ls-257])
		x |= uint64(b.distCode[ds]) << n
		n += uint(b.distLen[ds])
		x |= uint64(d-uint32(distBase[ds])) << n
		n += uint(distExtra[ds])
		out.put(x, n)
	}
	out.put(uint64(b.litCode[endOfBlock]), uint(b.litLen[endOfBlock]))
	clear(b.lit[:])
	clear(b.dist[:])
}

// lengths gives every symbol that occurs the length of its Huffman code, at
// most longest bits.
func (b *huffmanBlock) lengths(freq []uint32, length []uint8, longest int) {
	clear(length)
	keys := b.keys[:0]
	for s, n := range freq {
		if n > 0 {
			keys = append(keys, uint64(n)<<16|uint64(s))
		}
	}
	if len(keys) <= 1 {
		// One code must have a bit; even none must, or the tree has no code.
		s := 0
		if len(keys) == 1 {
			s = int(keys[0] & 0xffff)
		}
		length[s] = 1
		return
	}
	slices.Sort(keys)
	// Moffat and Katajainen, "In-place calculation of minimum-redundancy
	// codes": w holds first weights, then parents, then depths.
	w := b.work[:len(keys)]
	for i, k := range keys {
		w[i] = k >> 16
	}
	n := len(w)
	leaf, root := 0, 0
	for i := 0; i < n-1; i++ {
		take := func() uint64 {
			if leaf < n && (root >= i || w[leaf] < w[root]) {
				leaf++
				return w[leaf-1]
			}
			x := w[root]
			w[root] = uint64(i)
			root++
			return x
		}
		x := take()
		w[i] = x + take()
	}
	w[n-2] = 0
	for i := n - 3; i >= 0; i-- {
		w[i] = w[w[i]] + 1
	}
	// How many codes have each length; those too long are counted as longest.
	var count [64]int
	avail, used, depth := 1, 0, 0
	for i := n - 2; avail > 0; depth++ {
		for i >= 0 && w[i] == uint64(depth) {
			used++
			i--
		}
		count[min(depth, longest)] += avail - used
		avail, used = 2*used, 0
	}
	// Lengthen short codes until the long ones fit: the sum of 2^-length
	// must be 1.
	sum := 0
	for l := 1; l <= longest; l++ {
		sum += count[l] << (longest - l)
	}
	for ; sum > 1<<longest; sum-- {
		l := longest - 1
		for count[l] == 0 {
			l--
		}
		// One code of l bits becomes two of l+1: itself, and one that was
		// of the longest.
		count[l]--
		count[l+1] += 2
		count[longest]--
	}
	// The rarest symbols get the longest codes.
	i := 0
	for l := longest; l > 0; l-- {
		for range count[l] {
			length[keys[i]&0xffff] = uint8(l)
			i++
		}
	}
}

// codes gives the canonical code of each length, its first bit lowest.
func codes(length []uint8, code []uint16) {
	var next [17]uint16
	for _, l := range length {
		next[l+1]++
	}
	next[0], next[1] = 0, 0
	for l := 2; l < len(next); l++ {
		next[l] = (next[l-1] + next[l]) << 1
	}
	for s, l := range length {
		if l > 0 && s < len(code) {
			code[s] = bits.Reverse16(next[l]) >> (16 - l)
			next[l]++
		}
	}
}

// A blockHeader is the description of a dynamic block's codes.
type blockHeader struct {
	lit, dist int      // how many lengths are told
	symbols   []uint16 // of the lengths' code: symbol, and extra bits << 8
	length    [19]uint8
	told      int // how many of the lengths' own lengths are told
}

// The order in which the lengths of the lengths' code are written.
var lengthOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

func (b *huffmanBlock) header() *blockHeader {
	h := &blockHeader{lit: litSymbols, dist: distSymbols}
	for h.lit > 257 && b.litLen[h.lit-1] == 0 {
		h.lit--
	}
	for h.dist > 1 && b.distLen[h.dist-1] == 0 {
		h.dist--
	}
	all := make([]uint8, 0, litSymbols+distSymbols)
	all = append(append(all, b.litLen[:h.lit]...), b.distLen[:h.dist]...)
	h.symbols = make([]uint16, 0, len(all))
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n] == all[0] {
			n++
		}
		l := uint16(all[0])
		all = all[n:]
		if l > 0 {
			h.symbols = append(h.symbols, l)
			n--
		}
		for n > 0 {
			switch {
			case l == 0 && n >= 11:
				k := min(n, 138)
				h.symbols = append(h.symbols, 18|uint16(k-11)<<8)
				n -= k
			case l == 0 && n >= 3:
				h.symbols = append(h.symbols, 17|uint16(n-3)<<8)
				n = 0
			case l > 0 && n >= 3:
				k := min(n, 6)
				h.symbols = append(h.symbols, 16|uint16(k-3)<<8)
				n -= k
			default:
				h.symbols = append(h.symbols, l)
				n--
			}
		}
	}
	var freq [19]uint32
	for _, s := range h.symbols {
		freq[s&0xff]++
	}
	b.lengths(freq[:], h.length[:], 7)
	h.told = len(lengthOrder)
	for h.told > 4 && h.length[lengthOrder[h.told-1]] == 0 {
		h.told--
	}
	return h
}

func extraBits(s uint16) uint {
	switch s & 0xff {
	case 16:
		return 2
	case 17:
		return 3
	case 18:
		return 7
	}
	return 0
}

// bits is how many bits write takes.
func (h *blockHeader) bits() uint64 {
	n := 14 + 3*uint64(h.told)
	for _, s := range h.symbols {
		n += uint64(h.length[s&0xff]) + uint64(extraBits(s))
	}
	return n
}

func (h *blockHeader) write(out *bitWriter) {
	out.put(uint64(h.lit-257)|uint64(h.dist-1)<<5|uint64(h.told-4)<<10, 14)
	for _, s := range lengthOrder[:h.told] {
		out.put(uint64(h.length[s]), 3)
	}
	var code [19]uint16
	codes(h.length[:], code[:])
	for _, s := range h.symbols {
		l := uint(h.length[s&0xff])
		out.put(uint64(code[s&0xff])|uint64(s>>8)<<l, l+extraBits(s))
	}
}
