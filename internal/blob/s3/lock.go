package s3

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

var _ blob.Retainer = (*Store)(nil)

// Retains implements blob.Retainer: the bucket must have been made with Object
// Lock.
func (s *Store) Retains(ctx context.Context) (bool, error) {
	on, _, _, _, err := s.client.GetObjectLockConfig(ctx, s.at.Bucket)
	if err == nil && on == "Enabled" {
		return true, nil
	}
	var reply minio.ErrorResponse
	if err == nil || errors.As(err, &reply) && (reply.Code == "ObjectLockConfigurationNotFoundError" || reply.Code == "NotImplemented" || reply.Code == "MethodNotAllowed") {
		return false, fmt.Errorf("bucket %s has no Object Lock, which can only be switched on when a bucket is made: %w", s.at.Bucket, fault.ErrUnsupported)
	}
	return false, s.classify(ctx, "object lock", err)
}

// SetRetention implements blob.Retainer, in compliance mode: not even the
// owner of the bucket ends it early.
func (s *Store) SetRetention(until func(name string) time.Time) { s.until = until }

// Retain implements blob.Retainer, for the version that is current.
func (s *Store) Retain(ctx context.Context, name string, until time.Time) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	switch had, err := s.RetainedUntil(ctx, name); {
	case err != nil:
		return err
	case !had.Before(until):
		return nil
	}
	mode := minio.Compliance
	err = s.client.PutObjectRetention(ctx, s.at.Bucket, key, minio.PutObjectRetentionOptions{Mode: &mode, RetainUntilDate: &until})
	return s.classify(ctx, name, err)
}

// RetainedUntil implements blob.Retainer, for the version that is current.
func (s *Store) RetainedUntil(ctx context.Context, name string) (time.Time, error) {
	key, err := s.key(name)
	if err != nil {
		return time.Time{}, err
	}
	// Of HEAD and GET ?retention, HEAD is what all storages answer alike.
	info, err := s.client.StatObject(ctx, s.at.Bucket, key, minio.StatObjectOptions{})
	if err != nil {
		return time.Time{}, s.classify(ctx, name, err)
	}
	until := info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date")
	if until == "" || info.Metadata.Get("X-Amz-Object-Lock-Mode") != string(minio.Compliance) {
		return time.Time{}, nil // what anybody may take back is no promise
	}
	t, err := time.Parse(time.RFC3339, until)
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: kept until %q, which is no time: %w", name, until, err)
	}
	return t, nil
}

// purge deletes key with all its versions, as far as they are not kept. The
// marker that hides it comes first and goes last, and only if nothing is left
// that it hides.
func (s *Store) purge(ctx context.Context, key string) error {
	remove := func(version string) error {
		return s.client.RemoveObject(ctx, s.at.Bucket, key, minio.RemoveObjectOptions{VersionID: version})
	}
	if err := remove(""); err != nil {
		return err
	}
	var markers []string
	for o := range s.client.ListObjectsIter(ctx, s.at.Bucket, minio.ListObjectsOptions{Prefix: key, Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			return o.Err
		}
		if o.Key != key {
			continue
		}
		if o.IsDeleteMarker {
			markers = append(markers, o.VersionID)
			continue
		}
		if err := remove(o.VersionID); err != nil {
			var reply minio.ErrorResponse
			if errors.As(err, &reply) && classes[reply.Code] == fault.ErrDenied {
				return nil // kept, and hidden
			}
			return err
		}
	}
	for _, version := range markers {
		if err := remove(version); err != nil {
			return err
		}
	}
	return nil
}
