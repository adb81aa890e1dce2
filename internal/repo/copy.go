package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// CopyOptions say what to copy and how.
type CopyOptions struct {
	Points   []*point.RestorePoint // of the source, in any order
	Level    Level                 // of what has to be sealed again
	Progress func(done, total int64)
	Told     func(PointCopy) // of each point, when it is done with
}

// States of a point that was to be copied.
const (
	CopyDone   = "copied"
	CopyThere  = "there"   // before; nothing was sent
	CopyFailed = "damaged" // in the source: it was not copied
	CopyGone   = "gone"    // deleted in the source before its turn came
)

// A PointCopy says what became of one point.
type PointCopy struct {
	Point     *point.RestorePoint
	State     string
	ReadBytes int64 // chunks read from the source, before compression
	SentBytes int64 // records that the other side did not have
	Err       error // why State is CopyFailed
}

// Same says whether two repositories have the same id, keys and chunks, so that
// what is sealed in one opens in the other.
func (r *Repository) Same(to *Repository) bool {
	return r.keys != nil && to.keys != nil && r.id == to.id && *r.keys == *to.keys && r.conf.ChunkBytes == to.conf.ChunkBytes
}

// Replicate makes an empty repository in st with the id, the master key and the
// keys of r. It gives fault.ErrExists where there is one.
func (r *Repository) Replicate(ctx context.Context, st blob.Store) error {
	raw, err := readObject(ctx, r.st, configName)
	if err != nil {
		return err
	}
	// The replica makes the promises that r makes: as in Init, no storage is
	// taken that could keep them and was not made for it.
	if st, err = retain(ctx, st, r.ImmutableFor()); err != nil {
		return err
	}
	keys := 0
	for o, err := range r.st.List(ctx, keysPrefix) {
		if err != nil {
			return err
		}
		_, b, err := readKey(ctx, r.st, o.Name)
		if errors.Is(err, fault.ErrCorrupt) || errors.Is(err, fault.ErrNotFound) {
			continue
		}
		if err == nil {
			err = create(ctx, st, o.Name, b)
		}
		if err != nil {
			return err
		}
		keys++
	}
	if keys == 0 {
		return fmt.Errorf("%s: no key objects: %w", r.st, fault.ErrNotFound)
	}
	// Last, so that there is no repository without keys.
	if err := create(ctx, st, configName, raw); err != nil || r.conf.Parity == "" {
		return err
	}
	// The repository is there, whatever becomes of this: Check says what has no
	// parity.
	_ = storeParity(ctx, st, r.id, configName, seal.Hash(raw), bytes.NewReader(raw), int64(len(raw)))
	return nil
}

// CopyPoints makes restore points of r exist in to as well, as they are: name,
// time, grade, suspicion and protection; but until when r promised to keep them
// is no promise of to, which makes its own. Those that exist there are left alone, and nothing
// is ever deleted there. Every chunk is verified by its id on the way, and each
// point is committed by itself, so an interrupted copy goes on where it was. A
// point whose data are damaged in r is told and left out; any other trouble
// ends the copy with an error.
//
// Chunks that to has are not sent. Where both repositories have the same keys
// (Same) they are not even read, and others go as they are sealed, but for the
// small files of a machine's definition; otherwise
// chunks that did not change since the point before, if that is in both, are not
// read either, and the rest is sealed anew.
func (r *Repository) CopyPoints(ctx context.Context, to *Repository, o CopyOptions) error {
	if err := errors.Join(r.needKeys(), to.needKeys()); err != nil {
		return err
	}
	there, err := to.Points(ctx)
	if err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	c := &copier{from: r, to: to, o: o, same: r.Same(to), there: map[string]*point.RestorePoint{}}
	for _, p := range there {
		c.there[p.Ref()] = p
	}
	all, err := r.Points(ctx)
	if err != nil && len(UnreadRecords(err)) == 0 {
		return err
	}
	// Points that are not copied are still good to know what did not change.
	for _, p := range all {
		if c.there[p.Ref()] != nil {
			c.both = append(c.both, p)
		}
	}
	points := slices.Clone(o.Points)
	slices.SortStableFunc(points, func(a, b *point.RestorePoint) int { return a.Time.Compare(b.Time) })
	for _, p := range points {
		if c.there[p.Ref()] == nil {
			c.total += p.SizeBytes()
		}
	}
	for _, p := range points {
		if err := c.point(ctx, p); err != nil {
			return fmt.Errorf("copy %s: %w", p.Ref(), err)
		}
	}
	return nil
}

// point copies one point unless it is there.
func (c *copier) point(ctx context.Context, p *point.RestorePoint) error {
	got := PointCopy{Point: p, State: CopyThere}
	if have := c.there[p.Ref()]; have != nil {
		if err := c.notes(ctx, p, have); err != nil {
			return err
		}
		c.tell(got)
		return nil
	}
	began := c.done.Load()
	// Somebody may delete it here, and vacuum, while it is on its way.
	switch release, err := c.from.Hold(ctx, p); {
	case err == nil:
		defer release()
	case errors.Is(err, fault.ErrNotFound):
		got.State = CopyGone
		c.advance(p.SizeBytes())
		c.tell(got)
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	err := c.attempt(ctx, p, true)
	if d := (*destinationError)(nil); errors.As(err, &d) && errors.Is(err, fault.ErrCorrupt) {
		// The point before is damaged there: this one does not need it.
		err = c.attempt(ctx, p, false)
	}
	for try := 0; try < 3 && errors.Is(err, fault.ErrFenced); try++ {
		err = c.attempt(ctx, p, true) // a vacuum there; what was stored is reused
	}
	got.ReadBytes, got.SentBytes = c.read.Swap(0), c.sent.Swap(0)
	c.done.Store(began)
	c.advance(p.SizeBytes())
	switch d := (*destinationError)(nil); {
	case err == nil:
		got.State = CopyDone
	case errors.Is(err, fault.ErrCorrupt) && !errors.As(err, &d):
		got.State, got.Err = CopyFailed, err
	default:
		return err
	}
	c.tell(got)
	return nil
}

func (c *copier) tell(got PointCopy) {
	if c.o.Told != nil {
		c.o.Told(got)
	}
}

// notes brings the notes beside p over; those that have has stay.
func (c *copier) notes(ctx context.Context, p, have *point.RestorePoint) error {
	if p.Suspect != "" && have.Suspect == "" {
		if err := c.to.MarkSuspect(ctx, p.VM, p.ID, p.Suspect); err != nil {
			return atDestination(err)
		}
	}
	if p.Protected && !have.Protected {
		return atDestination(c.to.Protect(ctx, p.VM, p.ID, ProtectOptions{Why: p.ProtectedWhy}))
	}
	return nil
}

// attempt copies p in a session of its own.
func (c *copier) attempt(ctx context.Context, p *point.RestorePoint, build bool) error {
	s, err := c.to.Begin(ctx, SessionOptions{Level: c.o.Level})
	if err != nil {
		return atDestination(err)
	}
	defer s.Abort(ctx)
	fresh := *p
	// Until when the source keeps its point says nothing of this one: what the
	// destination promises is written at the commit.
	fresh.ImmutableUntil = nil
	fresh.Suspect, fresh.Protected, fresh.ProtectedWhy = "", false, ""
	fresh.Disks = slices.Clone(p.Disks)
	for i := range p.Disks {
		var before *point.Disk
		var there point.ManifestID
		if build {
			before, there = c.before(p, p.Disks[i].ID)
		}
		if fresh.Disks[i].Manifest, err = c.disk(ctx, s, p.Disks[i], before, there); err != nil {
			return fmt.Errorf("disk %s: %w", p.Disks[i].ID, err)
		}
	}
	if p.Config != nil {
		fresh.Config = make(map[string]point.Blob, len(p.Config))
	}
	for name, b := range p.Config {
		data, err := c.from.ReadBlob(ctx, b)
		if err != nil {
			return fmt.Errorf("file %s: %w", name, err)
		}
		if fresh.Config[name], err = s.PutBlob(ctx, data); err != nil {
			return atDestination(err)
		}
	}
	if err := s.Commit(ctx, &fresh); err != nil {
		return atDestination(err)
	}
	c.there[p.Ref()] = &fresh
	c.both = append(c.both, p)
	return c.notes(ctx, p, &fresh)
}

// before finds the disk of the newest point before p that is in both places, or
// of the oldest after it.
func (c *copier) before(p *point.RestorePoint, id diskID) (from *point.Disk, there point.ManifestID) {
	var best *point.RestorePoint
	for _, q := range c.both {
		if q.VM != p.VM || diskOf(q, id) == nil {
			continue
		}
		switch {
		case best == nil,
			!q.Time.After(p.Time) && (best.Time.After(p.Time) || q.Time.After(best.Time)),
			q.Time.After(p.Time) && best.Time.After(p.Time) && q.Time.Before(best.Time):
			best = q
		}
	}
	if best == nil {
		return nil, ""
	}
	d := diskOf(c.there[best.Ref()], id)
	if d == nil {
		return nil, ""
	}
	return diskOf(best, id), d.Manifest
}

func diskOf(p *point.RestorePoint, id diskID) *point.Disk {
	for i := range p.Disks {
		if p.Disks[i].ID == id {
			return &p.Disks[i]
		}
	}
	return nil
}

// A destinationError is trouble on the other side, and not damage in the source.
type destinationError struct{ err error }

func (e *destinationError) Error() string { return "destination: " + e.err.Error() }
func (e *destinationError) Unwrap() error { return e.err }

func atDestination(err error) error {
	if err == nil {
		return nil
	}
	return &destinationError{err}
}
