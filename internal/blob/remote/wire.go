package remote

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// What the two sides say to each other; docs/design/serve.md is the
// specification. Repository servers and clients of different releases meet:
// add to these, never change them.
const (
	// HashHeader carries the BLAKE3-256 of a body, 64 hex digits.
	HashHeader = "Backstay-Blake3"
	// FreeingHeader, with "1", says that the object is a small one of somebody
	// who frees room: what the server keeps back on a full disk is for it.
	FreeingHeader = "Backstay-Freeing"
	// ClassHeader says which class of error an answer is.
	ClassHeader = "Backstay-Class"
	// ListEnd and ListMore are the last line of a page of a listing.
	ListEnd  = "end"
	ListMore = "more"
	// MaxRange is the longest range that one GET may ask for, in bytes.
	MaxRange = 64 << 20
	// MaxReason bounds what a server says about an error, in bytes.
	MaxReason = 1 << 10

	base       = "/v1/"
	maxRepo    = 100
	maxDigits  = 18 // of a number: no sum of two overflows
	maxNameLen = blob.MaxNameBytes
)

// Classes are the values of ClassHeader. An answer without one may be passing
// trouble.
var Classes = map[string]error{
	"not-found":   fault.ErrNotFound,
	"exists":      fault.ErrExists,
	"held":        fault.ErrHeld,
	"denied":      fault.ErrDenied,
	"no-space":    fault.ErrNoSpace,
	"read-only":   fault.ErrReadOnly,
	"unsupported": fault.ErrUnsupported,
}

// ClassOf is the value of ClassHeader and the status for err; "" and 500 for
// one that belongs to no class.
func ClassOf(err error) (class string, status int) {
	for _, c := range []struct {
		class  string
		err    error
		status int
	}{
		{"not-found", fault.ErrNotFound, http.StatusNotFound},
		{"exists", fault.ErrExists, http.StatusPreconditionFailed},
		{"held", fault.ErrHeld, http.StatusForbidden},
		{"denied", fault.ErrDenied, http.StatusForbidden},
		{"no-space", fault.ErrNoSpace, http.StatusInsufficientStorage},
		{"read-only", fault.ErrReadOnly, http.StatusForbidden},
		{"unsupported", fault.ErrUnsupported, http.StatusNotImplemented},
	} {
		if errors.Is(err, c.err) {
			return c.class, c.status
		}
	}
	return "", http.StatusInternalServerError
}

// byStatus serves answers without a class, such as those of something that
// stands between.
var byStatus = map[int]error{
	http.StatusNotFound:              fault.ErrNotFound,
	http.StatusPreconditionFailed:    fault.ErrExists,
	http.StatusUnauthorized:          fault.ErrDenied,
	http.StatusForbidden:             fault.ErrDenied,
	http.StatusBadRequest:            fault.ErrUnsupported,
	http.StatusMethodNotAllowed:      fault.ErrUnsupported,
	http.StatusRequestEntityTooLarge: fault.ErrUnsupported,
	http.StatusInsufficientStorage:   fault.ErrNoSpace,
	http.StatusNotImplemented:        fault.ErrUnsupported,
}

// A Target is what a request is about: a repository, its list, what is claimed
// in it, the end of a claim, or one of its objects.
type Target struct {
	Repo    string
	List    bool
	Claims  bool
	Settled bool
	Name    string // of the object; "" for all else
}

// Whole says that t is the repository itself.
func (t Target) Whole() bool { return t == Target{Repo: t.Repo} }

// Path is the path of t's URL.
func (t Target) Path() string {
	switch {
	case t.List:
		return base + t.Repo + "/list"
	case t.Claims:
		return base + t.Repo + "/claims"
	case t.Settled:
		return base + t.Repo + "/settled"
	case t.Name != "":
		return base + t.Repo + "/o/" + t.Name
	}
	return base + t.Repo
}

// ParseTarget reads a path as it came, with nothing unescaped or cleaned: names
// need neither.
func ParseTarget(path string) (Target, error) {
	rest, ok := strings.CutPrefix(path, base)
	if !ok || len(rest) > maxRepo+len("/o/")+maxNameLen {
		return Target{}, errors.New("no such path: want /v1/REPOSITORY…")
	}
	repo, rest, more := strings.Cut(rest, "/")
	if err := CheckRepo(repo); err != nil {
		return Target{}, err
	}
	switch {
	case !more:
		return Target{Repo: repo}, nil
	case rest == "list":
		return Target{Repo: repo, List: true}, nil
	case rest == "claims":
		return Target{Repo: repo, Claims: true}, nil
	case rest == "settled":
		return Target{Repo: repo, Settled: true}, nil
	}
	name, ok := strings.CutPrefix(rest, "o/")
	if !ok {
		return Target{}, errors.New("no such path: want /v1/REPOSITORY/o/NAME")
	}
	if err := blob.CheckName(name); err != nil {
		return Target{}, err
	}
	return Target{Repo: repo, Name: name}, nil
}

// CheckRepo says what is wrong with name as the name of a repository on a
// server: one segment, as in the name of an object.
func CheckRepo(name string) error {
	if name == "" || len(name) > maxRepo || name[0] == '.' || !plain(name) {
		return fmt.Errorf("repository name %.100q: want 1 to %d of a-z, 0-9, \".\" and \"-\", and no \".\" in front", name, maxRepo)
	}
	return nil
}

func plain(name string) bool {
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

// CheckPrefix says what is wrong with prefix as the beginning of names.
func CheckPrefix(prefix string) error {
	if len(prefix) > maxNameLen {
		return fmt.Errorf("a prefix of %d bytes: want at most %d", len(prefix), maxNameLen)
	}
	if !plain(strings.ReplaceAll(prefix, "/", "")) {
		return fmt.Errorf("prefix %q has a character other than a-z, 0-9, \".\", \"-\" and \"/\"", prefix)
	}
	return nil
}

// ParseRange reads "bytes=5-9", the one form of a Range header that is served.
func ParseRange(s string) (off, n int64, err error) {
	span, ok := strings.CutPrefix(s, "bytes=")
	a, b, dash := strings.Cut(span, "-")
	first, okA := number(a)
	last, okB := number(b)
	if !ok || !dash || !okA || !okB || last < first {
		return 0, 0, fmt.Errorf("range %.100q: want bytes=FIRST-LAST", s)
	}
	if last-first >= MaxRange {
		return 0, 0, fmt.Errorf("a range of %d bytes: want at most %d", last-first+1, int64(MaxRange))
	}
	return first, last - first + 1, nil
}

// number reads decimal digits and nothing else: no sign, no space.
func number(s string) (int64, bool) {
	if s == "" || len(s) > maxDigits {
		return 0, false
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// ListLine is one object in a listing.
func ListLine(b []byte, o blob.Object) []byte {
	b = strconv.AppendInt(b, o.Bytes, 10)
	b = append(b, ' ')
	b = append(b, o.Name...)
	return append(b, '\n')
}

func parseListLine(line string) (blob.Object, error) {
	size, name, ok := strings.Cut(line, " ")
	n, isNumber := number(size)
	if !ok || !isNumber || blob.CheckName(name) != nil {
		return blob.Object{}, fmt.Errorf("the server listed %.100q", line)
	}
	return blob.Object{Name: name, Bytes: n}, nil
}
