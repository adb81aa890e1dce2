package ranged

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

// The object is "0123456789"; five bytes from off are asked for.
func TestRead(t *testing.T) {
	broken := errors.New("any error")
	for _, c := range []struct {
		name string
		off  int64
		body string
		span string
		size int64
		want string
		err  error // broken stands for any but io.EOF
	}{
		{"what was asked for", 3, "34567", "bytes 3-7/10", 5, "34567", nil},
		{"its length not said", 3, "34567", "bytes 3-7/10", -1, "34567", nil},
		{"the end of the object", 8, "89", "bytes 8-9/10", 2, "89", io.EOF},
		{"exactly to its end", 5, "56789", "bytes 5-9/10", 5, "56789", nil},
		{"behind its end, as some say it", 10, "", "bytes 10-9/10", 0, "", io.EOF},
		{"the whole object for its beginning", 0, "0123456789", "", 10, "01234", nil},
		{"the whole object, which is shorter", 0, "01", "", 2, "01", io.EOF},
		{"the whole object for its middle", 3, "0123456789", "", 10, "", broken},
		{"neither range nor length", 0, "0123456789", "", -1, "", broken},
		{"another range", 3, "45678", "bytes 4-8/10", 5, "", broken},
		{"less than there is", 3, "345", "bytes 3-5/10", 3, "", broken},
		{"more than was asked for", 3, "345678", "bytes 3-8/10", 6, "", broken},
		{"a range that is none", 3, "34567", "bytes 3-7", 5, "", broken},
		{"a range of negative length", 3, "34567", "bytes 3-1/10", 5, "", broken},
		{"a body that breaks off", 3, "345", "bytes 3-7/10", 5, "345", io.ErrUnexpectedEOF},
		{"a body that does not begin", 3, "", "bytes 3-7/10", 5, "", io.ErrUnexpectedEOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := make([]byte, 5)
			n, err := Read(t.Context(), strings.NewReader(c.body), c.span, c.size, c.off, p)
			if string(p[:n]) != c.want {
				t.Errorf("read %q, want %q", p[:n], c.want)
			}
			if c.err == broken && (err == nil || err == io.EOF) || c.err != broken && !errors.Is(err, c.err) || (c.err == io.EOF) != (err == io.EOF) {
				t.Errorf("%v, want %v", err, c.err)
			}
		})
	}
}

func TestReadSaysWhyItWasEnded(t *testing.T) {
	why := errors.New("why")
	ctx, end := context.WithCancelCause(t.Context())
	end(why)
	if _, err := Read(ctx, strings.NewReader("3"), "bytes 3-7/10", 5, 3, make([]byte, 5)); !errors.Is(err, why) {
		t.Error(err)
	}
}
