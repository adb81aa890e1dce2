// Package extent does arithmetic on the byte ranges of a disk.
package extent

import (
	"fmt"
	"sort"
)

// An Extent is the half-open byte range [Off, Off+Len).
type Extent struct {
	Off int64 // bytes from the start of the disk
	Len int64 // bytes
}

// End is the first byte behind e.
func (e Extent) End() int64 { return e.Off + e.Len }

// Intersect is what e and f share; its Len is 0 where they share nothing.
func (e Extent) Intersect(f Extent) Extent {
	off, end := max(e.Off, f.Off), min(e.End(), f.End())
	if end <= off {
		return Extent{Off: off}
	}
	return Extent{off, end - off}
}

// Align widens e to multiples of unit and cuts it at limit, the disk's size.
func (e Extent) Align(unit, limit int64) Extent {
	if e.Len == 0 {
		return Extent{Off: e.Off}
	}
	off := e.Off / unit * unit
	end := e.End()
	if r := end % unit; r != 0 {
		end += unit - r
	}
	return Extent{off, min(end, limit) - off}
}

func (e Extent) String() string { return fmt.Sprintf("[%d,+%d)", e.Off, e.Len) }

// A Set is a set of bytes as sorted extents that neither overlap nor touch.
// The zero Set is empty. A Set is not safe for concurrent changes.
type Set struct{ list []Extent }

// NewSet makes a Set of extents in any order.
func NewSet(extents ...Extent) Set {
	var s Set
	for _, e := range extents {
		s.Add(e)
	}
	return s
}

// Add puts e into s. Adding in ascending order takes constant time each.
func (s *Set) Add(e Extent) {
	if e.Len <= 0 {
		return
	}
	if n := len(s.list); n == 0 || s.list[n-1].End() < e.Off {
		s.list = append(s.list, e)
		return
	}
	// i is the first extent that ends at or after e.Off, j the first that
	// starts behind e: all between melt into one.
	i := sort.Search(len(s.list), func(i int) bool { return s.list[i].End() >= e.Off })
	j := i
	end := e.End()
	for j < len(s.list) && s.list[j].Off <= end {
		e.Off = min(e.Off, s.list[j].Off)
		end = max(end, s.list[j].End())
		j++
	}
	e.Len = end - e.Off
	if i == j {
		s.list = append(s.list, Extent{})
		copy(s.list[i+1:], s.list[i:])
		s.list[i] = e
		return
	}
	s.list[i] = e
	s.list = append(s.list[:i+1], s.list[j:]...)
}

// List gives the extents in ascending order. The caller must not change them.
func (s Set) List() []Extent { return s.list }

// Bytes is how many bytes s holds.
func (s Set) Bytes() int64 {
	var n int64
	for _, e := range s.list {
		n += e.Len
	}
	return n
}

// Within is the part of s that lies in e.
func (s Set) Within(e Extent) Set {
	var out Set
	i := sort.Search(len(s.list), func(i int) bool { return s.list[i].End() > e.Off })
	for ; i < len(s.list) && s.list[i].Off < e.End(); i++ {
		out.Add(s.list[i].Intersect(e))
	}
	return out
}

// Contains says whether every byte of e is in s.
func (s Set) Contains(e Extent) bool {
	if e.Len == 0 {
		return true
	}
	i := sort.Search(len(s.list), func(i int) bool { return s.list[i].End() > e.Off })
	return i < len(s.list) && s.list[i].Off <= e.Off && s.list[i].End() >= e.End()
}

// Union is the bytes that are in s, in t or in both.
func (s Set) Union(t Set) Set {
	var out Set
	a, b := s.list, t.list
	for len(a) > 0 || len(b) > 0 {
		if len(b) == 0 || len(a) > 0 && a[0].Off <= b[0].Off {
			out.Add(a[0])
			a = a[1:]
		} else {
			out.Add(b[0])
			b = b[1:]
		}
	}
	return out
}

// Subtract is the bytes of s that are not in t.
func (s Set) Subtract(t Set) Set {
	var out Set
	b := t.list
	for _, e := range s.list {
		for len(b) > 0 && b[0].End() <= e.Off {
			b = b[1:]
		}
		off := e.Off
		for _, f := range b {
			if f.Off >= e.End() {
				break
			}
			out.Add(Extent{off, f.Off - off}) // Add ignores what is empty or negative
			off = max(off, f.End())
		}
		out.Add(Extent{off, e.End() - off})
	}
	return out
}

// Align widens every extent to multiples of unit and cuts at limit bytes.
func (s Set) Align(unit, limit int64) Set {
	var out Set
	for _, e := range s.list {
		out.Add(e.Align(unit, limit))
	}
	return out
}
