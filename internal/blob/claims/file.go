package claims

import "io"

// A File is what a Log keeps claims in. Several processes have it open at once;
// two of one process are two of them.
type File interface {
	io.ReaderAt
	io.WriterAt
	Size() (int64, error)
	Truncate(size int64) error
	// Lock locks the byte at that offset, which the file need not have, for this
	// File alone: it gives fault.ErrLocked at once where another one has. A lock
	// ends with Unlock, with Close, and with the process, however that ends.
	Lock(at int64) error
	Unlock(at int64) error
	// Locked says whether another File has locked that byte.
	Locked(at int64) (bool, error)
	// Gone says that the file's name leads to another file, or to none.
	Gone() bool
	Close() error
}
