package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cloudsoda/go-smb2"

	"github.com/backstay/backstay/internal/fault"
)

// Info is what a host says of a file or directory.
type Info struct {
	Name    string // the last part of its path
	Dir     bool
	Link    bool  // a link, a junction or another reparse point
	Bytes   int64 // its length
	Created time.Time
	Written time.Time
	// ID is the file system's own number of the file, 0 where the host gives
	// none.
	ID uint64
}

const (
	attributeDirectory = 0x10
	attributeReparse   = 0x400
)

func infoOf(s os.FileInfo) Info {
	i := Info{Name: s.Name(), Bytes: s.Size(), Written: s.ModTime(), Dir: s.IsDir()}
	if f, ok := s.Sys().(*smb2.FileStat); ok {
		i.Created, i.ID = f.CreationTime, f.FileId
		i.Dir, i.Link = f.FileAttributes&attributeDirectory != 0, f.FileAttributes&attributeReparse != 0
	}
	return i
}

// same says what makes two looks at a path not the same file, or nothing. The
// file system's number tells a file from one made later in its place; where
// there is none, the time it was made must do. Samba gives another time for
// one and the same file now and then, so it does not count beside a number.
func (i Info) same(now Info) string {
	switch {
	case i.ID != now.ID:
		return "another file has its name"
	case i.ID == 0 && !i.Created.Equal(now.Created):
		return "it was made anew"
	case i.Bytes != now.Bytes:
		return fmt.Sprintf("it had %d bytes and has %d", i.Bytes, now.Bytes)
	case !i.Written.Equal(now.Written):
		return "it was written to"
	}
	return ""
}

// A File is a file on a share, opened for reading with others free to read and
// write it: a host that has it open notices nothing. It must not change while
// it is read; where a connection is lost and made anew, and wherever a further
// connection opens it, that is checked, and ErrChanged the answer.
//
// All methods are safe for concurrent use, and reads run in parallel.
type File struct {
	c    *Client
	path Path
	name string
	info Info
	life context.Context // ends with Close
	end  context.CancelFunc

	mu      sync.Mutex
	handles map[*lane]*handle
	closed  bool
	ahead   ahead
	outage  time.Duration
}

// A handle is the file on one connection.
type handle struct {
	lock chan struct{}
	link *link
	file *smb2.File
}

// Open opens the file at p, which name stands for in messages and as Name;
// empty for the path itself.
//
// Errors: fault.ErrNotFound for a missing share or file, fault.ErrDenied,
// fault.ErrLocked for one that a program keeps for itself.
func (c *Client) Open(ctx context.Context, p Path, name string) (*File, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	f := &File{c: c, path: p, name: name, handles: map[*lane]*handle{}, outage: c.target.Outage}
	if name == "" {
		f.name = c.name(p)
	}
	f.life, f.end = context.WithCancel(c.life)
	_, err := detached(ctx, func() (struct{}, error) {
		return struct{}{}, c.again(ctx, func(n *lane, l *link) error {
			_, err := f.on(ctx, n, l)
			return err
		})
	})
	if err != nil {
		go f.Close() // what is under way may take its time
		return nil, f.error("open", -1, err)
	}
	return f, nil
}

// name is p as people write it.
func (c *Client) name(p Path) string { return `\\` + c.target.Host + `\` + p.String() }

func (f *File) error(op string, off int64, err error) error {
	return &Error{op, f.c.name(f.path), off, err}
}

// on gives the file's handle on the lane n, whose connection is l.
func (f *File) on(ctx context.Context, n *lane, l *link) (*smb2.File, error) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil, os.ErrClosed
	}
	h := f.handles[n]
	if h == nil {
		h = &handle{lock: make(chan struct{}, 1)}
		f.handles[n] = h
	}
	first := f.info == Info{}
	f.mu.Unlock()
	select {
	case h.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-h.lock }()
	if h.link == l && h.file != nil {
		return h.file, nil
	}
	forget(h.file)
	h.file = nil
	file, info, err := l.open(f.path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case info.Dir:
		err = errors.New("it is a directory")
	case first && f.info == Info{}:
		f.info = info
	default:
		if why := f.info.same(info); why != "" {
			err = fmt.Errorf("%w: %s", ErrChanged, why)
		}
	}
	if err == nil && f.closed {
		err = os.ErrClosed
	}
	if err != nil {
		l.close(file)
		return nil, err
	}
	h.link, h.file = l, file
	return file, nil
}

// open opens p and asks what it is.
func (l *link) open(p Path, flag int) (*smb2.File, Info, error) {
	share, err := l.share(p.Share)
	if err != nil {
		return nil, Info{}, err
	}
	var f *smb2.File
	if err := l.call(func() (err error) {
		f, err = share.OpenFile(p.Name, flag, 0o666)
		return err
	}); err != nil {
		return nil, Info{}, err
	}
	var info Info
	for tries := 0; ; tries++ {
		err = l.call(func() error {
			s, err := f.Stat()
			if err == nil {
				info = infoOf(s)
			}
			return err
		})
		// The question asks for much room. While others read, the credits for it
		// may be lent out, and the host says that it is not valid.
		var answer *smb2.ResponseError
		if tries == 3 || !errors.As(err, &answer) || answer.Code != 0xC000000D {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err == nil && info.Bytes < 0 {
		err = senseless("a file of %d bytes", info.Bytes)
	}
	if err != nil {
		l.close(f)
		return nil, Info{}, err
	}
	return f, info, nil
}

// close gives a handle back, if its connection is still there.
func (l *link) close(f *smb2.File) error {
	defer forget(f)
	if l.gate.failed() != nil {
		return nil
	}
	return l.call(f.Close)
}

// Bytes is the file's length when it was opened.
func (f *File) Bytes() int64 { return f.Info().Bytes }

// Name is what Open was told to call the file.
func (f *File) Name() string { return f.name }

// Info is what the host said of the file when it was opened.
func (f *File) Info() Info {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.info
}

// GiveUpAfter sets how long this file's readers try to reach a host that went
// away, which Target.Outage says of all others: for whoever has another way to
// the file. It is for before the first read.
func (f *File) GiveUpAfter(outage time.Duration) { f.outage = outage }

// Identity tells files of one share apart, whatever path led to them; it is
// empty where the host does not number its files.
func (f *File) Identity() string {
	i := f.Info()
	if i.ID == 0 {
		return ""
	}
	// Volumes number their files each by itself, and the host does not say which
	// one this is.
	return fmt.Sprintf("%s %s %d %d %d", f.c.target.address(), strings.ToLower(f.path.Share), i.ID, i.Bytes, i.Written.UnixNano())
}

// Close gives the file back to the host. Reads under way may fail. It may be
// called twice.
func (f *File) Close() error {
	f.mu.Lock()
	f.closed = true
	handles := f.handles
	f.handles = nil
	f.mu.Unlock()
	f.end()
	f.ahead.stop()
	for _, h := range handles {
		h.lock <- struct{}{}
		if h.file != nil {
			h.link.close(h.file) // nothing was written, so nothing can be lost
			h.file = nil
		}
		<-h.lock
	}
	return nil
}

// ReadAt is ReadAtContext without a limit but Close of the Client.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	return f.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads as io.ReaderAt does. After an error p holds nothing of
// use. What a cancelled ctx leaves under way is dropped when it arrives.
func (f *File) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	size := f.Bytes()
	if off < 0 {
		return 0, f.error("read", off, errors.New("a negative offset"))
	}
	if off >= size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > size-off {
		p, end = p[:size-off], io.EOF
	}
	if err := f.ahead.read(ctx, f, p, off); err != nil {
		return 0, err
	}
	return len(p), end
}

// fill reads all of p, in pieces side by side.
func (f *File) fill(ctx context.Context, p []byte, off int64) error {
	if len(p) <= pieceBytes {
		return f.piece(ctx, p, off, false)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var first error
	for len(p) > 0 {
		n := min(len(p), pieceBytes)
		part, at := p[:n], off
		wg.Go(func() {
			if err := f.piece(ctx, part, at, false); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if first == nil {
					first = err
				}
			}
		})
		p, off = p[n:], off+int64(n)
	}
	wg.Wait()
	return first
}

var pieces = sync.Pool{New: func() any { return new([pieceBytes]byte) }}

// piece reads all of p, at most pieceBytes. A request can't be taken back, so
// with a ctx that can end it uses memory of its own, unless p is given up:
// nobody has it after an error.
func (f *File) piece(ctx context.Context, p []byte, off int64, givenUp bool) error {
	if err := f.c.slot(ctx); err != nil {
		return f.error("read", off, err)
	}
	read := func(p []byte) error {
		defer func() { <-f.c.slots }()
		return f.request(ctx, p, off)
	}
	var err error
	switch {
	case ctx.Done() == nil:
		err = read(p)
	case givenUp:
		_, err = detached(ctx, func() (struct{}, error) { return struct{}{}, read(p) })
	default:
		n := len(p)
		var buf *[pieceBytes]byte
		buf, err = detached(ctx, func() (*[pieceBytes]byte, error) {
			buf := pieces.Get().(*[pieceBytes]byte)
			return buf, read(buf[:n])
		})
		if err == nil {
			copy(p, buf[:n])
			pieces.Put(buf)
		}
	}
	if err != nil {
		var whole *Error
		if !errors.As(err, &whole) {
			err = f.error("read", off, err)
		}
	}
	return err
}

// request reads all of p from whichever connection has the least to do, and
// goes on where a lost one ended.
func (f *File) request(ctx context.Context, p []byte, off int64) error {
	done := 0
	return f.c.againFor(ctx, f.outage, func(n *lane, l *link) error {
		file, err := f.on(ctx, n, l)
		if err != nil {
			return err
		}
		for done < len(p) {
			got := 0
			err := l.call(func() (err error) {
				got, err = file.ReadAt(p[done:], off+int64(done))
				return err
			})
			done += got
			f.c.moved.Add(int64(got))
			switch {
			case errors.Is(err, io.EOF), err == nil && got == 0:
				return fmt.Errorf("the host has no more than %d bytes of the file's %d: %w", off+int64(done), f.Bytes(), fault.ErrCorrupt)
			case err != nil:
				return err
			}
		}
		return nil
	})
}
