// Package azure is a store in a container of Azure Blob Storage.
//
// What the promises of blob.Store rest on there: Put Blob is atomic, what it
// stored is visible to reads and listings when it has returned, and
// If-None-Match: * lets one of several creators win.
package azure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	azblob "github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/ranged"
	"github.com/backstay/backstay/internal/fault"
)

// A Store is a blob.Store. It makes one request for a call and tries nothing
// again: that is blob/retry's, which belongs around it.
type Store struct {
	client *container.Client
	at     Location
}

var (
	_ blob.Store      = (*Store)(nil)
	_ blob.ReadShaper = (*Store)(nil)
)

func (s *Store) prefix() string {
	if s.at.Prefix == "" {
		return ""
	}
	return s.at.Prefix + "/"
}

func (s *Store) blob(name string) (*blockblob.Client, error) {
	if err := blob.CheckName(name); err != nil {
		return nil, err
	}
	return s.client.NewBlockBlobClient(s.prefix() + name), nil
}

// Put implements blob.Store, by one Put Blob whose MD5 the storage checks.
func (s *Store) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.put(ctx, name, body, size, nil)
}

// Create implements blob.Store, by a Put Blob that is conditional on there
// being no such object.
func (s *Store) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	any := azcore.ETagAny
	return s.put(ctx, name, body, size, &azblob.AccessConditions{
		ModifiedAccessConditions: &azblob.ModifiedAccessConditions{IfNoneMatch: &any},
	})
}

func (s *Store) put(ctx context.Context, name string, body io.ReaderAt, size int64, cond *azblob.AccessConditions) error {
	b, err := s.blob(name)
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
	_, err = b.Upload(ctx, streaming.NopCloser(io.NewSectionReader(body, 0, size)), &blockblob.UploadOptions{
		TransactionalValidation: azblob.TransferValidationTypeMD5(sum),
		AccessConditions:        cond,
	})
	return s.classify(ctx, name, err)
}

// ReadAt implements blob.Store, by one request for that range.
func (s *Store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	b, err := s.blob(name)
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
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	reply, err := b.DownloadStream(ctx, &azblob.DownloadStreamOptions{Range: azblob.HTTPRange{Offset: off, Count: int64(len(p))}})
	if err != nil {
		var re *azcore.ResponseError
		if errors.As(err, &re) && re.StatusCode == http.StatusRequestedRangeNotSatisfiable {
			return 0, io.EOF
		}
		return 0, s.classify(ctx, name, err)
	}
	defer reply.Body.Close()
	length, span := int64(-1), ""
	if reply.ContentLength != nil {
		length = *reply.ContentLength
	}
	if reply.ContentRange != nil {
		span = *reply.ContentRange
	}
	n, err := ranged.Read(ctx, reply.Body, span, length, off, p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", name, withoutURL(err))
	}
	return n, err
}

// Size implements blob.Store.
func (s *Store) Size(ctx context.Context, name string) (int64, error) {
	b, err := s.blob(name)
	if err != nil {
		return 0, err
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	p, err := b.GetProperties(ctx, nil)
	if err != nil {
		return 0, s.classify(ctx, name, err)
	}
	if p.ContentLength == nil {
		return 0, fmt.Errorf("%s: the server does not say how long it is", name)
	}
	return *p.ContentLength, nil
}

// List implements blob.Store. Objects whose names are none of ours are left
// out: a container may be shared.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		at, last := s.prefix(), ""
		all := at + prefix
		pages := s.client.NewListBlobsFlatPager(&container.ListBlobsFlatOptions{Prefix: &all})
		for pages.More() {
			if ctx.Err() != nil {
				yield(blob.Object{}, context.Cause(ctx))
				return
			}
			page, err := pages.NextPage(ctx)
			if err != nil {
				yield(blob.Object{}, s.classify(ctx, strings.TrimSpace("list "+prefix), err))
				return
			}
			if page.Segment == nil {
				continue
			}
			for _, b := range page.Segment.BlobItems {
				if b.Name == nil || b.Properties == nil || b.Properties.ContentLength == nil {
					yield(blob.Object{}, fmt.Errorf("list %s: the server listed an object without name or length", prefix))
					return
				}
				name, ok := strings.CutPrefix(*b.Name, at)
				if !ok || !strings.HasPrefix(name, prefix) {
					yield(blob.Object{}, fmt.Errorf("list %s: the server listed %q, which was not asked for", prefix, *b.Name))
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
				if !yield(blob.Object{Name: name, Bytes: *b.Properties.ContentLength}, nil) {
					return
				}
			}
		}
	}
}

// Delete implements blob.Store, with the snapshots that somebody else may have
// made of the object.
func (s *Store) Delete(ctx context.Context, name string) error {
	b, err := s.blob(name)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	include := azblob.DeleteSnapshotsOptionTypeInclude
	_, err = b.Delete(ctx, &azblob.DeleteOptions{DeleteSnapshots: &include})
	err = s.classify(ctx, name, err)
	if errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNoContainer) {
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

// withoutURL takes the URL out of an error: a signature would be in it.
func withoutURL(err error) error {
	if ue := (*url.Error)(nil); errors.As(err, &ue) {
		return ue.Err
	}
	return err
}
