package repo

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/object"
)

const (
	pointPrefix   = "rp/"
	suspectPrefix = "suspect/"
)

// clearRecord is what a restore point's record shows to everyone: what vacuum
// must keep.
type clearRecord struct {
	Format    int      `json:"format"`
	Manifests []string `json:"manifests"`
	Records   []string `json:"records"`
}

// record is a restore point's record. It never changes.
type record struct {
	name  string // without "rp/"
	clear clearRecord
	point *point.RestorePoint // nil without keys
}

func (r *Repository) encodeRecord(name string, p *point.RestorePoint) ([]byte, error) {
	c := clearRecord{Format: formatVersion, Manifests: []string{}, Records: []string{}}
	for _, d := range p.Disks {
		c.Manifests = append(c.Manifests, string(d.Manifest))
	}
	for _, b := range p.Config {
		for _, id := range b.Chunks {
			c.Records = append(c.Records, id.String())
		}
	}
	slices.Sort(c.Manifests)
	slices.Sort(c.Records)
	c.Manifests, c.Records = slices.Compact(c.Manifests), slices.Compact(c.Records)
	plain := *p
	plain.Suspect, plain.Protected, plain.ProtectedWhy = "", false, "" // kept beside the record
	secret, err := json.Marshal(&plain)
	if err != nil {
		return nil, err
	}
	return object.EncodeSealed(c, &r.keys.Meta, object.Binding{Repo: r.id, Name: pointPrefix + name}, secret)
}

func (r *Repository) decodeRecord(name string, b []byte) (*record, error) {
	rec := &record{name: name}
	full := pointPrefix + name
	var secret []byte
	var err error
	if r.keys == nil {
		err = object.Decode(full, b, &rec.clear)
	} else {
		secret, err = object.DecodeSealed(full, b, &r.keys.Meta, object.Binding{Repo: r.id, Name: full}, &rec.clear)
	}
	if err != nil {
		return nil, err
	}
	if rec.clear.Format > formatVersion {
		return nil, fmt.Errorf("%s has format %d, this version reads up to %d: %w", full, rec.clear.Format, formatVersion, fault.ErrUnsupported)
	}
	for _, m := range rec.clear.Manifests {
		if _, err := parseManifestID(point.ManifestID(m)); err != nil {
			return nil, &fault.CorruptError{Object: full, Offset: -1, Err: err}
		}
	}
	if r.keys == nil {
		return rec, nil
	}
	rec.point = new(point.RestorePoint)
	if err := json.Unmarshal(secret, rec.point); err != nil {
		return nil, &fault.CorruptError{Object: full, Offset: -1, Err: err}
	}
	return rec, nil
}

// list gives the records of all restore points that exist. With records that
// cannot be read it gives an error and the others: who found what he looked
// for may go on, but nobody may act as if those were not there.
func (r *Repository) list(ctx context.Context) ([]*record, error) {
	var recs []*record
	var unread error
	err := r.eachRecord(ctx, func(name string, rec *record, err error) error {
		if err != nil {
			unread = errors.Join(unread, &RecordError{name, err})
			return nil
		}
		recs = append(recs, rec)
		return nil
	})
	return recs, errors.Join(err, unread)
}

// eachRecord calls fn for each restore point that exists, or seems to: a record
// that cannot be read comes with an error. Records and outcomes never change,
// so each is read once.
func (r *Repository) eachRecord(ctx context.Context, fn func(name string, rec *record, err error) error) error {
	outcomes := map[string]outcome{}
	seen := map[string]bool{}
	var strays []string
	for o, err := range r.st.List(ctx, pointPrefix) {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(o.Name, pointPrefix)
		seen[name] = true
		r.recMu.Lock()
		rec := r.records[name]
		r.recMu.Unlock()
		if rec == nil {
			session, _, _ := strings.Cut(name, "-")
			out, ok := outcomes[session]
			if !ok {
				if out, err = r.outcomeOf(ctx, session); err != nil {
					if err := fn(name, nil, err); err != nil {
						return err
					}
					continue
				}
				outcomes[session] = out
			}
			if out.State == committed && !slices.Contains(out.Points, name) {
				strays = append(strays, name)
				continue
			}
			if out.State != committed {
				continue
			}
			b, err := readObject(ctx, r.st, o.Name)
			if errors.Is(err, fault.ErrNotFound) {
				continue // deleted meanwhile
			}
			if err == nil {
				rec, err = r.decodeRecord(name, b)
			}
			if err != nil {
				if err := fn(name, nil, err); err != nil {
					return err
				}
				continue
			}
			r.recMu.Lock()
			r.records[name] = rec
			r.recMu.Unlock()
		}
		if err := fn(name, rec, nil); err != nil {
			return err
		}
	}
	r.recMu.Lock()
	defer r.recMu.Unlock()
	r.strays = strays
	for name := range r.records {
		if !seen[name] {
			delete(r.records, name)
		}
	}
	return nil
}

// suspects reads the notes of all points that have one. A note that cannot be
// read still makes its point suspect.
func (r *Repository) suspects(ctx context.Context) (map[string]string, error) {
	return r.notes(ctx, suspectPrefix)
}

// notes reads the notes that stand beside records under prefix, by record.
func (r *Repository) notes(ctx context.Context, prefix string) (map[string]string, error) {
	why := map[string]string{}
	for o, err := range r.st.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(o.Name, prefix)
		text, err := r.readNote(ctx, o.Name)
		if errors.Is(err, fault.ErrNotFound) {
			continue
		}
		if why[name] = text; err != nil {
			why[name] = "there is a note that cannot be read: " + err.Error()
		}
	}
	return why, nil
}

// readNote gives the sentence that a note beside a record holds.
func (r *Repository) readNote(ctx context.Context, name string) (string, error) {
	b, err := readObject(ctx, r.st, name)
	if err != nil {
		return "", err
	}
	var c struct{}
	secret, err := object.DecodeSealed(name, b, &r.keys.Meta, object.Binding{Repo: r.id, Name: name}, &c)
	return string(secret), err
}

// Points gives all restore points, sorted by VM and then by time. If records
// of some cannot be read it gives the others together with an error.
func (r *Repository) Points(ctx context.Context) ([]*point.RestorePoint, error) {
	if err := r.needKeys(); err != nil {
		return nil, err
	}
	recs, unread := r.list(ctx)
	why, err := r.suspects(ctx)
	if err != nil {
		return nil, err
	}
	protected, err := r.protections(ctx)
	if err != nil {
		return nil, err
	}
	points := make([]*point.RestorePoint, len(recs))
	for i, rec := range recs {
		p := *rec.point
		p.Suspect = why[rec.name]
		p.ProtectedWhy, p.Protected = protected[rec.name]
		points[i] = &p
	}
	slices.SortFunc(points, func(a, b *point.RestorePoint) int {
		return cmp.Or(cmp.Compare(a.VM, b.VM), a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID))
	})
	return points, unread
}

// Point gives one restore point; an empty id means the newest of vm, and then
// the records of all points must be readable.
func (r *Repository) Point(ctx context.Context, vm string, id point.ID) (*point.RestorePoint, error) {
	points, err := r.Points(ctx)
	if err != nil && id == "" {
		return nil, err
	}
	for _, p := range slices.Backward(points) {
		if p.VM == vm && (id == "" || p.ID == id) {
			return p, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return nil, noPoint(vm, id)
}

func noPoint(vm string, id point.ID) error {
	if id == "" {
		return fmt.Errorf("restore point of %s: %w", vm, fault.ErrNotFound)
	}
	return fmt.Errorf("restore point %s/%s: %w", vm, id, fault.ErrNotFound)
}

// record finds the record of a restore point.
func (r *Repository) record(ctx context.Context, vm string, id point.ID) (*record, error) {
	if err := r.needKeys(); err != nil {
		return nil, err
	}
	recs, err := r.list(ctx)
	for _, rec := range recs {
		if rec.point.VM == vm && rec.point.ID == id {
			return rec, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return nil, noPoint(vm, id)
}

// DeletePoint makes a restore point cease to exist. Vacuum frees its chunks. One
// that is protected gives a ProtectedError, and one that was promised to stay an
// ImmutableError.
func (r *Repository) DeletePoint(ctx context.Context, vm string, id point.ID) error {
	return r.deletePoint(ctx, vm, id, false)
}

// DeleteProtected is DeletePoint for a point that is protected, too.
func (r *Repository) DeleteProtected(ctx context.Context, vm string, id point.ID) error {
	return r.deletePoint(ctx, vm, id, true)
}

func (r *Repository) deletePoint(ctx context.Context, vm string, id point.ID, force bool) error {
	rec, err := r.record(ctx, vm, id)
	if err != nil {
		return err
	}
	if err := r.mayDelete(ctx, rec.point.Ref(), rec.name, rec.point); err != nil {
		return err
	}
	return r.takeAway(ctx, rec.point.Ref(), rec.name, force)
}

// MarkSuspect notes beside a restore point why it may be wrong.
func (r *Repository) MarkSuspect(ctx context.Context, vm string, id point.ID, why string) error {
	rec, err := r.record(ctx, vm, id)
	if err != nil {
		return err
	}
	name := suspectPrefix + rec.name
	b, err := object.EncodeSealed(struct {
		Format int `json:"format"`
	}{formatVersion}, &r.keys.Meta, object.Binding{Repo: r.id, Name: name}, []byte(why))
	if err != nil {
		return err
	}
	// A store that lets nobody overwrite keeps the first note, which says as
	// much about the point.
	if err := put(ctx, r.st, name, b); !errors.Is(err, fault.ErrExists) {
		return err
	}
	return nil
}

// ReadBlob reads a small file that PutBlob stored.
func (r *Repository) ReadBlob(ctx context.Context, b point.Blob) ([]byte, error) {
	if err := r.needKeys(); err != nil {
		return nil, err
	}
	if b.SizeBytes < 0 || (b.SizeBytes+r.conf.ChunkBytes-1)/r.conf.ChunkBytes != int64(len(b.Chunks)) {
		return nil, fmt.Errorf("a file of %d bytes in %d chunks: %w", b.SizeBytes, len(b.Chunks), fault.ErrCorrupt)
	}
	w := r.worker(readLevel)
	defer r.idle(readLevel, w)
	var out []byte
	for _, id := range b.Chunks {
		plain, err := r.readChunk(ctx, w, ref{id: id}, min(r.conf.ChunkBytes, b.SizeBytes-int64(len(out))))
		if err != nil {
			return nil, err
		}
		out = append(out, plain...)
	}
	return out, nil
}

// parsePointName says whether name, without its prefix, is one of a record.
func parsePointName(name string) bool {
	session, n, ok := strings.Cut(name, "-")
	return ok && isID(session) && len(n) == 6 && strings.Trim(n, "0123456789") == ""
}

// hexID is the chunk id that s stands for.
func hexID(s string) (id [32]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%q is no id", s)
	}
	return [32]byte(b), nil
}
