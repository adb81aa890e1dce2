package file

import (
	"errors"
	"io/fs"
	"path"
	"sync"
)

// dirs makes directories and syncs them. Concurrent callers share a sync: on a
// disk that syncs slowly, eight packs that end together cost no more than one.
type dirs struct {
	fs FS

	mu    sync.Mutex
	ready map[string]bool   // directories whose own name is durable
	syncs map[string]*batch // by directory
}

// A batch is one sync of a directory: begun after everyone who waits for it
// had made their change.
type batch struct {
	running sync.Mutex // held while syncing
	next    *round
	// failed stays: after a sync that failed, the system may call the next one
	// good although what the first should have written is lost.
	failed error
}

type round struct {
	done chan struct{}
	err  error
}

func newDirs(f FS) *dirs {
	return &dirs{fs: f, ready: map[string]bool{"": true}, syncs: map[string]*batch{}}
}

// ensure makes dir and its parents, durably.
func (d *dirs) ensure(dir string) error {
	d.mu.Lock()
	ok := d.ready[dir]
	d.mu.Unlock()
	if ok {
		return nil
	}
	parent := dirOf(dir)
	if err := d.ensure(parent); err != nil {
		return err
	}
	if err := d.fs.Mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Also if it was there: whoever made it may have died before this.
	if err := d.sync(parent); err != nil {
		return err
	}
	d.mu.Lock()
	d.ready[dir] = true
	d.mu.Unlock()
	return nil
}

// forget makes ensure look again: somebody else took a directory away.
func (d *dirs) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ready = map[string]bool{"": true}
}

// sync makes every change of dir durable that was made before the call.
func (d *dirs) sync(dir string) error {
	d.mu.Lock()
	b := d.syncs[dir]
	if b == nil {
		b = &batch{}
		d.syncs[dir] = b
	}
	r := b.next
	if r != nil { // a sync that has not begun: it will see our change
		d.mu.Unlock()
		<-r.done
		return r.err
	}
	r = &round{done: make(chan struct{})}
	b.next = r
	d.mu.Unlock()

	b.running.Lock()
	d.mu.Lock()
	b.next = nil
	d.mu.Unlock()
	if b.failed == nil {
		b.failed = d.fs.SyncDir(dir)
	}
	r.err = b.failed
	b.running.Unlock()
	close(r.done)
	return r.err
}

// dirOf is the directory of a name; "" for the store's own.
func dirOf(name string) string {
	if d := path.Dir(name); d != "." {
		return d
	}
	return ""
}
