package smb

import (
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/winpath"
)

// A Path is where a host's shares have a file or directory.
type Path struct {
	Share string
	Name  string // below the share, with backslashes; empty for the share itself
}

// String is the path without its host.
func (p Path) String() string {
	if p.Name == "" {
		return p.Share
	}
	return p.Share + `\` + p.Name
}

// Join is the file name in the directory p; name is one part of a path.
func (p Path) Join(name string) Path {
	if p.Name != "" {
		name = p.Name + `\` + name
	}
	return Path{p.Share, name}
}

// check refuses what must not go to a host, wherever it came from.
func (p Path) check() error {
	whole := `\\host\` + p.Share + `\` + p.Name
	parsed, err := winpath.Parse(whole)
	if err == nil && (parsed.Below() != p.Name || p.Share == "" || strings.ContainsAny(p.Share, `\/`)) {
		err = fmt.Errorf("%q: %w", p, winpath.ErrName)
	}
	return err
}

// Shares says through which share each directory of a host is reached: by
// default C:\ through the administrative share C$, which only administrators
// may use. Where shares were given, no administrative one is used. A path that
// is the host's own \\host\share\file says it itself.
type Shares struct {
	names []string // of the host
	given []givenShare
}

type givenShare struct {
	dir   winpath.Path
	share string
}

// NewShares is for the host that has those names and addresses, of which any
// may stand in a path \\host\share.
func NewShares(names ...string) *Shares { return &Shares{names: names} }

// Add takes "PREFIX=SHARE": what lies below the directory PREFIX is below the
// share SHARE.
func (s *Shares) Add(word string) error {
	at := strings.LastIndexByte(word, '=') // no share's name has one
	if at < 0 {
		return fmt.Errorf(`share %q: it is given as C:\directory=share`, word)
	}
	dir, err := winpath.Parse(word[:at])
	if err != nil {
		return fmt.Errorf("share %q: %w", word, err)
	}
	share := strings.TrimPrefix(word[at+1:], `\`)
	if err := (Path{Share: share}).check(); err != nil {
		return fmt.Errorf("share %q: %w", word, err)
	}
	s.given = append(s.given, givenShare{dir, share})
	return nil
}

// Find says where p is. The longest directory that was given counts.
//
// Errors: fault.ErrUnsupported for a path of another host and for one that no
// share leads to.
func (s *Shares) Find(p winpath.Path) (Path, error) {
	best, found := -1, Path{}
	for _, g := range s.given {
		rest, ok := p.Under(g.dir)
		if n := len(g.dir.String()); ok && n > best {
			best, found = n, Path{g.share, rest}
		}
	}
	if best >= 0 {
		return found, nil
	}
	if server, share, ok := p.Share(); ok {
		if !s.is(server) {
			return Path{}, fmt.Errorf("%s lies on another host: %w", p, fault.ErrUnsupported)
		}
		return Path{share, p.Below()}, nil
	}
	if len(s.given) > 0 {
		return Path{}, fmt.Errorf("%s lies below none of the given shares' directories: %w", p, fault.ErrUnsupported)
	}
	drive, ok := p.Drive()
	if !ok {
		return Path{}, fmt.Errorf("%s lies on a volume without a letter, which needs a share of its own: %w", p, fault.ErrUnsupported)
	}
	return Path{drive + "$", p.Below()}, nil
}

// is says whether server is a name of this host. The first label of a DNS name
// is the name that Windows itself gives.
func (s *Shares) is(server string) bool {
	return slices.ContainsFunc(s.names, func(name string) bool {
		if strings.EqualFold(name, server) {
			return true
		}
		label, _, _ := strings.Cut(name, ".")
		return strings.EqualFold(label, server) && strings.Trim(label, "0123456789") != ""
	})
}
