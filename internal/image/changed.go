package image

import (
	"context"
	"fmt"
	"iter"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
)

// A Recorder is an Image whose file records, under names, which parts of the
// disk were written: the persistent bitmaps of qcow2.
type Recorder interface {
	Image

	// Changed walks what was written since the record of that name was begun,
	// in ascending order; neighbours do not touch. It costs time in proportion
	// to the record. A record that may lack writes is an error, and the caller
	// takes the whole disk for changed instead. Errors: fault.ErrNotFound,
	// fault.ErrUnsupported for a record that cannot be trusted or understood,
	// fault.ErrCorrupt.
	Changed(ctx context.Context, name string) iter.Seq2[extent.Extent, error]
}

// Changed is img's Changed, or that of the Image which img says by Unwrap that
// it wraps. An image without records gives fault.ErrUnsupported.
func Changed(ctx context.Context, img Image, name string) iter.Seq2[extent.Extent, error] {
	for inner := img; ; {
		if r, ok := inner.(Recorder); ok {
			return r.Changed(ctx, name)
		}
		wrapper, ok := inner.(interface{ Unwrap() Image })
		if !ok {
			break
		}
		inner = wrapper.Unwrap()
	}
	return func(yield func(extent.Extent, error) bool) {
		yield(extent.Extent{}, fmt.Errorf("bitmap %q: %s images have none: %w", name, img.Info().Format, fault.ErrUnsupported))
	}
}
