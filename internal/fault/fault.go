// Package fault holds the error classes that every layer agrees on.
//
// A layer that meets one of these wraps it with the operand that only it
// knows; the retry wrapper, cli and console ask for the class with errors.Is
// and never look at the text.
package fault

import (
	"errors"
	"fmt"
)

var (
	// ErrCorrupt is the class of every "what we read is not what was written".
	// It is never retried and never lowered to a warning.
	ErrCorrupt = errors.New("corrupt data")

	// ErrNotFound is the class of every named thing that does not exist.
	ErrNotFound = errors.New("not found")

	// ErrExists is the class of every refused overwrite: a create-only object
	// that is there already, a restore target that holds a file.
	ErrExists = errors.New("already exists")

	// ErrLocked is the class of everything that another process holds.
	ErrLocked = errors.New("locked")

	// ErrKey is the class of every wrong or missing passphrase or identity.
	// It never says which of several keys came close.
	ErrKey = errors.New("no key fits")

	// ErrUnsupported is the class of everything that is well formed and that
	// this version cannot handle: a newer format, an unknown feature bit.
	ErrUnsupported = errors.New("not supported")

	// ErrNoSpace is the class of a full disk, a full quota and a full bucket.
	ErrNoSpace = errors.New("no space left")

	// ErrReadOnly is the class of a store or file that cannot be written.
	ErrReadOnly = errors.New("read-only")

	// ErrDenied is the class of everything that whoever we are signed in as may
	// not do, and of a sign-in that was refused.
	ErrDenied = errors.New("access denied")

	// ErrHeld is the class of every delete that the store refuses to everybody
	// until a time has passed. It is in class ErrLocked.
	ErrHeld error = held{}

	// ErrFenced says that this session was revoked while it ran. What it
	// stored is garbage or reusable; nothing of it was committed, and it may
	// simply be repeated.
	ErrFenced = errors.New("session revoked")

	// ErrConsistency says that the grade of consistency that was asked for
	// could not be reached, and that policy forbids a lower one.
	ErrConsistency = errors.New("consistency not reached")
)

type held struct{}

func (held) Error() string { return "not to be deleted yet" }

func (held) Is(target error) bool { return target == ErrLocked }

// A CorruptError says which object is damaged, where, and how we know.
type CorruptError struct {
	Object string // as the user can look it up: "pack 4f2a91c0"
	Offset int64  // bytes from the start of Object, -1 where it has no place
	Err    error
}

func (e *CorruptError) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("%s is corrupt: %v", e.Object, e.Err)
	}
	return fmt.Sprintf("%s is corrupt at offset %d: %v", e.Object, e.Offset, e.Err)
}

// Unwrap gives the evidence.
func (e *CorruptError) Unwrap() error { return e.Err }

// Is puts every CorruptError in the class ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Corrupt makes a CorruptError whose evidence is a formatted message.
func Corrupt(object string, offset int64, format string, args ...any) error {
	return &CorruptError{Object: object, Offset: offset, Err: fmt.Errorf(format, args...)}
}
