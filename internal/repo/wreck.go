package repo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"syscall"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/repo/internal/parity"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// A wreck is a damaged pack: what is left of it, and what parity makes of that.
type wreck struct {
	r    *Repository
	raw  []byte // as it is, with zeros where it cannot be read
	data []byte // healed as far as that goes; raw where nothing is
	good map[uint32]pack.Entry
	why  error // why not all of it is healed
	same bool  // it is as it was stored
}

// openWreck reads pack p, or what is left of it, and heals it in memory. Damage
// is no error.
func (r *Repository) openWreck(ctx context.Context, p heldPack) (*wreck, error) {
	w := &wreck{r: r, good: map[uint32]pack.Entry{}}
	if p.bytes > 0 && p.bytes <= pack.MaxBytes {
		w.raw = make([]byte, p.bytes)
		n, err := (&holed{ctx, r.st, p.name()}).ReadAt(w.raw, 0)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		w.raw = w.raw[:n]
	}
	w.data = w.raw
	if w.same = seal.Hash(w.raw) == p.id; w.same {
		w.why = fault.Corrupt(packLabel(p.id), -1, "it is as it was stored, so parity cannot help; who has the keys may find its records sound")
	} else if err := w.heal(ctx, p); err != nil {
		return nil, err
	}
	good, _ := pack.Scan(w.data, r.id)
	for _, e := range good {
		w.good[e.Off] = e
	}
	return w, nil
}

func (w *wreck) heal(ctx context.Context, p heldPack) error {
	par, err := w.r.parityOf(ctx, p.name())
	if err == nil && (par.Sum != p.id || par.Size > pack.MaxBytes) {
		err = fault.Corrupt(parityPrefix+p.name(), -1, "it is for another pack")
	}
	switch {
	case errors.Is(err, fault.ErrNotFound):
		w.why = fault.Corrupt(packLabel(p.id), -1, "it has no parity")
		return nil
	case errors.Is(err, fault.ErrCorrupt):
		w.why = err
		return nil
	case err != nil:
		return err
	}
	data := make([]byte, par.Size)
	res, err := par.Heal(bytes.NewReader(w.raw), parity.Window(data))
	if err != nil {
		return err
	}
	w.data = data
	w.why = fault.Corrupt(packLabel(p.id), -1, "its index expects other records than it has")
	if seal.Hash(data) != p.id {
		var lost int64
		for _, l := range res.Lost {
			lost += l.Len
		}
		w.why = fault.Corrupt(packLabel(p.id), -1, "%d bytes of it are damaged beyond what its parity heals", lost)
	}
	return nil
}

// record gives the record at off, if its checksums are right and its chunk has
// that key; healed says that it was not so before. One that a check found
// damaged in a pack that is as it was stored was stored wrong, or could not be
// read for a while: only opening it can tell.
func (w *wreck) record(off uint32, k index.Key, doubted bool) (e pack.Entry, rec []byte, healed bool) {
	e, ok := w.good[off]
	if !ok || index.KeyOf(e.ID) != k {
		return e, nil, false
	}
	rec = w.data[e.Off:e.End()]
	healed = e.End() > int64(len(w.raw)) || !bytes.Equal(rec, w.raw[e.Off:e.End()])
	if !doubted || !w.same {
		return e, rec, healed
	}
	if w.r.keys == nil {
		return e, nil, false
	}
	worker := w.r.worker(readLevel)
	defer w.r.idle(readLevel, worker)
	if _, err := worker.Open(nil, bytes.Clone(rec), e.ID); err != nil {
		return e, nil, false
	}
	return e, rec, false
}

// parityOf reads the parity of the object called name, as far as there is any.
func (r *Repository) parityOf(ctx context.Context, name string) (*parity.Parity, error) {
	par := parityPrefix + name
	n, err := r.st.Size(ctx, par)
	if err != nil {
		return nil, err
	}
	if n > object.MaxBytes {
		return nil, fault.Corrupt(par, -1, "%d bytes are too many", n)
	}
	b := make([]byte, n)
	k, err := (&holed{ctx, r.st, par}).ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	p, err := parity.Open(r.id, b[:k])
	if err != nil {
		return nil, &fault.CorruptError{Object: par, Offset: -1, Err: err}
	}
	return p, nil
}

// sectorBytes is what a medium loses at once.
const sectorBytes = 4096

// holed reads an object and gives zeros for the parts of it that the medium no
// longer gives; one that does not exist is empty.
type holed struct {
	ctx  context.Context
	st   blob.Store
	name string
}

func (h *holed) ReadAt(p []byte, off int64) (int, error) {
	n, err := h.st.ReadAt(h.ctx, h.name, p, off)
	switch {
	case err == nil || errors.Is(err, io.EOF):
		return n, err
	case errors.Is(err, fault.ErrNotFound):
		return 0, io.EOF
	case !errors.Is(err, syscall.EIO) && !errors.Is(err, fault.ErrCorrupt):
		return n, err
	case len(p) <= sectorBytes:
		clear(p)
		return len(p), nil
	}
	// Halves that meet where sectors do.
	half := (off+int64(len(p))/2+sectorBytes-1)/sectorBytes*sectorBytes - off
	if half >= int64(len(p)) {
		half = int64(len(p)) / 2
	}
	n, err = h.ReadAt(p[:half], off)
	if err != nil || n < int(half) {
		return n, err
	}
	k, err := h.ReadAt(p[half:], off+half)
	return n + k, err
}
