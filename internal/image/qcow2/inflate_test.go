package qcow2

import (
	"errors"
)

var errInflate = errors.New("no deflate stream")

// farthest decodes raw deflate by the letter of RFC 1951, slowly, and gives
// what it holds and how far back its matches reach at most. Decoders one can
// buy do not tell the latter.
func farthest(p []byte) (out []byte, distance int, err error) {
	r := &slowBits{p: p}
	for last := false; !last; {
		last = r.bits(1) == 1
		var lit, dist slowCode
		switch r.bits(2) {
		case 0:
			r.at = (r.at + 7) &^ 7
			n := r.bits(16)
			if n^r.bits(16) != 1<<16-1 {
				return nil, 0, errInflate
			}
			for range n {
				out = append(out, byte(r.bits(8)))
			}
			continue
		case 1:
			lit, dist = slowFixed()
		case 2:
			if lit, dist, err = r.codes(); err != nil {
				return nil, 0, err
			}
		default:
			return nil, 0, errInflate
		}
		for {
			s := r.symbol(lit)
			if r.bad || s > 285 {
				return nil, 0, errInflate
			}
			if s == 256 {
				break
			}
			if s < 256 {
				out = append(out, byte(s))
				continue
			}
			n := 3 + s - 257
			switch {
			case s == 285:
				n = 258
			case s >= 265:
				extra := (s - 261) / 4
				n = 3 + (4+(s-265)%4)<<extra + r.bits(extra)
			}
			d := r.symbol(dist)
			if d > 29 {
				return nil, 0, errInflate
			}
			far := d + 1
			if d >= 4 {
				extra := d/2 - 1
				far = 1 + (2+d%2)<<extra + r.bits(extra)
			}
			if r.bad || far > len(out) {
				return nil, 0, errInflate
			}
			distance = max(distance, far)
			for range n {
				out = append(out, out[len(out)-far])
			}
		}
	}
	if r.bad {
		return nil, 0, errInflate
	}
	return out, distance, nil
}

type slowBits struct {
	p   []byte
	at  int // in bits
	bad bool
}

func (r *slowBits) bits(n int) (x int) {
	for i := range n {
		if r.at/8 >= len(r.p) {
			r.bad = true
			return 0
		}
		x |= int(r.p[r.at/8]>>(r.at%8)&1) << i
		r.at++
	}
	return x
}

// A slowCode is a canonical Huffman code: its symbols by their code and its
// length.
type slowCode map[[2]int]int

func newSlowCode(lengths []int) slowCode {
	c := slowCode{}
	code := 0
	for n := 1; n <= 15; n++ {
		for s, l := range lengths {
			if l == n {
				c[[2]int{n, code}] = s
				code++
			}
		}
		code <<= 1
	}
	return c
}

func slowFixed() (lit, dist slowCode) {
	l, d := make([]int, 288), make([]int, 30)
	for i := range l {
		switch {
		case i < 144, i >= 280:
			l[i] = 8
		case i < 256:
			l[i] = 9
		default:
			l[i] = 7
		}
	}
	for i := range d {
		d[i] = 5
	}
	return newSlowCode(l), newSlowCode(d)
}

func (r *slowBits) symbol(c slowCode) int {
	code := 0
	for n := 1; n <= 15; n++ {
		code = code<<1 | r.bits(1)
		if s, ok := c[[2]int{n, code}]; ok {
			return s
		}
	}
	r.bad = true
	return 0
}

// codes reads the codes of a dynamic block.
func (r *slowBits) codes() (lit, dist slowCode, err error) {
	nl, nd, n := r.bits(5)+257, r.bits(5)+1, r.bits(4)+4
	own := make([]int, 19)
	for i := range n {
		own[[]int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[i]] = r.bits(3)
	}
	c := newSlowCode(own)
	var lengths []int
	for len(lengths) < nl+nd && !r.bad {
		s := r.symbol(c)
		x, times := s, 1
		switch {
		case s == 16 && len(lengths) == 0:
			return nil, nil, errInflate
		case s == 16:
			x, times = lengths[len(lengths)-1], 3+r.bits(2)
		case s == 17:
			x, times = 0, 3+r.bits(3)
		case s == 18:
			x, times = 0, 11+r.bits(7)
		}
		for range times {
			lengths = append(lengths, x)
		}
	}
	if r.bad || len(lengths) != nl+nd {
		return nil, nil, errInflate
	}
	return newSlowCode(lengths[:nl]), newSlowCode(lengths[nl:]), nil
}
