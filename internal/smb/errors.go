package smb

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/cloudsoda/go-smb2"

	"github.com/backstay/backstay/internal/fault"
)

// ErrChanged says that the file of a name is not the one that was opened: it
// was replaced or written to while the connection was gone.
var ErrChanged = errors.New("the file is not the one that was opened")

// ErrLost says that the host was out of reach for as long as anybody may wait
// for it, so that another way to the file is worth a try.
var ErrLost = errors.New("the host was lost")

// ErrNotEmpty says that a directory holds something, be it empty directories,
// and can't be removed.
var ErrNotEmpty = errors.New("the directory is not empty")

// An Error says what could not be done with which file.
type Error struct {
	Op     string // "read", "create"
	Path   string // \\host\share\dir\file
	Offset int64  // in bytes, -1 where it has none
	Err    error
}

func (e *Error) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("%s: %s: %v", e.Path, e.Op, e.Err)
	}
	return fmt.Sprintf("%s: %s at %d: %v", e.Path, e.Op, e.Offset, e.Err)
}

// Unwrap gives the reason.
func (e *Error) Unwrap() error { return e.Err }

// A lostError is the end of a connection. Trying again may help; less so if
// the host's answer made no sense.
type lostError struct {
	err       error
	senseless bool
}

func (e *lostError) Error() string { return "connection lost: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

func (e *lostError) Is(target error) bool { return target == ErrLost }

func isTransport(err error) bool {
	var t *smb2.TransportError
	return errors.As(err, &t)
}

// A status is what an NTSTATUS means to us.
type status struct {
	class error // nil for one that only has a text
	text  string
	lost  bool // the connection, session or share is gone and may come back
}

// statuses are those that people meet, by MS-ERREF.
var statuses = map[uint32]status{
	0xC000006D: {fault.ErrDenied, "wrong user or password", false},
	0xC000006A: {fault.ErrDenied, "wrong password", false},
	0xC0000064: {fault.ErrDenied, "no such user", false},
	0xC000006E: {fault.ErrDenied, "the account is restricted", false},
	0xC000006F: {fault.ErrDenied, "the account may not sign in at this hour", false},
	0xC0000070: {fault.ErrDenied, "the account may not sign in from here", false},
	0xC0000071: {fault.ErrDenied, "the password has expired", false},
	0xC0000072: {fault.ErrDenied, "the account is disabled", false},
	0xC0000133: {fault.ErrDenied, "the clocks of this machine and the host differ too much", false},
	0xC000015B: {fault.ErrDenied, "the account may not sign in over the network", false},
	0xC0000193: {fault.ErrDenied, "the account has expired", false},
	0xC0000224: {fault.ErrDenied, "the password must be changed", false},
	0xC0000234: {fault.ErrDenied, "the account is locked out", false},
	0xC0000022: {fault.ErrDenied, "the user may not do that", false},

	0xC00000CC: {fault.ErrNotFound, "the host has no share of that name", false},
	0xC00000BE: {fault.ErrNotFound, "the host has no share of that name", false},
	0xC000000F: {fault.ErrNotFound, "no such file", false},
	0xC0000033: {fault.ErrNotFound, "the host takes no such name", false},
	0xC000003B: {fault.ErrNotFound, "the host takes no such path", false},
	0xC0000056: {fault.ErrNotFound, "it is being deleted", false},
	0xC0000103: {fault.ErrNotFound, "not a directory", false},
	0xC00000BA: {nil, "it is a directory", false},
	0xC0000101: {ErrNotEmpty, "the host keeps it", false},

	0xC0000043: {fault.ErrLocked, "another program has it open and shares it with nobody", false},
	0xC0000054: {fault.ErrLocked, "another program has locked that range", false},
	0xC000007F: {fault.ErrNoSpace, "the host's volume is full", false},
	0xC0000044: {fault.ErrNoSpace, "the user's quota on the host is used up", false},
	0xC0000904: {fault.ErrNoSpace, "the host's file system holds no larger file", false},
	0xC00000A2: {fault.ErrReadOnly, "the host's volume takes no writes", false},
	0xC00000BB: {fault.ErrUnsupported, "the host does not do that", false},
	0xC000003E: {nil, "the host can't read its disk there", false},
	0xC000009C: {nil, "the host can't read its disk there", false},
	0xC0000185: {nil, "the host's disk fails", false},

	0xC00000C9: {nil, "the share went away", true},
	0xC0000203: {nil, "the session was ended", true},
	0xC000035C: {nil, "the session has expired", true},
	0xC0000128: {nil, "the host closed the file", true},
	0xC0000008: {nil, "the host closed the file", true},
	0xC00000B5: {nil, "the host waited too long for its disk", true},
	0xC000009A: {nil, "the host is out of resources", true},
	0xC00000D0: {nil, "the host takes no further connections", true},
	0xC000020C: {nil, "the host lost its own connection", true},
	0xC000020D: {nil, "the host lost its own connection", true},
	0xC000026E: {nil, "the volume was dismounted", true},
	0xC0000466: {nil, "the host is not available", true},
	0xC0000467: {nil, "the file is not available at this moment", true},
}

// classify puts an error of the library into the classes that every layer
// knows, without the path, which the Error around it has.
func classify(err error) error {
	var path *os.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		err = path.Err
	case errors.As(err, &link):
		err = link.Err
	}
	var answer *smb2.ResponseError
	var invalid *smb2.InvalidResponseError
	switch {
	case errors.As(err, &answer):
		s, ok := statuses[answer.Code]
		if !ok {
			return fmt.Errorf("status %#08x: %w", answer.Code, err)
		}
		switch {
		case s.lost:
			return &lostError{errors.New(s.text), false}
		case s.class != nil:
			return fmt.Errorf("%s: %w", s.text, s.class)
		}
		return errors.New(s.text)
	case errors.As(err, &invalid):
		return &lostError{fmt.Errorf("an answer that makes no sense: %s", invalid.Message), true}
	case errors.Is(err, smb2.ErrRequestNotAccepted):
		return &lostError{errors.New("the host takes no further connections"), false}
	case isTransport(err), errors.Is(err, context.Canceled):
		return &lostError{err, false}
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no such file: %w", fault.ErrNotFound)
	case errors.Is(err, os.ErrExist):
		return fault.ErrExists
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("the user may not do that: %w", fault.ErrDenied)
	}
	return err
}
