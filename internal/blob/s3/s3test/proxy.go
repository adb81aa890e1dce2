package s3test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"strings"
	"sync"
	"testing"
	"time"
)

// A Fault is what a Proxy does to one request. The zero Fault does nothing.
type Fault struct {
	Delay   time.Duration              // before the server hears of the request
	Status  int                        // is answered in place of the server, who hears nothing
	Code    string                     // that the answer names, as S3 does
	Lost    bool                       // the request is carried out, the answer never comes
	Cut     bool                       // the answer breaks off in its middle
	Stale   bool                       // a GET, HEAD or LIST is answered as it was the first time
	Rewrite func(http.Header, *[]byte) // changes the answer
}

// Proxy starts an HTTP proxy before the server at endpoint and gives its own
// host:port. The hook is asked about each request, from several goroutines.
func Proxy(t testing.TB, endpoint string, hook func(*http.Request) Fault) string {
	t.Helper()
	p := &proxy{hook: hook, seen: map[string]answer{}}
	p.forward = &httputil.ReverseProxy{
		// The host stays as the client signed it.
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", endpoint },
		Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			w.WriteHeader(http.StatusBadGateway)
		},
	}
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

type proxy struct {
	hook    func(*http.Request) Fault
	forward *httputil.ReverseProxy

	mu   sync.Mutex
	seen map[string]answer // first answers, by method and URL
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := p.hook(r)
	time.Sleep(f.Delay)
	if f.Status != 0 {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(f.Status)
		io.WriteString(w, "<Error><Code>"+f.Code+"</Code><Message>injected</Message></Error>")
		return
	}
	if !f.Lost && !f.Cut && !f.Stale && f.Rewrite == nil {
		p.forward.ServeHTTP(w, r)
		return
	}
	key := r.Method + " " + r.URL.String() + " " + r.Header.Get("Range")
	rec := httptest.NewRecorder()
	p.forward.ServeHTTP(rec, r)
	a := answer{rec.Code, rec.Header(), rec.Body.Bytes()}
	if f.Stale && r.Method != http.MethodPut && r.Method != http.MethodDelete {
		p.mu.Lock()
		if old, ok := p.seen[key]; ok {
			a = old
		} else {
			p.seen[key] = a
		}
		p.mu.Unlock()
	}
	if f.Rewrite != nil {
		a.body = bytes.Clone(a.body)
		a.header = a.header.Clone()
		f.Rewrite(a.header, &a.body)
	}
	if f.Lost {
		panic(http.ErrAbortHandler)
	}
	for name, values := range a.header {
		w.Header()[name] = values
	}
	w.WriteHeader(a.status)
	if f.Cut {
		w.Write(a.body[:len(a.body)/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	w.Write(a.body)
}

// IsList says whether the request lists a bucket.
func IsList(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.RawQuery, "prefix=")
}
