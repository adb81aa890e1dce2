package reposerver

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// raw sends bytes over TLS and gives the status of the first final answer; 0 if
// the server closed instead.
func (g *rig) raw(request string) (status int, body string) {
	g.t.Helper()
	c, err := tls.Dial("tcp", g.addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		g.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
	if _, err := io.WriteString(c, request); err != nil {
		return 0, ""
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, ""
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(b)
}

func hashOf(body string) string {
	sum := blake3.Sum256([]byte(body))
	return hex.EncodeToString(sum[:])
}

// Requests that no client of ours sends, with an admin's token: what protects
// here is not the role. None of them may store, show or break anything.
func TestHostileRequests(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	st := g.open("root", Admin, "r")
	if err := putIn(t, st, "a", "aaaa"); err != nil {
		t.Fatal(err)
	}
	if err := g.srv.makeRepository("other"); err != nil {
		t.Fatal(err)
	}
	tok := g.token("again", Admin, "r")
	auth := "Host: x\r\nAuthorization: Bearer " + tok.Reveal()[:strings.LastIndex(tok.Reveal(), ".")] + "\r\n"
	hash := remote.HashHeader + ": " + hashOf("body") + "\r\n"
	length := "Content-Length: 4\r\n"
	for name, c := range map[string]struct {
		request string
		status  []int
	}{
		"traversal":                      {"GET /v1/r/o/../../.backstay/tls.pem HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"traversal, escaped":             {"GET /v1/r/o/%2e%2e/%2e%2e/.backstay/tls.pem HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"traversal, escaped slash":       {"GET /v1/r/o/..%2f..%2f.backstay%2ftls.pem HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"the state as a repository":      {"GET /v1/.backstay/o/tls.pem HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"a reserved name":                {"GET /v1/r/o/tmp/x HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"a needless escape":              {"GET /v1/r/o/%61 HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"another host's URL":             {"GET http://evil/v1/r/o/a HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"another repository":             {"GET /v1/other/list HTTP/1.1\r\n" + auth + "\r\n", []int{403}},
		"two tokens":                     {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + auth[len("Host: x\r\n"):] + "\r\n", []int{400}},
		"two ranges in headers":          {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + "Range: bytes=0-1\r\nRange: bytes=0-2\r\n\r\n", []int{400}},
		"two ranges in one":              {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + "Range: bytes=0-1,2-3\r\n\r\n", []int{400}},
		"a range of exabytes":            {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + "Range: bytes=0-99999999999999999\r\n\r\n", []int{400}},
		"a range that overflows":         {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + "Range: bytes=9223372036854775807-9223372036854775808\r\n\r\n", []int{400}},
		"a range far behind the end":     {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + "Range: bytes=999999999999999990-999999999999999999\r\n\r\n", []int{416}},
		"get with a body":                {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + length + "\r\nbody", []int{400}},
		"delete with a body":             {"DELETE /v1/r/o/a HTTP/1.1\r\n" + auth + length + "\r\nbody", []int{400}},
		"delete of everything":           {"DELETE /v1/r HTTP/1.1\r\n" + auth + "\r\n", []int{405}},
		"delete of the list":             {"DELETE /v1/r/list HTTP/1.1\r\n" + auth + "\r\n", []int{405}},
		"put to the list":                {"PUT /v1/r/list HTTP/1.1\r\n" + auth + hash + length + "\r\nbody", []int{405}},
		"claims that are fetched":        {"GET /v1/r/claims HTTP/1.1\r\n" + auth + "\r\n", []int{405}},
		"claims that are put":            {"PUT /v1/r/claims HTTP/1.1\r\n" + auth + hash + length + "\r\nbody", []int{405}},
		"settled that is deleted":        {"DELETE /v1/r/settled HTTP/1.1\r\n" + auth + "\r\n", []int{405}},
		"a claim of nothing":             {"POST /v1/r/claims HTTP/1.1\r\n" + auth + "Content-Length: 0\r\n\r\n", []int{400}},
		"a ticket and no key":            {"POST /v1/r/claims HTTP/1.1\r\n" + auth + "Content-Length: 16\r\n\r\n0123456789abcdef", []int{400}},
		"half a key":                     {"POST /v1/r/claims HTTP/1.1\r\n" + auth + "Content-Length: 24\r\n\r\n0123456789abcdef01234567", []int{400}},
		"a claim without a length":       {"POST /v1/r/claims HTTP/1.1\r\n" + auth + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", []int{411}},
		"a claim of exabytes":            {"POST /v1/r/claims HTTP/1.1\r\n" + auth + "Content-Length: 999999999999999999\r\n\r\nbody", []int{413}},
		"a claim of a key too many":      {"POST /v1/r/claims HTTP/1.1\r\n" + auth + "Content-Length: 1048608\r\n\r\nbody", []int{413}},
		"claims in another repository":   {"POST /v1/other/claims HTTP/1.1\r\n" + auth + "Content-Length: 32\r\n\r\n0123456789abcdef0123456789abcdef", []int{403}},
		"half a hash that is settled":    {"POST /v1/r/settled HTTP/1.1\r\n" + auth + "Content-Length: 32\r\n\r\n0123456789abcdef0123456789abcdef", []int{400}},
		"an unknown verb":                {"MOVE /v1/r/o/a HTTP/1.1\r\n" + auth + "\r\n", []int{405}},
		"post":                           {"POST /v1/r/o/b HTTP/1.1\r\n" + auth + hash + length + "\r\nbody", []int{400, 405}},
		"put without a length":           {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", []int{411}},
		"put with two lengths":           {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + length + "Content-Length: 5\r\n\r\nbody", []int{400}},
		"put with a length and chunks":   {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + length + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", []int{400, 411}},
		"put of less than nothing":       {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + "Content-Length: -4\r\n\r\nbody", []int{400}},
		"put of exabytes":                {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + "Content-Length: 999999999999999999\r\n\r\nbody", []int{413}},
		"put of more than a number":      {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + "Content-Length: 99999999999999999999999\r\n\r\nbody", []int{400}},
		"put without a hash":             {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + length + "\r\nbody", []int{400}},
		"put with two hashes":            {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + hash + length + "\r\nbody", []int{400}},
		"put with half a hash":           {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash[:60] + "\r\n" + length + "\r\nbody", []int{400}},
		"put with another hash":          {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + remote.HashHeader + ": " + hashOf("else") + "\r\n" + length + "\r\nbody", []int{422}},
		"put of nothing, another hash":   {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + "Content-Length: 0\r\n\r\n", []int{422}},
		"put with another condition":     {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + length + "If-None-Match: \"x\"\r\n\r\nbody", []int{400}},
		"put of a part":                  {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + length + "Content-Range: bytes 0-3/8\r\n\r\nbody", []int{400}},
		"put, compressed":                {"PUT /v1/r/o/b HTTP/1.1\r\n" + auth + hash + length + "Content-Encoding: gzip\r\n\r\nbody", []int{400}},
		"put below an object":            {"PUT /v1/r/o/a/b HTTP/1.1\r\n" + auth + hash + length + "\r\nbody", []int{500}},
		"a name of 2000 bytes":           {"GET /v1/r/o/" + strings.Repeat("x/", 1000) + "x HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"a header of a megabyte":         {"GET /v1/r/o/a HTTP/1.1\r\n" + auth + "X: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", []int{431, 0}},
		"a list of something else":       {"GET /v1/r/list?prefix=../ HTTP/1.1\r\n" + auth + "\r\n", []int{200}},
		"a list with a strange prefix":   {"GET /v1/r/list?prefix=%00 HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"a list with two prefixes":       {"GET /v1/r/list?prefix=a&prefix=b HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"a list with a setting":          {"GET /v1/r/list?max=1000000000 HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
		"a token in the query":           {"GET /v1/r/o/a?token=" + tok.Reveal() + " HTTP/1.1\r\nHost: x\r\n\r\n", []int{401}},
		"basic authentication":           {"GET /v1/r/o/a HTTP/1.1\r\nHost: x\r\nAuthorization: Basic cm9vdDpyb290\r\n\r\n", []int{401}},
		"a bearer of nothing":            {"GET /v1/r/o/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \r\n\r\n", []int{401}},
		"a bearer that climbs":           {"GET /v1/r/o/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer bst1.../../x." + strings.Repeat("A", 43) + "\r\n\r\n", []int{401}},
		"no HTTP at all":                 {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", []int{400, 0}},
		"the preface of HTTP/2":          {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{400, 401, 505, 0}},
		"options for the server":         {"OPTIONS * HTTP/1.1\r\n" + auth + "\r\n", []int{200, 400}},
		"a connection to somewhere else": {"CONNECT evil:22 HTTP/1.1\r\n" + auth + "\r\n", []int{400}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			status, body := g.raw(c.request)
			ok := false
			for _, s := range c.status {
				ok = ok || s == status
			}
			if !ok {
				t.Errorf("status %d, %q; want %v", status, body, c.status)
			}
			if strings.Contains(body, "PRIVATE") || strings.Contains(body, "aaaa") || strings.Contains(body, g.dir) {
				t.Errorf("it shows %q", body)
			}
		})
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) != 1 {
		t.Errorf("afterwards there is %q, %v", names, err)
	}
	if b, err := blobtest.Read(t.Context(), st, "a"); err != nil || string(b) != "aaaa" {
		t.Errorf("a holds %q, %v", b, err)
	}
	if left, err := os.ReadDir(filepath.Join(g.dir, "r", "tmp")); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
}

// A client that sends a byte now and then, or reads none, is let go.
func TestSlowClients(t *testing.T) {
	short := usual
	short.stall = 300 * time.Millisecond
	g := serve(t, Options{ImmutableFor: -1, limit: short})
	if err := g.srv.makeRepository("r"); err != nil {
		t.Fatal(err)
	}
	tok := g.token("root", Admin, "r")
	auth := "Host: x\r\nAuthorization: Bearer " + tok.Reveal()[:strings.LastIndex(tok.Reveal(), ".")] + "\r\n"
	big := bytes.Repeat([]byte("0123456789abcdef"), 4<<20)
	// Not through the server: a busy machine may be as slow as those clients.
	if err := os.WriteFile(filepath.Join(g.dir, "r", "big"), big, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, request := range map[string]string{
		"half a request line":   "GET /v1",
		"half a header":         "GET /v1/r/o/big HTTP/1.1\r\n" + auth,
		"no body":               "PUT /v1/r/o/b HTTP/1.1\r\n" + auth + remote.HashHeader + ": " + hashOf("body") + "\r\nContent-Length: 4\r\n\r\n",
		"half a claim":          "POST /v1/r/claims HTTP/1.1\r\n" + auth + "Content-Length: 1048576\r\n\r\n0123456789abcdef",
		"half a body":           "PUT /v1/r/o/b HTTP/1.1\r\n" + auth + remote.HashHeader + ": " + hashOf("body") + "\r\nContent-Length: 4\r\n\r\nbo",
		"an answer not fetched": "GET /v1/r/o/big HTTP/1.1\r\n" + auth + "\r\n",
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			var c *tls.Conn
			waitFor(t, "a connection, which has to be quick, too", func() (ok bool) {
				var err error
				if c, err = tls.Dial("tcp", g.addr, &tls.Config{InsecureSkipVerify: true}); err == nil {
					if _, err = io.WriteString(c, request); err != nil {
						c.Close()
					}
				}
				return err == nil
			})
			if t.Failed() {
				return
			}
			defer c.Close()
			if name == "an answer not fetched" {
				began, sent := false, time.Now()
				waitFor(t, "the request to end", func() bool {
					g.srv.mu.Lock()
					defer g.srv.mu.Unlock()
					began = began || g.srv.total > 0
					return g.srv.total == 0 && (began || time.Since(sent) > 10*time.Second) // it may have been too quick to be seen
				})
			}
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Minute))
			n, err := io.Copy(io.Discard, c)
			var timeout interface{ Timeout() bool }
			if errors.As(err, &timeout) && timeout.Timeout() || n >= int64(len(big)) {
				t.Errorf("it still listens after %d bytes: %v", n, err)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(g.dir, "r", "b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a body was stored: %v", err)
	}
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < 5*time.Minute; time.Sleep(20 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Errorf("waited in vain for %s", what)
}

// One client cannot take all the places, and who comes too many is told to come
// again, and not that it was denied.
func TestTooMuchAtOnce(t *testing.T) {
	few := usual
	few.requestsPerName, few.connsPerHost = 2, 6
	g := serve(t, Options{ImmutableFor: -1, limit: few})
	greedy := g.open("greedy", Admin, "r")
	other := g.openAs(g.token("other", Admin, "r"), "r")
	for range 2 { // hold its two places
		if !g.srv.enter("greedy") {
			t.Fatal("no place")
		}
	}
	err := putIn(t, greedy, "a", "a")
	if err == nil || errors.Is(err, fault.ErrDenied) || !strings.Contains(err.Error(), "too many") {
		t.Errorf("a third request: %v", err)
	}
	if err := putIn(t, other, "a", "a"); err != nil {
		t.Errorf("another client: %v", err)
	}
	g.srv.leave("greedy")
	if err := putIn(t, greedy, "b", "b"); err != nil {
		t.Errorf("when a place is free: %v", err)
	}
	g.srv.leave("greedy")

	var conns []*tls.Conn
	refused := 0
	for range 10 {
		c, err := tls.Dial("tcp", g.addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			refused++
			continue
		}
		conns = append(conns, c)
	}
	for _, c := range conns {
		c.Close()
	}
	if refused < 4 {
		t.Errorf("%d of 10 connections were refused", refused)
	}
	waitFor(t, "places to be free again", func() bool { return putIn(t, other, "c", "c") == nil })
}

// Strangers cannot fill the log.
func TestTheLogStaysShort(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	begun := time.Now()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 25 {
				g.raw("GET /v1/r/o/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + strings.Repeat("x", 1000) + "\r\n\r\n")
			}
		})
	}
	wg.Wait()
	most := linesPerSecond * (int(time.Since(begun)/time.Second) + 2)
	if lines := strings.Count(g.logged(), "msg=denied"); lines > most || lines == 0 {
		t.Errorf("500 strangers made %d lines, want 1 to %d", lines, most)
	}
	if strings.Contains(g.logged(), "xxxxxxxxxx") {
		t.Error("what they sent is in the log")
	}
}
