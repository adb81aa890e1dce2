package filetest

import (
	"io"
	"io/fs"

	"github.com/backstay/backstay/internal/blob/claims"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
)

var _ file.SharedFS = (*Disk)(nil)

// A shared is an open file that others read and write as well. What is done to it
// is no step of CutAfter: no promise rests on it.
type shared struct {
	d    *Disk
	n    *inode
	name string
}

// Share implements file.SharedFS. Hooks are told "share", "shareread",
// "sharewrite", "sharesize", "sharetruncate" and "sharelock".
func (d *Disk) Share(name string) (claims.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin("share", name, false); err != nil {
		return nil, err
	}
	p, base, err := d.parent(name)
	if err != nil {
		return nil, err
	}
	n := p.names[base]
	if n == nil {
		n = &inode{}
		if err := d.enter(name, n); err != nil {
			return nil, err
		}
	}
	if n.dir {
		return nil, &fs.PathError{Op: "share", Path: name, Err: fs.ErrInvalid}
	}
	return &shared{d, n, name}, nil
}

// do is one operation on the file.
func (f *shared) do(op string, run func() error) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.begin(op, f.name, false); err != nil {
		return err
	}
	return run()
}

func (f *shared) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.do("shareread", func() error {
		if off < int64(len(f.n.data)) {
			n = copy(p, f.n.data[off:])
		}
		if n < len(p) {
			return io.EOF
		}
		return nil
	})
	return n, err
}

func (f *shared) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.do("sharewrite", func() error {
		f.n.data = resized(f.n.data, max(int64(len(f.n.data)), off+int64(len(p))))
		n = copy(f.n.data[off:], p)
		return nil
	})
	return n, err
}

func (f *shared) Truncate(size int64) error {
	return f.do("sharetruncate", func() error {
		f.n.data = resized(f.n.data, size)
		return nil
	})
}

func resized(b []byte, size int64) []byte {
	if size <= int64(len(b)) {
		return b[:size]
	}
	return append(b, make([]byte, size-int64(len(b)))...)
}

func (f *shared) Size() (size int64, err error) {
	err = f.do("sharesize", func() error {
		size = int64(len(f.n.data))
		return nil
	})
	return size, err
}

func (f *shared) Lock(at int64) error {
	return f.do("sharelock", func() error {
		if by := f.n.locked[at]; by != nil && by != f {
			return fault.ErrLocked
		}
		if f.n.locked == nil {
			f.n.locked = map[int64]*shared{}
		}
		f.n.locked[at] = f
		return nil
	})
}

func (f *shared) Unlock(at int64) error {
	return f.do("sharelock", func() error {
		if f.n.locked[at] == f {
			delete(f.n.locked, at)
		}
		return nil
	})
}

func (f *shared) Locked(at int64) (locked bool, err error) {
	err = f.do("sharelock", func() error {
		by := f.n.locked[at]
		locked = by != nil && by != f
		return nil
	})
	return locked, err
}

func (f *shared) Gone() bool {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	n, err := f.d.find(f.name)
	return err != nil || n != f.n
}

// Close ends the locks, as the death of a process does.
func (f *shared) Close() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	for at, by := range f.n.locked {
		if by == f {
			delete(f.n.locked, at)
		}
	}
	return nil
}
