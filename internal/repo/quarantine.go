package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

const quarantinePrefix = "quarantine/"

// quarantineNote is one of quarantine/: which records of which packs a check
// found damaged, so that nobody relies on them any more.
type quarantineNote struct {
	Format int              `json:"format"`
	Packs  []quarantinePack `json:"packs"`
}

// quarantinePack are the damaged records of one pack, by their offsets. There
// are none where only the pack's frame is damaged.
type quarantinePack struct {
	Pack    string   `json:"pack"`
	Records []uint32 `json:"records"`
}

// offsets are those of records in a pack.
type offsets map[uint32]bool

// A quarantine is what all notes say together, of packs that are there.
type quarantine struct {
	packs map[[32]byte]offsets
	notes map[string][][32]byte // the packs that each note names; none for one that cannot be read
}

func newQuarantine() quarantine {
	return quarantine{map[[32]byte]offsets{}, map[string][][32]byte{}}
}

func (q *quarantine) add(pack [32]byte, records ...uint32) {
	if q.packs[pack] == nil {
		q.packs[pack] = offsets{}
	}
	for _, off := range records {
		q.packs[pack][off] = true
	}
}

// quarantines lists the names of all notes.
func (r *Repository) quarantines(ctx context.Context) (names []string, err error) {
	for o, err := range r.st.List(ctx, quarantinePrefix) {
		if err != nil {
			return nil, err
		}
		if isID(strings.TrimPrefix(o.Name, quarantinePrefix)) {
			names = append(names, o.Name)
		}
	}
	return names, nil
}

// loadQuarantine reads the notes. One that is damaged says nothing: the next
// check finds out again what it said.
func (r *Repository) loadQuarantine(ctx context.Context, h *holdings) error {
	names, err := r.quarantines(ctx)
	if err != nil {
		return err
	}
	h.state += strings.Join(names, "\n")
	for _, name := range names {
		b, err := readObject(ctx, r.st, name)
		if errors.Is(err, fault.ErrNotFound) {
			continue
		}
		var note quarantineNote
		if err == nil {
			note, err = decodeQuarantine(name, b)
		}
		if errors.Is(err, fault.ErrCorrupt) {
			h.quarantine.notes[name] = nil
			h.findings = append(h.findings, Finding{Object: name, Offset: -1, Err: err})
			continue
		}
		if err != nil {
			return err
		}
		for _, p := range note.Packs {
			id, _ := hexID(p.Pack) // decodeQuarantine refuses others
			h.quarantine.notes[name] = append(h.quarantine.notes[name], id)
			n, ok := h.number(id)
			if !ok {
				continue
			}
			h.quarantine.add(id)
			for _, off := range p.Records {
				if int64(off) < h.packs[n].bytes {
					h.quarantine.add(id, off)
				}
			}
		}
	}
	return nil
}

func decodeQuarantine(name string, b []byte) (note quarantineNote, err error) {
	if err := object.Decode(name, b, &note); err != nil {
		return note, err
	}
	if note.Format > formatVersion {
		return note, fmt.Errorf("%s has format %d, this version reads up to %d: %w", name, note.Format, formatVersion, fault.ErrUnsupported)
	}
	for _, p := range note.Packs {
		if _, err := hexID(p.Pack); err != nil {
			return note, &fault.CorruptError{Object: name, Offset: -1, Err: err}
		}
	}
	return note, nil
}

// Trust says how far the record at a place can be relied on; less is better.
type trust uint8

const (
	sound       trust = iota
	quarantined       // a check found it damaged
	inDamaged         // its pack lost its end
	missing           // its pack is gone
)

// trust is asked with h.mu held.
func (h *holdings) trust(p index.Place) trust {
	switch in := &h.packs[p.Pack]; {
	case in.state == packMissing:
		return missing
	case in.state == packDamaged:
		return inDamaged
	case h.quarantine.packs[in.id][p.Off]:
		return quarantined
	}
	return sound
}

// doubt says whether there is any chunk that is indexed and not to be relied
// on.
func (h *holdings) doubt() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.bad)+len(h.quarantine.packs) > 0 ||
		slices.ContainsFunc(h.packs, func(p heldPack) bool { return p.state != packSound })
}

// quarantined says whether a check found anything of that pack damaged.
func (h *holdings) quarantined(pack [32]byte) bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	_, ok := h.quarantine.packs[pack]
	return ok
}

// inQuarantine says whether a check found that record damaged.
func (h *holdings) inQuarantine(pack [32]byte, off uint32) bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.quarantine.packs[pack][off]
}

// note writes down what this check found damaged and no earlier one did, and
// takes back what earlier ones wrote of packs that turned out to be sound.
func (c *check) note(ctx context.Context) error {
	var note quarantineNote
	c.h.mu.Lock()
	known := c.h.quarantine
	for _, id := range slices.SortedFunc(maps.Keys(c.damaged.packs), compareIDs) {
		had, ok := known.packs[id]
		p := quarantinePack{Pack: hex.EncodeToString(id[:]), Records: []uint32{}}
		for _, off := range slices.Sorted(maps.Keys(c.damaged.packs[id])) {
			if !had[off] {
				p.Records = append(p.Records, off)
			}
		}
		if !ok || len(p.Records) > 0 {
			note.Packs = append(note.Packs, p)
		}
	}
	var healed []string
	for name, packs := range known.notes {
		over := func(id [32]byte) bool {
			n, ok := c.h.number(id)
			return !ok || c.h.packs[n].state == packMissing || c.whole[id]
		}
		if len(packs) > 0 && !slices.ContainsFunc(packs, func(id [32]byte) bool { return !over(id) }) {
			healed = append(healed, name)
		}
	}
	c.h.mu.Unlock()
	for _, name := range healed {
		if err := c.r.st.Delete(ctx, name); err != nil {
			return err
		}
	}
	if len(note.Packs) == 0 {
		return nil
	}
	note.Format = formatVersion
	b, err := object.Encode(note)
	if err != nil {
		return err
	}
	id, _, err := newID()
	if err != nil {
		return err
	}
	// The next session sees it in the store, and loads again.
	return create(ctx, c.r.st, quarantinePrefix+id, b)
}

func compareIDs(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) }

// Doubtful are the chunks of the previous point, cut at within, that the
// repository knows it may not be able to give back: damaged, or in a pack that
// is gone. A backup that stores them again makes every point whole that has
// them.
func (w *DiskWriter) Doubtful(ctx context.Context, within extent.Extent) (set extent.Set, err error) {
	h, err := w.s.r.held(ctx)
	if err != nil || w.prev == nil || within.Off >= w.prev.Size() || !h.doubt() {
		return set, err
	}
	first, end, err := w.prev.within(within.Intersect(extent.Extent{Len: w.prev.Size()}))
	if err != nil {
		return set, err
	}
	err = w.prev.walk(ctx, first, end, func(i int64, c ref) error {
		_, stored, err := w.s.r.stores(ctx, h, w.s.r.recordID(c))
		if err == nil && stored && c.overlay() {
			_, stored, err = w.s.r.stores(ctx, h, c.base)
		}
		if err == nil && !stored {
			set.Add(w.prev.extent(i).Intersect(within))
		}
		return err
	})
	return set, err
}

// planQuarantine lists the notes of which no pack stays, and those that cannot
// be read.
func (v *vacuum) planQuarantine(goes map[[32]byte]bool) {
	stays := func(id [32]byte) bool {
		n, ok := v.h.number(id)
		return ok && v.h.packs[n].state != packMissing && !goes[id]
	}
	for _, name := range slices.Sorted(maps.Keys(v.h.quarantine.notes)) {
		if !slices.ContainsFunc(v.h.quarantine.notes[name], stays) {
			v.plan = append(v.plan, name)
		}
	}
}
