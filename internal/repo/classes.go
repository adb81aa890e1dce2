package repo

import (
	"encoding/binary"
	"slices"
)

// A class says who needs a chunk, as far as Usage asks. Classes are numbered
// and there is one of a kind: many chunks have few of them.
type class struct {
	first uint32 // the oldest point that needs it
	only  uint32 // the one point that needs it, or manyPoints
	vms   uint32 // the set of VMs that need it
}

const manyPoints = 1<<32 - 1

// classes numbers classes and sets of VMs. Class 0 is nobody.
type classes struct {
	of     map[class]uint32
	all    []class
	sets   map[string]uint32
	vms    [][]uint32 // by set: VMs, ascending
	joined map[[2]uint32]uint32
	united map[[2]uint32]uint32
}

func newClasses() *classes {
	c := &classes{of: map[class]uint32{}, sets: map[string]uint32{}, joined: map[[2]uint32]uint32{}, united: map[[2]uint32]uint32{}}
	c.all = []class{{}} // nobody
	return c
}

func (c *classes) number(k class) uint32 {
	n, ok := c.of[k]
	if !ok {
		n = uint32(len(c.all))
		c.of[k] = n
		c.all = append(c.all, k)
	}
	return n
}

func (c *classes) set(vms []uint32) uint32 {
	b := make([]byte, 0, 4*len(vms))
	for _, v := range vms {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	n, ok := c.sets[string(b)]
	if !ok {
		n = uint32(len(c.vms))
		c.sets[string(b)] = n
		c.vms = append(c.vms, vms)
	}
	return n
}

// point is the class of what one point alone needs.
func (c *classes) point(p, vm uint32) uint32 {
	return c.number(class{first: p, only: p, vms: c.set([]uint32{vm})})
}

// join is the class of what is in both a and b.
func (c *classes) join(a, b uint32) uint32 {
	switch {
	case a == b || b == 0:
		return a
	case a == 0:
		return b
	case a > b:
		a, b = b, a
	}
	n, ok := c.joined[[2]uint32{a, b}]
	if !ok {
		x, y := c.all[a], c.all[b]
		k := class{first: min(x.first, y.first), only: x.only, vms: c.unite(x.vms, y.vms)}
		if x.only != y.only {
			k.only = manyPoints
		}
		n = c.number(k)
		c.joined[[2]uint32{a, b}] = n
	}
	return n
}

func (c *classes) unite(a, b uint32) uint32 {
	if a == b {
		return a
	}
	if a > b {
		a, b = b, a
	}
	n, ok := c.united[[2]uint32{a, b}]
	if !ok {
		vms := slices.Concat(c.vms[a], c.vms[b])
		slices.Sort(vms)
		n = c.set(slices.Compact(vms))
		c.united[[2]uint32{a, b}] = n
	}
	return n
}
