// Package s3 is a store in a bucket of an S3-compatible object storage.
//
// What the promises of blob.Store rest on there: a PUT is atomic, an object
// and its place in listings are visible when the PUT has returned, and
// If-None-Match: * lets one of several creators win. blob/probe tries all of that,
// because some storages take the header and ignore it.
package s3

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/ranged"
	"github.com/backstay/backstay/internal/fault"
)

// A Store is a blob.Store. It makes one request for a call and tries nothing
// again: that is blob/retry's, which belongs around it.
type Store struct {
	client minio.Core
	at     Location
	until  func(name string) time.Time // nil without retention
}

var (
	_ blob.Store      = (*Store)(nil)
	_ blob.ReadShaper = (*Store)(nil)
)

// key is the object's key in the bucket.
func (s *Store) key(name string) (string, error) {
	if err := blob.CheckName(name); err != nil {
		return "", err
	}
	return s.at.prefix() + name, nil
}

// Put implements blob.Store, by one PUT with Content-MD5, which every storage
// checks; the newer checksums are not known to all.
func (s *Store) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.put(ctx, name, body, size, minio.PutObjectOptions{})
}

// Create implements blob.Store, by a PUT that is conditional on there being no
// such object.
func (s *Store) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	var o minio.PutObjectOptions
	o.SetMatchETagExcept("*")
	return s.put(ctx, name, body, size, o)
}

func (s *Store) put(ctx context.Context, name string, body io.ReaderAt, size int64, o minio.PutObjectOptions) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%s: size %d", name, size)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	sum, err := blob.ContentMD5(body, size)
	if err != nil {
		return fmt.Errorf("%s: body: %w", name, err)
	}
	if s.until != nil {
		if t := s.until(name); !t.IsZero() {
			o.Mode, o.RetainUntilDate = minio.Compliance, t.UTC()
		}
	}
	o.DisableMultipart = true
	o.DisableContentSha256 = true // Content-MD5 covers the bytes, and the signature covers Content-MD5
	o.ContentType = "application/octet-stream"
	_, err = s.client.PutObject(ctx, s.at.Bucket, key, io.NewSectionReader(body, 0, size), size, base64.StdEncoding.EncodeToString(sum), "", o)
	return s.classify(ctx, name, err)
}

// ReadAt implements blob.Store, by one GET of that range.
func (s *Store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	return s.readAt(ctx, name, "", p, off)
}

// readAt reads that version of the object, or the current one.
func (s *Store) readAt(ctx context.Context, name, version string, p []byte, off int64) (int, error) {
	key, err := s.key(name)
	if err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: offset %d", name, off)
	}
	if len(p) == 0 {
		_, err := s.Size(ctx, name)
		return 0, err
	}
	o := minio.GetObjectOptions{VersionID: version}
	if err := o.SetRange(off, off+int64(len(p))-1); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	body, info, header, err := s.client.GetObject(ctx, s.at.Bucket, key, o)
	if err != nil {
		if reply := minio.ToErrorResponse(err); reply.Code == minio.InvalidRange || reply.StatusCode == http.StatusRequestedRangeNotSatisfiable {
			return 0, io.EOF
		}
		return 0, s.classify(ctx, name, err)
	}
	defer body.Close()
	n, err := ranged.Read(ctx, body, header.Get("Content-Range"), info.Size, off, p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return n, err
}

// Size implements blob.Store.
func (s *Store) Size(ctx context.Context, name string) (int64, error) {
	key, err := s.key(name)
	if err != nil {
		return 0, err
	}
	info, err := s.client.StatObject(ctx, s.at.Bucket, key, minio.StatObjectOptions{})
	if err != nil {
		return 0, s.classify(ctx, name, err)
	}
	return info.Size, nil
}

// List implements blob.Store. Objects whose names are none of ours are left
// out: a bucket may be shared.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		if ctx.Err() != nil {
			yield(blob.Object{}, context.Cause(ctx))
			return
		}
		at := s.at.prefix()
		last := ""
		for o := range s.client.ListObjectsIter(ctx, s.at.Bucket, minio.ListObjectsOptions{Prefix: at + prefix, Recursive: true}) {
			if o.Err != nil {
				yield(blob.Object{}, s.classify(ctx, strings.TrimSpace("list "+prefix), o.Err))
				return
			}
			name, ok := strings.CutPrefix(o.Key, at)
			if !ok || !strings.HasPrefix(name, prefix) {
				yield(blob.Object{}, fmt.Errorf("list %s: the server listed %q, which was not asked for", prefix, o.Key))
				return
			}
			if blob.CheckName(name) != nil {
				continue
			}
			if name <= last {
				yield(blob.Object{}, fmt.Errorf("list %s: the server listed %q after %q: %w", prefix, name, last, fault.ErrUnsupported))
				return
			}
			last = name
			if !yield(blob.Object{Name: name, Bytes: o.Size}, nil) {
				return
			}
		}
		if ctx.Err() != nil {
			yield(blob.Object{}, context.Cause(ctx))
		}
	}
}

// Delete implements blob.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	if s.until != nil {
		err = s.purge(ctx, key)
	} else {
		err = s.client.RemoveObject(ctx, s.at.Bucket, key, minio.RemoveObjectOptions{})
	}
	err = s.classify(ctx, name, err)
	if errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNoBucket) {
		return nil
	}
	return err
}

// ReadShape implements blob.ReadShaper: each request is a round trip, and paid.
func (s *Store) ReadShape() blob.ReadShape { return blob.Remote }

// String implements blob.Store.
func (s *Store) String() string { return s.at.String() }

// Close implements blob.Store.
func (s *Store) Close() error { return nil }
