package imagetest

import (
	"fmt"

	"github.com/backstay/backstay/internal/image"
)

// A Dir is a directory in memory, an image.Resolver that notes what it was
// asked for.
type Dir struct {
	Files map[string][]byte
	Asked []string
}

// Resolve gives the file of that name and no other.
func (d *Dir) Resolve(name string) (image.File, error) {
	d.Asked = append(d.Asked, name)
	if p, ok := d.Files[name]; ok {
		return Bytes(name, p), nil
	}
	return nil, fmt.Errorf("%q: %w", name, image.ErrNotAllowed)
}

// Open opens the image called top by open, and so its parents.
func (d *Dir) Open(top string, open func(image.File, image.OpenParent) (image.Image, error)) (image.Image, error) {
	f := Bytes(top, d.Files[top])
	return open(f, image.Parents(f, d, func(f image.File, _ image.Format, parent image.OpenParent) (image.Image, error) {
		return open(f, parent)
	}))
}
