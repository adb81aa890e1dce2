package pack

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

// overlaid is a pack of a chunk of a little more than two blocks, of an overlay
// on it of which one block is a difference and the other is not, and of one
// that has all of its chunk.
func overlaid(t testing.TB) *vector {
	v := sample(t)
	v.MetaKey = vectors.Fill(0x80, 32)
	w := v.worker()
	base := noise(1, 5*blockBytes+100)
	id := w.ID(base)
	changed := bytes.Clone(base)
	copy(changed[blockBytes+7:], "a few bytes of a block")
	copy(changed[5*blockBytes:], bytes.Repeat([]byte("all "), 25))
	v.Records = []record{{Raw, base, base, vectors.Fill(0x90, 12), nil}}
	for i, seal := range []func() error{
		func() error {
			_, _, ok, err := w.SealOverlay(w.ID(changed), id, changed, base, true)
			if !ok {
				err = errors.New("no overlay")
			}
			return err
		},
		func() error { _, _, err := w.SealWhole(w.ID(changed), id, changed, true); return err },
	} {
		if err := seal(); err != nil {
			t.Fatal(err)
		}
		v.Records = append(v.Records, record{Overlay, changed, bytes.Clone(w.body), vectors.Fill(0xa0+byte(16*i), 12), id[:]})
	}
	return v
}

// noise is n bytes that do not compress and depend on seed alone.
func noise(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func TestOverlayVectors(t *testing.T) {
	v := overlaid(t)
	entries := v.load(t, "overlay")
	w := v.worker()
	for i, e := range entries[1:] {
		rec := bytes.Clone(v.Pack[e.Off:e.End()])
		if _, err := w.Open(nil, bytes.Clone(rec), e.ID); !errors.Is(err, ErrOverlay) {
			t.Errorf("record %d opens without its base: %v", i+1, err)
		}
		p, err := w.OpenOverlay(rec, e.ID)
		if err != nil || !bytes.Equal(p.Base[:], v.Records[i+1].Base) || p.Whole() != (i == 1) {
			t.Fatalf("record %d: %+v, %v", i+1, p, err)
		}
		plain := bytes.Clone(v.Records[0].Chunk)
		if p.Whole() {
			clear(plain)
		}
		if err := w.Apply(&p, plain); err != nil || !bytes.Equal(plain, v.Records[i+1].Chunk) {
			t.Errorf("record %d: %v", i+1, err)
		}
	}
}

func TestOverlaysOfEverySize(t *testing.T) {
	w := overlaid(t).worker()
	for _, c := range []struct {
		name    string
		bytes   int
		changed []int // offsets
		ok      bool
	}{
		{"nothing differs", 8 * blockBytes, nil, false},
		{"one byte of one block", blockBytes, []int{4095}, false},
		{"one of two blocks", 2 * blockBytes, []int{4096}, true},
		{"half of the blocks", 4 * blockBytes, []int{0, 5000}, true},
		{"one more than half", 4 * blockBytes, []int{0, 5000, 9000}, false},
		{"the short last block", 8*blockBytes + 1, []int{8 * blockBytes}, true},
		{"the last block of nine, in a second byte of the bitmap", 9 * blockBytes, []int{8*blockBytes + 77}, true},
		{"half of the longest chunk", chunk.MaxBytes, []int{0, 1 << 20, chunk.MaxBytes - 1}, true},
	} {
		for _, compress := range []bool{true, false} {
			base := noise(3, c.bytes)
			plain := bytes.Clone(base)
			for _, at := range c.changed {
				plain[at] ^= 0x55
			}
			id, on := w.ID(plain), w.ID(base)
			e, rec, ok, err := w.SealOverlay(id, on, plain, base, compress)
			if err != nil || ok != c.ok {
				t.Fatalf("%s: %v, %v", c.name, ok, err)
			}
			if !ok {
				if e, rec, err = w.SealWhole(id, on, plain, compress); err != nil {
					t.Fatal(err)
				}
				clear(base)
			}
			if e.check() != nil || int64(len(rec)) != e.Bytes() {
				t.Fatalf("%s: %+v", c.name, e)
			}
			p, err := w.OpenOverlay(bytes.Clone(rec), e.ID)
			if err != nil || p.Whole() == ok {
				t.Fatalf("%s: whole %v, %v", c.name, p.Whole(), err)
			}
			if err := w.Apply(&p, base); err != nil || !bytes.Equal(base, plain) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
	if _, _, ok, _ := w.SealOverlay(chunk.ID{}, chunk.ID{}, make([]byte, 8192), make([]byte, 4096), true); ok {
		t.Error("an overlay on a base of another length")
	}
}

// A block of which few bytes changed takes few bytes, whatever it holds.
func TestSmallChangesOfBlocksAreSmall(t *testing.T) {
	w := overlaid(t).worker()
	base := noise(9, 16*blockBytes)
	plain := bytes.Clone(base)
	for i := range 8 {
		copy(plain[i*blockBytes+500:], "a row of a table")
	}
	e, _, ok, err := w.SealOverlay(w.ID(plain), w.ID(base), plain, base, true)
	if err != nil || !ok || e.CLen > 1000 {
		t.Errorf("%d bytes, %v, %v", e.CLen, ok, err)
	}
}

// With the wrong base there is an error, never another chunk.
func TestTheWrongBaseIsFound(t *testing.T) {
	v := overlaid(t)
	w := v.worker()
	base, plain := []byte(v.Records[0].Chunk), v.Records[1].Chunk
	_, rec, _, err := w.SealOverlay(w.ID(plain), w.ID(base), plain, base, true)
	if err != nil {
		t.Fatal(err)
	}
	e, _, err := ParseRecordHeader(rec)
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.OpenOverlay(rec, e.ID)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Clone(base)
	other[0] ^= 1
	if w.Apply(&p, other) == nil {
		t.Error("a changed base is not found")
	}
	if w.Apply(&p, base[:len(base)-1]) == nil {
		t.Error("a shorter base is not found")
	}
}

// Sealed by somebody with the keys, but with a hostile body: no panic, and what
// comes out is the chunk that the record's id names.
func FuzzOverlay(f *testing.F) {
	v := overlaid(f)
	for _, r := range v.Records[1:] {
		f.Add([]byte(r.Body), uint32(len(r.Chunk)))
	}
	f.Add([]byte{}, uint32(1))
	base := []byte(v.Records[0].Chunk)
	w := v.worker()
	f.Fuzz(func(t *testing.T, body []byte, plen uint32) {
		plen = plen%uint32(len(base)) + 1
		e := Entry{ID: v.id(w, v.Records[1]), PLen: plen, Encoding: Overlay}
		rec := w.seal(&e, body, [12]byte{})
		p, err := w.OpenOverlay(rec, e.ID)
		if err != nil {
			return
		}
		plain := bytes.Clone(base[:plen])
		if w.Apply(&p, plain) == nil && v.id(w, record{Chunk: plain, Base: p.Base[:]}) != e.ID {
			t.Error("a chunk does not match its record's id")
		}
	})
}
