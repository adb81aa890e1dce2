package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/images"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/repo"
)

// Exit codes. Scripts depend on them: add, never change.
const (
	exitDone     = 0
	exitFailed   = 1 // also: consistency not reached, images differ
	exitUsage    = 2
	exitCorrupt  = 3 // corrupt data found, or the tracking audit disagreed
	exitWarnings = 4 // done, but a disk is unprotected or the grade is lower than preferred
	exitRefused  = 5 // a lock, a protection, an existing target
)

// A usageError is a command line that can't be understood.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// errPartial ends a command that has told its errors already, one by one.
var errPartial = errors.New("some of it failed")

// A coded error brings its own exit code and hint.
type coded struct {
	code int
	hint string
	err  error
}

func (e coded) Error() string { return e.err.Error() }
func (e coded) Unwrap() error { return e.err }

// withHint adds what the user can do next to an error that keeps its class.
func withHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return coded{hint: fmt.Sprintf(format, args...), err: err}
}

// exitCode turns the class of err into a code. Of several, corruption weighs
// more than failure, failure more than refusal, refusal more than warnings.
func exitCode(err error) int {
	var u usageError
	var c coded
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &c) && c.code != 0:
		return c.code
	case errors.As(err, &u):
		return exitUsage
	case errors.Is(err, fault.ErrCorrupt):
		return exitCorrupt
	case errors.Is(err, fault.ErrLocked), errors.Is(err, fault.ErrExists):
		return exitRefused
	}
	return exitFailed
}

// worse is the one of two codes that a command with both ends with.
func worse(a, b int) int {
	for _, c := range []int{exitCorrupt, exitFailed, exitRefused, exitWarnings, exitUsage} {
		if a == c || b == c {
			return c
		}
	}
	return exitDone
}

// hints are what the user can do about err, most specific first.
func hints(err error, cmd *cobra.Command) []string {
	var out []string
	for e := err; e != nil; {
		var c coded
		if !errors.As(e, &c) {
			break
		}
		if c.hint != "" {
			out = append(out, c.hint)
		}
		e = c.err
	}
	if len(out) > 0 {
		return out
	}
	var u usageError
	switch {
	case repo.UnreadRecords(err) != nil:
		out = append(out, recordHint(err))
	case damagedObject(err, "repo.json"), damagedObject(err, "keys/"):
		out = append(out, `it is small and never changes: "backstay repo repair" heals repo.json from its parity; otherwise bring it back from a copy of the repository; everything else waits for it`)
	case damagedObject(err, "outcome/"):
		out = append(out, `run "backstay repo vacuum", which settles what that object was about`)
	case errors.Is(err, backup.ErrSource) && errors.Is(err, fault.ErrCorrupt):
		out = append(out, `the image that was being backed up is damaged, and not the repository; look at it with "backstay image info" or "qemu-img check"`)
	case hypervHint(err) != "":
		out = append(out, hypervHint(err))
	case errors.Is(err, images.ErrChanged):
		out = append(out, "shut its VM down first, or back that up through its hypervisor as kvm:///system/NAME; no restore point was made")
	case errors.Is(err, backup.ErrNoSuchVM):
		out = append(out, `"backstay vm list" shows which VMs a host has, for example "backstay vm list kvm:///system"`)
	case errors.Is(err, hypervisor.ErrNoDisk):
		out = append(out, "leave out fewer disks with --exclude-disk: a restore point without one would protect nothing")
	case errors.As(err, &u):
		if cmd != nil {
			out = append(out, fmt.Sprintf(`run "%s --help"`, cmd.CommandPath()))
		}
	case errors.As(err, new(*repo.ImmutableError)):
		out = append(out, "nobody shortens that; it can be deleted from then on, and prune passes over it until then")
	case errors.As(err, new(*repo.ProtectedError)):
		out = append(out, `"backstay point unprotect" lets it go; "backstay point delete --force" deletes it as it is`)
	case errors.As(err, new(*repo.GoingError)):
		out = append(out, `no delete or prune that begins from now on takes it; see with "backstay point list" whether it is still there, and if none is running any more, say "backstay point protect --force"`)
	case errors.Is(err, hypervisor.ErrLeft):
		out = append(out, "the next backup of that VM, or restore to that host, takes away what is left there, once the host answers")
	case errors.Is(err, context.Canceled):
		out = append(out, "nothing half-made is left; run the same command again")
	case errors.Is(err, fault.ErrCorrupt) && cmd != nil && cmd.CommandPath() == "backstay repo check":
		out = append(out, "bring that object back from a copy of the repository, and check again")
	case errors.Is(err, fault.ErrCorrupt):
		out = append(out, `run "backstay repo check --read-data" to see which restore points are hit`)
	case errors.Is(err, fault.ErrKey):
		out = append(out, "check --password-file, BACKSTAY_PASSWORD_FILE or --identity-file; without a key nobody can read this repository")
	case errors.Is(err, fault.ErrHeld):
		out = append(out, "the storage keeps that from everybody until its time is over; prune and vacuum pass over it until then")
	case errors.Is(err, fault.ErrLocked):
		out = append(out, "wait for the other run to end, or end it, and try again")
	case errors.Is(err, fault.ErrNoSpace):
		out = append(out, `free space on the target, or drop restore points with "backstay point delete" and then run "backstay repo vacuum"; what was committed is safe`)
	case errors.Is(err, fault.ErrDenied):
		out = append(out, "see that the credentials are right, and that they may read, write, list and delete there")
	case errors.Is(err, fault.ErrReadOnly):
		out = append(out, "make the target writable for this user, or choose another")
	case errors.Is(err, fault.ErrExists):
		out = append(out, "choose another target; where --force is offered, it replaces the existing one")
	case errors.Is(err, fault.ErrFenced):
		out = append(out, "a vacuum took it for dead; nothing was lost, run it again and it reuses what was stored")
	case errors.Is(err, fault.ErrConsistency):
		out = append(out, "install and start the guest agent, or allow a lower grade with --consistency")
	case errors.Is(err, image.ErrNotAllowed):
		out = append(out, `it builds on another file, which no image may name on its own; make one image of both with "backstay image convert --parents"`)
	case errors.Is(err, open.ErrFormat):
		out = append(out, "say what it is with --format")
	case errors.Is(err, fault.ErrUnsupported):
		out = append(out, "a newer version of backstay may be able to")
	case errors.Is(err, fs.ErrPermission):
		out = append(out, "run it as a user who may do that, or change the permissions of what is named")
	}
	return out
}

// damagedObject says whether err is about a damaged object of a repository
// whose name begins so.
func damagedObject(err error, prefix string) bool {
	var ce *fault.CorruptError
	return errors.As(err, &ce) && strings.HasPrefix(ce.Object, prefix)
}

// recordHint says what to do about restore points whose records are damaged.
func recordHint(err error) string {
	unread := repo.UnreadRecords(err)
	if !errors.Is(err, fault.ErrCorrupt) {
		return "nothing can be said of a restore point whose record can't be read; other points restore, each named in full as VM/ID"
	}
	more := ""
	if len(unread) > 1 {
		more = " (and so on)"
	}
	return fmt.Sprintf(`other restore points are not hit, and restore when named in full as VM/ID; run "backstay repo repair", or bring %s back from a copy, or give it up with "backstay point delete %s --force"%s`,
		damagedOf(unread[0].Name, unread[0].Err), unread[0].Name, more)
}

// damagedOf is the object by whose damage a record cannot be read: itself, or
// the outcome that says whether it counts.
func damagedOf(record string, err error) string {
	var ce *fault.CorruptError
	if errors.As(err, &ce) && strings.Contains(ce.Object, "/") {
		return ce.Object
	}
	return "rp/" + record
}
