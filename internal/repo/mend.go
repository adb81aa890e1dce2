package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/parity"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// objects mends the manifests, records and outcomes that are damaged, in place:
// they are named by others. It says how many it mended, or would.
func (m *mender) objects(ctx context.Context) (n int, err error) {
	var names []string
	for _, f := range m.c.report.Findings {
		name := f.Object
		// A record may be unreadable for its outcome.
		if ce := (*fault.CorruptError)(nil); errors.As(f.Err, &ce) && strings.HasPrefix(ce.Object, outcomePrefix) {
			name = ce.Object
		}
		names = append(names, name)
	}
	for len(names) > 0 {
		name := names[0]
		names = names[1:]
		mendable := name == configName || strings.HasPrefix(name, manifestPrefix) || strings.HasPrefix(name, pointPrefix) || strings.HasPrefix(name, outcomePrefix)
		if !mendable || m.tried[name] {
			continue
		}
		m.tried[name] = true
		base, mended, err := m.object(ctx, name)
		if err != nil {
			return n, err
		}
		if base != "" {
			names = append(names, base)
		}
		if mended {
			n++
		}
	}
	return n, nil
}

// object mends one small object. If that is a differential which is sound, it
// gives its base, which may be what is damaged.
func (m *mender) object(ctx context.Context, name string) (base string, mended bool, err error) {
	size, err := m.r.st.Size(ctx, name)
	if errors.Is(err, fault.ErrNotFound) && strings.HasPrefix(name, manifestPrefix) {
		size, err = 0, nil // a point needs it, so nobody meant to delete it
	}
	if errors.Is(err, fault.ErrNotFound) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	src := &holed{ctx, m.r.st, name}
	evidence := m.r.soundObject(name, src, size)
	if evidence == nil {
		return m.baseOf(name, src, size), false, nil
	}
	got := Mended{Object: name}
	healed, size, err := m.heal(ctx, name, src)
	if healed != nil {
		got.By = []string{ByParity}
	} else if err != nil {
		got.Err = fmt.Errorf("%w; its parity: %w", evidence, err)
	}
	if healed == nil && m.o.From != nil {
		if healed, size, err = m.fetch(ctx, name); healed != nil {
			got.By, got.Err = []string{ByCopy}, nil
		} else if err != nil {
			got.Err = fmt.Errorf("%w; the copy's: %w", got.Err, err)
		}
	}
	if ctx.Err() != nil {
		return "", false, context.Cause(ctx)
	}
	if healed == nil {
		m.say(got)
		return "", false, nil
	}
	defer healed.Close()
	if !m.o.DryRun {
		// Once more, since a record that somebody has given up must stay away.
		if _, err := m.r.st.Size(ctx, name); err != nil && (!errors.Is(err, fault.ErrNotFound) || !strings.HasPrefix(name, manifestPrefix)) {
			return "", false, err
		}
		if err := m.r.st.Put(ctx, name, healed, size); err != nil {
			got.By, got.Err = nil, err // such as a lock on the object
			m.say(got)
			return "", false, nil
		}
	}
	m.say(got)
	return "", true, nil
}

// heal makes the object from what is left of it and its parity; nil if that
// does not give what was there.
func (m *mender) heal(ctx context.Context, name string, src io.ReaderAt) (*scratch, int64, error) {
	par, err := m.r.parityOf(ctx, name)
	if err != nil {
		return nil, 0, err
	}
	out, err := newScratch(par.Size)
	if err != nil {
		return nil, 0, err
	}
	_, err = par.Heal(src, out)
	if err == nil {
		var sum [32]byte
		if sum, err = hashOf(out, par.Size); err == nil && sum != par.Sum {
			err = fault.Corrupt(name, -1, "damaged beyond what its parity heals")
		}
	}
	if err == nil {
		err = m.r.soundObject(name, out, par.Size)
	}
	if err != nil {
		out.Close()
		return nil, 0, err
	}
	return out, par.Size, nil
}

// fetch reads the object from the copy of the repository.
func (m *mender) fetch(ctx context.Context, name string) (*scratch, int64, error) {
	st := m.o.From.st
	size, err := st.Size(ctx, name)
	if err != nil {
		return nil, 0, err
	}
	if size > parity.MaxBytes {
		return nil, 0, fault.Corrupt(name, -1, "%d bytes are too many", size)
	}
	out, err := newScratch(size)
	if err != nil {
		return nil, 0, err
	}
	err = copyObject(out, &storeReader{ctx, st, name}, size)
	if err == nil {
		err = m.r.soundObject(name, out, size)
	}
	if err != nil {
		out.Close()
		return nil, 0, err
	}
	return out, size, nil
}

func copyObject(to io.WriterAt, from io.ReaderAt, size int64) error {
	_, err := io.Copy(io.NewOffsetWriter(to, 0), io.NewSectionReader(from, 0, size))
	return err
}

// soundObject says what is wrong with an object that was read from somewhere and
// is to be that of this name.
func (r *Repository) soundObject(name string, src io.ReaderAt, size int64) error {
	if strings.HasPrefix(name, manifestPrefix) {
		id, ok := parseHashName(name, manifestPrefix)
		if !ok {
			return fmt.Errorf("%s is no manifest", name)
		}
		f, err := r.manifestFrom(src, size, id)
		for i := 0; err == nil && i < f.Written(); i++ {
			_, err = f.Needs(i)
		}
		return err
	}
	if size > object.MaxBytes {
		return fault.Corrupt(name, -1, "%d bytes are too many", size)
	}
	b := make([]byte, size)
	if n, err := src.ReadAt(b, 0); n < len(b) {
		return fmt.Errorf("%s: %w", name, err)
	}
	switch {
	case name == configName:
		c, _, err := parseConfig(b)
		if err == nil && c.ID != r.ID() {
			err = fault.Corrupt(name, -1, "it is that of repository %s", c.ID)
		}
		return err
	case strings.HasPrefix(name, pointPrefix):
		_, err := r.decodeRecord(strings.TrimPrefix(name, pointPrefix), b)
		return err
	}
	o, err := decodeOutcome(strings.TrimPrefix(name, outcomePrefix), b)
	if err == nil && len(o.Points) == 0 {
		err = fault.Corrupt(name, -1, "it is not of a session that made restore points exist")
	}
	return err
}

func (r *Repository) manifestFrom(src io.ReaderAt, size int64, id manifest.ID) (*manifest.File, error) {
	if r.keys == nil {
		return manifest.Open(src, size, id, r.id, nil)
	}
	return manifest.Open(src, size, id, r.id, &r.keys.Meta)
}

// baseOf names the base of a sound differential.
func (m *mender) baseOf(name string, src io.ReaderAt, size int64) string {
	id, ok := parseHashName(name, manifestPrefix)
	if !ok {
		return ""
	}
	if f, err := m.r.manifestFrom(src, size, id); err == nil && f.Differential() {
		return manifestObject(f.Base)
	}
	return ""
}

// guardAgain makes the parity of an object that has none, or has it damaged, and
// gives its length. Damage to the object itself is an error.
func (m *mender) guardAgain(ctx context.Context, name string) (int64, error) {
	size, err := m.r.st.Size(ctx, name)
	if err != nil {
		return 0, err
	}
	if size > parity.MaxBytes || size < 1 {
		return 0, fault.Corrupt(name, -1, "an object of %d bytes can have no parity", size)
	}
	var sum [32]byte
	var src io.ReaderAt
	if id, ok := parsePackName(name); ok {
		b, err := m.r.readPack(ctx, heldPack{id: id, bytes: size})
		if err != nil {
			return 0, err
		}
		if sum = seal.Hash(b); sum != id {
			return 0, fault.Corrupt(name, -1, "content does not match its name")
		}
		src = bytes.NewReader(b)
	} else {
		out, err := newScratch(size)
		if err != nil {
			return 0, err
		}
		defer out.Close()
		if err := copyObject(out, &storeReader{ctx, m.r.st, name}, size); err != nil {
			return 0, err
		}
		if sum, err = hashOf(out, size); err != nil {
			return 0, err
		}
		if err := m.r.soundObject(name, out, size); err != nil {
			return 0, &fault.CorruptError{Object: name, Offset: -1, Err: err}
		}
		src = out
	}
	if m.o.DryRun {
		return parity.Bytes(size), nil
	}
	return parity.Bytes(size), m.r.guard(ctx, name, sum, src, size)
}

// MendConfig brings a damaged repo.json back from its parity, without which no
// repository opens. It says whether there was something to mend; with dry it
// does no more than say so.
func MendConfig(ctx context.Context, st blob.Store, dry bool) (bool, error) {
	raw, err := readObject(ctx, st, configName)
	if err != nil {
		return false, err
	}
	_, _, evidence := parseConfig(raw)
	if !errors.Is(evidence, fault.ErrCorrupt) {
		return false, nil
	}
	b, err := readObject(ctx, st, parityPrefix+configName)
	if err != nil || len(b) < 24 {
		return false, evidence
	}
	// Which repository this is nobody can say yet; what is healed must agree.
	par, err := parity.Open([16]byte(b[8:24]), b)
	if err != nil || par.Size > object.MaxBytes {
		return false, evidence
	}
	healed := make([]byte, par.Size)
	if _, err := par.Heal(bytes.NewReader(raw), parity.Window(healed)); err != nil {
		return false, err
	}
	c, id, err := parseConfig(healed)
	if err != nil || seal.Hash(healed) != par.Sum || !slices.Equal(id[:], b[8:24]) || c.ID != hex.EncodeToString(id[:]) {
		return false, evidence
	}
	if dry {
		return true, nil
	}
	return true, put(ctx, st, configName, healed)
}

// scratchMemory is how much of a scratch stays in memory, in bytes.
const scratchMemory = 64 << 20

// A scratch is room for one object: in memory, or in a temporary file if it is
// large. There is nothing in it but what is sealed.
type scratch struct {
	parity.Window
	file *os.File
}

func newScratch(size int64) (*scratch, error) {
	if size <= scratchMemory {
		return &scratch{Window: make([]byte, size)}, nil
	}
	f, err := os.CreateTemp("", "backstay-repair-*")
	if err != nil {
		return nil, fmt.Errorf("temporary file: %w", err)
	}
	os.Remove(f.Name()) // gone however the process ends, where the system allows that
	return &scratch{file: f}, nil
}

// WriteAt implements io.WriterAt.
func (s *scratch) WriteAt(p []byte, off int64) (int, error) {
	if s.file != nil {
		return s.file.WriteAt(p, off)
	}
	return s.Window.WriteAt(p, off)
}

// ReadAt implements io.ReaderAt.
func (s *scratch) ReadAt(p []byte, off int64) (int, error) {
	if s.file != nil {
		return s.file.ReadAt(p, off)
	}
	return bytes.NewReader(s.Window).ReadAt(p, off)
}

// Close removes the temporary file.
func (s *scratch) Close() error {
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	os.Remove(s.file.Name()) // where an open file keeps its name
	return err
}
