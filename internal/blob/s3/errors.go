package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/minio/minio-go/v7"

	"github.com/backstay/backstay/internal/fault"
)

var errNoBucket = fmt.Errorf("no such bucket: %w", fault.ErrNotFound)

// classes are what storages call the errors that a second try does not mend.
// Whatever is not here may pass.
var classes = map[string]error{
	"NoSuchKey":             fault.ErrNotFound,
	"NoSuchVersion":         fault.ErrNotFound,
	"NotFound":              fault.ErrNotFound,
	"NoSuchBucket":          errNoBucket,
	"PreconditionFailed":    fault.ErrExists,
	"AccessDenied":          fault.ErrDenied,
	"AllAccessDisabled":     fault.ErrDenied,
	"AccountProblem":        fault.ErrDenied,
	"InvalidAccessKeyId":    fault.ErrDenied,
	"SignatureDoesNotMatch": fault.ErrDenied,
	"ExpiredToken":          fault.ErrDenied,
	"InvalidToken":          fault.ErrDenied,
	"RequestTimeTooSkewed":  fault.ErrDenied,
	"ObjectLocked":          fault.ErrDenied,
	"QuotaExceeded":         fault.ErrNoSpace,
	"InsufficientStorage":   fault.ErrNoSpace,
	"XMinioStorageFull":     fault.ErrNoSpace,
	"NotImplemented":        fault.ErrUnsupported,
	"MethodNotAllowed":      fault.ErrUnsupported,
	"EntityTooLarge":        fault.ErrUnsupported,
	"InvalidBucketName":     fault.ErrUnsupported,
	"PermanentRedirect":     fault.ErrUnsupported,
}

// passing are those with status 400, which otherwise says that the request is
// wrong and will be wrong again.
var passing = map[string]bool{
	"RequestTimeout":            true, // the body came too slowly
	"IncompleteBody":            true,
	"BadDigest":                 true, // it was changed on its way
	"XAmzContentSHA256Mismatch": true,
	"TooManyRequests":           true,
	"Throttling":                true,
	"ThrottlingException":       true,
	"RequestLimitExceeded":      true,
	"BandwidthLimitExceeded":    true,
	"InternalError":             true,
}

// byStatus serves storages and proxies that answer without a code.
var byStatus = map[int]error{
	http.StatusNotFound:            fault.ErrNotFound,
	http.StatusPreconditionFailed:  fault.ErrExists,
	http.StatusUnauthorized:        fault.ErrDenied,
	http.StatusForbidden:           fault.ErrDenied,
	http.StatusInsufficientStorage: fault.ErrNoSpace,
	http.StatusNotImplemented:      fault.ErrUnsupported,
}

// classify gives err the class that callers branch on, and the name that only
// we know.
func (s *Store) classify(ctx context.Context, name string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var reply minio.ErrorResponse
	if !errors.As(err, &reply) {
		return fmt.Errorf("%s: %w", name, err)
	}
	class, known := classes[reply.Code]
	if !known {
		class = byStatus[reply.StatusCode]
	}
	if class == nil && reply.StatusCode == http.StatusBadRequest && !passing[reply.Code] {
		class = fault.ErrUnsupported
	}
	switch {
	case class == errNoBucket:
		return fmt.Errorf("bucket %s: %w", s.at.Bucket, errNoBucket)
	case class == fault.ErrExists || class == fault.ErrNotFound:
		return fmt.Errorf("%s: %w", name, class)
	case class != nil:
		return fmt.Errorf("%s: %s (%s): %w", name, reply.Message, reply.Code, class)
	}
	return fmt.Errorf("%s: status %d, %s: %w", name, reply.StatusCode, reply.Code, err)
}
