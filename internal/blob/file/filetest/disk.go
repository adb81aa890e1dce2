// Package filetest is a disk that can lose its power, for tests of the file
// store and of whatever writes through it.
//
// It is harsher than any real one: of everything that was not synced, each
// name of each directory and each sector of each file decides for itself
// whether it survives. What holds here rests on no file system's habits.
package filetest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"sync"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

// ErrPowerCut is what every call gives after the power is gone.
var ErrPowerCut = errors.New("the power was cut")

const sectorBytes = 512

// A Disk is a file.FS in memory. It is safe for concurrent use.
type Disk struct {
	mu    sync.Mutex
	root  *inode
	ops   int
	cutAt int // -1 for never
	hook  func(op, name string) error
	locks map[string]int // shared holders, -1 for an exclusive one
}

var _ file.FS = (*Disk)(nil)

// An inode is a file or a directory.
type inode struct {
	dir   bool
	links int

	// Of a file: what readers see, and what survives for certain.
	data, synced []byte
	locked       map[int64]*shared // bytes of it

	// Of a directory: what names lead to, and for names that changed since the
	// last sync also what they led to before, oldest first.
	names   map[string]*inode
	history map[string][]*inode
}

func newDir() *inode {
	return &inode{dir: true, links: 1, names: map[string]*inode{}, history: map[string][]*inode{}}
}

func (d *inode) set(name string, to *inode) {
	d.history[name] = append(d.history[name], d.names[name])
	if to == nil {
		delete(d.names, name)
	} else {
		d.names[name] = to
	}
}

// New makes an empty disk.
func New() *Disk { return &Disk{root: newDir(), cutAt: -1, locks: map[string]int{}} }

// CutAfter lets n more changing operations succeed and cuts the power in the
// one after them.
func (d *Disk) CutAfter(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutAt = d.ops + n
}

// Cut cuts the power now.
func (d *Disk) Cut() { d.CutAfter(0) }

// Off says whether the power was cut while somebody still wanted to write.
func (d *Disk) Off() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cutAt >= 0 && d.ops > d.cutAt
}

// Hook is called before every operation, changing or not, with "open",
// "create", "read", "write", "sync", "rename", "remove", "mkdir", "syncdir",
// "readdir", "stat" or "lock"; its error fails the operation without effect.
// A sync that fails so has forgotten its data, as real disks do.
func (d *Disk) Hook(hook func(op, name string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook = hook
}

// Reboot gives what a power cut leaves, one of many possible ways chosen with
// rng. The old disk stays as it is, so that Reboot may be asked again.
func (d *Disk) Reboot(rng *rand.Rand) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	after := New()
	after.root = survive(d.root, rng, map[*inode]*inode{})
	return after
}

func survive(n *inode, rng *rand.Rand, seen map[*inode]*inode) *inode {
	if s := seen[n]; s != nil {
		s.links++
		return s
	}
	if !n.dir {
		s := &inode{links: 1, data: tear(n, rng)}
		s.synced = slices.Clone(s.data)
		seen[n] = s
		return s
	}
	s := newDir()
	seen[n] = s
	var names []string
	for name := range n.names {
		names = append(names, name)
	}
	for name := range n.history {
		if n.names[name] == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names) // for one rng, one outcome
	for _, name := range names {
		versions := append(slices.Clone(n.history[name]), n.names[name])
		if to := versions[rng.IntN(len(versions))]; to != nil {
			s.names[name] = survive(to, rng, seen)
		}
	}
	return s
}

// tear mixes what was synced and what was written since, by the sector.
func tear(n *inode, rng *rand.Rand) []byte {
	if slices.Equal(n.data, n.synced) {
		return slices.Clone(n.data)
	}
	out := make([]byte, len(n.synced))
	switch rng.IntN(4) {
	case 0: // all of it made it
		return slices.Clone(n.data)
	case 1: // nothing
		copy(out, n.synced)
		return out
	case 2: // the length did, the bytes did not
		out = make([]byte, len(n.data))
		copy(out, n.synced)
		return out
	}
	out = make([]byte, len(n.synced)+rng.IntN(max(1, len(n.data)-len(n.synced)+1)))
	copy(out, n.synced)
	for off := 0; off < len(out); off += sectorBytes {
		if end := min(off+sectorBytes, len(out), len(n.data)); rng.IntN(2) == 0 && off < end {
			copy(out[off:end], n.data[off:end])
		}
	}
	return out
}

// begin counts and admits one operation. The caller holds mu.
func (d *Disk) begin(op, name string, changes bool) error {
	if d.hook != nil {
		hook := d.hook
		d.mu.Unlock() // a hook may wait for another operation
		err := hook(op, name)
		d.mu.Lock()
		if err != nil {
			return &fs.PathError{Op: op, Path: name, Err: err}
		}
	}
	if changes {
		d.ops++
	}
	if d.cutAt >= 0 && (d.ops > d.cutAt) {
		return ErrPowerCut
	}
	return nil
}

func (d *Disk) find(name string) (*inode, error) {
	n := d.root
	if name == "" {
		return n, nil
	}
	for _, seg := range split(name) {
		if !n.dir || n.names[seg] == nil {
			return nil, &fs.PathError{Op: "find", Path: name, Err: fs.ErrNotExist}
		}
		n = n.names[seg]
	}
	return n, nil
}

func split(name string) []string {
	var list []string
	for name != "." && name != "" {
		list = append(list, path.Base(name))
		name = path.Dir(name)
	}
	slices.Reverse(list)
	return list
}

func (d *Disk) parent(name string) (*inode, string, error) {
	dir := path.Dir(name)
	if dir == "." {
		dir = ""
	}
	p, err := d.find(dir)
	if err == nil && !p.dir {
		err = &fs.PathError{Op: "find", Path: name, Err: fs.ErrNotExist}
	}
	return p, path.Base(name), err
}

// Open implements file.FS.
func (d *Disk) Open(name string) (file.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("open", name, false); err != nil {
		return nil, err
	}
	n, err := d.find(name)
	if err == nil && n.dir {
		err = &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	return &handle{d: d, n: n, name: name}, nil
}

// Create implements file.FS.
func (d *Disk) Create(name string) (file.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("create", name, true); err != nil {
		return nil, err
	}
	n := &inode{}
	if err := d.enter(name, n); err != nil {
		return nil, err
	}
	return &handle{d: d, n: n, name: name}, nil
}

func (d *Disk) enter(name string, n *inode) error {
	p, base, err := d.parent(name)
	if err != nil {
		return err
	}
	if p.names[base] != nil {
		return &fs.PathError{Op: "enter", Path: name, Err: fs.ErrExist}
	}
	n.links++
	p.set(base, n)
	return nil
}

// Mkdir implements file.FS.
func (d *Disk) Mkdir(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("mkdir", name, true); err != nil {
		return err
	}
	n := newDir()
	n.links = 0
	return d.enter(name, n)
}

// Rename implements file.FS.
func (d *Disk) Rename(from, to string) error { return d.rename(from, to, true) }

// RenameNew implements file.FS.
func (d *Disk) RenameNew(from, to string) error { return d.rename(from, to, false) }

func (d *Disk) rename(from, to string, replace bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("rename", to, true); err != nil {
		return err
	}
	src, srcBase, err := d.parent(from)
	if err != nil {
		return err
	}
	dst, dstBase, err := d.parent(to)
	if err != nil {
		return err
	}
	n := src.names[srcBase]
	if n == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	if old := dst.names[dstBase]; old != nil {
		if !replace || old.dir {
			return &fs.PathError{Op: "rename", Path: to, Err: fs.ErrExist}
		}
		old.links--
	}
	src.set(srcBase, nil)
	dst.set(dstBase, n)
	return nil
}

// Remove implements file.FS.
func (d *Disk) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("remove", name, true); err != nil {
		return err
	}
	p, base, err := d.parent(name)
	if err != nil {
		return err
	}
	n := p.names[base]
	if n == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	if n.dir && len(n.names) > 0 {
		return fmt.Errorf("remove %s: directory not empty", name)
	}
	n.links--
	p.set(base, nil)
	return nil
}

// SyncDir implements file.FS.
func (d *Disk) SyncDir(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("syncdir", name, true); err != nil {
		return err
	}
	n, err := d.find(name)
	if err != nil {
		return err
	}
	clear(n.history)
	return nil
}

// ReadDir implements file.FS.
func (d *Disk) ReadDir(name string) ([]file.Entry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("readdir", name, false); err != nil {
		return nil, err
	}
	n, err := d.find(name)
	if err == nil && !n.dir {
		err = &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	var list []file.Entry
	for name, e := range n.names {
		list = append(list, file.Entry{Name: name, Dir: e.dir, Bytes: int64(len(e.data))})
	}
	return list, nil
}

// Stat implements file.FS.
func (d *Disk) Stat(name string) (file.Entry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("stat", name, false); err != nil {
		return file.Entry{}, err
	}
	n, err := d.find(name)
	if err != nil {
		return file.Entry{}, err
	}
	return file.Entry{Name: path.Base(name), Dir: n.dir, Bytes: int64(len(n.data))}, nil
}

// Lock implements file.FS. A reboot frees all locks.
func (d *Disk) Lock(name string, exclusive bool) (func(), error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("lock", name, false); err != nil {
		return nil, err
	}
	held := d.locks[name]
	if held < 0 || exclusive && held > 0 {
		return nil, fault.ErrLocked
	}
	if exclusive {
		d.locks[name] = -1
	} else {
		d.locks[name]++
	}
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if exclusive {
			d.locks[name] = 0
		} else {
			d.locks[name]--
		}
	}), nil
}

// Close implements file.FS; the disk stays.
func (d *Disk) Close() error { return nil }

// A handle is one open file.
type handle struct {
	d    *Disk
	n    *inode
	name string
}

func (h *handle) ReadAt(p []byte, off int64) (int, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if err := h.d.begin("read", h.name, false); err != nil {
		return 0, err
	}
	n := 0
	if off < int64(len(h.n.data)) {
		n = copy(p, h.n.data[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *handle) Write(p []byte) (int, error) {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if err := h.d.begin("write", h.name, true); err != nil {
		return 0, err
	}
	h.n.data = append(h.n.data, p...)
	return len(p), nil
}

func (h *handle) Sync() error {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if err := h.d.begin("sync", h.name, true); err != nil {
		return err
	}
	h.n.synced = slices.Clone(h.n.data)
	return nil
}

func (h *handle) Gone() bool {
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	return h.n.links == 0
}

func (h *handle) Close() error { return nil }
