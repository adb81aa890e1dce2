//go:build !linux

package image

// NextData cannot tell holes from data here; reading a hole is only slower.
func NextData(File, int64, int64) (data, hole int64, ok bool) { return 0, 0, false }
