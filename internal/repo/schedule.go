package repo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// Scrub notes say when packs were last read. Nobody relies on them: what they
// get wrong is read earlier or later than it need be. docs/format/repository.md
// has the bytes.
const (
	scrubPrefix     = "scrub/"
	scrubHeadBytes  = 32
	scrubEntryBytes = 40
	// manyScrubs is how many notes are joined into one.
	manyScrubs = 8
	// recently is for how long a pack counts as read a short while ago.
	recently = 30 * 24 * time.Hour
)

var scrubMagic = []byte("BSTYSCR1")

// lastRead is when a pack was last read, in minutes since 1970; 0 is never.
type lastRead struct {
	scrub, data uint32
}

func minutes(t time.Time) uint32 { return uint32(max(0, t.Unix()/60)) }

func (l lastRead) newer(o lastRead) lastRead {
	return lastRead{max(l.scrub, o.scrub), max(l.data, o.data)}
}

// Verified says how long ago what is stored was last read and found to be as it
// was stored, or written down as damaged.
type Verified struct {
	Never       int64     // packs that no check has read yet
	Oldest      time.Time // of those that were; zero where there are none
	Bytes       int64     // of all packs
	RecentBytes int64     // of those that were read in the last 30 days
}

type scrubEntry struct {
	pack [32]byte
	lastRead
}

func encodeScrub(repo [16]byte, entries []scrubEntry) []byte {
	b := append([]byte(nil), scrubMagic...)
	b = append(b, repo[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(entries)))
	b = append(b, 0, 0, 0, 0)
	for _, e := range entries {
		b = append(b, e.pack[:]...)
		b = binary.LittleEndian.AppendUint32(b, e.scrub)
		b = binary.LittleEndian.AppendUint32(b, e.data)
	}
	sum := seal.Hash(b)
	return append(b, sum[:]...)
}

func decodeScrub(repo [16]byte, b []byte) ([]scrubEntry, error) {
	if len(b) < scrubHeadBytes+len(repo)*2 || !bytes.Equal(b[:8], scrubMagic) {
		return nil, errors.New("it does not begin like a scrub note")
	}
	front := b[:len(b)-32]
	if sum := seal.Hash(front); !bytes.Equal(sum[:], b[len(front):]) {
		return nil, errors.New("checksum does not match")
	}
	n := int64(binary.LittleEndian.Uint32(b[24:]))
	switch {
	case !bytes.Equal(b[8:24], repo[:]):
		return nil, fmt.Errorf("it belongs to repository %x", b[8:24])
	case binary.LittleEndian.Uint32(b[28:]) != 0:
		return nil, errors.New("header has bytes that must be zero")
	case int64(len(front)) != scrubHeadBytes+n*scrubEntryBytes:
		return nil, fmt.Errorf("%d entries in %d bytes", n, len(b))
	}
	entries := make([]scrubEntry, n)
	for i := range entries {
		p := front[scrubHeadBytes+i*scrubEntryBytes:]
		entries[i] = scrubEntry{[32]byte(p[:32]), lastRead{binary.LittleEndian.Uint32(p[32:]), binary.LittleEndian.Uint32(p[36:])}}
	}
	return entries, nil
}

// loadScrubs reads all notes. Times in the future are those of a clock that was
// wrong: they count as never. A damaged note says nothing.
func (c *check) loadScrubs(ctx context.Context) error {
	c.last = make([]lastRead, len(c.h.packs))
	now := minutes(c.o.now())
	for o, err := range c.r.st.List(ctx, scrubPrefix) {
		if err != nil {
			return err
		}
		if !isID(strings.TrimPrefix(o.Name, scrubPrefix)) {
			continue
		}
		b, err := readObject(ctx, c.r.st, o.Name)
		if err != nil && !errors.Is(err, fault.ErrNotFound) && !errors.Is(err, fault.ErrCorrupt) {
			return err
		}
		entries, err := decodeScrub(c.r.id, b)
		if err != nil {
			c.badScrubs = append(c.badScrubs, o.Name)
			continue
		}
		c.scrubs = append(c.scrubs, o.Name)
		c.h.mu.RLock()
		for _, e := range entries {
			if n, ok := c.h.number(e.pack); ok && int(n) < len(c.last) && e.scrub <= now && e.data <= now {
				c.last[n] = c.last[n].newer(e.lastRead)
			}
		}
		c.h.mu.RUnlock()
	}
	return nil
}

func (o *CheckOptions) now() time.Time {
	if o.Now != nil {
		return o.Now()
	}
	return time.Now()
}

// limited says whether this check reads only some packs.
func (o *CheckOptions) limited() bool { return o.Budget > 0 || o.For > 0 }

// due puts what is to be read in order: everything but packs, which is little,
// then packs with their parity, those first that were read longest ago. A budget
// cuts the list.
func (c *check) due(objects []blob.Object) []blob.Object {
	if !c.o.limited() {
		return objects
	}
	type pair struct {
		at    uint32 // when it was last read
		parts []blob.Object
	}
	var first []blob.Object
	packs := map[[32]byte]*pair{}
	var order []*pair
	for _, o := range objects {
		id, ok := parsePackName(strings.TrimPrefix(o.Name, parityPrefix))
		if !ok {
			first = append(first, o)
			continue
		}
		p := packs[id]
		if p == nil {
			p = &pair{}
			if n, ok := c.h.number(id); ok && int(n) < len(c.last) {
				if p.at = c.last[n].scrub; c.o.ReadData {
					p.at = c.last[n].data
				}
			}
			packs[id] = p
			order = append(order, p)
		}
		p.parts = append(p.parts, o)
	}
	slices.SortStableFunc(order, func(a, b *pair) int { return cmp.Compare(a.at, b.at) })
	budget := c.o.Budget
	for _, p := range order {
		if c.o.Budget > 0 && budget <= 0 {
			break
		}
		for _, o := range p.parts {
			budget -= o.Bytes
			first = append(first, o)
		}
	}
	return first
}

// wasRead notes that a pack was read, whatever was found.
func (c *check) wasRead(id [32]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := scrubEntry{pack: id, lastRead: lastRead{scrub: minutes(c.o.now())}}
	if c.o.ReadData {
		e.data = e.scrub
	}
	c.reads = append(c.reads, e)
}

// record writes down which packs were read, in a note of its own, and joins all
// notes into it where there are many. Two checks that do so at once both write
// what they know, and neither deletes what it has not read.
func (c *check) record(ctx context.Context) error {
	gone := c.badScrubs
	if len(c.reads) == 0 {
		return nil
	}
	entries := c.reads
	join := len(c.scrubs) >= manyScrubs
	if join {
		entries = nil
		for n, l := range c.last {
			if p := &c.h.packs[n]; l != (lastRead{}) && p.state != packMissing {
				entries = append(entries, scrubEntry{p.id, l})
			}
		}
	}
	slices.SortFunc(entries, func(a, b scrubEntry) int { return compareIDs(a.pack, b.pack) })
	id, _, err := newID()
	if err != nil {
		return err
	}
	if err := create(ctx, c.r.st, scrubPrefix+id, encodeScrub(c.r.id, entries)); err != nil {
		return err
	}
	if join {
		gone = slices.Concat(gone, c.scrubs)
	}
	for _, name := range gone {
		err := c.r.st.Delete(ctx, name)
		if err != nil && !errors.Is(err, fault.ErrLocked) && !errors.Is(err, fault.ErrDenied) {
			return err
		}
	}
	return nil
}

// keep writes down what was found and what was read, also of a check that was
// interrupted.
func (c *check) keep(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	c.report.Unnoted = c.note(ctx)
	c.report.Unkept = c.record(ctx)
}

// sumUp takes what this check read into account and says how old all of it is.
func (c *check) sumUp() {
	c.h.mu.RLock()
	defer c.h.mu.RUnlock()
	for _, e := range c.reads {
		if n, ok := c.h.number(e.pack); ok && int(n) < len(c.last) {
			c.last[n] = c.last[n].newer(e.lastRead)
		}
	}
	v := &c.report.Verified
	since := minutes(c.o.now().Add(-recently))
	for n, l := range c.last {
		p := &c.h.packs[n]
		if p.state == packMissing {
			continue
		}
		v.Bytes += p.bytes
		at := time.Unix(int64(l.scrub)*60, 0).UTC()
		switch {
		case l.scrub == 0:
			v.Never++
		case v.Oldest.IsZero() || at.Before(v.Oldest):
			v.Oldest = at
		}
		if l.scrub > 0 && l.scrub >= since {
			v.RecentBytes += p.bytes
		}
	}
}
