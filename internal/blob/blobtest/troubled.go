package blobtest

import (
	"errors"
	"io"
	"net/http"
	"sync/atomic"
)

// Troubled fails every third request as servers do: busy before it took
// effect, a connection that breaks after it did, an answer that breaks off.
// Busy is how this kind of server says that it is.
func Troubled(rt http.RoundTripper, busy func(*http.Request) *http.Response) http.RoundTripper {
	return &troubled{RoundTripper: rt, busy: busy}
}

type troubled struct {
	http.RoundTripper
	busy func(*http.Request) *http.Response
	n    atomic.Int64
}

func (tr *troubled) RoundTrip(r *http.Request) (*http.Response, error) {
	n := tr.n.Add(1)
	if n%3 != 0 {
		return tr.RoundTripper.RoundTrip(r)
	}
	if n%2 == 0 {
		if r.Body != nil {
			r.Body.Close()
		}
		return tr.busy(r), nil
	}
	reply, err := tr.RoundTripper.RoundTrip(r)
	if err != nil || r.Method != http.MethodGet || reply.StatusCode >= 300 {
		if err == nil {
			reply.Body.Close()
		}
		return nil, errors.New("connection reset")
	}
	reply.Body = &breaksOff{reply.Body, reply.ContentLength / 2}
	return reply, nil
}

// breaksOff ends as a body does whose connection is gone.
type breaksOff struct {
	io.ReadCloser
	left int64
}

func (b *breaksOff) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}
