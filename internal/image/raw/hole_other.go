//go:build !linux

package raw

import "github.com/backstay/backstay/internal/image"

// nextData cannot tell holes from data here; reading a hole is only slower.
func nextData(image.File, int64, int64) (data, hole int64, ok bool) { return 0, 0, false }
