package file

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// ReadAt implements blob.Store.
func (s *Store) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	if err := check(ctx, name); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: offset %d", name, off)
	}
	h, err := s.open.get(name)
	if err != nil {
		if missing(err) {
			err = fault.ErrNotFound
		}
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	defer s.open.put(h)
	n, err := h.f.ReadAt(p, off)
	if n == len(p) {
		err = nil
	}
	if err != nil && err != io.EOF {
		return n, fmt.Errorf("%s: %w", name, err)
	}
	return n, err
}

// Size implements blob.Store.
func (s *Store) Size(ctx context.Context, name string) (int64, error) {
	if err := check(ctx, name); err != nil {
		return 0, err
	}
	e, err := s.fs.Stat(name)
	if missing(err) || err == nil && (e.Dir || e.Other) {
		err = fault.ErrNotFound
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return e.Bytes, nil
}

// List implements blob.Store. Directories are read one at a time, and synced
// before their names are shown: see the package's comment.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Object, error] {
	return s.ListAfter(ctx, prefix, "")
}

// ListAfter is List without the objects up to and including the name after. It
// reads no directory that holds only such.
func (s *Store) ListAfter(ctx context.Context, prefix, after string) iter.Seq2[blob.Object, error] {
	return func(yield func(blob.Object, error) bool) { s.walk(ctx, "", prefix, after, yield) }
}

func (s *Store) walk(ctx context.Context, dir, prefix, after string, yield func(blob.Object, error) bool) bool {
	entries, err := s.list(ctx, dir, prefix)
	if err != nil {
		yield(blob.Object{}, err)
		return false
	}
	for _, e := range entries {
		name := join(dir, e.Name)
		switch {
		case e.Dir:
			if name+"/" < after && !strings.HasPrefix(after, name+"/") {
				continue
			}
			if !s.walk(ctx, name, prefix, after, yield) {
				return false
			}
		case name <= after:
		case ctx.Err() != nil:
			yield(blob.Object{}, ctx.Err())
			return false
		case !yield(blob.Object{Name: name, Bytes: e.Bytes}, nil):
			return false
		}
	}
	return true
}

// list gives what of a directory belongs to a listing, in the order of full
// names: a directory sorts as if its name ended in the slash that follows it.
func (s *Store) list(ctx context.Context, dir, prefix string) ([]Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	entries, err := s.fs.ReadDir(dir)
	if missing(err) && dir != "" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	files := false
	all := dir != "" && strings.HasPrefix(dir+"/", prefix) // files in here have the prefix
	entries = slices.DeleteFunc(entries, func(e Entry) bool {
		if all && !e.Dir && !e.Other && len(dir)+1+len(e.Name) <= blob.MaxNameBytes && blob.CheckName(e.Name) == nil {
			files = true
			return false // as below, and quicker for a directory of many
		}
		name := join(dir, e.Name)
		if e.Other || blob.CheckName(name) != nil {
			return true // nothing of ours
		}
		if e.Dir {
			return !strings.HasPrefix(name+"/", prefix) && !strings.HasPrefix(prefix, name+"/")
		}
		files = files || strings.HasPrefix(name, prefix)
		return !strings.HasPrefix(name, prefix)
	})
	if files {
		if err := s.dirs.sync(dir); err != nil && !missing(err) {
			return nil, err
		}
	}
	key := func(e Entry) string {
		if e.Dir {
			return e.Name + "/"
		}
		return e.Name
	}
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(key(a), key(b)) })
	return entries, nil
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// Delete implements blob.Store. When it returns, the object stays away also
// after a power cut.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := check(ctx, name); err != nil {
		return err
	}
	e, err := s.fs.Stat(name)
	if err == nil && !e.Dir {
		err = s.fs.Remove(name)
	}
	s.open.drop(name)
	if err == nil && !e.Dir || missing(err) {
		// Also if it was gone: whoever removed it may not have come to this.
		err = s.dirs.sync(dirOf(name))
	}
	if err != nil && !missing(err) {
		return fmt.Errorf("%s: %w", name, classify(err))
	}
	if e.Bytes >= pieceBytes {
		s.refillReserve()
	}
	return nil
}
