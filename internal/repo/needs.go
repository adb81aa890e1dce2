package repo

import (
	"context"

	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// needs says what restore points need, from the clear parts of their manifests
// alone.
type needs struct {
	r     *Repository
	files map[manifest.ID]bool   // every manifest that is needed
	read  map[manifest.ID]bool   // those of them that were asked for and could be read
	bases map[manifest.ID][]bool // for each base: which of its pages
	// visit is called for each page that is needed, once.
	visit func(id manifest.ID, f *manifest.File, i int) error
	// fail is called for each manifest that cannot be read; what it returns
	// ends the walk unless it is nil.
	fail func(id manifest.ID, err error) error
}

// recManifests are the manifests that the points name.
func recManifests(recs []*record) (names []string) {
	for _, rec := range recs {
		names = append(names, rec.clear.Manifests...)
	}
	return names
}

// walk visits all pages that these manifests need. A base needs its pages only
// as far as a point names it, or a differential does not replace them. In
// memory are a bit for each page of each base and one manifest's table.
func (n *needs) walk(ctx context.Context, manifests []string) error {
	n.files, n.bases, n.read = map[manifest.ID]bool{}, map[manifest.ID][]bool{}, map[manifest.ID]bool{}
	done := map[manifest.ID]bool{}
	for _, m := range manifests {
		id, err := parseManifestID(point.ManifestID(m))
		if err != nil {
			return err
		}
		if done[id] {
			continue
		}
		done[id] = true
		if err := n.one(ctx, id); err != nil {
			return err
		}
	}
	for id, pages := range n.bases {
		f, err := n.r.openManifest(ctx, id)
		if err != nil {
			if err := n.fail(id, err); err != nil {
				return err
			}
			continue
		}
		for i, needed := range pages {
			if needed && i < f.Written() {
				if err := n.page(ctx, id, f, i); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (n *needs) one(ctx context.Context, id manifest.ID) error {
	n.files[id] = true
	f, base, err := n.r.openManifests(ctx, id)
	if err != nil {
		return n.fail(id, err)
	}
	n.read[id] = true
	if base == nil {
		pages := make([]bool, f.Written())
		for i := range pages {
			pages[i] = true
		}
		n.bases[id] = pages
		return nil
	}
	n.files[f.Base] = true
	pages := n.bases[f.Base]
	if pages == nil {
		pages = make([]bool, base.Written())
		n.bases[f.Base] = pages
	}
	for i := range pages {
		if _, replaced := f.Find(base.PageNo(i)); !replaced {
			pages[i] = true
		}
	}
	for i := range f.Written() {
		if err := n.page(ctx, id, f, i); err != nil {
			return err
		}
	}
	return nil
}

func (n *needs) page(ctx context.Context, id manifest.ID, f *manifest.File, i int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return n.visit(id, f, i)
}
