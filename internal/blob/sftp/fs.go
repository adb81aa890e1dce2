package sftp

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"sync"
	"syscall"
	"time"

	"github.com/pkg/sftp"

	"github.com/backstay/backstay/internal/blob/file"
)

// remote is the file.FS of a directory on a server.
//
// SFTP cannot sync a directory. But a file that is synced after it was given
// its name takes that name to the disk with it, on every journaling file
// system: the change of the name and that of the file's own time or link count
// are in one transaction. So that is when files are synced here, and SyncDir
// has nothing to do.
type remote struct {
	dial func() (*sftp.Client, error)
	root string

	mu     sync.Mutex
	client *sftp.Client // nil before the first use and after a connection broke

	sweep sync.Once
}

var _ file.FS = (*remote)(nil)

// use gives the connection, a new one if the last broke.
func (r *remote) use() (*sftp.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		return r.client, nil
	}
	c, err := r.dial()
	if err != nil {
		return nil, err
	}
	r.client = c
	go func() {
		c.Wait()
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.client == c {
			r.client = nil
		}
	}()
	return c, nil
}

func (r *remote) path(name string) string { return path.Join(r.root, name) }

// Open implements file.FS.
func (r *remote) Open(name string) (file.File, error) {
	c, err := r.use()
	if err != nil {
		return nil, err
	}
	st, err := c.Lstat(r.path(name))
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	f, err := c.Open(r.path(name))
	if err != nil {
		return nil, err
	}
	return remoteFile{f, c}, nil
}

// Create implements file.FS.
func (r *remote) Create(name string) (file.File, error) {
	c, err := r.use()
	if err != nil {
		return nil, err
	}
	f, err := c.OpenFile(r.path(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, full(c, r.root, err)
	}
	if st, err := f.Stat(); err == nil {
		r.sweep.Do(func() { r.sweepBefore(c, path.Dir(name), st.ModTime()) })
	}
	if err := f.Chmod(0o600); err != nil {
		f.Close()
		return nil, err
	}
	return remoteFile{f, c}, nil
}

// abandonedAfter is how old a temporary file is when nobody can still be
// writing it. Should somebody do so all the same, they cannot give it a name,
// and their backup fails and may be repeated.
const abandonedAfter = 7 * 24 * time.Hour

// sweepBefore removes what crashed processes left, by the server's clock.
func (r *remote) sweepBefore(c *sftp.Client, dir string, now time.Time) {
	entries, err := c.ReadDir(r.path(dir))
	if err != nil {
		return // it costs space and nothing else
	}
	for _, e := range entries {
		if e.Mode().IsRegular() && now.Sub(e.ModTime()) > abandonedAfter {
			_ = c.Remove(r.path(dir + "/" + e.Name()))
		}
	}
}

// Rename implements file.FS.
func (r *remote) Rename(from, to string) error {
	c, err := r.use()
	if err != nil {
		return err
	}
	if err := c.PosixRename(r.path(from), r.path(to)); err != nil {
		return full(c, r.root, err)
	}
	return syncFile(c, r.path(to))
}

// RenameNew implements file.FS by a hard link, which is refused where the name
// is taken.
func (r *remote) RenameNew(from, to string) error {
	c, err := r.use()
	if err != nil {
		return err
	}
	if err := c.Link(r.path(from), r.path(to)); err != nil {
		// The protocol has no word for "exists".
		if _, there := c.Lstat(r.path(to)); there == nil {
			return &fs.PathError{Op: "link", Path: to, Err: fs.ErrExist}
		}
		return full(c, r.root, err)
	}
	if err := syncFile(c, r.path(to)); err != nil {
		return err
	}
	_ = c.Remove(r.path(from)) // swept some day if this fails
	return nil
}

func syncFile(c *sftp.Client, path string) error {
	f, err := c.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Remove implements file.FS.
func (r *remote) Remove(name string) error {
	c, err := r.use()
	if err != nil {
		return err
	}
	return c.Remove(r.path(name))
}

// Mkdir implements file.FS.
func (r *remote) Mkdir(name string) error {
	c, err := r.use()
	if err != nil {
		return err
	}
	if err := c.Mkdir(r.path(name)); err != nil {
		if _, there := c.Lstat(r.path(name)); there == nil {
			return &fs.PathError{Op: "mkdir", Path: name, Err: fs.ErrExist}
		}
		return full(c, r.root, err)
	}
	return nil
}

// SyncDir implements file.FS.
func (r *remote) SyncDir(string) error { return nil }

// ReadDir implements file.FS.
func (r *remote) ReadDir(name string) ([]file.Entry, error) {
	c, err := r.use()
	if err != nil {
		return nil, err
	}
	infos, err := c.ReadDir(r.path(name))
	if err != nil {
		return nil, err
	}
	entries := make([]file.Entry, len(infos))
	for i, st := range infos {
		entries[i] = entry(st)
	}
	return entries, nil
}

// Stat implements file.FS.
func (r *remote) Stat(name string) (file.Entry, error) {
	c, err := r.use()
	if err != nil {
		return file.Entry{}, err
	}
	st, err := c.Lstat(r.path(name))
	if err != nil {
		return file.Entry{}, err
	}
	return entry(st), nil
}

func entry(st fs.FileInfo) file.Entry {
	e := file.Entry{Name: st.Name(), Dir: st.IsDir(), Other: !st.IsDir() && !st.Mode().IsRegular()}
	if st.Mode().IsRegular() {
		e.Bytes = st.Size()
	}
	return e
}

// Lock implements file.FS: SFTP has no locks.
func (r *remote) Lock(string, bool) (func(), error) { return nil, file.ErrNoLocks }

// Close implements file.FS.
func (r *remote) Close() error {
	r.mu.Lock()
	c := r.client
	r.client = nil
	r.mu.Unlock()
	if c != nil {
		c.Close() // the answer of a process that we end is no news
	}
	return nil
}

// full finds out whether a full disk is behind a failure: the protocol has no
// word for that either.
func full(c *sftp.Client, root string, err error) error {
	var status *sftp.StatusError
	if !errors.As(err, &status) {
		return err
	}
	st, statErr := c.StatVFS(root)
	if statErr == nil && (st.Bavail*st.Frsize < 1<<20 || st.Files > 0 && st.Favail == 0) {
		return errors.Join(syscall.ENOSPC, err)
	}
	return err
}

// A remoteFile is an open file. Nobody can ask the server whether its name
// still leads to it, so it is never kept.
type remoteFile struct {
	*sftp.File
	client *sftp.Client
}

// Gone implements file.File.
func (remoteFile) Gone() bool { return true }

// Write implements io.Writer.
func (f remoteFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	if err != nil {
		err = full(f.client, path.Dir(f.Name()), err)
	}
	return n, err
}
