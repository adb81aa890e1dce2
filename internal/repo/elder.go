package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"maps"
	"slices"
	"syscall"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// A twin is a chunk of which two flat index objects name a record each.
type twin struct {
	key          index.Key
	older, newer index.Place
}

// load loads the holdings and notes what is there twice.
func (v *vacuum) load(ctx context.Context) (err error) {
	h := newHoldings()
	h.noteTwins = true
	v.h, err = v.r.loadInto(ctx, h)
	h.noteTwins = false
	return err
}

// elders makes the oldest sound record of each chunk the one that counts in this
// vacuum, where there are several: whoever may add packs could otherwise have
// good records vacuumed away by storing others of the same name. Older is what is
// in a run, and of flat index objects what is in the first by name; of runs the
// one of the lowest generation. Readers go on taking the newest, which may be a
// healed copy, until this vacuum has written its index.
//
// It takes memory for the chunks that were stored again since the last vacuum, and
// reads their records.
func (v *vacuum) elders(ctx context.Context) error {
	all := map[index.Key][]index.Place{} // the oldest first
	for _, t := range v.h.twins {
		if all[t.key] == nil {
			all[t.key] = []index.Place{t.older}
		}
		all[t.key] = append(all[t.key], t.newer)
	}
	err := v.h.table.Twice(ctx, func(k index.Key, fresh index.Place, older []index.Place) error {
		slices.Reverse(older)
		if all[k] == nil {
			older = append(older, fresh)
		}
		all[k] = append(older, all[k]...)
		return nil
	})
	if err != nil {
		return err
	}
	v.elected = map[index.Key][]index.Place{}
	for _, k := range slices.SortedFunc(maps.Keys(all), func(a, b index.Key) int { return a.Compare(&b) }) {
		if err := v.elect(ctx, k, all[k]); err != nil {
			return err
		}
	}
	v.h.twins = nil
	return nil
}

// elect decides which of places, the oldest first, counts.
func (v *vacuum) elect(ctx context.Context, k index.Key, places []index.Place) error {
	v.h.mu.RLock()
	places = slices.DeleteFunc(places, func(p index.Place) bool { return v.h.trust(p) != sound })
	v.h.mu.RUnlock()
	for ; len(places) > 1; places = places[1:] {
		rec, err := v.sound(ctx, k, places[0])
		if err != nil {
			return err
		}
		if rec == nil {
			continue
		}
		// A copy of it, byte for byte, is what an earlier vacuum made that died.
		// To take that spares making it again.
		elder := 0
		for i := len(places) - 1; i > 0 && elder == 0; i-- {
			again, err := v.r.recordAt(ctx, v.h.packs[places[i].Pack].name(), places[i])
			if err != nil {
				return err
			}
			if bytes.Equal(again, rec) {
				elder = i
			}
		}
		if elder < len(places)-1 {
			v.elected[k] = places
		}
		v.h.table.Insert(k, places[elder], func(index.Place) bool { return true })
		return nil
	}
	return nil
}

// sound gives the record at a place, or nil if it is damaged: by its checksum, and
// by what is in it if there are keys.
func (v *vacuum) sound(ctx context.Context, k index.Key, at index.Place) ([]byte, error) {
	rec, err := v.r.recordAt(ctx, v.h.packs[at.Pack].name(), at)
	if rec == nil || err != nil {
		return nil, err
	}
	e, err := pack.CheckRecord(rec)
	if err != nil || index.KeyOf(e.ID) != k {
		return nil, nil
	}
	if v.r.keys == nil || e.Encoding == pack.Overlay {
		return rec, nil
	}
	w := v.r.worker(readLevel)
	defer v.r.idle(readLevel, w)
	if _, err := w.Open(nil, bytes.Clone(rec), e.ID); err != nil {
		return nil, nil
	}
	return rec, nil
}

// recordAt reads a record, or gives nil where there is none that can be read.
func (r *Repository) recordAt(ctx context.Context, name string, at index.Place) ([]byte, error) {
	rec := make([]byte, pack.RecordOverhead+int64(at.CLen))
	n, err := r.st.ReadAt(ctx, name, rec, int64(at.Off))
	switch {
	case err == nil || errors.Is(err, io.EOF):
	case errors.Is(err, fault.ErrNotFound), errors.Is(err, fault.ErrCorrupt), errors.Is(err, syscall.EIO):
		return nil, nil
	default:
		return nil, err
	}
	if n < len(rec) {
		return nil, nil
	}
	return rec, nil
}

// younger gives chunks whose elder goes the youngest of their records that stay:
// nothing needs them any more, but a session that began before may.
func (v *vacuum) younger(stays func(uint32) bool) {
	for k, places := range v.elected {
		if p, ok := v.h.table.Fresh(k); !ok || stays(p.Pack) {
			continue
		}
		for i := len(places) - 1; i >= 0; i-- {
			if stays(places[i].Pack) {
				v.h.table.Insert(k, places[i], func(index.Place) bool { return true })
				break
			}
		}
	}
}

// A wrongRecord is one that somebody read and found to be another chunk than it
// should be.
type wrongRecord struct {
	pack [32]byte
	id   chunk.ID
	at   index.Place
}

// manyWrong bounds how many of them are remembered.
const manyWrong = 1 << 16

func (r *Repository) remember(w wrongRecord) {
	r.workMu.Lock()
	defer r.workMu.Unlock()
	if len(r.wrong) < manyWrong && !slices.Contains(r.wrong, w) {
		r.wrong = append(r.wrong, w)
	}
}

// noteWrong writes a note of records that were found wrong, twice, although their
// checksums are right: a vacuum without keys would take them for sound, and for
// the elder. Where it may not, as through a repository server, a check has to.
func (r *Repository) noteWrong(ctx context.Context) {
	r.workMu.Lock()
	wrong := r.wrong
	r.wrong = nil
	r.workMu.Unlock()
	h := r.current()
	if len(wrong) == 0 || h == nil {
		return
	}
	found := newQuarantine()
	for _, w := range wrong {
		if h.inQuarantine(w.pack, w.at.Off) {
			continue
		}
		rec, err := r.recordAt(ctx, packName(w.pack), w.at)
		if err != nil || rec == nil {
			continue
		}
		e, err := pack.CheckRecord(rec)
		if err != nil || e.ID != w.id {
			continue // anybody can see that
		}
		pw := r.worker(readLevel)
		if _, err := pw.Open(nil, rec, w.id); err != nil && !errors.Is(err, pack.ErrOverlay) {
			found.add(w.pack, w.at.Off)
		}
		r.idle(readLevel, pw)
	}
	note := quarantineNote{Format: formatVersion}
	for _, id := range slices.SortedFunc(maps.Keys(found.packs), func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) }) {
		note.Packs = append(note.Packs, quarantinePack{Pack: hex.EncodeToString(id[:]), Records: slices.Sorted(maps.Keys(found.packs[id]))})
	}
	if len(note.Packs) == 0 {
		return
	}
	if b, err := object.Encode(note); err == nil {
		if id, _, err := newID(); err == nil {
			_ = create(ctx, r.st, quarantinePrefix+id, b)
		}
	}
}
