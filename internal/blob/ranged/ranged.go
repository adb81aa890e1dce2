// Package ranged reads an HTTP server's answer to a request for a range of
// bytes.
package ranged

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Read fills p with the answer to a request for as many bytes from off, as
// blob.Store's ReadAt does: io.EOF means that the object ends before p is full.
// The other arguments are those of Answered.
func Read(ctx context.Context, body io.Reader, contentRange string, size, off int64, p []byte) (int, error) {
	want, atEnd, err := Answered(contentRange, size, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	n, err := io.ReadFull(body, p[:want])
	switch {
	case err != nil && ctx.Err() != nil:
		return n, context.Cause(ctx)
	case err == io.EOF:
		return n, fmt.Errorf("the answer broke off: %w", io.ErrUnexpectedEOF)
	case err != nil:
		return n, fmt.Errorf("the answer broke off: %w", err)
	case atEnd && n < len(p):
		return n, io.EOF
	}
	return n, nil
}

// Answered says how many bytes of [off, off+length) an answer holds and
// whether the object ends with them. Size is the length of the answer, or -1
// where it is not known. A server may ignore a range; taking its
// answer for the range would be silently wrong.
func Answered(contentRange string, size, off, length int64) (n int64, atEnd bool, err error) {
	r := contentRange
	if r == "" {
		if size < 0 {
			return 0, false, errors.New("the server says neither what it answers nor how much")
		}
		if off > 0 && size > 0 {
			return 0, false, errors.New("the server ignores ranges")
		}
		// The whole object, of which the beginning was asked.
		return min(length, size), size <= length, nil
	}
	first, last, total, ok := parseRange(r)
	if ok && first == off && total == off && last == off-1 {
		return 0, true, nil // how some say that the object ends here
	}
	if !ok || first != off || last < first || last >= off+length || total <= last || size >= 0 && size != last-first+1 {
		return 0, false, fmt.Errorf("the server answered with range %q to %d-%d", r, off, off+length-1)
	}
	n = last - first + 1
	if n < length && last != total-1 {
		return 0, false, fmt.Errorf("the server answered with less than the range %d-%d: %q", off, off+length-1, r)
	}
	return n, last == total-1, nil
}

// parseRange reads "bytes 5-9/100".
func parseRange(s string) (first, last, total int64, ok bool) {
	s, found := strings.CutPrefix(s, "bytes ")
	span, all, slash := strings.Cut(s, "/")
	a, b, dash := strings.Cut(span, "-")
	if !found || !slash || !dash {
		return 0, 0, 0, false
	}
	first, err1 := strconv.ParseInt(a, 10, 64)
	last, err2 := strconv.ParseInt(b, 10, 64)
	total, err3 := strconv.ParseInt(all, 10, 64)
	return first, last, total, err1 == nil && err2 == nil && err3 == nil
}
