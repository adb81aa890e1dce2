package s3

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/probe"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/blob/s3/s3test"
	"github.com/backstay/backstay/internal/fault"
)

func open(t *testing.T, url string, wrap func(http.RoundTripper) http.RoundTripper) *Store {
	t.Helper()
	l, err := ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	if l.Region == "" {
		l.Region = "us-east-1"
	}
	st, err := Open(t.Context(), l, Options{Credentials: s3test.Credentials(), Wrap: wrap})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestStore(t *testing.T) {
	g := s3test.Start(t)
	endpoint := g.Endpoint
	blobtest.Run(t, func(t *testing.T) blob.Store {
		return open(t, "s3://"+endpoint+"/"+g.Bucket(t), nil)
	})
	t.Run("under a prefix", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store {
			return open(t, "s3://"+endpoint+"/"+g.Bucket(t)+"/some/where", nil)
		})
	})
	t.Run("probe", func(t *testing.T) {
		st := open(t, "s3://"+endpoint+"/"+g.Bucket(t), nil)
		if err := probe.Run(t.Context(), st); err != nil {
			t.Error(err)
		}
		if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) > 0 {
			t.Errorf("the probe left %v, %v", names, err)
		}
	})
	t.Run("no bucket", func(t *testing.T) {
		st := open(t, "s3://"+endpoint+"/nowhere", nil)
		r, n := blobtest.Body(nil)
		if err := st.Put(t.Context(), "a", r, n); !errors.Is(err, fault.ErrNotFound) || !strings.Contains(err.Error(), "bucket nowhere") {
			t.Errorf("put: %v", err)
		}
		if err := st.Delete(t.Context(), "a"); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("delete: %v", err)
		}
	})
	t.Run("a wrong secret", func(t *testing.T) {
		l, err := ParseURL("s3://" + endpoint + "/" + g.Bucket(t) + "?region=us-east-1")
		if err != nil {
			t.Fatal(err)
		}
		const wrong = "not-the-secret"
		st, err := Open(t.Context(), l, Options{Credentials: credentials.NewStaticV4(s3test.AccessKey, wrong, "")})
		if err != nil {
			t.Fatal(err)
		}
		_, err = blobtest.Names(t.Context(), st, "")
		if !errors.Is(err, fault.ErrDenied) || strings.Contains(err.Error(), wrong) {
			t.Errorf("list: %v", err)
		}
	})
	t.Run("a bucket that is shared", func(t *testing.T) {
		name := g.Bucket(t)
		st := open(t, "s3://"+endpoint+"/"+name, nil)
		r, n := blobtest.Body([]byte("x"))
		if err := st.Put(t.Context(), "ours", r, n); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(g.Dir(name)+"/Not Ours.txt", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) != 1 {
			t.Errorf("listed %q, %v", names, err)
		}
	})
	t.Run("trouble on every third request", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store {
			st := open(t, "s3://"+endpoint+"/"+g.Bucket(t), func(rt http.RoundTripper) http.RoundTripper { return blobtest.Troubled(rt, slowDown) })
			return retry.Wrap(st, retry.Options{First: time.Millisecond, Longest: 5 * time.Millisecond})
		})
	})
}

func slowDown(r *http.Request) *http.Response {
	return &http.Response{StatusCode: 503, Status: "503 Slow Down", Header: http.Header{}, Request: r, ProtoMajor: 1, ProtoMinor: 1,
		Body: io.NopCloser(strings.NewReader("<Error><Code>SlowDown</Code></Error>"))}
}

// answers gives one answer to everything.
type answers func(*http.Request) (*http.Response, error)

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	reply, err := a(r)
	if reply != nil {
		reply.Request, reply.ProtoMajor, reply.ProtoMinor = r, 1, 1
	}
	return reply, err
}

func reply(status int, body string, header ...string) *http.Response {
	h := http.Header{"Last-Modified": {"Sun, 22 Nov 2026 08:00:00 GMT"}, "Etag": {`"d41d8cd98f00b204e9800998ecf8427e"`}, "Content-Length": {fmt.Sprint(len(body))}}
	for i := 0; i < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Status: http.StatusText(status), Header: h, ContentLength: int64(len(body)), Body: io.NopCloser(strings.NewReader(body))}
}

func with(t *testing.T, a answers) *Store {
	return open(t, "s3+http://storage.example/bucket", func(http.RoundTripper) http.RoundTripper { return a })
}

func TestAnswersThatAreNotTheRange(t *testing.T) {
	for _, c := range []struct {
		name  string
		reply *http.Response
		want  int // bytes, or -1 for an error
		err   error
	}{
		{"right", reply(206, "23456", "Content-Range", "bytes 2-6/100"), 5, nil},
		{"right, at the end", reply(206, "234", "Content-Range", "bytes 2-4/5"), 3, io.EOF},
		{"the range is ignored", reply(200, "0123456789"), -1, nil},
		{"another range", reply(206, "34567", "Content-Range", "bytes 3-7/100"), -1, nil},
		{"more than was asked", reply(206, "234567", "Content-Range", "bytes 2-7/100"), -1, nil},
		{"less than was asked", reply(206, "234", "Content-Range", "bytes 2-4/100"), -1, nil},
		{"less than it says", reply(206, "234", "Content-Range", "bytes 2-6/100"), -1, nil},
		{"no range at all", reply(206, "23456", "Content-Range", "pages 2-6/100"), -1, nil},
	} {
		st := with(t, func(*http.Request) (*http.Response, error) { return c.reply, nil })
		p := make([]byte, 5)
		n, err := st.ReadAt(t.Context(), "a", p, 2)
		if c.want < 0 {
			if err == nil || err == io.EOF {
				t.Errorf("%s: %d bytes, %v: want an error", c.name, n, err)
			}
		} else if n != c.want || err != c.err {
			t.Errorf("%s: %d bytes, %v", c.name, n, err)
		}
	}
}

func TestAStorageThatIgnoresConditionsIsRefused(t *testing.T) {
	st := with(t, func(*http.Request) (*http.Response, error) { return reply(200, ""), nil })
	if err := probe.Run(t.Context(), st); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}

// A cache between us and the storage, or in it, must not pass for one that
// shows every writer what the others did.
func TestAStorageThatAnswersWithThePastIsRefused(t *testing.T) {
	g := s3test.Start(t)
	for name, stale := range map[string]func(*http.Request) bool{
		"lists":        s3test.IsList,
		"reads":        func(r *http.Request) bool { return r.Method == http.MethodGet && !s3test.IsList(r) },
		"missing ones": func(r *http.Request) bool { return r.Method == http.MethodGet },
	} {
		at := s3test.Proxy(t, g.Endpoint, func(r *http.Request) s3test.Fault { return s3test.Fault{Stale: stale(r)} })
		st := open(t, "s3://"+at+"/"+g.Bucket(t), nil)
		if err := probe.Run(t.Context(), st); !errors.Is(err, fault.ErrUnsupported) {
			t.Errorf("stale %s: %v", name, err)
		}
	}
}

func TestClasses(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		want   error
	}{
		{403, "AccessDenied", fault.ErrDenied},
		{403, "", fault.ErrDenied},
		{507, "", fault.ErrNoSpace},
		{400, "QuotaExceeded", fault.ErrNoSpace},
		{412, "PreconditionFailed", fault.ErrExists},
		{501, "NotImplemented", fault.ErrUnsupported},
		{400, "InvalidArgument", fault.ErrUnsupported},
		{400, "AuthorizationHeaderMalformed", fault.ErrUnsupported},
	} {
		st := with(t, func(*http.Request) (*http.Response, error) {
			body := ""
			if c.code != "" {
				body = "<Error><Code>" + c.code + "</Code><Message>no</Message></Error>"
			}
			return reply(c.status, body), nil
		})
		r, n := blobtest.Body([]byte("x"))
		if err := st.Create(t.Context(), "a", r, n); !errors.Is(err, c.want) {
			t.Errorf("%d %s: %v", c.status, c.code, err)
		}
	}
}

// What may end otherwise the next time is in no class, so blob/retry goes on.
func TestWhatPasses(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
	}{
		{503, "SlowDown"}, {503, ""}, {500, "InternalError"}, {502, ""}, {504, ""}, {429, "TooManyRequests"}, {429, ""}, {408, ""},
		{400, "RequestTimeout"}, {400, "BadDigest"}, {400, "IncompleteBody"}, {409, "ConditionalRequestConflict"}, {409, "OperationAborted"},
	} {
		n := 0
		st := retry.Wrap(with(t, func(*http.Request) (*http.Response, error) {
			if n++; n > 2 {
				return reply(200, ""), nil
			}
			return reply(c.status, "<Error><Code>"+c.code+"</Code><Message>no</Message></Error>"), nil
		}), retry.Options{First: time.Microsecond})
		r, size := blobtest.Body([]byte("x"))
		if err := st.Create(t.Context(), "a", r, size); err != nil || n != 3 {
			t.Errorf("%d %s: %v after %d requests", c.status, c.code, err, n)
		}
	}
}

func TestPutSendsWhatTheStorageCanCheck(t *testing.T) {
	var mu sync.Mutex
	var md5 string
	st := with(t, func(r *http.Request) (*http.Response, error) {
		mu.Lock()
		defer mu.Unlock()
		md5 = r.Header.Get("Content-Md5")
		return reply(200, ""), nil
	})
	r, n := blobtest.Body([]byte("hello"))
	if err := st.Put(t.Context(), "a", r, n); err != nil {
		t.Fatal(err)
	}
	if md5 != "XUFAKrxLKna5cZ2REBfFkg==" {
		t.Errorf("Content-MD5 %q", md5)
	}
}

func TestParseURL(t *testing.T) {
	for url, want := range map[string]Location{
		"s3://s3.example/bucket":                   {Endpoint: "s3.example", Bucket: "bucket"},
		"s3://s3.example:9000/bucket/a/b/":         {Endpoint: "s3.example:9000", Bucket: "bucket", Prefix: "a/b"},
		"s3://s3.example/bucket?region=eu-1":       {Endpoint: "s3.example", Bucket: "bucket", Region: "eu-1"},
		"s3+http://10.0.0.1:9000/bucket/x?region=": {Endpoint: "10.0.0.1:9000", Bucket: "bucket", Prefix: "x", Plain: true},
	} {
		if got, err := ParseURL(url); err != nil || got != want {
			t.Errorf("%s: %+v, %v", url, got, err)
		}
	}
	for _, url := range []string{"s3://", "s3://host", "s3://host/", "s3:///bucket", "s3://user:hunter2@host/bucket", "s3://host/bucket?key=x", "s3://host/bucket/../c", "https://host/bucket", "s3://host/b", "s3://host/Bucket", "s3://host/bucket#c", "s3://h%zz/b"} {
		_, err := ParseURL(url)
		if err == nil {
			t.Errorf("%s was taken", url)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows the password: %v", url, err)
		}
	}
}
