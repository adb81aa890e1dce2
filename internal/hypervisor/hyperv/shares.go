package hyperv

import (
	"context"
	"net"
	"strconv"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/winpath"
)

// shareFiles reaches a host's files over SMB. It connects when the first is
// asked for: listing VMs needs none.
type shareFiles struct {
	target smb.Target
	shares *smb.Shares

	lock   chan struct{} // has something while client is used or made
	client *smb.Client
}

func newShareFiles(a address, password secret.Bytes) (*shareFiles, error) {
	f := &shareFiles{target: smb.Target{User: a.user, Password: password}, lock: make(chan struct{}, 1)}
	return f, f.set(a)
}

// set is for before the first file is asked for.
func (f *shareFiles) set(a address) error {
	host, port, err := net.SplitHostPort(a.smb)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return err
	}
	f.target.Host, f.target.Port, f.shares = host, int(n), a.shares
	return nil
}

// named says how the host of o calls itself.
func (f *shareFiles) named(o Options, name string) error {
	a, err := parseAddress(o.Host, name)
	if err != nil {
		return err
	}
	return f.set(a)
}

func (f *shareFiles) connect(ctx context.Context) (*smb.Client, error) {
	select {
	case f.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, &FilesError{context.Cause(ctx)}
	}
	defer func() { <-f.lock }()
	if f.client == nil {
		c, err := smb.Dial(ctx, f.target)
		if err != nil {
			return nil, &FilesError{err}
		}
		f.client = c
	}
	return f.client, nil
}

// A FilesError says that the host's files could not be reached, though perhaps
// everything else of it.
type FilesError struct{ Err error }

func (e *FilesError) Error() string { return "the host's files: " + e.Err.Error() }

// Unwrap gives the reason.
func (e *FilesError) Unwrap() error { return e.Err }

func (f *shareFiles) find(name string) (smb.Path, error) {
	p, err := winpath.Parse(name)
	if err != nil {
		return smb.Path{}, err
	}
	return f.shares.Find(p)
}

// at does something with a file or a folder of the host.
func at[T any](ctx context.Context, f *shareFiles, name string, do func(*smb.Client, smb.Path) (T, error)) (out T, err error) {
	p, err := f.find(name)
	if err != nil {
		return out, &FilesError{err}
	}
	c, err := f.connect(ctx)
	if err != nil {
		return out, err
	}
	if out, err = do(c, p); err != nil {
		return out, &FilesError{err}
	}
	return out, nil
}

func (f *shareFiles) open(ctx context.Context, name string) (image.File, error) {
	return at(ctx, f, name, func(c *smb.Client, p smb.Path) (image.File, error) {
		file, err := c.Open(ctx, p, name)
		if err != nil {
			return nil, err // no File in an interface
		}
		return file, nil
	})
}

func (f *shareFiles) list(ctx context.Context, folder string) (names []string, err error) {
	return at(ctx, f, folder, func(c *smb.Client, p smb.Path) ([]string, error) {
		all, err := c.List(ctx, p)
		for _, i := range all {
			if !i.Dir {
				names = append(names, i.Name)
			}
		}
		return names, err
	})
}

func (f *shareFiles) size(ctx context.Context, name string) (int64, error) {
	return at(ctx, f, name, func(c *smb.Client, p smb.Path) (int64, error) {
		i, err := c.Stat(ctx, p)
		return i.Bytes, err
	})
}

func (f *shareFiles) space(ctx context.Context, name string) (free, total int64, err error) {
	p, err := winpath.Parse(name)
	if err != nil {
		return 0, 0, err
	}
	s, err := at(ctx, f, p.Dir().String(), func(c *smb.Client, p smb.Path) (smb.Space, error) { return c.Space(ctx, p) })
	return s.Free, s.Total, err
}

func (f *shareFiles) share(name string) (string, error) {
	p, err := f.find(name)
	return p.Share, err
}

func (f *shareFiles) create(ctx context.Context, name string) (image.Output, error) {
	return at(ctx, f, name, func(c *smb.Client, p smb.Path) (image.Output, error) {
		file, err := c.Create(ctx, p)
		if err != nil {
			return nil, err // no NewFile in an interface
		}
		return file, nil
	})
}

// change is at for what gives nothing.
func (f *shareFiles) change(ctx context.Context, name string, do func(*smb.Client, smb.Path) error) error {
	_, err := at(ctx, f, name, func(c *smb.Client, p smb.Path) (struct{}, error) { return struct{}{}, do(c, p) })
	return err
}

func (f *shareFiles) mkdir(ctx context.Context, name string) error {
	return f.change(ctx, name, func(c *smb.Client, p smb.Path) error { return c.Mkdir(ctx, p) })
}

func (f *shareFiles) remove(ctx context.Context, name string) error {
	return f.change(ctx, name, func(c *smb.Client, p smb.Path) error { return c.Remove(ctx, p) })
}

func (f *shareFiles) rename(ctx context.Context, from, to string) error {
	return f.change(ctx, from, func(c *smb.Client, p smb.Path) error {
		q, err := f.find(to)
		if err != nil {
			return err
		}
		return c.Rename(ctx, p, q)
	})
}

func (f *shareFiles) room(ctx context.Context, folder string, bytes int64) error {
	return f.change(ctx, folder, func(c *smb.Client, p smb.Path) error { return c.Room(ctx, p, bytes) })
}

func (f *shareFiles) close() error {
	f.lock <- struct{}{}
	defer func() { <-f.lock }()
	if f.client == nil {
		return nil
	}
	return f.client.Close()
}
