// Package blob says what a store is: a place for named opaque objects.
//
// Names are slash-separated paths of [a-z0-9.-] segments, chosen by the
// repository and never by a user or a guest; CheckName has the rule. No name
// is the directory of another: beside "a/b" there is no "a". blob/blobtest
// holds the conformance suite that every implementation passes.
package blob

import (
	"context"
	"io"
	"iter"
)

// A Store keeps named objects. All methods are safe for concurrent use, also
// by several processes.
//
// What an implementation promises: an object is whole or absent, for every
// reader and after every crash; when Put or Create has returned nil the object
// survives a power cut; List sees every object whose Put or Create returned
// before List was called. What it may do wrong: any call may fail, and a Put
// that failed may nevertheless have stored the object.
//
// Errors: fault.ErrNotFound for an object that does not exist,
// fault.ErrExists from Create, fault.ErrNoSpace, fault.ErrReadOnly. Anything
// else may be passing trouble.
type Store interface {
	// Put stores size bytes of body under name, replacing what was there.
	// Body may be read more than once.
	Put(ctx context.Context, name string, body io.ReaderAt, size int64) error

	// Create is Put, but exactly one of all that ever Create the same name
	// succeeds; the others get fault.ErrExists.
	Create(ctx context.Context, name string, body io.ReaderAt, size int64) error

	// ReadAt fills p from byte off of the object. It returns io.EOF, with what
	// was there, if the object ends before p is full.
	ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error)

	// Size is the length of the object in bytes.
	Size(ctx context.Context, name string) (int64, error)

	// List walks all objects whose name begins with prefix, in ascending order
	// of name. Iteration ends at the first error.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]

	// Delete removes the object; one that does not exist is no error.
	Delete(ctx context.Context, name string) error

	// String is the store's URL for messages, without secrets.
	String() string

	Close() error
}

// An Object is one entry of a listing.
type Object struct {
	Name  string
	Bytes int64
}

// A Locker is a Store that can show whether a writer lives. A lock ends with
// its process, however that ended. Locks are a courtesy to people: no promise
// of the repository rests on them.
type Locker interface {
	// Lock takes the named lock, shared or exclusive, without waiting. It
	// returns fault.ErrLocked, naming the holder where it can, if it is held.
	Lock(ctx context.Context, name string, exclusive bool) (release func(), err error)
}
