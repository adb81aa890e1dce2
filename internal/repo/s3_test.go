package repo

import (
	"bytes"
	"maps"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/retry"
	"github.com/backstay/backstay/internal/blob/s3"
	"github.com/backstay/backstay/internal/blob/s3/s3test"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// bucketAt is a bucket behind endpoint as the commands use it, but with
// shorter pauses.
func bucketAt(t *testing.T, endpoint, bucket string) blob.Store {
	t.Helper()
	st, err := s3.Open(bg, s3.Location{Endpoint: endpoint, Bucket: bucket, Region: s3test.Region}, s3.Options{Credentials: s3test.Credentials()})
	if err != nil {
		t.Fatal(err)
	}
	return retry.Wrap(st, retry.Options{First: 10 * time.Millisecond, Longest: 200 * time.Millisecond, Patience: time.Minute})
}

func readBack(r *Repository, p *point.RestorePoint, o FetchOptions) ([]byte, error) {
	d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
	if err != nil {
		return nil, err
	}
	out := make([]byte, d.Size())
	err = d.Fetch(bg, extent.Extent{Len: d.Size()}, o, func(off int64, data []byte) error {
		copy(out[off:], data)
		return nil
	})
	return out, err
}

// However a storage misbehaves, what a backup said it committed is there, and
// nothing that is read differs from what was stored.
func TestAStorageThatMisbehaves(t *testing.T) {
	g := s3test.Start(t)
	var n atomic.Int64
	every := func(k int64) bool { return n.Add(1)%k == 0 }
	get := func(r *http.Request) bool { return r.Method == http.MethodGet && !s3test.IsList(r) }
	var trouble atomic.Int64 // when it is over, in Unix nanoseconds
	for _, c := range []struct {
		name    string
		hook    func(*http.Request) s3test.Fault
		mayFail bool
	}{
		{"503 for a while", func(*http.Request) s3test.Fault {
			if n.Add(1) == 40 {
				trouble.Store(time.Now().Add(3 * time.Second).UnixNano())
			}
			if time.Now().UnixNano() < trouble.Load() {
				return s3test.Fault{Status: 503, Code: "SlowDown"}
			}
			return s3test.Fault{}
		}, false},
		{"short reads", func(r *http.Request) s3test.Fault { return s3test.Fault{Cut: get(r) && every(3)} }, false},
		{"lost replies", func(r *http.Request) s3test.Fault { return s3test.Fault{Lost: every(4)} }, false},
		{"wrong ETags", func(*http.Request) s3test.Fault {
			return s3test.Fault{Rewrite: func(h http.Header, _ *[]byte) {
				if h.Get("Etag") != "" {
					h.Set("Etag", `"00000000000000000000000000000000"`)
				}
			}}
		}, false},
		{"bytes changed on their way", func(r *http.Request) s3test.Fault {
			if !get(r) || !every(7) {
				return s3test.Fault{}
			}
			return s3test.Fault{Rewrite: func(_ http.Header, body *[]byte) {
				if len(*body) > 0 {
					(*body)[len(*body)/2] ^= 4
				}
			}}
		}, true},
		{"lists of the past", func(r *http.Request) s3test.Fault { return s3test.Fault{Stale: s3test.IsList(r)} }, true},
		{"reads of the past", func(r *http.Request) s3test.Fault { return s3test.Fault{Stale: get(r)} }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			bucket := g.Bucket(t)
			direct := bucketAt(t, g.Endpoint, bucket)
			mustInit(t, direct)
			first := noise(1, 4<<20)
			p1, err := backup(bg, mustOpen(t, direct), "web01", first, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			n.Store(0)
			st := bucketAt(t, s3test.Proxy(t, g.Endpoint, c.hook), bucket)
			committed := map[*point.RestorePoint][]byte{p1: first}
			second := bytes.Clone(first)
			copy(second[1<<20:], noise(2, 1<<20))
			for range 2 {
				r, err := Open(bg, st, testKey)
				if err != nil {
					if !c.mayFail {
						t.Fatal(err)
					}
					continue
				}
				p2, err := backup(bg, r, "web01", second, p1, first)
				if err == nil {
					committed[p2] = second
				} else if !c.mayFail {
					t.Fatal(err)
				}
				for p, want := range committed {
					got, err := readBack(r, p, FetchOptions{})
					if err == nil && !bytes.Equal(got, want) {
						t.Errorf("%s was restored wrongly and nothing said so", p.Ref())
					}
					if err != nil && !c.mayFail {
						t.Errorf("%s: %v", p.Ref(), err)
					}
				}
				r.Close()
				second = bytes.Clone(second)
				copy(second[3<<20:], noise(3, 1<<20))
			}
			// The storage comes to its senses.
			r := mustOpen(t, direct)
			points, err := r.Points(bg)
			if err != nil || len(points) < len(committed) {
				t.Fatalf("%d points of at least %d are left: %v", len(points), len(committed), err)
			}
			for p := range committed {
				got, err := readBack(r, p, FetchOptions{Ordered: true})
				if err != nil {
					t.Errorf("%s: %v", p.Ref(), err)
				} else if want := committed[p]; !bytes.Equal(got, want) {
					t.Errorf("%s differs", p.Ref())
				}
			}
		})
	}
}

// What a run over HTTP costs is what the repository asks of a store, request by
// request: no upload in parts, no HEAD before a read, no LIST for a chunk. A
// restore through 50 ms of latency, of what is far apart as after many
// increments, has many of them under way at once.
func TestRequestsOnTheWire(t *testing.T) {
	realBeats(t)
	noLooks(t)
	g := s3test.Start(t)
	bucket := g.Bucket(t)
	if err := Init(bg, bucketAt(t, g.Endpoint, bucket), InitOptions{Passphrase: password, KDF: cheap}); err != nil {
		t.Fatal(err)
	}
	const part = chunk.DefaultBytes
	size := int64(256 << 20)
	if testing.Short() {
		size /= 2
	}
	gb := float64(size) / 1e9
	var mu sync.Mutex
	asked := map[string]int{}
	var late atomic.Int64 // how long a request takes to get there
	far := &farAway{Store: bucketAt(t, s3test.Proxy(t, g.Endpoint, func(r *http.Request) s3test.Fault {
		kind := r.Method
		switch {
		case s3test.IsList(r):
			kind = "LIST"
		case strings.Contains(r.URL.Path, "/beat/"):
			kind = "beat" // for each 5 s
		}
		mu.Lock()
		asked[kind]++
		mu.Unlock()
		return s3test.Fault{Delay: time.Duration(late.Load())}
	}), bucket)}
	since := func() map[string]int {
		mu.Lock()
		defer mu.Unlock()
		was := maps.Clone(asked)
		clear(asked)
		return was
	}

	since()
	s, err := mustOpen(t, far).Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(bg, size, "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range size / part {
		if _, err := w.Put(bg, i, noise(uint64(i)+1, part)); err != nil {
			t.Fatal(err)
		}
	}
	m, err := w.Finish(bg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(bg, newPoint("web01", m, size)); err != nil {
		t.Fatal(err)
	}
	const fixed = 10 // a run's own, however small it is
	n := since()
	t.Logf("backup of %.2f GB: %v", gb, n)
	if float64(n["PUT"]) > 20*gb+fixed || n["LIST"] > 24 || n["HEAD"] > 8 || n["POST"] > 0 {
		t.Error("that is more than 20 PUTs for a GB, or not by whole objects")
	}

	for _, c := range []struct {
		step  int64         // every which chunk is read
		delay time.Duration // of each request
	}{{1, 0}, {4, 50 * time.Millisecond}} {
		d, err := mustOpen(t, far).OpenDisk(bg, m)
		if err != nil {
			t.Fatal(err)
		}
		late.Store(int64(c.delay))
		far.atOnce.Store(0)
		var got atomic.Int64
		began := time.Now()
		err = d.Fetch(bg, extent.Extent{Len: size}, FetchOptions{Skip: func(i int64, _ chunk.ID) bool { return i%c.step != 0 }}, func(_ int64, data []byte) error {
			got.Add(int64(len(data)))
			return nil
		})
		late.Store(0)
		if err != nil {
			t.Fatal(err)
		}
		n := since()
		t.Logf("restore of every %d. chunk, %v of latency: %.0f MB/s, %v, %d reads at once", c.step, c.delay, float64(got.Load())/1e6/time.Since(began).Seconds(), n, far.atOnce.Load())
		if n["LIST"] > 24 || n["HEAD"] > 8 {
			t.Error("that is a LIST or HEAD for what is read")
		}
		if c.step == 1 && float64(n["GET"]) > 80*gb+fixed {
			t.Error("that is more than 80 GETs for a GB")
		}
		if c.step > 1 && far.atOnce.Load() < 32 {
			t.Error("fewer than 32 reads were under way at once")
		}
	}
}

// A storage that never answers reads again is given up within patience, and
// says which object it was.
func TestAStorageThatStaysAway(t *testing.T) {
	g := s3test.Start(t)
	bucket := g.Bucket(t)
	direct := bucketAt(t, g.Endpoint, bucket)
	mustInit(t, direct)
	content := noise(1, 1<<20)
	p, err := backup(bg, mustOpen(t, direct), "web01", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := s3test.Proxy(t, g.Endpoint, func(r *http.Request) s3test.Fault {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/data/") {
			return s3test.Fault{Status: 503, Code: "SlowDown"}
		}
		return s3test.Fault{}
	})
	st, err := s3.Open(bg, s3.Location{Endpoint: at, Bucket: bucket, Region: s3test.Region}, s3.Options{Credentials: s3test.Credentials()})
	if err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, retry.Wrap(st, retry.Options{First: time.Millisecond, Longest: 10 * time.Millisecond, Patience: 100 * time.Millisecond}))
	if _, err = readBack(r, p, FetchOptions{}); err == nil || !strings.Contains(err.Error(), "gave up after") || !strings.Contains(err.Error(), "pack ") {
		t.Errorf("got %v", err)
	}
}
