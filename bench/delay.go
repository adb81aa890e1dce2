//go:build linux && amd64

package main

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// delayChunk is how many bytes a delay takes at once, delayQueue how many of
// those are on their way: together what a long, fast line holds.
const (
	delayChunk = 256 << 10
	delayQueue = 512
)

// A delay stands between a client and a server as a long line does: what goes
// in comes out later, as fast as it went in.
type delay struct {
	l      net.Listener
	target string
	oneWay atomic.Int64 // nanoseconds
	conns  atomic.Int64
	down   atomic.Int64 // bytes from the server

	mu   sync.Mutex
	open map[net.Conn]bool
	done bool
	wg   sync.WaitGroup
}

func newDelay(target string) (*delay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &delay{l: l, target: target, open: map[net.Conn]bool{}}
	d.wg.Go(d.accept)
	return d, nil
}

func (d *delay) addr() string { return d.l.Addr().String() }

// roundTrip sets how much longer an answer takes.
func (d *delay) roundTrip(t time.Duration) { d.oneWay.Store(int64(t / 2)) }

func (d *delay) close() {
	d.l.Close()
	d.mu.Lock()
	d.done = true
	for c := range d.open {
		c.Close()
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// keep notes a connection to be closed with the delay.
func (d *delay) keep(c net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done {
		c.Close()
	}
	d.open[c] = true
}

func (d *delay) drop(c net.Conn) {
	d.mu.Lock()
	delete(d.open, c)
	d.mu.Unlock()
	c.Close()
}

func (d *delay) accept() {
	for {
		client, err := d.l.Accept()
		if err != nil {
			return
		}
		d.conns.Add(1)
		d.keep(client)
		d.wg.Go(func() {
			defer d.drop(client)
			server, err := net.Dial("tcp", d.target)
			if err != nil {
				return
			}
			d.keep(server)
			defer d.drop(server)
			up := make(chan struct{})
			go func() { defer close(up); d.pass(server, client, nil) }()
			d.pass(client, server, &d.down)
			client.Close()
			server.Close()
			<-up
		})
	}
}

// pass moves bytes until one end closes.
func (d *delay) pass(to, from net.Conn, count *atomic.Int64) {
	type part struct {
		due time.Time
		p   []byte
	}
	line := make(chan part, delayQueue)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for q := range line {
			time.Sleep(time.Until(q.due))
			if _, err := to.Write(q.p); err != nil {
				from.Close() // which ends the reading
			}
		}
	}()
	p := make([]byte, delayChunk)
	for {
		n, err := from.Read(p)
		if n > 0 {
			if count != nil {
				count.Add(int64(n))
			}
			line <- part{time.Now().Add(time.Duration(d.oneWay.Load())), slices.Clone(p[:n])}
		}
		if err != nil {
			break
		}
	}
	close(line)
	<-sent
}
