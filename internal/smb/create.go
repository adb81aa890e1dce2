package smb

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/cloudsoda/go-smb2"
)

// A NewFile is a file that did not exist and is being written. WriteAt may be
// called from several goroutines at once; Truncate, Sync and Close come after
// all of them.
//
// A lost connection ends it for good: what the host had taken and not yet
// stored may be gone with a host that crashed, and nobody would know which.
type NewFile struct {
	c    *Client
	path Path
	link *link

	mu   sync.Mutex
	file *smb2.File // nil once closed
	busy sync.WaitGroup
}

// Create makes the file p, which must not exist.
//
// Errors: fault.ErrExists, fault.ErrNotFound for a missing share or
// directory, fault.ErrDenied, fault.ErrNoSpace.
func (c *Client) Create(ctx context.Context, p Path) (*NewFile, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	f, err := detached(ctx, func() (*NewFile, error) {
		f := &NewFile{c: c, path: p}
		err := c.once(ctx, func(l *link) error {
			share, err := l.share(p.Share)
			if err != nil {
				return err
			}
			f.link = l
			return l.call(func() (err error) {
				f.file, err = share.OpenFile(p.Name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
				return err
			})
		})
		if err == nil && ctx.Err() != nil {
			// Nobody waits for it any more.
			l := f.link
			l.close(f.file)
			c.remove(l, p)
			err = context.Cause(ctx)
		}
		return f, err
	})
	if err != nil {
		return nil, &Error{"create", c.name(p), -1, err}
	}
	return f, nil
}

// Name is the file's path with its host.
func (f *NewFile) Name() string { return f.c.name(f.path) }

func (f *NewFile) error(op string, off int64, err error) error {
	return &Error{op, f.Name(), off, err}
}

// begin gives the handle to one call, which ends it by busy.Done.
func (f *NewFile) begin() (*smb2.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		return nil, os.ErrClosed
	}
	if err := f.link.gate.failed(); err != nil {
		return nil, err
	}
	f.busy.Add(1)
	return f.file, nil
}

func (f *NewFile) do(op string, off int64, do func(*smb2.File) error) error {
	file, err := f.begin()
	if err == nil {
		defer f.busy.Done()
		err = f.link.call(func() error { return do(file) })
	}
	if err != nil {
		return f.error(op, off, err)
	}
	return nil
}

// WriteAt writes p at off.
func (f *NewFile) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, f.error("write", off, errors.New("a negative offset"))
	}
	done := 0
	for done < len(p) {
		part, at := p[done:min(len(p), done+pieceBytes)], off+int64(done)
		if err := f.c.slot(context.Background()); err != nil {
			return done, f.error("write", at, err)
		}
		err := f.do("write", at, func(file *smb2.File) error {
			n, err := file.WriteAt(part, at)
			if err == nil && n != len(part) {
				err = &smb2.InvalidResponseError{Message: fmt.Sprintf("%d of %d bytes were written", n, len(part))}
			}
			return err
		})
		<-f.c.slots
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// Truncate makes the file size bytes long; what is new is zeros.
func (f *NewFile) Truncate(size int64) error {
	return f.do("truncate", size, func(file *smb2.File) error { return file.Truncate(size) })
}

// Sync returns once the host has stored what was written.
func (f *NewFile) Sync() error {
	return f.do("sync", -1, (*smb2.File).Sync)
}

// Close gives the file back to the host; it may be called twice. What was not
// synced may be lost with the host.
func (f *NewFile) Close() error {
	f.mu.Lock()
	file := f.file
	f.file = nil
	f.mu.Unlock()
	if file == nil {
		return nil
	}
	f.busy.Wait()
	if err := f.link.close(file); err != nil {
		return f.error("close", -1, err)
	}
	return nil
}
