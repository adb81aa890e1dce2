package file

import (
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"time"

	"github.com/backstay/backstay/internal/blob/claims"
)

// FS is what Store asks of a file system. Names are slash-separated, without
// "." and ".."; "" is the store's own directory. Errors are those of package
// os: fs.ErrNotExist, fs.ErrExist, or what the system said.
//
// There are two: a directory of the real one, and in filetest a disk that can
// lose its power.
type FS interface {
	// Open opens a regular file for reading.
	Open(name string) (File, error)
	// Create makes a new file that only its owner may read.
	Create(name string) (File, error)
	// Rename moves a file over whatever is at to; RenameNew gives fs.ErrExist
	// if there is something. Both are atomic for every process.
	Rename(from, to string) error
	RenameNew(from, to string) error
	Remove(name string) error
	Mkdir(name string) error
	// SyncDir makes the names in a directory survive a power cut.
	SyncDir(name string) error
	// ReadDir lists a directory in any order.
	ReadDir(name string) ([]Entry, error)
	// Stat describes one file, not following links.
	Stat(name string) (Entry, error)
	// Lock takes a lock on the named file, which it makes if need be, and
	// notes the holder in it. It gives fault.ErrLocked.
	Lock(name string, exclusive bool) (release func(), err error)
	Close() error
}

// A SharedFS is an FS with files that several processes read and write by turns.
// A store on an FS without them keeps no claims.
type SharedFS interface {
	FS
	// Share opens the named file, which it makes if need be. It gives ErrNoLocks
	// where a file can't have locks.
	Share(name string) (claims.File, error)
}

// A File is an open file: for reading, or for writing from front to back.
type File interface {
	io.ReaderAt
	io.Writer
	// Sync makes the contents survive a power cut. After an error they are
	// not to be trusted, whatever a second Sync says.
	Sync() error
	// Gone says that the name was removed or given to another file, so that
	// the next reader must open it again.
	Gone() bool
	Close() error
}

// An Entry is one name of a directory.
type Entry struct {
	Name  string
	Dir   bool
	Bytes int64 // of a regular file
	Other bool  // neither a directory nor a regular file
	// Written is the modification time of a regular file, zero where the file
	// system does not tell. Nothing but Store.Written asks for it.
	Written time.Time
}

// osFS is a directory of the real file system. os.Root keeps every name in it,
// also where symbolic links lead elsewhere.
type osFS struct{ root *os.Root }

func (f osFS) Open(name string) (File, error) {
	file, err := f.root.Open(local(name))
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return osFile{file}, nil
}

func (f osFS) Create(name string) (File, error) {
	file, err := f.root.OpenFile(local(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{file}, nil
}

func (f osFS) Rename(from, to string) error { return f.root.Rename(local(from), local(to)) }

func (f osFS) RenameNew(from, to string) error {
	if done, err := renameNew(f.root, from, to); done {
		return err
	}
	// A link is refused where the name is taken. A network file system may
	// have made it and lost the reply: then the name is ours all the same.
	err := f.root.Link(local(from), local(to))
	if err != nil {
		if !os.IsExist(err) || !f.same(from, to) {
			return err
		}
	}
	// What is left of a failed remove is swept with the other temporary files.
	_ = f.root.Remove(local(from))
	return nil
}

func (f osFS) same(a, b string) bool {
	x, errX := f.root.Lstat(local(a))
	y, errY := f.root.Lstat(local(b))
	return errX == nil && errY == nil && os.SameFile(x, y)
}

func (f osFS) Remove(name string) error { return f.root.Remove(local(name)) }
func (f osFS) Mkdir(name string) error  { return f.root.Mkdir(local(name), 0o700) }

func (f osFS) SyncDir(name string) error {
	if runtime.GOOS == "windows" {
		return nil // a directory can't be flushed; NTFS journals its names
	}
	dir, err := f.root.Open(local(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return syncDir(dir)
}

func (f osFS) ReadDir(name string) ([]Entry, error) {
	dir, err := f.root.OpenRoot(local(name))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	self, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer self.Close()
	names, err := self.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	list := make([]Entry, 0, len(names))
	for _, n := range names {
		e, err := entryIn(dir, self, n)
		if os.IsNotExist(err) {
			continue // removed since
		}
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

func (f osFS) Stat(name string) (Entry, error) { return entry(f.root, local(name)) }

func entry(root *os.Root, name string) (Entry, error) {
	st, err := root.Lstat(name)
	if err != nil {
		return Entry{}, err
	}
	e := Entry{Name: path.Base(name), Dir: st.IsDir(), Other: !st.IsDir() && !st.Mode().IsRegular()}
	if st.Mode().IsRegular() {
		e.Bytes, e.Written = st.Size(), st.ModTime()
	}
	return e, nil
}

func (f osFS) Close() error { return f.root.Close() }

// local turns "", the store's own directory, into what os calls it.
func local(name string) string {
	if name == "" {
		return "."
	}
	return name
}

type osFile struct{ *os.File }
