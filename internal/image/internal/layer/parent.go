package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// A Child is what a layer says of its parent.
type Child struct {
	Name   string // the layer's own, for messages
	Format image.Format
	// Names is what the parent is called, the likeliest first, and Identities
	// what it may be; IdentityName is what the format calls that: "UUID".
	Names        []string
	Identities   []string
	IdentityName string
	Bytes        int64 // virtual size of the layer
	SectorBytes  int
}

// A parentError says that a layer has no parent, or none that opens.
type parentError struct {
	child string
	err   error
}

func (e *parentError) Error() string { return e.child + ": parent: " + e.err.Error() }
func (e *parentError) Unwrap() error { return e.err }

// Open opens the parent by the first name that leads to the right one. It
// also gives what people should know of the parent.
func (c Child) Open(open image.OpenParent) (parent image.Image, warnings []string, err error) {
	if open == nil {
		return nil, nil, fmt.Errorf("%s: parent %q: %w", c.Name, strings.Join(c.Names, `", "`), image.ErrNotAllowed)
	}
	switch {
	case len(c.Names) == 0:
		return nil, nil, fault.Corrupt(c.Name, -1, "a differencing disk that names no parent")
	case len(c.Identities) == 0:
		return nil, nil, fault.Corrupt(c.Name, -1, "a differencing disk that does not say its parent's %s", c.IdentityName)
	}
	var first error
	for _, name := range c.Names {
		parent, err := open(name, c.Format)
		if err == nil {
			if warnings, err = c.accept(name, parent.Info()); err == nil {
				return parent, warnings, nil
			}
			parent.Close()
		}
		// The names mostly lead to the same file. Where that is found and its
		// own parent is not, asking again by another name would double the work
		// with each layer of the chain. People need to hear of that layer alone.
		if below := (*parentError)(nil); errors.As(err, &below) {
			return nil, nil, below
		}
		// A name that leads nowhere says less than one that led to something wrong.
		if first == nil || missing(first) && !missing(err) {
			first = err
		}
	}
	return nil, nil, &parentError{c.Name, first}
}

// accept says why the image called name is not the parent.
func (c Child) accept(name string, info image.Info) (warnings []string, err error) {
	switch {
	case !slices.Contains(c.Identities, info.Identity):
		return nil, fault.Corrupt(c.Name, -1, "its parent has the %s %s, but %q has %s: the parent was written to since, or is another",
			c.IdentityName, c.Identities[0], name, info.Identity)
	case info.SectorBytes != c.SectorBytes:
		return nil, fault.Corrupt(c.Name, -1, "it has sectors of %d bytes and its parent %q of %d", c.SectorBytes, name, info.SectorBytes)
	case info.VirtualBytes != c.Bytes:
		warnings = append(warnings, fmt.Sprintf("the parent has %d bytes and this disk %d", info.VirtualBytes, c.Bytes))
	}
	for _, w := range info.Warnings {
		warnings = append(warnings, fmt.Sprintf("parent %q: %s", name, w))
	}
	return warnings, nil
}

func missing(err error) bool {
	return errors.Is(err, image.ErrNotAllowed) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fault.ErrNotFound)
}
