package blob

import (
	"crypto/md5"
	"io"
)

// ContentMD5 is the checksum of a body that storages behind HTTP compare with
// what arrived. It gives io.ErrUnexpectedEOF for a body shorter than size.
func ContentMD5(body io.ReaderAt, size int64) ([]byte, error) {
	sum := md5.New()
	n, err := io.Copy(sum, io.NewSectionReader(body, 0, size))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	return sum.Sum(nil), err
}
