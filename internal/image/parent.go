package image

import (
	"fmt"
	"os"

	"github.com/backstay/backstay/internal/fault"
)

// OpenParent opens the image that another image's header names as its parent.
// The name is hostile; format is what the child says its parent to be, and
// empty where it says nothing, in which case only the caller's own word, never
// the file's content, may settle it. An Image that was opened with a parent
// owns it and closes it.
type OpenParent func(name string, format Format) (Image, error)

// MaxDepth is how many parents a chain may have.
const MaxDepth = 200

// maxTries is how many files may be opened in search of a chain's parents. A
// layer has several names for its parent, of which each may lead to a whole
// chain of the wrong identity: without a limit they multiply.
const maxTries = 4 * MaxDepth

// A RelativeResolver is a Resolver to which it matters in which file a name
// stands: relative names begin at the file that holds them.
type RelativeResolver interface {
	Resolver
	// From is the Resolver for the names in child.
	From(child File) Resolver
}

// Parents makes the OpenParent of the image in top: every name goes to r, or
// to what r says is for that child if it is a RelativeResolver, and what that
// gives goes to open, together with the OpenParent of that file; where open
// returns an error, the file is closed here. A chain deeper than MaxDepth and
// one that comes back to a file it holds already are refused as damage. An
// OpenParent is for one image, and not safe for concurrent use.
func Parents(top File, r Resolver, open func(f File, format Format, parent OpenParent) (Image, error)) OpenParent {
	if r == nil {
		r = None
	}
	return parents([]File{top}, new(int), r, open)
}

func parents(chain []File, tries *int, r Resolver, open func(File, Format, OpenParent) (Image, error)) OpenParent {
	return func(name string, format Format) (Image, error) {
		child := chain[len(chain)-1]
		if len(chain) > MaxDepth {
			return nil, fault.Corrupt(child.Name(), -1, "the chain has more than %d parents", MaxDepth)
		}
		here := r
		if relative, ok := r.(RelativeResolver); ok {
			here = relative.From(child)
		}
		f, err := here.Resolve(name)
		if err != nil {
			return nil, err
		}
		for _, g := range chain {
			if sameFile(f, g) {
				f.Close()
				return nil, fault.Corrupt(child.Name(), -1, "its parent %q is in the chain already", name)
			}
		}
		if *tries++; *tries > maxTries {
			f.Close()
			return nil, fault.Corrupt(child.Name(), -1, "more than %d files were tried for the parents of the chain", maxTries)
		}
		img, err := open(f, format, parents(append(chain[:len(chain):len(chain)], f), tries, r, open))
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("parent %q: %w", name, err)
		}
		return img, nil
	}
}

// sameFile compares what the files are, not what they are called. Files that
// cannot say are taken for different; MaxDepth ends their loops.
func sameFile(a, b File) bool {
	type stater interface{ Stat() (os.FileInfo, error) }
	x, okx := a.(stater)
	y, oky := b.(stater)
	if okx && oky {
		i, erri := x.Stat()
		j, errj := y.Stat()
		return erri == nil && errj == nil && os.SameFile(i, j)
	}
	// A file on another machine says in one word what it is, or nothing.
	type identified interface{ Identity() string }
	v, okv := a.(identified)
	w, okw := b.(identified)
	return okv && okw && v.Identity() != "" && v.Identity() == w.Identity()
}

// OpenOptions say what an Image may open besides its own file, and which of
// its states it shows. Zero values allow nothing and show the present state
// of the whole chain.
type OpenOptions struct {
	// Resolver opens what belongs to the same layer: extents, data files. Nil
	// is None.
	Resolver Resolver
	// Parent opens the parent. Where it is nil, an image that has one is
	// refused with ErrNotAllowed.
	Parent OpenParent
	// OnlyTop leaves the parent unopened: what it holds is Absent and reads
	// as zeros.
	OnlyTop bool
	// Snapshot is the name or, failing that, the ID of an internal snapshot
	// to show instead of the present state.
	Snapshot string
}
