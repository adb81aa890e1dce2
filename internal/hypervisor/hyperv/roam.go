package hyperv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/smb"
)

// Times of reading through several nodes.
const (
	// nodeOutage is how long a node's share is waited for before another node
	// is tried, and roamTime how long they all are.
	nodeOutage = 5 * time.Second
	roamTime   = 2 * time.Minute
	// openTime is for opening a file through one node, and seeing which it is.
	openTime = 20 * time.Second
)

// mostRoams is how often one read may be begun again on another node.
const mostRoams = 8

// isShared says whether a volume, as volumeOf names it, is one that every node
// of a cluster reaches under the same name.
func isShared(volume string) bool {
	_, below, isDrive := strings.Cut(volume, ":")
	return isDrive && strings.HasPrefix(below, `\clusterstorage\`)
}

// A roamer reads the files of a session's VM. Those on shared volumes go on to
// be read through another node where the one that served them goes away.
type roamer struct {
	files
	b    *beginning
	home *Driver       // whose files those are
	gone chan struct{} // closed when a node went away

	via    atomic.Pointer[Driver] // through which files are read; changed by settle alone
	mu     sync.Mutex             // held while a node is looked for
	denied map[*Driver]bool

	kept   sync.Mutex // of opened
	opened []*movable
}

func newRoamer(b *beginning) *roamer {
	r := &roamer{files: b.d.files, b: b, home: b.d, gone: make(chan struct{}), denied: map[*Driver]bool{}}
	r.via.Store(b.d)
	return r
}

// serving is the Driver of the node by which a file of the VM can be reached, as
// far as is known.
func (r *roamer) serving(file string) *Driver {
	if isShared(volumeOf(file)) {
		return r.via.Load()
	}
	return r.home
}

// went says whether a node went away.
func (r *roamer) went() bool {
	select {
	case <-r.gone:
		return true
	default:
		return false
	}
}

func (r *roamer) open(ctx context.Context, name string) (image.File, error) {
	f, err := r.files.open(ctx, name)
	if err != nil || !isShared(volumeOf(name)) || len(r.home.cluster.known()) < 2 {
		return f, err
	}
	m := &movable{r: r, name: name, f: f, at: r.home}
	impatient(f, r.home)
	if m.like, err = look(ctx, f); err != nil {
		go f.Close() // its host may not answer
		return nil, &FilesError{err}
	}
	r.kept.Lock()
	defer r.kept.Unlock()
	r.opened = append(r.opened, m)
	return m, nil
}

// unchanged fails if a file that was read through several nodes is not what it
// was when it was opened.
func (r *roamer) unchanged(ctx context.Context) error {
	r.kept.Lock()
	defer r.kept.Unlock()
	for _, m := range r.opened {
		_, at, turn := m.now()
		if turn == 0 {
			continue
		}
		f, err := m.reopen(ctx, at)
		if err != nil {
			return &hypervisor.RetryError{Err: &FilesError{err}}
		}
		f.Close()
	}
	return nil
}

// nodes are the Drivers by which files may be reached, that of the VM's owner
// first and from last.
func (r *roamer) nodes(ctx context.Context, from *Driver) (out []*Driver) {
	names := from.cluster.known()
	for _, name := range names {
		n, err := from.at(name)
		if err != nil || n == from {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, seekTime)
		up, err := n.up(limited)
		if err == nil {
			up = n.ownerFirst(limited, r.b.sys.guid, up)
		}
		cancel()
		if err == nil {
			names = up
			break
		}
	}
	for _, name := range names {
		if n, err := from.at(name); err == nil && n != from {
			out = append(out, n)
		}
	}
	return append(out, from)
}

// reach opens a file again that can't be read through the node from any more,
// or that is another one there. It ends with the run.
func (r *roamer) reach(m *movable, from *Driver, why error) (f image.File, at *Driver, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx := r.b.reading
	list := []*Driver{r.via.Load()} // where others of the files are read by now
	if list[0] == from {
		list = r.nodes(ctx, from)
	}
	until := time.Now().Add(from.roamTime)
	for again := false; ; again = true {
		if again {
			limited, cancel := context.WithDeadline(ctx, until)
			list = r.nodes(limited, from)
			cancel()
		}
		tried := []error{why}
		for _, d := range list {
			if again && time.Now().After(until) {
				break // each was tried at least once
			}
			if r.denied[d] { // again and again, and an account is locked
				tried = append(tried, &NodeError{d.called(), fault.ErrDenied})
				continue
			}
			f, err := m.reopen(ctx, d)
			switch {
			case err == nil:
				r.settle(d, from, why)
				return f, d, nil
			case ctx.Err() != nil:
				return nil, nil, context.Cause(ctx)
			case errors.Is(err, smb.ErrChanged):
				return nil, nil, &hypervisor.RetryError{Err: &NodeError{d.called(), err}}
			}
			r.denied[d] = errors.Is(err, fault.ErrDenied)
			tried = append(tried, &NodeError{d.called(), err})
		}
		if time.Now().After(until) {
			return nil, nil, &hypervisor.RetryError{Err: oneError(tried)}
		}
		if err := sleep(ctx, from.poll); err != nil {
			return nil, nil, err
		}
	}
}

// settle notes that files are read through another node, once for each.
func (r *roamer) settle(to, from *Driver, why error) {
	if to == r.via.Load() {
		return
	}
	r.via.Store(to)
	r.b.warn("node %s went away while the VM's files were read through it, and they were read on through %s: %v", from.called(), to.called(), why)
	if !r.went() {
		close(r.gone)
	}
}

// impatient lets a file's readers give up soon, since there is another way.
func impatient(f image.File, d *Driver) {
	if f, ok := f.(interface{ GiveUpAfter(time.Duration) }); ok {
		f.GiveUpAfter(d.nodeOutage)
	}
}

// A likeness is what a frozen file keeps whichever node shows it. Whether nodes
// number a volume's files alike is not known, so that the number does not
// count; what is in both ends does, where a VHDX says when it was written to,
// and a VHD which one it is.
type likeness struct {
	bytes   int64
	written int64 // in nanoseconds since 1970; 0 for not known
	ends    [sha256.Size]byte
}

// What of a file's ends is compared: a VHDX has its identity and headers in the
// first 192 KiB, a VHD its footer in the last 512 bytes.
const (
	headBytes = 192 << 10
	tailBytes = 512
)

func look(ctx context.Context, f image.File) (l likeness, err error) {
	if f, ok := f.(interface{ Info() smb.Info }); ok {
		l.written = f.Info().Written.UnixNano()
	}
	l.bytes = f.Bytes()
	head := make([]byte, min(headBytes, l.bytes))
	tail := make([]byte, min(tailBytes, l.bytes))
	for off, p := range map[int64][]byte{0: head, l.bytes - int64(len(tail)): tail} {
		if n, err := readUntil(ctx, f, p, off); n < len(p) {
			return l, err
		}
	}
	l.ends = sha256.Sum256(append(head, tail...))
	return l, nil
}

// readUntil is f.ReadAt that ends with ctx, where f can do that.
func readUntil(ctx context.Context, f image.File, p []byte, off int64) (int, error) {
	if f, ok := f.(interface {
		ReadAtContext(context.Context, []byte, int64) (int, error)
	}); ok {
		return f.ReadAtContext(ctx, p, off)
	}
	return f.ReadAt(p, off)
}

// A movable is a file that is read through whichever node serves it.
type movable struct {
	r    *roamer
	name string
	like likeness

	mu     sync.Mutex
	f      image.File
	at     *Driver // through which f is reached
	turn   int     // how often it was opened anew
	closed bool
}

func (m *movable) now() (f image.File, at *Driver, turn int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.f, m.at, m.turn
}

func (m *movable) Name() string { return m.name }
func (m *movable) Bytes() int64 { return m.like.bytes }

// Identity is the file's own, by which a loop of parents is known.
func (m *movable) Identity() string {
	f, _, _ := m.now()
	if i, ok := f.(interface{ Identity() string }); ok {
		return i.Identity()
	}
	return ""
}

func (m *movable) ReadAt(p []byte, off int64) (int, error) {
	ctx := m.r.b.reading
	for try := 1; ; try++ {
		f, _, turn := m.now()
		n, err := readUntil(ctx, f, p, off)
		if err == nil || err == io.EOF || try == mostRoams {
			return n, err
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if _, _, now := m.now(); now != turn {
			continue // another reader moved it, which closes f
		}
		if !strayed(err) {
			return n, err
		}
		if err := m.move(turn, err); err != nil {
			return 0, err
		}
	}
}

// strayed says whether a file that was there may be reached by another node yet:
// its node is lost, or answers and has the volume no more, as one whose cluster
// service was stopped; or, where the address is the cluster's own, leads to
// another node by now, which may number its files otherwise. A file that is
// really another does not have the same likeness.
func strayed(err error) bool {
	return errors.Is(err, smb.ErrLost) || errors.Is(err, fault.ErrNotFound) || errors.Is(err, smb.ErrChanged)
}

// move opens the file through another node, unless somebody did since turn.
func (m *movable) move(turn int, why error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.turn != turn {
		return nil
	}
	if m.closed {
		return why
	}
	f, at, err := m.r.reach(m, m.at, why)
	if err != nil {
		return err
	}
	go m.f.Close() // its host may not answer
	m.f, m.at = f, at
	m.turn++
	return nil
}

// reopen opens the file through a node, and sees that it is the same.
func (m *movable) reopen(ctx context.Context, d *Driver) (image.File, error) {
	limited, cancel := context.WithTimeout(ctx, d.openTime)
	defer cancel()
	f, err := d.files.open(limited, m.name)
	if err != nil {
		return nil, err
	}
	impatient(f, d)
	like, err := look(limited, f)
	if err == nil && like != m.like {
		err = fmt.Errorf("%s: %w", m.name, smb.ErrChanged)
	}
	if err != nil {
		go f.Close() // its host may not answer
		return nil, err
	}
	return f, nil
}

// Close does not wait for a host that went silent.
func (m *movable) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	f, done := m.f, make(chan error, 1)
	go func() { done <- f.Close() }()
	select {
	case err := <-done:
		return err
	case <-time.After(m.at.nodeOutage):
		return nil // nothing was written, so nothing can be lost
	}
}
