package reposerver

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// A refusal is an answer with a status of its own.
type refusal struct {
	status int
	reason string
}

func (e *refusal) Error() string { return e.reason }

func refuse(status int, format string, args ...any) error {
	return &refusal{status, fmt.Sprintf(format, args...)}
}

// An exchange is one request on its way to an answer.
type exchange struct {
	s     *Server
	w     http.ResponseWriter
	r     *http.Request
	rc    *http.ResponseController
	to    remote.Target
	grant Grant // what the client's token gives; empty until it is known
	store *file.Store
	sent  bool // the answer has begun: an error can only break it off
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &exchange{s: s, w: w, r: r, rc: http.NewResponseController(w)}
	w.Header().Set("Server", "backstay")
	w.Header().Set("Cache-Control", "no-store")
	if err := x.serve(); err != nil {
		x.fail(err)
	}
}

func (x *exchange) serve() (err error) {
	if x.grant, err = x.signIn(); err != nil {
		return err
	}
	if !x.s.enter(x.grant.Name) {
		return refuse(http.StatusServiceUnavailable, "too many requests at once")
	}
	defer x.s.leave(x.grant.Name)
	// RawPath is set where something in the path was escaped, which names never
	// need: so what is looked at is what was sent.
	if x.r.URL.RawPath != "" || x.r.URL.Scheme != "" {
		return refuse(http.StatusBadRequest, "the path has something escaped in it, which no name needs")
	}
	if x.to, err = remote.ParseTarget(x.r.URL.Path); err != nil {
		return refuse(http.StatusBadRequest, "%v", err)
	}
	if !x.grant.covers(x.to.Repo) {
		// The same for one that exists and one that doesn't.
		return fmt.Errorf("this token is not for repository %s: %w", x.to.Repo, fault.ErrDenied)
	}
	if x.to.Whole() && x.r.Method == http.MethodPut {
		return x.make()
	}
	if x.store, err = x.s.repository(x.to.Repo); err != nil {
		return err
	}
	claims := x.to.Claims || x.to.Settled
	if x.r.Method != http.MethodPut && !claims && x.r.ContentLength != 0 {
		return refuse(http.StatusBadRequest, "a body belongs to PUT and to claims alone")
	}
	switch {
	case claims && x.r.Method == http.MethodPost && x.to.Claims:
		return x.claimKeys()
	case claims && x.r.Method == http.MethodPost:
		return x.settle()
	case claims:
	case x.to.List && x.r.Method == http.MethodGet:
		return x.list()
	case x.to.List:
	case x.to.Name == "" && x.r.Method == http.MethodGet:
		return x.hello()
	case x.to.Name == "":
	case x.r.Method == http.MethodGet:
		return x.get()
	case x.r.Method == http.MethodHead:
		return x.head()
	case x.r.Method == http.MethodPut:
		return x.put()
	case x.r.Method == http.MethodDelete:
		return x.delete()
	}
	return refuse(http.StatusMethodNotAllowed, "no such verb here")
}

// one gives the only value of a header; "" if there is none.
func (x *exchange) one(name string) (string, error) {
	switch v := x.r.Header.Values(name); len(v) {
	case 0:
		return "", nil
	case 1:
		return v[0], nil
	}
	return "", refuse(http.StatusBadRequest, "header %s is there more than once", name)
}

func (x *exchange) signIn() (Grant, error) {
	auth, err := x.one("Authorization")
	if err != nil {
		return Grant{}, err
	}
	const scheme = "Bearer "
	if len(auth) < len(scheme) || auth[:len(scheme)] != scheme {
		return Grant{}, errNoToken
	}
	return x.s.tokens.check(x.r.Context(), auth[len(scheme):])
}

// fail answers with err, and writes down what was refused.
func (x *exchange) fail(err error) {
	class, status := remote.ClassOf(err)
	reason := err.Error()
	var no *refusal
	switch {
	case x.r.Context().Err() != nil && class == "":
		panic(http.ErrAbortHandler) // nobody is there to hear it
	case errors.As(err, &no):
		status = no.status
	case errors.Is(err, errNoToken):
		class, status = "denied", http.StatusUnauthorized
		x.w.Header().Set("WWW-Authenticate", "Bearer")
	case class == "":
		// What the machine says about its directories is for its own people.
		reason = "the server is in trouble; its log says more"
	}
	x.audit(status, err)
	if x.sent {
		panic(http.ErrAbortHandler)
	}
	_ = x.rc.SetWriteDeadline(time.Now().Add(x.s.limit.stall))
	h := x.w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Del("Content-Length")
	h.Del("Content-Range")
	if class != "" {
		h.Set(remote.ClassHeader, class)
	}
	x.w.WriteHeader(status)
	reason = strings.TrimPrefix(reason, x.to.Name+": ") // the client knows
	if len(reason) > remote.MaxReason-1 {
		reason = reason[:remote.MaxReason-1]
	}
	_, _ = io.WriteString(x.w, reason+"\n")
}

// audit writes one line about a request that was denied or that failed. It
// never holds a token: only its name, once it was known to be right.
func (x *exchange) audit(status int, err error) {
	log, what := x.s.log.Warn, "denied"
	switch {
	case status == http.StatusNotFound, status == http.StatusPreconditionFailed, status == http.StatusServiceUnavailable,
		status == http.StatusRequestedRangeNotSatisfiable, status == http.StatusRequestTimeout:
		return // everyday answers
	case status >= 500:
		log, what = x.s.log.Error, "failed"
	}
	if x.grant.Name == "" && !x.s.noise.may() {
		return
	}
	args := []any{"from", x.r.RemoteAddr, "token", x.grant.Name, "verb", cut(x.r.Method, 20), "repository", x.to.Repo, "object", x.to.Name, "status", status, "why", err.Error()}
	if n := x.s.noise.more(); n > 0 {
		args = append(args, "not_shown", n)
	}
	log(what, args...)
}

func cut(s string, n int) string { return s[:min(n, len(s))] }

// hello says what this token may do, so that a client learns at once what is
// wrong.
func (x *exchange) hello() error {
	x.w.Header().Set("Content-Type", "application/json")
	return x.finish(json.NewEncoder(x.w).Encode(map[string]any{
		"repository": x.to.Repo, "token": x.grant.Name, "role": x.grant.Role, "immutable_seconds": int64(x.s.held / time.Second),
	}))
}

// finish marks that the answer began.
func (x *exchange) finish(err error) error {
	x.sent = true
	return err
}

// make makes a repository's directory: for an admin, or for a backup client
// whose token names this very repository.
func (x *exchange) make() error {
	if _, err := x.s.repository(x.to.Repo); err == nil || !errors.Is(err, fault.ErrNotFound) {
		if err != nil {
			return err
		}
		x.w.WriteHeader(http.StatusOK)
		return nil
	}
	named := false
	for _, r := range x.grant.Repositories {
		named = named || r == x.to.Repo
	}
	if x.grant.Role != Admin && (x.grant.Role != Backup || !named) {
		return fmt.Errorf("a token of role %s may not make repository %s: %w", x.grant.Role, x.to.Repo, fault.ErrDenied)
	}
	if err := x.s.makeRepository(x.to.Repo); err != nil {
		return err
	}
	x.s.log.Info("repository made", "from", x.r.RemoteAddr, "token", x.grant.Name, "repository", x.to.Repo)
	x.w.WriteHeader(http.StatusCreated)
	return nil
}

func (x *exchange) head() error {
	n, err := x.store.Size(x.r.Context(), x.to.Name)
	if err != nil {
		return err
	}
	h := x.w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	x.w.WriteHeader(http.StatusOK)
	return nil
}

// Buffers of two sizes: for small objects and pages, and for runs of a pack.
const (
	smallBuffer = 64 << 10
	largeBuffer = 4 << 20
)

var buffers = [2]sync.Pool{
	{New: func() any { b := make([]byte, smallBuffer); return &b }},
	{New: func() any { b := make([]byte, largeBuffer); return &b }},
}

// buffer gives at most largeBuffer bytes, n if it is less.
func buffer(n int64) (b []byte, free func()) {
	pool := &buffers[1]
	if n <= smallBuffer {
		pool = &buffers[0]
	}
	p := pool.Get().(*[]byte)
	return (*p)[:min(n, int64(len(*p)))], func() { pool.Put(p) }
}

// get serves a whole object or a range. What fits a buffer is read in one call
// of the store, so that it is whole even if it is being replaced.
func (x *exchange) get() error {
	head, err := x.one("Range")
	if err != nil {
		return err
	}
	h := x.w.Header()
	h.Set("Content-Type", "application/octet-stream")
	if head != "" {
		off, n, err := remote.ParseRange(head)
		if err != nil {
			return refuse(http.StatusBadRequest, "%v", err)
		}
		if n <= largeBuffer {
			return x.getShort(off, n)
		}
		size, err := x.store.Size(x.r.Context(), x.to.Name)
		if err != nil {
			return err
		}
		if off >= size {
			return refuse(http.StatusRequestedRangeNotSatisfiable, "the object ends before that")
		}
		end := min(size, off+n)
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, end-1, size))
		return x.getLong(http.StatusPartialContent, off, end)
	}
	size, err := x.store.Size(x.r.Context(), x.to.Name)
	if err != nil {
		return err
	}
	return x.getLong(http.StatusOK, 0, size)
}

func (x *exchange) getShort(off, n int64) error {
	p, free := buffer(n)
	defer free()
	got, err := x.store.ReadAt(x.r.Context(), x.to.Name, p, off)
	total := "*"
	switch {
	case err == io.EOF && got == 0:
		return refuse(http.StatusRequestedRangeNotSatisfiable, "the object ends before that")
	case err == io.EOF:
		total = strconv.FormatInt(off+int64(got), 10)
	case err != nil:
		return err
	}
	h := x.w.Header()
	h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%s", off, off+int64(got)-1, total))
	h.Set("Content-Length", strconv.Itoa(got))
	x.sent = true
	x.w.WriteHeader(http.StatusPartialContent)
	return x.write(p[:got])
}

func (x *exchange) getLong(status int, off, end int64) error {
	x.w.Header().Set("Content-Length", strconv.FormatInt(end-off, 10))
	p, free := buffer(end - off)
	defer free()
	for first := true; first || off < end; first = false {
		q := p[:min(int64(len(p)), end-off)]
		if n, err := x.store.ReadAt(x.r.Context(), x.to.Name, q, off); n < len(q) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF // it was replaced by a shorter one
			}
			return err
		}
		if first {
			x.sent = true
			x.w.WriteHeader(status)
		}
		if err := x.write(q); err != nil {
			return err
		}
		off += int64(len(q))
	}
	return nil
}

// write sends p, and gives each piece the time of a stall to leave.
func (x *exchange) write(p []byte) error {
	for len(p) > 0 {
		piece := p[:min(len(p), 256<<10)]
		if err := x.rc.SetWriteDeadline(time.Now().Add(x.s.limit.stall)); err != nil {
			return err
		}
		if _, err := x.w.Write(piece); err != nil {
			return err
		}
		p = p[len(piece):]
	}
	return nil
}

// list serves one page of a listing.
func (x *exchange) list() error {
	query, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return refuse(http.StatusBadRequest, "the query cannot be read")
	}
	for key, v := range query {
		if len(v) != 1 || key != "prefix" && key != "after" {
			return refuse(http.StatusBadRequest, "the query has %.50q: want prefix and after, each once", key)
		}
		if err := remote.CheckPrefix(v[0]); err != nil {
			return refuse(http.StatusBadRequest, "%v", err)
		}
	}
	x.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	buf := make([]byte, 0, smallBuffer)
	n := 0
	for o, err := range x.store.ListAfter(x.r.Context(), query.Get("prefix"), query.Get("after")) {
		if err != nil {
			return err
		}
		if n == x.s.limit.page {
			return x.write(append(buf, remote.ListMore+"\n"...))
		}
		n++
		if buf = remote.ListLine(buf, o); len(buf) > smallBuffer-2*blob.MaxNameBytes {
			x.sent = true
			if err := x.write(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
	}
	return x.write(append(buf, remote.ListEnd+"\n"...))
}

// hashHeader reads the hash of the body that is to come.
func (x *exchange) hashHeader() (sum [32]byte, err error) {
	text, err := x.one(remote.HashHeader)
	if err != nil {
		return sum, err
	}
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(sum) {
		return sum, refuse(http.StatusBadRequest, "header %s: want the BLAKE3 of the body in 64 hex digits", remote.HashHeader)
	}
	return [32]byte(b), nil
}

// holds says whether the object is there, and whether it has these bytes.
func (x *exchange) holds(size int64, sum [32]byte) (there, same bool, err error) {
	n, err := x.store.Size(x.r.Context(), x.to.Name)
	if errors.Is(err, fault.ErrNotFound) {
		return false, false, nil
	}
	if err != nil || n != size {
		return err == nil, false, err
	}
	p, free := buffer(max(size, 1))
	defer free()
	hash := blake3.New()
	for off := int64(0); off < size; {
		q := p[:min(int64(len(p)), size-off)]
		k, err := x.store.ReadAt(x.r.Context(), x.to.Name, q, off)
		if k < len(q) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return true, false, err
		}
		_, _ = hash.Write(q)
		off += int64(k)
	}
	return true, [32]byte(hash.Sum(nil)) == sum, nil
}
