package s3

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/oklog/ulid/v2"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// past is a bucket as it was: for each name the version that was current then.
// Nothing can be written. It takes about 200 bytes of memory for an object.
type past struct {
	s     *Store
	at    time.Time
	names []string // ascending
	had   map[string]version
}

type version struct {
	id    string
	bytes int64
}

// AsOf is the store as it was at the time at, by the storage's clock, in whole
// seconds: what was deleted, hidden or overwritten later is there as it was.
// The bucket must keep versions, and what was to be read must still be kept;
// Object Lock is what makes sure of that.
func (s *Store) AsOf(ctx context.Context, at time.Time) (blob.Store, error) {
	p := &past{s: s, at: at, had: map[string]version{}}
	when := map[string]time.Time{}
	prefix := s.at.prefix()
	for o := range s.client.ListObjectsIter(ctx, s.at.Bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			return nil, s.classify(ctx, "list versions", o.Err)
		}
		name, ok := strings.CutPrefix(o.Key, prefix)
		made := madeAt(o)
		if !ok || blob.CheckName(name) != nil || made.After(at) {
			continue
		}
		// Versions come newest first; of two in one second the first counts.
		if was, seen := when[name]; seen && !made.After(was) {
			continue
		}
		when[name] = made
		delete(p.had, name)
		if !o.IsDeleteMarker {
			p.had[name] = version{o.VersionID, o.Size}
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	for name := range p.had {
		p.names = append(p.names, name)
	}
	slices.Sort(p.names)
	return p, nil
}

// madeAt is when a version was made. versitygw over a directory says of an old
// version when it was superseded, and of a marker when what it hides was made;
// its version ids are ULIDs, which hold the right time. Nobody else's are.
func madeAt(o minio.ObjectInfo) time.Time {
	if id, err := ulid.ParseStrict(o.VersionID); err == nil {
		return ulid.Time(id.Time())
	}
	return o.LastModified
}

func (p *past) find(name string) (version, error) {
	if err := blob.CheckName(name); err != nil {
		return version{}, err
	}
	v, ok := p.had[name]
	if !ok {
		return v, fmt.Errorf("%s as of %s: %w", name, p.at.Format(time.RFC3339), fault.ErrNotFound)
	}
	return v, nil
}

func (p *past) readOnly(name string) error {
	return fmt.Errorf("%s: the past cannot be changed: %w", name, fault.ErrReadOnly)
}

func (p *past) Put(_ context.Context, name string, _ io.ReaderAt, _ int64) error {
	return p.readOnly(name)
}

func (p *past) Create(_ context.Context, name string, _ io.ReaderAt, _ int64) error {
	return p.readOnly(name)
}

func (p *past) Delete(_ context.Context, name string) error { return p.readOnly(name) }

func (p *past) ReadAt(ctx context.Context, name string, b []byte, off int64) (int, error) {
	v, err := p.find(name)
	if err != nil {
		return 0, err
	}
	return p.s.readAt(ctx, name, v.id, b, off)
}

func (p *past) Size(_ context.Context, name string) (int64, error) {
	v, err := p.find(name)
	return v.bytes, err
}

func (p *past) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		i, _ := slices.BinarySearch(p.names, prefix)
		for _, name := range p.names[i:] {
			if ctx.Err() != nil {
				yield(blob.Object{}, context.Cause(ctx))
				return
			}
			if !strings.HasPrefix(name, prefix) || !yield(blob.Object{Name: name, Bytes: p.had[name].bytes}, nil) {
				return
			}
		}
	}
}

func (p *past) ReadShape() blob.ReadShape { return p.s.ReadShape() }

func (p *past) String() string { return p.s.String() + " as of " + p.at.Format(time.RFC3339) }

func (p *past) Close() error { return nil }
