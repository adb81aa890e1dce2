// Package probe tries whether a storage keeps the promises of a blob.Store,
// before somebody relies on it.
package probe

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// Run tries st with an object of its own. It gives fault.ErrUnsupported,
// wrapped, if st does not keep the promises of a blob.Store as far as one
// client can see.
//
// It asks for what is not there before it makes it: a cache that remembers
// such answers, in the storage or before it, would hide one writer's session
// from another.
func Run(ctx context.Context, s blob.Store) error {
	var random [8]byte
	rand.Read(random[:])
	name := "probe/" + hex.EncodeToString(random[:])
	p := probe{s, name}
	defer s.Delete(context.WithoutCancel(ctx), name)

	if err := p.see(ctx, "", "shows an object that is not there"); err != nil {
		return err
	}
	if err := p.create(ctx, "first"); err != nil {
		return err
	}
	switch err := p.create(ctx, "second"); {
	case err == nil:
		return p.lacks("overwrites an object that was to be created (it ignores If-None-Match: *)")
	case !errors.Is(err, fault.ErrExists):
		return err
	}
	if err := p.see(ctx, "first", "does not show what was just stored"); err != nil {
		return err
	}
	if err := s.Put(ctx, name, strings.NewReader("third"), 5); err != nil {
		return err
	}
	if err := p.see(ctx, "third", "does not show what was just overwritten as it is now"); err != nil {
		return err
	}
	if err := s.Delete(ctx, name); err != nil {
		return err
	}
	return p.see(ctx, "", "still shows what was just deleted")
}

type probe struct {
	s    blob.Store
	name string
}

func (p probe) lacks(what string) error {
	return fmt.Errorf("%s %s, so two writers could not be kept apart: %w", p.s, what, fault.ErrUnsupported)
}

func (p probe) create(ctx context.Context, body string) error {
	return p.s.Create(ctx, p.name, strings.NewReader(body), int64(len(body)))
}

// see wants to read and to list the object with that content, or neither where
// content is empty.
func (p probe) see(ctx context.Context, content, otherwise string) error {
	got := make([]byte, 16)
	n, err := p.s.ReadAt(ctx, p.name, got, 0)
	there := !errors.Is(err, fault.ErrNotFound)
	if there && err != nil && err != io.EOF {
		return err
	}
	want := content != ""
	if there != want || string(got[:n]) != content {
		return p.lacks(otherwise + " to who reads")
	}
	listed := false
	for o, err := range p.s.List(ctx, "probe/") {
		if err != nil {
			return err
		}
		listed = listed || o.Name == p.name
	}
	if listed != want {
		return p.lacks(otherwise + " to who lists")
	}
	return nil
}
