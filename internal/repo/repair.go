package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
)

// RepairOptions say what to repair, and from what.
type RepairOptions struct {
	Scrub    bool        // re-read every stored byte first, to find all damage
	ReadData bool        // decrypt, decompress and re-hash it, too; needs keys
	From     *Repository // a copy of this repository, with the same id; may be nil
	DryRun   bool        // say what would be done, and do nothing
	Progress func(doneBytes, totalBytes int64)
}

// By what something was healed.
const (
	ByParity = "parity"
	ByCopy   = "copy" // of the repository
	ByName   = "name" // its bytes lay under another one
)

// Mended is one object that was damaged, and what became of it.
type Mended struct {
	Object string
	By     []string // ByParity, ByCopy, or both, or ByName; none if nothing heals it
	// Of a pack: records that points may need, of which so many can be read as
	// they are, were healed, and are lost.
	Sound, Healed, Lost int
	// Err is why no more could be done; nil if all is well again.
	Err error
}

// A RepairReport says what was, or would be, repaired and what is left.
type RepairReport struct {
	Mended      []Mended
	ParityMade  int64 // objects that got parity
	ParityBytes int64
	StoredBytes int64 // of records, in new packs
	// Left is what a check says afterwards: what is still damaged, with the parts
	// of restore points that it hits.
	Left CheckReport
}

// Repair heals what damage it can: from parity, or from a copy of the
// repository. It needs no keys. Without Scrub and ReadData it is about damage
// that earlier checks found, and what is easily seen.
//
// Records of damaged packs are stored again in new packs; the damaged ones stay,
// for Vacuum to delete when nothing in them is needed. Nothing is believed that
// its own checksum does not prove. What cannot be healed is left as it is: the
// next backup may store it again.
func (r *Repository) Repair(ctx context.Context, o RepairOptions) (RepairReport, error) {
	var rep RepairReport
	if o.From != nil && o.From.id != r.id {
		return rep, fmt.Errorf("%s is not a copy of repository %s but repository %s: %w", o.From.st, r.ID()[:8], o.From.ID()[:8], fault.ErrUnsupported)
	}
	c, err := r.look(ctx, CheckOptions{Scrub: o.Scrub, ReadData: o.ReadData, Progress: o.Progress}, !o.DryRun)
	if err != nil {
		return rep, err
	}
	m := &mender{r: r, o: o, c: c, report: &rep, gone: map[string]bool{}, tried: map[string]bool{}, aside: map[string]string{}}
	if n, err := m.misplaced(ctx); err != nil {
		return rep, err
	} else if n > 0 && !o.DryRun {
		if m.c, err = r.look(ctx, CheckOptions{}, false); err != nil {
			return rep, err
		}
	}
	for {
		n, err := m.objects(ctx)
		if err != nil {
			return rep, err
		}
		if n == 0 || o.DryRun {
			break
		}
		// Only now is it known what else points need.
		if m.c, err = r.look(ctx, CheckOptions{}, false); err != nil {
			return rep, err
		}
	}
	if err := m.packs(ctx); err != nil {
		return rep, err
	}
	if err := m.parity(ctx, c); err != nil {
		return rep, err
	}
	if o.DryRun {
		rep.Left = c.report
		rep.Left.Findings = nil
	} else {
		after, err := r.look(ctx, CheckOptions{}, false)
		if err != nil {
			return rep, err
		}
		rep.Left = after.report
	}
	m.leave(c, o.DryRun)
	return rep, nil
}

// A mender is one run of Repair.
type mender struct {
	r      *Repository
	o      RepairOptions
	c      *check
	report *RepairReport
	gone   map[string]bool   // objects that are, or would be, damaged no more
	tried  map[string]bool   // small objects
	aside  map[string]string // records that lay in the place of another: where they are until they are in theirs
}

func (m *mender) say(d Mended) {
	m.report.Mended = append(m.report.Mended, d)
	if d.Err == nil {
		m.gone[d.Object] = true
	}
}

// packs heals what lies in damaged packs: those in quarantine, those that lost
// their end or all of themselves, and those that this run found.
func (m *mender) packs(ctx context.Context) error {
	want := map[uint32]map[uint32]index.Key{} // what the index places in it: by pack, by offset
	damaged := map[uint32]bool{}
	if len(m.c.bad) > 0 {
		err := m.eachPlace(ctx, func(k index.Key, at index.Place) {
			if _, ok := m.c.bad[k]; ok {
				damaged[at.Pack] = true
			}
		})
		if err != nil {
			return err
		}
	}
	for n, used := range m.c.used {
		p := &m.c.h.packs[n]
		_, found := m.c.damaged.packs[p.id]
		if used && (found || damaged[uint32(n)] || p.state != packSound || m.c.h.quarantined(p.id)) {
			want[uint32(n)] = map[uint32]index.Key{}
		}
	}
	if len(want) == 0 {
		return nil
	}
	err := m.eachPlace(ctx, func(k index.Key, at index.Place) {
		if in := want[at.Pack]; in != nil {
			in[at.Off] = k
		}
	})
	if err != nil {
		return err
	}
	var s *Session
	if !m.o.DryRun {
		if s, err = m.r.begin(ctx, SessionOptions{}); err != nil {
			return err
		}
		defer s.Abort(context.WithoutCancel(ctx))
	}
	var packs []uint32
	for n := range want {
		packs = append(packs, n)
	}
	slices.SortFunc(packs, func(a, b uint32) int { return compareIDs(m.c.h.packs[a].id, m.c.h.packs[b].id) })
	for _, n := range packs {
		if err := m.pack(ctx, s, m.c.h.packs[n], want[n]); err != nil {
			return err
		}
	}
	if s == nil {
		return nil
	}
	return s.Commit(ctx)
}

// eachPlace calls fn with the place of every chunk, perhaps of some twice.
func (m *mender) eachPlace(ctx context.Context, fn func(index.Key, index.Place)) error {
	for range loadTries {
		err := m.c.h.table.Each(ctx, func(k index.Key, at index.Place) error {
			fn(k, at)
			return ctx.Err()
		})
		if err == nil {
			return nil
		}
		if h, err := m.r.mend(ctx, m.c.h, err); err != nil {
			return err
		} else if h != m.c.h {
			return errors.New("the index was replaced by a vacuum meanwhile: try again")
		}
	}
	return fmt.Errorf("the index cannot be read: %w", fault.ErrCorrupt)
}

// pack stores again what the index expects in pack p: what can be read, what
// parity heals, and what the copy has.
func (m *mender) pack(ctx context.Context, s *Session, p heldPack, want map[uint32]index.Key) error {
	got := Mended{Object: p.name()}
	w, err := m.r.openWreck(ctx, p)
	if err != nil {
		return err
	}
	var sl *slot
	if s != nil {
		sl = s.openSlot(nil)
		defer s.closeSlot(sl)
	}
	by := map[string]bool{}
	offs := make([]uint32, 0, len(want))
	for off := range want {
		offs = append(offs, off)
	}
	slices.Sort(offs)
	for _, off := range offs {
		k := want[off]
		_, bad := m.c.bad[k]
		e, rec, healed := w.record(off, k, bad || m.c.h.inQuarantine(p.id, off))
		switch {
		case rec == nil && m.o.From != nil:
			if e, rec, err = m.o.From.copyOf(ctx, k); err != nil {
				return err
			}
			if rec != nil {
				by[ByCopy] = true
				got.Healed++
			}
		case rec != nil && healed:
			by[ByParity] = true
			got.Healed++
		case rec != nil:
			got.Sound++
		}
		if rec == nil {
			got.Lost++
			continue
		}
		if s == nil {
			m.report.StoredBytes += int64(len(rec))
			continue
		}
		if err := s.append(ctx, sl, e, rec); err != nil {
			return s.fail(err)
		}
		m.report.StoredBytes += int64(len(rec))
	}
	for _, what := range []string{ByParity, ByCopy} {
		if by[what] {
			got.By = append(got.By, what)
		}
	}
	if got.Lost > 0 {
		got.Err = fmt.Errorf("%d of %d records are lost: %w", got.Lost, len(want), w.why)
	}
	m.say(got)
	return nil
}

// parity makes what is missing, and what this run found damaged, of objects
// that are sound.
func (m *mender) parity(ctx context.Context, first *check) error {
	if !m.r.keepsParity() {
		return nil
	}
	names := slices.Clone(m.c.unguarded)
	for _, f := range first.report.Findings {
		if name, ok := strings.CutPrefix(f.Object, parityPrefix); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		bytes, err := m.guardAgain(ctx, name)
		switch {
		case errors.Is(err, fault.ErrNotFound): // deleted since
			continue
		case errors.Is(err, fault.ErrCorrupt):
			m.say(Mended{Object: name, Err: err})
			continue
		case err != nil:
			return err
		}
		m.gone[parityPrefix+name] = true
		m.report.ParityMade++
		m.report.ParityBytes += bytes
	}
	return nil
}

// leave says what is left of what first was found, if that is not for a check
// to say that only looks whether all is there.
func (m *mender) leave(first *check, dry bool) {
	left := &m.report.Left
	for _, f := range first.report.Findings {
		said := slices.ContainsFunc(left.Findings, func(g Finding) bool { return g.Object == f.Object })
		if !said && !m.gone[f.Object] && (dry || lasts(f.Object)) {
			left.Findings = append(left.Findings, f)
		}
	}
}

// lasts says whether damage to that object is seen by Scrub alone.
func lasts(name string) bool {
	return name != configName && !strings.HasPrefix(name, parityPrefix) &&
		!slices.ContainsFunc(guarded, func(p string) bool { return strings.HasPrefix(name, p) })
}

// copyOf gives the record of the chunk whose key is k, with its checksums
// right; nil if there is none.
func (r *Repository) copyOf(ctx context.Context, k index.Key) (e pack.Entry, rec []byte, err error) {
	h, err := r.held(ctx)
	if err != nil {
		return e, nil, err
	}
	at, ok, err := h.table.Lookup(ctx, k)
	if err != nil {
		if h, err = r.mend(ctx, h, err); err == nil {
			at, ok, err = h.table.Lookup(ctx, k)
		}
	}
	if err != nil || !ok {
		return e, nil, err
	}
	h.mu.RLock()
	p := h.packs[at.Pack]
	h.mu.RUnlock()
	rec = make([]byte, pack.Entry{CLen: at.CLen}.Bytes())
	if p.state == packMissing || int64(len(rec)) > pack.MaxRecord {
		return e, nil, nil
	}
	n, err := r.st.ReadAt(ctx, p.name(), rec, int64(at.Off))
	if err != nil && !errors.Is(err, io.EOF) {
		return e, nil, fmt.Errorf("copy %s: %w", r.st, err)
	}
	if e, err = pack.CheckRecord(rec[:n]); err != nil || index.KeyOf(e.ID) != k || e.Bytes() != int64(n) {
		return e, nil, nil
	}
	return e, rec, nil
}
