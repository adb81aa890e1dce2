package reposerver

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/zeebo/blake3"
)

// limitListener takes at most total connections at a time, and each host's
// share; what is more is closed at once, before it costs a handshake.
func limitListener(l net.Listener, total, perHost int) net.Listener {
	return &limited{Listener: l, max: total, perHost: perHost, hosts: map[string]int{}}
}

type limited struct {
	net.Listener
	max, perHost int

	mu    sync.Mutex
	all   int
	hosts map[string]int
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, _, err := net.SplitHostPort(c.RemoteAddr().String())
		if err != nil {
			host = c.RemoteAddr().String()
		}
		l.mu.Lock()
		ok := l.all < l.max && l.hosts[host] < l.perHost
		if ok {
			l.all++
			l.hosts[host]++
		}
		l.mu.Unlock()
		if !ok {
			c.Close()
			continue
		}
		return &limitedConn{Conn: c, done: sync.OnceFunc(func() { l.gone(host) })}, nil
	}
}

func (l *limited) gone(host string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.hosts[host]--; l.hosts[host] == 0 {
		delete(l.hosts, host)
	}
}

type limitedConn struct {
	net.Conn
	done func()
}

func (c *limitedConn) Close() error {
	c.done()
	return c.Conn.Close()
}

// quiet lets through a few lines a second, so that a stranger cannot fill the
// disk with our log.
type quiet struct {
	mu      sync.Mutex
	left    int
	second  int64
	dropped int
}

const linesPerSecond = 20

func (q *quiet) may() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if now := time.Now().Unix(); now != q.second {
		q.second, q.left = now, linesPerSecond
	}
	if q.left == 0 {
		q.dropped++
		return false
	}
	q.left--
	return true
}

// more says how many lines were dropped since it was last asked.
func (q *quiet) more() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.dropped
	q.dropped = 0
	return n
}

// An upload is the body of a PUT as the file store reads it: once, from front
// to back. It gives the last bytes only if all have the hash that the client
// named, so no object appears that has other bytes.
type upload struct {
	r     io.Reader
	rc    *http.ResponseController
	stall time.Duration
	size  int64
	want  [32]byte

	at     int64
	hash   *blake3.Hasher
	broken error // why the client's bytes ended early
}

var (
	errHash       = errors.New("the body has not the hash that its header names")
	errSequential = errors.New("an upload is read once, from front to back")
)

func (u *upload) ReadAt(p []byte, off int64) (int, error) {
	if off != u.at {
		return 0, errSequential
	}
	n := 0
	for n < len(p) {
		// Each piece has the time of a stall to arrive: a client that sends a
		// byte now and then is not waited for.
		piece := p[n:min(len(p), n+256<<10)]
		if u.broken = u.rc.SetReadDeadline(time.Now().Add(u.stall)); u.broken != nil {
			return n, u.broken
		}
		k, err := io.ReadFull(u.r, piece)
		n += k
		u.at += int64(k)
		_, _ = u.hash.Write(piece[:k])
		if err != nil {
			u.broken = err
			return n, err
		}
	}
	if u.at == u.size && !u.sound() {
		return 0, errHash
	}
	return n, nil
}

// maxFreeing is the longest body that may have what is kept back on a full disk,
// in bytes: it is held in memory.
const maxFreeing = 1 << 20

// A smallUpload is an upload that can be read more than once.
type smallUpload struct {
	*upload
	b []byte
}

func (u *smallUpload) ReadAt(p []byte, off int64) (int, error) {
	if u.b == nil {
		b := make([]byte, u.size)
		if _, err := u.upload.ReadAt(b, 0); err != nil {
			return 0, err
		}
		u.b = b
	}
	return bytes.NewReader(u.b).ReadAt(p, off)
}

func (u *upload) sound() bool { return [32]byte(u.hash.Sum(nil)) == u.want }
