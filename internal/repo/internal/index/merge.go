package index

import "context"

// Merge calls fn with the place of every chunk that is in memory or in one of
// runs, which are some of the set's, the newest first: in the order of the keys,
// with the best place by rank. In memory are one shard of the table and a
// megabyte of each run. An error of a run is a PartError.
func (s *Set) Merge(ctx context.Context, runs []*Run, rank func(Place) uint8, fn func(Key, Place) error) error {
	cursors := []cursor{&tableCursor{t: &s.fresh}}
	for _, r := range runs {
		cursors = append(cursors, &runCursor{r: r, sum: newSummer()})
	}
	type head struct {
		Located
		c cursor
	}
	var heads []head // of those that are not at their end, the newest first
	for _, c := range cursors {
		e, ok, err := c.next(ctx)
		if err != nil {
			return err
		}
		if ok {
			heads = append(heads, head{e, c})
		}
	}
	for len(heads) > 0 {
		least := 0
		for i := 1; i < len(heads); i++ {
			if heads[i].Key.Compare(&heads[least].Key) < 0 {
				least = i
			}
		}
		e := heads[least].Located
		best := rank(e.Place)
		for i := least; i < len(heads); i++ {
			if heads[i].Key != e.Key {
				continue
			}
			if r := rank(heads[i].Place); r < best {
				e, best = heads[i].Located, r
			}
			next, ok, err := heads[i].c.next(ctx)
			if err != nil {
				return err
			}
			if heads[i].Located = next; !ok {
				heads = append(heads[:i], heads[i+1:]...)
				i--
			}
		}
		if err := fn(e.Key, e.Place); err != nil {
			return err
		}
	}
	return nil
}

// A cursor walks entries in the order of their keys.
type cursor interface {
	next(ctx context.Context) (e Located, ok bool, err error)
}

type tableCursor struct {
	t     *Table
	shard int
	left  []Located
	buf   []Located
}

func (c *tableCursor) next(context.Context) (e Located, ok bool, err error) {
	for len(c.left) == 0 {
		if c.shard == shards {
			return e, false, nil
		}
		c.buf = c.t.sorted(c.shard, c.buf)
		c.left = c.buf
		c.shard++
	}
	e, c.left = c.left[0], c.left[1:]
	return e, true, nil
}

// A runCursor passes over parts that do not count and packs that are gone.
type runCursor struct {
	r    *Run
	sum  *summer
	part int
	no   int64  // of the next block to read in the part
	buf  []byte // blocks that were read and not yet looked into
	room []byte
	n    int // entries left in the first block of buf
	at   int
}

func (c *runCursor) next(ctx context.Context) (e Located, ok bool, err error) {
	for {
		for c.at == c.n {
			if ok, err := c.block(ctx); !ok || err != nil {
				return e, false, err
			}
		}
		rec := getRecord(c.buf[c.at*recordBytes:])
		c.at++
		n, err := c.r.number(&rec)
		if err != nil {
			return e, false, &PartError{c.r.parts[c.part].name, err}
		}
		if n != Gone {
			return Located{rec.key, Place{n, rec.off, rec.clen}}, true, nil
		}
	}
}

// block goes to the next block, if there is one.
func (c *runCursor) block(ctx context.Context) (ok bool, err error) {
	if len(c.buf) > 0 {
		c.buf = c.buf[blockBytes:]
	}
	for len(c.buf) == 0 {
		for c.part < len(c.r.parts) && (c.r.parts[c.part].lost() || c.no == blocks(c.r.parts[c.part].entries)) {
			c.part++
			c.no = 0
		}
		if c.part == len(c.r.parts) {
			return false, nil
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
		p := &c.r.parts[c.part]
		n := min(windowBlocks, blocks(p.entries)-c.no)
		if int64(cap(c.room)) < n*blockBytes {
			c.room = make([]byte, n*blockBytes)
		}
		c.buf = c.room[:n*blockBytes]
		if err := c.r.read(ctx, p.name, c.buf, (c.no+1)*blockBytes); err != nil {
			return false, &PartError{p.name, err}
		}
		for i := range n {
			if err := c.r.check(c.sum, uint32(c.part), c.no+i, c.buf[i*blockBytes:][:blockBytes]); err != nil {
				return false, err
			}
		}
		c.no += n
	}
	p := &c.r.parts[c.part]
	c.n = inBlock(p.entries, c.no-int64(len(c.buf)/blockBytes))
	c.at = 0
	return true, nil
}
