package file

import (
	"container/list"
	"sync"
	"sync/atomic"
	"time"
)

// handles keeps the files open that were read last, since a restore reads each
// pack, and a lookup each part of the index, many times. What was not read for a
// while is closed, so that a process that lives long, such as a repository
// server, does not keep the space of packs that another one deleted. It is safe
// for concurrent use.
type handles struct {
	fs FS

	mu     sync.Mutex
	byName map[string]*handle
	lru    list.List // of *handle, the last used in front
	sweep  *time.Timer
}

const (
	fewestHandles = 64   // in a process whose limit of open files is small
	mostHandles   = 1024 // an index of 500 million chunks has some hundred parts, and packs are read beside it
	ownHandles    = 16   // that a store keeps whatever the others of its process have open
)

// kept counts the open files of all stores of this process.
var kept atomic.Int64

// handleBudget is how many files all stores of this process keep open together:
// a quarter of what the system lets it open, which leaves room for what is being
// written, for images and for connections.
var handleBudget = sync.OnceValue(func() int64 { return budgetFor(openFiles()) })

// budgetFor is handleBudget where limit files may be open; 0 is unknown.
func budgetFor(limit uint64) int64 {
	return int64(max(fewestHandles, min(limit/4, mostHandles)))
}

// idleFor is after what time without a read a file is closed. Tests make it
// short.
var idleFor = time.Minute

type handle struct {
	f       File
	name    string
	users   int
	dropped bool
	elem    *list.Element
	used    time.Time // last
}

// get opens name, or finds it open. The caller ends its use with put.
func (hs *handles) get(name string) (*handle, error) {
	if !handlesMayStay {
		f, err := hs.fs.Open(name)
		return &handle{f: f, dropped: true, users: 1}, err
	}
	hs.mu.Lock()
	h := hs.byName[name]
	if h != nil {
		h.users++
		h.used = time.Now()
		hs.lru.MoveToFront(h.elem)
	}
	hs.mu.Unlock()
	if h != nil {
		if !h.f.Gone() {
			return h, nil
		}
		hs.mu.Lock()
		hs.forget(h)
		hs.mu.Unlock()
		hs.put(h)
	}
	f, err := hs.fs.Open(name)
	if err != nil {
		return nil, err
	}
	h = &handle{f: f, name: name, users: 1, used: time.Now()}
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if hs.byName == nil {
		hs.byName = map[string]*handle{}
	}
	if hs.byName[name] != nil { // somebody was faster; ours serves this one read
		h.dropped = true
		return h, nil
	}
	hs.byName[name] = h
	h.elem = hs.lru.PushFront(h)
	if kept.Add(1); hs.sweep == nil {
		hs.sweep = time.AfterFunc(idleFor, hs.closeIdle)
	}
	for kept.Load() > handleBudget() && hs.lru.Len() > ownHandles {
		hs.forget(hs.lru.Back().Value.(*handle))
	}
	return h, nil
}

func (hs *handles) put(h *handle) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h.users--
	if h.dropped && h.users == 0 {
		h.f.Close()
	}
}

// forget takes h out of the cache and closes it when its last reader is done.
// The caller holds mu.
func (hs *handles) forget(h *handle) {
	if h.dropped {
		return
	}
	h.dropped = true
	delete(hs.byName, h.name)
	hs.lru.Remove(h.elem)
	kept.Add(-1)
	if h.users == 0 {
		h.f.Close()
	}
}

// drop makes the next get open name anew.
func (hs *handles) drop(name string) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if h := hs.byName[name]; h != nil {
		hs.forget(h)
	}
}

// closeIdle closes what was not read for a while, and comes again as long as
// anything is open.
func (hs *handles) closeIdle() {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	for e := hs.lru.Back(); e != nil && time.Since(e.Value.(*handle).used) >= idleFor; e = hs.lru.Back() {
		hs.forget(e.Value.(*handle))
	}
	if hs.sweep = nil; hs.lru.Len() > 0 {
		hs.sweep = time.AfterFunc(idleFor, hs.closeIdle)
	}
}

func (hs *handles) closeAll() {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if hs.sweep != nil {
		hs.sweep.Stop()
	}
	for _, h := range hs.byName {
		hs.forget(h)
	}
}
