// Package remote is a store on a repository server ("backstay repo serve"),
// and the words that the two say to each other.
//
// It makes one request for a call and tries nothing again: that is
// blob/retry's, which belongs around it. It has no locks.
package remote

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
)

const (
	bufferBytes = 128 << 10
	// A body longer than this is sent when the server has said that it wants
	// it: a refusal then arrives, and costs no traffic.
	expectAbove = 256 << 10
	// Who sends nothing for so long, in the middle of an answer, is dead.
	stall = time.Minute
)

// A Store is a blob.Store.
type Store struct {
	at        Location
	host      string // https://host:port
	bearer    string
	client    http.Client
	transport *http.Transport
}

var (
	_ blob.Store      = (*Store)(nil)
	_ blob.ReadShaper = (*Store)(nil)
)

// request makes a request without sending it.
func (s *Store) request(ctx context.Context, method string, t Target, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, s.host+t.Path(), body)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Authorization", s.bearer)
	r.Header.Set("User-Agent", "backstay")
	return r, nil
}

// do sends a request whose answer has no place in a file. The caller closes the
// answer's body.
func (s *Store) do(ctx context.Context, method string, t Target, query url.Values) (*http.Response, error) {
	r, err := s.request(ctx, method, t, nil)
	if err != nil {
		return nil, err
	}
	r.URL.RawQuery = query.Encode()
	return s.send(ctx, r)
}

func (s *Store) send(ctx context.Context, r *http.Request) (*http.Response, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	res, err := s.client.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var wrapped *url.Error // names the URL, which the caller says better
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return nil, err
	}
	if res.StatusCode/100 == 2 || res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return res, nil
	}
	defer res.Body.Close()
	return nil, answer(res)
}

// answer makes an error of an answer that says no.
func answer(res *http.Response) error {
	reason, _ := io.ReadAll(io.LimitReader(res.Body, MaxReason))
	text := strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, string(reason)))
	class, known := Classes[res.Header.Get(ClassHeader)]
	if !known {
		class = byStatus[res.StatusCode]
	}
	switch {
	case class != nil && (text == "" || text == class.Error()):
		return fmt.Errorf("the server says: %w", class)
	case class != nil:
		return fmt.Errorf("the server says: %s: %w", strings.TrimSuffix(text, ": "+class.Error()), class)
	}
	return fmt.Errorf("the server says: %s (status %d)", text, res.StatusCode)
}

// Put implements blob.Store. For who may not overwrite, an object that has the
// same bytes is as good as stored, and one that has others is fault.ErrExists.
func (s *Store) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.put(ctx, name, body, size, false)
}

// Create implements blob.Store.
func (s *Store) Create(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	return s.put(ctx, name, body, size, true)
}

func (s *Store) put(ctx context.Context, name string, body io.ReaderAt, size int64, create bool) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%s: size %d", name, size)
	}
	sum := blake3.New()
	switch n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{io.NewSectionReader(body, 0, size)}, make([]byte, min(size+1, 1<<20))); {
	case err != nil:
		return fmt.Errorf("%s: body: %w", name, err)
	case n < size:
		return fmt.Errorf("%s: body: %w", name, io.ErrUnexpectedEOF)
	}
	sent := &sentBody{r: io.NewSectionReader(body, 0, size)}
	r, err := s.request(ctx, http.MethodPut, Target{Repo: s.at.Repo, Name: name}, sent)
	if err != nil {
		return err
	}
	r.ContentLength = size
	if size == 0 {
		r.Body = http.NoBody
	}
	r.Header.Set(HashHeader, hex.EncodeToString(sum.Sum(nil)))
	if create {
		r.Header.Set("If-None-Match", "*")
	}
	if blob.IsFreeing(ctx) {
		r.Header.Set(FreeingHeader, "1")
	}
	if size > expectAbove {
		r.Header.Set("Expect", "100-continue")
	}
	res, err := s.send(ctx, r)
	if err != nil {
		if broken := sent.failed(); broken != nil {
			err = fmt.Errorf("body: %w", broken)
		}
		return fmt.Errorf("%s: %w", name, err)
	}
	return drain(res)
}

// drain reads what little an answer says, so that its connection can be used
// again.
func drain(res *http.Response) error {
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, MaxReason))
	return res.Body.Close()
}

// A sentBody remembers whether it was the body that failed.
type sentBody struct {
	r io.Reader

	mu  sync.Mutex
	err error
}

func (b *sentBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF {
		b.mu.Lock()
		b.err = err
		b.mu.Unlock()
	}
	return n, err
}

func (b *sentBody) failed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// ReadAt implements blob.Store, by one GET of that range.
func (s *Store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if err := check(ctx, name); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: offset %d", name, off)
	}
	if len(p) == 0 {
		_, err := s.Size(ctx, name)
		return 0, err
	}
	done := 0
	for done < len(p) {
		n, err := s.readRange(ctx, name, p[done:min(len(p), done+MaxRange)], off+int64(done))
		done += n
		if err == io.EOF {
			return done, err
		}
		if err != nil {
			return done, fmt.Errorf("%s: %w", name, err)
		}
	}
	return done, nil
}

func (s *Store) readRange(ctx context.Context, name string, p []byte, off int64) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, err := s.request(ctx, http.MethodGet, Target{Repo: s.at.Repo, Name: name}, nil)
	if err != nil {
		return 0, err
	}
	last := off + int64(len(p)) - 1
	if last < off || last >= 1e18 {
		return 0, io.EOF // no object is so long
	}
	r.Header.Set("Range", "bytes="+strconv.FormatInt(off, 10)+"-"+strconv.FormatInt(last, 10))
	watch := time.AfterFunc(stall, func() { cancel(errStalled) })
	defer watch.Stop()
	res, err := s.send(ctx, r)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return 0, io.EOF
	}
	want := res.ContentLength
	if res.StatusCode != http.StatusPartialContent || want < 1 || want > int64(len(p)) ||
		!strings.HasPrefix(res.Header.Get("Content-Range"), "bytes "+strconv.FormatInt(off, 10)+"-"+strconv.FormatInt(off+want-1, 10)+"/") {
		return 0, fmt.Errorf("the server answered with status %d, %d bytes, range %.60q to bytes %d-%d", res.StatusCode, want, res.Header.Get("Content-Range"), off, last)
	}
	n := 0
	for n < int(want) {
		watch.Reset(stall)
		k, err := res.Body.Read(p[n:want])
		n += k
		if err != nil && n < int(want) {
			if ctx.Err() != nil {
				return n, context.Cause(ctx)
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return n, fmt.Errorf("the answer broke off: %w", err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

var errStalled = fmt.Errorf("the server sent nothing for %s", stall)

// Size implements blob.Store.
func (s *Store) Size(ctx context.Context, name string) (int64, error) {
	if err := check(ctx, name); err != nil {
		return 0, err
	}
	res, err := s.do(ctx, http.MethodHead, Target{Repo: s.at.Repo, Name: name}, nil)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	res.Body.Close()
	if res.ContentLength < 0 {
		return 0, fmt.Errorf("%s: the server did not say how long it is", name)
	}
	return res.ContentLength, nil
}

// List implements blob.Store. Pages come whole into memory before they are
// shown: whoever walks may take his time, and no connection waits for him.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) {
		after := ""
		for {
			page, more, err := s.page(ctx, prefix, after)
			if err != nil {
				yield(blob.Object{}, err)
				return
			}
			for i, o := range page {
				if err := ctx.Err(); err != nil {
					yield(blob.Object{}, context.Cause(ctx))
					return
				}
				if !yield(o, nil) {
					return
				}
				page[i].Name = "" // shown; let it go
				after = o.Name
			}
			if !more {
				return
			}
		}
	}
}

// maxPage bounds one page in memory, in objects.
const maxPage = 100_000

func (s *Store) page(ctx context.Context, prefix, after string) (page []blob.Object, more bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := CheckPrefix(prefix); err != nil {
		return nil, false, nil // no object has such a name
	}
	// A page may take long to begin: the server reads directories.
	watch := time.AfterFunc(2*stall, func() { cancel(errStalled) })
	defer watch.Stop()
	query := url.Values{"prefix": {prefix}}
	if after != "" {
		query.Set("after", after)
	}
	res, err := s.do(ctx, http.MethodGet, Target{Repo: s.at.Repo, List: true}, query)
	if err != nil {
		return nil, false, fmt.Errorf("list %s: %w", prefix, err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(make([]byte, 0, 64<<10), 2*maxNameLen)
	for lines.Scan() {
		watch.Reset(2 * stall)
		line := lines.Bytes()
		if bytes.Equal(line, []byte(ListEnd)) || bytes.Equal(line, []byte(ListMore)) {
			more = string(line) == ListMore
			if more && len(page) == 0 {
				return nil, false, fmt.Errorf("list %s: the server sent an empty page", prefix)
			}
			if lines.Scan() {
				return nil, false, fmt.Errorf("list %s: the server sent something behind the end", prefix)
			}
			return page, more, lines.Err()
		}
		o, err := parseListLine(string(line))
		if err != nil {
			return nil, false, fmt.Errorf("list %s: %w", prefix, err)
		}
		if !strings.HasPrefix(o.Name, prefix) || o.Name <= after || len(page) == maxPage {
			return nil, false, fmt.Errorf("list %s: the server listed %s, which was not asked for or out of order", prefix, o.Name)
		}
		after = o.Name
		page = append(page, o)
	}
	if ctx.Err() != nil {
		return nil, false, context.Cause(ctx)
	}
	err = lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return nil, false, fmt.Errorf("list %s: the answer broke off: %w", prefix, err)
}

// Delete implements blob.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	res, err := s.do(ctx, http.MethodDelete, Target{Repo: s.at.Repo, Name: name}, nil)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return drain(res)
}

// String implements blob.Store.
func (s *Store) String() string { return s.at.String() }

// Close lets go of the connections. It may be called twice.
func (s *Store) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}

func check(ctx context.Context, name string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return blob.CheckName(name)
}

// ReadShape implements blob.ReadShaper: each read is a round trip.
func (s *Store) ReadShape() blob.ReadShape {
	return blob.ReadShape{Gap: 512 << 10, Run: 8 << 20, InFlight: 16, Memory: 128 << 20}
}
