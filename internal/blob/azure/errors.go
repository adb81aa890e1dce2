package azure

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"

	"github.com/backstay/backstay/internal/fault"
)

var errNoContainer = fmt.Errorf("no such container: %w", fault.ErrNotFound)

// classes are the codes whose status says too little. Whatever is in no class
// may pass.
var classes = map[bloberror.Code]error{
	bloberror.BlobNotFound:                       fault.ErrNotFound,
	bloberror.ContainerNotFound:                  errNoContainer,
	bloberror.BlobAlreadyExists:                  fault.ErrExists,
	bloberror.ConditionNotMet:                    fault.ErrExists,
	bloberror.UnauthorizedBlobOverwrite:          fault.ErrDenied, // a signature that may only create
	bloberror.BlobImmutableDueToPolicy:           fault.ErrDenied,
	bloberror.SnapshotsPresent:                   fault.ErrDenied,
	bloberror.LeaseIDMissing:                     fault.ErrDenied, // somebody holds it
	bloberror.AccountIsDisabled:                  fault.ErrDenied,
	bloberror.BlobArchived:                       fault.ErrUnsupported,
	bloberror.BlobBeingRehydrated:                fault.ErrUnsupported,
	bloberror.InvalidBlobType:                    fault.ErrUnsupported,
	bloberror.BlobTierInadequateForContentLength: fault.ErrUnsupported,
}

// passing are those with status 400, which otherwise says that the request is
// wrong and will be wrong again.
var passing = map[bloberror.Code]bool{
	bloberror.MD5Mismatch:   true,
	bloberror.CRC64Mismatch: true,
}

var byStatus = map[int]error{
	http.StatusBadRequest:         fault.ErrUnsupported,
	http.StatusUnauthorized:       fault.ErrDenied,
	http.StatusForbidden:          fault.ErrDenied,
	http.StatusNotFound:           fault.ErrNotFound,
	http.StatusMethodNotAllowed:   fault.ErrUnsupported,
	http.StatusPreconditionFailed: fault.ErrExists,
	http.StatusNotImplemented:     fault.ErrUnsupported,
}

// classify gives err the class that callers branch on, and the name that only
// we know. The library's own text is a page long and not repeated.
func (s *Store) classify(ctx context.Context, name string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var re *azcore.ResponseError
	if !errors.As(err, &re) {
		return fmt.Errorf("%s: %w", name, withoutURL(err))
	}
	code := bloberror.Code(re.ErrorCode)
	class := classes[code]
	if class == nil && !passing[code] {
		class = byStatus[re.StatusCode]
	}
	switch {
	case class == errNoContainer:
		return fmt.Errorf("container %s: %w", s.at.Container, errNoContainer)
	case class == fault.ErrExists || class == fault.ErrNotFound:
		return fmt.Errorf("%s: %w", name, class)
	case class != nil:
		return fmt.Errorf("%s: status %d %s: %w", name, re.StatusCode, code, class)
	}
	return fmt.Errorf("%s: status %d %s", name, re.StatusCode, code)
}
