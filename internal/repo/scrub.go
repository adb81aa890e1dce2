package repo

import (
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// scrub reads every object and compares its checksum.
func (c *check) scrub(ctx context.Context) error {
	if !c.o.Scrub {
		return nil
	}
	var objects []blob.Object
	for o, err := range c.r.st.List(ctx, "") {
		if err != nil {
			return err
		}
		objects = append(objects, o)
	}
	objects = c.due(objects)
	for _, o := range objects {
		c.total += o.Bytes
	}
	var enough <-chan time.Time
	if c.o.For > 0 {
		enough = time.After(c.o.For)
	}
	jobs := make(chan blob.Object)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range min(checkWorkers, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			s := &scrubber{check: c, near: blob.ShapeOf(c.r.st).InFlight == 0}
			s.bases.limit = int(max(4, cachedBytes/c.r.conf.ChunkBytes))
			if c.r.keys != nil {
				s.w = c.r.worker(readLevel)
				defer c.r.idle(readLevel, s.w)
			}
			for o := range jobs {
				if err := s.object(ctx, o); err != nil {
					cancel(err)
					return
				}
				c.progress(o.Bytes)
			}
		})
	}
feed:
	for _, o := range objects {
		select {
		case jobs <- o:
		case <-enough:
			break feed
		case <-ctx.Done():
			break feed
		}
	}
	close(jobs)
	wg.Wait()
	return context.Cause(ctx)
}

func (c *check) progress(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += n
	c.report.Bytes += n
	if c.o.Progress != nil {
		c.o.Progress(c.done, c.total)
	}
}

// A scrubber checks objects one after the other with memory of its own.
type scrubber struct {
	*check
	w     *pack.Worker // nil without keys
	near  bool         // the store: a read costs no round trip
	buf   []byte
	plain []byte
	bases lru[chunk.ID, []byte] // of overlays; several are on one
}

// object checks one object. Damage is a finding; errors are trouble with the
// store.
func (s *scrubber) object(ctx context.Context, o blob.Object) error {
	var evidence error
	switch {
	case strings.HasPrefix(o.Name, packPrefix):
		id, ok := parsePackName(o.Name)
		if !ok {
			return nil // not ours
		}
		return s.pack(ctx, id, o)
	case strings.HasPrefix(o.Name, manifestPrefix):
		return s.manifest(ctx, o)
	case strings.HasPrefix(o.Name, runPrefix):
		return s.run(ctx, o)
	}
	b, err := readObject(ctx, s.r.st, o.Name)
	switch {
	case errors.Is(err, fault.ErrNotFound):
		return nil // deleted since it was listed
	case err != nil:
		return s.trouble(ctx, o.Name, err)
	}
	switch {
	case strings.HasPrefix(o.Name, parityPrefix):
		evidence = s.parity(o.Name, b)
	case strings.HasPrefix(o.Name, scrubPrefix):
		_, evidence = decodeScrub(s.r.id, b)
	case strings.HasPrefix(o.Name, indexPrefix):
		evidence = index.Decode(s.r.id, b, func(index.Pack) error { return nil })
	case o.Name == configName, ours(o.Name):
		evidence = object.Check(o.Name, b)
	}
	if evidence == nil {
		return nil
	}
	if !errors.Is(evidence, fault.ErrCorrupt) {
		evidence = &fault.CorruptError{Object: o.Name, Offset: -1, Err: evidence}
	}
	s.find(Finding{Object: o.Name, Offset: -1, Err: evidence})
	return nil
}

// ours says whether name is that of a small object of a repository.
func ours(name string) bool {
	for _, p := range []string{keysPrefix, pointPrefix, sessionPrefix, beatPrefix, outcomePrefix, suspectPrefix, protectPrefix, goingPrefix, vacuumPrefix, epochPrefix, quarantinePrefix} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// trouble turns an object that cannot be read into a finding; only the end of
// the context ends the check.
func (s *scrubber) trouble(ctx context.Context, name string, err error) error {
	if ctx.Err() != nil {
		return err
	}
	s.find(Finding{Object: name, Offset: -1, Err: err})
	return nil
}

func (s *scrubber) manifest(ctx context.Context, o blob.Object) error {
	id, ok := parseHashName(o.Name, manifestPrefix)
	if !ok {
		return nil
	}
	f, err := s.r.openManifest(ctx, id)
	for i := 0; err == nil && i < f.Written(); i++ {
		if _, err = f.Needs(i); err != nil {
			err = manifestError(id, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if err != nil && !errors.Is(err, fault.ErrNotFound) { // deleted meanwhile, or else the inventory has said so
		s.find(Finding{Object: o.Name, Offset: offsetOf(err), Err: err})
	}
	return nil
}

// run reads a run of the index or one of its parts.
func (s *scrubber) run(ctx context.Context, o blob.Object) error {
	id, part, ok := parseRunName(o.Name)
	if !ok {
		return nil
	}
	var err error
	if part < 0 {
		err = index.VerifyRun(ctx, s.r.st, o.Name, o.Bytes, s.r.id, id)
	} else {
		err = index.VerifyPart(ctx, s.r.st, o.Name, o.Bytes, s.r.id, id, uint32(part))
	}
	switch {
	case err == nil, errors.Is(err, fault.ErrNotFound):
		return nil
	case index.Damaged(err):
		s.find(badIndex(o.Name, err))
		return nil
	}
	return s.trouble(ctx, o.Name, err)
}

// pack reads a pack, a second time if it looks damaged, and finds out which of
// its chunks are lost.
func (s *scrubber) pack(ctx context.Context, id [32]byte, o blob.Object) error {
	p := heldPack{id: id, bytes: o.Bytes}
	first := 0
	if !s.o.ReadData && s.near {
		if s.hashes(ctx, p) {
			s.wasRead(id)
			s.guardRead(ctx, p, nil)
			return nil
		}
		first = 1
	}
	for try := first; ; try++ {
		data, err := s.read(ctx, p)
		switch {
		case errors.Is(err, fault.ErrNotFound):
			return nil
		case err != nil:
			if try == 0 && ctx.Err() == nil {
				continue
			}
			if err := s.trouble(ctx, o.Name, err); err != nil {
				return err
			}
			s.unreadable(ctx, p, err)
			return nil
		}
		same := seal.Hash(data) == id
		if !same && try == 0 {
			continue
		}
		s.wasRead(id)
		if same {
			s.guardRead(ctx, p, data)
		}
		good, damage := []pack.Entry(nil), []pack.Damage(nil)
		if same && !s.o.ReadData {
			return nil
		}
		if good, damage = pack.Scan(data, s.r.id); !same && len(damage) == 0 {
			damage = []pack.Damage{{Off: -1, Err: errors.New("content does not match its name")}}
		}
		if s.o.ReadData {
			if good, damage, err = s.open(ctx, data, good, damage); err != nil {
				return err
			}
		}
		if len(damage) > 0 {
			s.lost(ctx, p, good, damage)
		} else if s.o.ReadData {
			s.mu.Lock()
			s.whole[id] = true
			s.mu.Unlock()
		}
		return nil
	}
}

// scrubPiece is how much of a pack hashes takes at a time: little enough to be in the
// processor's cache still when it is hashed.
const scrubPiece = 512 << 10

// hashes says whether a pack has the hash that is its name, piece by piece.
// Whatever else it finds is for the reader of the whole to say.
func (s *scrubber) hashes(ctx context.Context, p heldPack) bool {
	if p.bytes > pack.MaxBytes {
		return false
	}
	if len(s.buf) < scrubPiece {
		s.buf = make([]byte, scrubPiece)
	}
	h := blake3.New()
	for off := int64(0); off < p.bytes; off += scrubPiece {
		b := s.buf[:min(scrubPiece, p.bytes-off)]
		if n, _ := s.r.st.ReadAt(ctx, p.name(), b, off); n < len(b) {
			return false
		}
		h.Write(b)
	}
	var sum [32]byte
	h.Sum(sum[:0])
	return sum == p.id
}

func (s *scrubber) read(ctx context.Context, p heldPack) ([]byte, error) {
	if p.bytes > pack.MaxBytes {
		return nil, fault.Corrupt(packLabel(p.id), -1, "%d bytes are too many", p.bytes)
	}
	if int64(cap(s.buf)) < p.bytes {
		s.buf = make([]byte, max(p.bytes, min(2*int64(cap(s.buf)), pack.TargetBytes+pack.TargetBytes/16)))
	}
	n, err := s.r.st.ReadAt(ctx, p.name(), s.buf[:p.bytes], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return s.buf[:n], nil
}

// open opens all records that look good. Only the end of the context is an
// error.
func (s *scrubber) open(ctx context.Context, data []byte, good []pack.Entry, damage []pack.Damage) ([]pack.Entry, []pack.Damage, error) {
	opened := good[:0]
	for _, e := range good {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		if err := s.openOne(ctx, data[e.Off:e.End()], e); err != nil {
			damage = append(damage, pack.Damage{Off: int64(e.Off), Err: err, Entry: &e})
			continue
		}
		opened = append(opened, e)
	}
	return opened, damage, nil
}

// openOne opens a record, and an overlay on its base. That this cannot be read
// is for the base's own pack to answer for.
func (s *scrubber) openOne(ctx context.Context, record []byte, e pack.Entry) error {
	if e.Encoding != pack.Overlay {
		plain, err := s.w.Open(s.plain, record, e.ID)
		if err == nil {
			s.plain = plain
		}
		return err
	}
	p, err := s.w.OpenOverlay(record, e.ID)
	if err != nil {
		return err
	}
	base := make([]byte, p.Bytes)
	if !p.Whole() {
		plain, ok := s.bases.get(p.Base)
		if !ok {
			if plain, err = s.r.readChunk(ctx, s.w, ref{id: p.Base}, int64(p.Bytes)); err != nil {
				return nil
			}
			s.bases.put(p.Base, plain)
		}
		copy(base, plain)
	}
	return s.w.Apply(&p, base)
}

// lost makes a finding of the damage to a pack, and blames on it all chunks
// that the index expects there and that are not among the good.
func (s *scrubber) lost(ctx context.Context, p heldPack, good []pack.Entry, damage []pack.Damage) {
	n, frame := 0, false
	var records []uint32
	for _, d := range damage {
		err := &fault.CorruptError{Object: packLabel(p.id), Offset: d.Off, Err: d.Err}
		n = s.find(Finding{Object: p.name(), Offset: d.Off, Err: err})
		if d.Entry != nil {
			records = append(records, d.Entry.Off)
		} else {
			frame = true
		}
	}
	records = append(records, s.blamePack(ctx, p, good, n)...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damaged.add(p.id, records...)
	if frame {
		s.frames[n] = true
	}
}

// unreadable blames all chunks in a pack on the error that reading it gave. It
// goes into quarantine only if the medium itself is broken: other trouble may
// pass.
func (s *scrubber) unreadable(ctx context.Context, p heldPack, err error) {
	n := s.find(Finding{Object: p.name(), Offset: -1, Err: err})
	records := s.blamePack(ctx, p, nil, n)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frames[n] = true
	if errors.Is(err, fault.ErrCorrupt) || errors.Is(err, syscall.EIO) {
		s.damaged.add(p.id, records...)
	}
}

// blamePack blames on finding n what the index expects in p and what is not
// among the good, and gives the offsets of those records.
func (s *scrubber) blamePack(ctx context.Context, p heldPack, good []pack.Entry, n int) (records []uint32) {
	s.h.mu.RLock()
	in, ok := s.h.number(p.id)
	s.h.mu.RUnlock()
	if !ok {
		return nil // nothing refers to it
	}
	fine := map[uint32]index.Key{}
	for _, e := range good {
		fine[e.Off] = index.KeyOf(e.ID)
	}
	for range loadTries {
		records = nil
		err := s.h.table.Each(ctx, func(k index.Key, at index.Place) error {
			if at.Pack == in && fine[at.Off] != k {
				records = append(records, at.Off)
				s.blameChunk(k, n)
			}
			return nil
		})
		if err == nil {
			break
		}
		if _, err := s.r.mend(ctx, s.h, err); err != nil {
			break // what was seen is said; the index itself is a finding of its own
		}
	}
	return records
}
