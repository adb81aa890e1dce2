package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cloudsoda/go-smb2"

	"github.com/backstay/backstay/internal/fault"
)

// maxEntries is how many entries a directory may have for List.
const maxEntries = 1 << 17

// at runs f with the share of p, again after a lost connection if f may be
// repeated. What may not be is waited for once it is under way, also when ctx is
// over by then: a host has a patience to answer in, and whoever cleans up has to
// know what there is.
func at[T any](ctx context.Context, c *Client, op string, p Path, repeat bool, f func(*link, *smb2.Share) (T, error)) (T, error) {
	do := func() (v T, err error) {
		if err = p.check(); err != nil {
			return v, err
		}
		once := func(l *link) error {
			share, err := l.share(p.Share)
			if err == nil {
				v, err = f(l, share)
			}
			return err
		}
		if repeat {
			return v, c.again(ctx, func(_ *lane, l *link) error { return once(l) })
		}
		return v, c.once(ctx, once)
	}
	var v T
	var err error
	if repeat {
		v, err = detached(ctx, do)
	} else {
		v, err = do()
	}
	if err != nil {
		err = &Error{op, c.name(p), -1, err}
	}
	return v, err
}

// Stat says what p is. Errors: fault.ErrNotFound, fault.ErrDenied.
func (c *Client) Stat(ctx context.Context, p Path) (Info, error) {
	return at(ctx, c, "stat", p, true, func(l *link, s *smb2.Share) (info Info, err error) {
		err = l.call(func() error {
			i, err := s.Stat(p.Name)
			if err == nil {
				info = infoOf(i)
			}
			return err
		})
		return info, err
	})
}

// List gives what the directory p holds, in the host's order.
func (c *Client) List(ctx context.Context, p Path) ([]Info, error) {
	return at(ctx, c, "list", p, true, func(l *link, s *smb2.Share) ([]Info, error) {
		var dir *smb2.File
		if err := l.call(func() (err error) {
			dir, err = s.Open(p.Name)
			return err
		}); err != nil {
			return nil, err
		}
		defer l.close(dir)
		var all []Info
		for {
			var some []os.FileInfo
			err := l.call(func() (err error) {
				some, err = dir.Readdir(1024)
				return err
			})
			for _, i := range some {
				if i.Name() != "." && i.Name() != ".." {
					all = append(all, infoOf(i))
				}
			}
			switch {
			case errors.Is(err, io.EOF):
				return all, nil
			case err != nil:
				return nil, err
			case len(all) > maxEntries:
				return nil, fmt.Errorf("the directory has more than %d entries: %w", maxEntries, fault.ErrUnsupported)
			}
		}
	})
}

// Mkdir makes the directory p, which must not exist, in one that does.
func (c *Client) Mkdir(ctx context.Context, p Path) error {
	return c.change(ctx, "mkdir", p, func(l *link, s *smb2.Share) error {
		return l.call(func() error { return s.Mkdir(p.Name, 0o777) })
	})
}

// change is at for what is done once.
func (c *Client) change(ctx context.Context, op string, p Path, f func(*link, *smb2.Share) error) error {
	_, err := at(ctx, c, op, p, false, func(l *link, s *smb2.Share) (struct{}, error) { return struct{}{}, f(l, s) })
	return err
}

// Remove removes the file or the empty directory p.
func (c *Client) Remove(ctx context.Context, p Path) error {
	return c.change(ctx, "remove", p, func(l *link, _ *smb2.Share) error { return c.remove(l, p) })
}

func (c *Client) remove(l *link, p Path) error {
	s, err := l.share(p.Share)
	if err != nil {
		return err
	}
	return l.call(func() error { return s.Remove(p.Name) })
}

// Rename gives the file or directory from the name to, in the same share,
// which must not exist. The protocol could refuse in one step and the library
// does not ask it to, so somebody who makes that name between our look and the
// renaming loses it: it is for directories that are ours alone.
func (c *Client) Rename(ctx context.Context, from, to Path) error {
	return c.change(ctx, "rename", from, func(l *link, s *smb2.Share) error {
		if err := to.check(); err != nil {
			return err
		}
		if to.Share != from.Share {
			return fmt.Errorf("%s is in another share: %w", c.name(to), fault.ErrUnsupported)
		}
		err := l.call(func() error {
			_, err := s.Lstat(to.Name)
			return err
		})
		switch {
		case err == nil:
			return fmt.Errorf("%s: %w", c.name(to), fault.ErrExists)
		case !errors.Is(err, fault.ErrNotFound):
			return err
		}
		return l.call(func() error { return s.Rename(from.Name, to.Name) })
	})
}

// Space is how much room a volume has, in bytes.
type Space struct {
	Total int64
	Free  int64 // for this user
}

// Space says how much room the volume of the directory p has.
func (c *Client) Space(ctx context.Context, p Path) (Space, error) {
	return at(ctx, c, "free space", p, true, func(l *link, s *smb2.Share) (space Space, err error) {
		err = l.call(func() error {
			fs, err := s.Statfs(p.Name)
			if err != nil {
				return err
			}
			unit := fs.BlockSize()
			if unit == 0 || unit > 1<<30 || fs.TotalBlockCount() > 1<<62/unit || fs.AvailableBlockCount() > 1<<62/unit {
				return &smb2.InvalidResponseError{Message: "a volume that can't be"}
			}
			space = Space{int64(fs.TotalBlockCount() * unit), int64(fs.AvailableBlockCount() * unit)}
			return nil
		})
		return space, err
	})
}

// Room refuses with fault.ErrNoSpace, in words for whoever restores, where the
// volume of the directory p has less than need bytes.
func (c *Client) Room(ctx context.Context, p Path, need int64) error {
	space, err := c.Space(ctx, p)
	if err != nil {
		return err
	}
	if space.Free < need {
		return fmt.Errorf("%w on the host: %s has %d bytes free and the restore needs %d", fault.ErrNoSpace, c.name(p), space.Free, need)
	}
	return nil
}
