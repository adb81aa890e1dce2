package reposerver

import (
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/fault"
)

// A Role is what a token is for.
type Role string

// The roles. Everybody who has a token for a repository may read all of it.
const (
	// Backup stores new objects and changes nothing that is there, but for the
	// session objects that its token made.
	Backup Role = "backup"
	// Restore reads.
	Restore Role = "restore"
	// Admin may do everything that a store can: vacuum, delete, prune.
	Admin Role = "admin"
)

// ParseRole reads the name of a role.
func ParseRole(s string) (Role, error) {
	switch r := Role(s); r {
	case Backup, Restore, Admin:
		return r, nil
	}
	return "", fmt.Errorf("role %.50q: want backup, restore or admin", s)
}

// A grant is what a backup client may do with names of one prefix, beyond
// reading.
type grant int

const (
	// none: nothing.
	none grant = iota
	// found: create, while the repository has no repo.json.
	found
	// create: store under a name that is free. The same bytes again are no
	// harm, other bytes are refused.
	create
	// createHashed is create for objects whose name ends in the BLAKE3 of
	// their bytes.
	createHashed
	// createBound is create for objects that carry the name of a session, and
	// only if this token began that session.
	createBound
	// own: create, overwrite and delete what this token began.
	own
)

// A rule says what may happen to names with a prefix.
type rule struct {
	prefix string
	backup grant
	// held objects are what restore points are made of, and cannot be made
	// again: --immutable-for protects them from everybody.
	held bool
	// maxBytes bounds one object.
	maxBytes int64
}

const (
	small = 256 << 20 // what a reader takes for a small object
	large = 64 << 30  // a manifest of the largest disk is a tenth of that
)

// rules are the names of docs/format/repository.md, and the one place that
// says who may touch them. What is not here, nobody but an admin may store.
var rules = []rule{
	{"repo.json", found, true, small},
	{"keys/", found, true, small},
	{"data/", createHashed, true, 2 << 30},
	{"par/", create, true, 2 << 30},
	{"idx/l0/", createBound, false, large}, // rebuilt from packs
	{"idx/", none, false, large},           // joined by vacuum
	{"man/", create, true, large},
	{"rp/", createBound, true, small},
	{"session/", own, false, small},
	{"beat/", own, false, small},
	{"outcome/", createBound, true, small},
	{"suspect/", create, false, small},
	// To protect a point takes nothing away from anybody who backs up; to take
	// the protection away, and to begin to delete a point, is the admin's.
	{"protect/", create, false, small},
	{"going/", none, false, small},
	// No promise rests on when packs were read.
	{"scrub/", create, false, small},
	// A note that calls a good pack damaged makes vacuum drop it where another
	// copy seems to be, so these are not for everybody.
	{"quarantine/", none, false, small},
	{"scrub/", none, false, small},
	{"epoch/", none, false, small},
	{"vacuum/", none, false, small},
}

// otherwise is the rule for all other names.
var otherwise = rule{"", none, true, large}

func ruleFor(name string) rule {
	for _, r := range rules {
		if name == r.prefix || strings.HasSuffix(r.prefix, "/") && strings.HasPrefix(name, r.prefix) {
			return r
		}
	}
	return otherwise
}

// session gives the session that name belongs to: the ULID behind the prefix.
func (r rule) session(name string) (string, error) {
	const ulid = 26
	rest := name[len(r.prefix):]
	if len(rest) >= ulid && (len(rest) == ulid || rest[ulid] == '-') && strings.Trim(rest[:ulid], "0123456789abcdefghjkmnpqrstvwxyz") == "" {
		return rest[:ulid], nil
	}
	return "", fmt.Errorf("%s carries the name of no session: %w", name, fault.ErrDenied)
}
