package pack

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

type record struct {
	Encoding           uint8
	Chunk, Body, Nonce vectors.Hex // Body is what is sealed
	Base               vectors.Hex `json:",omitempty"` // the chunk id of an overlay's
}

type vector struct {
	Repo, Session, IDKey, DataKey vectors.Hex
	MetaKey                       vectors.Hex `json:",omitempty"`
	Records                       []record
	ID, Pack                      vectors.Hex
}

func (v *vector) worker() *Worker {
	k := &seal.Keys{ID: seal.Key(v.IDKey), Data: seal.Key(v.DataKey)}
	copy(k.Meta[:], v.MetaKey)
	return NewWorker([16]byte(v.Repo), k, 1)
}

// id is that of r's record.
func (v *vector) id(w *Worker, r record) chunk.ID {
	if r.Base == nil {
		return w.ID(r.Chunk)
	}
	meta := seal.Key(v.MetaKey)
	return meta.Overlays().ID(w.ID(r.Chunk), chunk.ID(r.Base))
}

func (v *vector) build(t testing.TB) (sum [32]byte, file []byte) {
	w := v.worker()
	b := NewBuilder(NewMemory(4<<20), [16]byte(v.Repo), [16]byte(v.Session))
	for _, r := range v.Records {
		e := Entry{ID: v.id(w, r), PLen: uint32(len(r.Chunk)), Encoding: r.Encoding}
		rec := w.seal(&e, r.Body, [12]byte(r.Nonce))
		if _, err := b.Append(e, rec); err != nil {
			t.Fatal(err)
		}
	}
	_, sum = b.Finish()
	file = make([]byte, b.Bytes())
	if _, err := b.ReadAt(file, 0); err != nil {
		t.Fatal(err)
	}
	b.Free()
	return sum, file
}

// load makes v the vector of that name, which must still be built as it is, and
// gives the entries of its pack.
func (v *vector) load(t testing.TB, name string) []Entry {
	t.Helper()
	sum, file := v.build(t)
	v.ID, v.Pack = sum[:], file
	vectors.Load(t, name, v)
	sum, file = v.build(t)
	if !bytes.Equal(sum[:], v.ID) || !bytes.Equal(file, v.Pack) {
		t.Errorf("pack %x is %x", sum, file)
	}
	entries, err := ReadEntries(bytes.NewReader(v.Pack), int64(len(v.Pack)))
	if err != nil || len(entries) != len(v.Records) {
		t.Fatalf("%v, %v", entries, err)
	}
	return entries
}

func sample(t testing.TB) *vector {
	v := &vector{Repo: vectors.Fill(0, 16), Session: vectors.Fill(0x10, 16), IDKey: vectors.Fill(0x40, 32), DataKey: vectors.Fill(0x60, 32)}
	w := v.worker()
	text := bytes.Repeat([]byte("again and "), 30)
	frame, err := w.codec.Compress(nil, text)
	if err != nil {
		t.Fatal(err)
	}
	v.Records = []record{
		{Raw, vectors.Hex("a short chunk"), vectors.Hex("a short chunk"), vectors.Fill(0x90, 12), nil},
		{Zstd, text, bytes.Clone(frame), vectors.Fill(0xa0, 12), nil},
	}
	return v
}

func TestVectors(t *testing.T) {
	v := sample(t)
	entries := v.load(t, "pack")
	w := v.worker()
	for i, e := range entries {
		plain, err := w.Open(nil, bytes.Clone(v.Pack[e.Off:e.End()]), e.ID)
		if err != nil || !bytes.Equal(plain, v.Records[i].Chunk) {
			t.Errorf("record %d: %q, %v", i, plain, err)
		}
	}
}

func TestSealChoosesTheEncoding(t *testing.T) {
	w := sample(t).worker()
	noise := make([]byte, 5000)
	for i, x := 0, uint32(1); i < len(noise); i++ {
		x = x*1664525 + 1013904223
		noise[i] = byte(x >> 24)
	}
	for _, c := range []struct {
		name     string
		plain    []byte
		compress bool
		want     uint8
	}{{"text", bytes.Repeat([]byte("abc"), 1000), true, Zstd}, {"noise", noise, true, Raw}, {"not asked to", bytes.Repeat([]byte("abc"), 1000), false, Raw}, {"one byte", []byte{1}, true, Raw}} {
		id := w.ID(c.plain)
		e, rec, err := w.Seal(id, c.plain, c.compress)
		if err != nil || e.Encoding != c.want || int64(len(rec)) != e.Bytes() {
			t.Errorf("%s: %+v, %d bytes, %v", c.name, e, len(rec), err)
		}
		got, err := w.Open(nil, bytes.Clone(rec), id)
		if err != nil || !bytes.Equal(got, c.plain) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// Whatever is left of a pack, Scan finds all records that are whole.
func TestScanFindsWhatIsLeft(t *testing.T) {
	v := sample(t)
	for range 4 {
		v.Records = append(v.Records, v.Records[0])
	}
	_, file := v.build(t)
	entries, err := ReadEntries(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	for n := range file {
		for name, bad := range map[string][]byte{
			"cut":     file[:n],
			"flipped": append(append(bytes.Clone(file[:n]), file[n]^0x10), file[n+1:]...),
		} {
			good, damage := Scan(bad, [16]byte(v.Repo))
			if len(damage) == 0 {
				t.Fatalf("%s at %d: no damage", name, n)
			}
			for _, e := range entries {
				whole := name == "cut" && e.End() <= int64(n) || name == "flipped" && (int64(n) < int64(e.Off) || int64(n) >= e.End())
				found := false
				for _, g := range good {
					found = found || g == e
				}
				if whole != found {
					t.Fatalf("%s at %d: record at %d found: %v", name, n, e.Off, found)
				}
			}
		}
	}
}

func TestMemoryIsBounded(t *testing.T) {
	m := NewMemory(3 * segBytes)
	a := NewBuilder(m, [16]byte{}, [16]byte{})
	b := NewBuilder(m, [16]byte{}, [16]byte{})
	e := Entry{PLen: segBytes, CLen: segBytes - 200}
	rec := make([]byte, e.Bytes())
	if _, err := a.Append(e, rec); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Append(e, rec); err != nil {
		t.Fatal(err)
	}
	back := m.Returned()
	if _, err := b.Append(e, rec); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Append(e, rec); !errors.Is(err, ErrMemory) || b.Len() != 2 {
		t.Errorf("%v, %d records", err, b.Len())
	}
	a.Free()
	<-back
	if _, err := b.Append(e, rec); err != nil {
		t.Error(err)
	}
}

func TestViewIsWhatReadAtGives(t *testing.T) {
	b := NewBuilder(NewMemory(4*segBytes), [16]byte{}, [16]byte{})
	e := Entry{PLen: segBytes, CLen: segBytes - 200}
	for i := range byte(2) {
		if _, err := b.Append(e, bytes.Repeat([]byte{i + 1}, int(e.Bytes()))); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		off, n int64
		lies   bool
	}{
		{"the header", 0, 64, true}, {"up to the end of a segment", segBytes - 9, 9, true}, {"into the next", segBytes - 9, 10, false},
		{"the last byte", b.Bytes() - 1, 1, true}, {"one byte more", b.Bytes() - 1, 2, false},
	} {
		want := make([]byte, c.n)
		b.ReadAt(want, c.off)
		if got := b.View(c.off, c.n); (got != nil) != c.lies || c.lies && !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes", c.name, len(got))
		}
	}
	b.Free()
}

// Packs come from stores that nobody trusts. Whatever the bytes say, reading
// must not panic, loop, or allocate more than the pack could justify.
func FuzzPack(f *testing.F) {
	v := sample(f)
	_, file := v.build(f)
	f.Add(file)
	f.Add(file[:100])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		if entries, err := ReadEntries(bytes.NewReader(data), int64(len(data))); err == nil {
			for _, e := range entries {
				if e.End() > int64(len(data)) {
					t.Errorf("entry %+v in %d bytes", e, len(data))
				}
			}
		}
		good, _ := Scan(data, [16]byte(v.Repo))
		w := v.worker()
		for _, e := range good {
			w.Open(nil, bytes.Clone(data[e.Off:e.End()]), e.ID)
		}
	})
}

// A record that opens is the chunk that its id names.
func FuzzRecord(f *testing.F) {
	v := sample(f)
	_, file := v.build(f)
	entries, _ := ReadEntries(bytes.NewReader(file), int64(len(file)))
	for _, e := range entries {
		f.Add(file[e.Off:e.End()], uint8(1), uint32(13))
	}
	f.Fuzz(func(t *testing.T, data []byte, encoding uint8, plen uint32) {
		w := v.worker()
		var id chunk.ID
		if e, _, err := ParseRecordHeader(data); err == nil {
			id = e.ID
		}
		if plain, err := w.Open(nil, bytes.Clone(data), id); err == nil && w.ID(plain) != id {
			t.Error("a chunk does not match its id")
		}
		// Sealed by somebody with the keys, but with a hostile body.
		if plen%4096 == 0 || len(data) == 0 {
			return
		}
		e := Entry{ID: id, PLen: plen % 4096, Encoding: encoding % 4}
		rec := w.seal(&e, data, [12]byte{})
		if plain, err := w.Open(nil, bytes.Clone(rec), id); err == nil && w.ID(plain) != id {
			t.Error("a chunk does not match its id")
		} else if want := map[uint8]error{Overlay: ErrOverlay, 3: fault.ErrUnsupported}[e.Encoding]; want != nil && e.check() == nil && !errors.Is(err, want) {
			t.Errorf("encoding %d: %v", e.Encoding, err)
		}
	})
}

var _ io.ReaderAt = (*Builder)(nil)

// What is kept of a pack is what a pack of that alone would be, wherever records
// cross from one piece of memory to the next, and the memory of the rest is free.
func TestKeep(t *testing.T) {
	for name, kept := range map[string][]byte{
		"all": {0, 1, 2, 3, 4, 5, 6}, "none": {}, "the first": {0}, "the last": {6}, "every other": {1, 3, 5}, "the middle": {3, 4}, "all but the first": {1, 2, 3, 4, 5, 6},
	} {
		t.Run(name, func(t *testing.T) {
			m := NewMemory(8 * segBytes)
			whole := NewBuilder(m, [16]byte{1}, [16]byte{2})
			alone := NewBuilder(NewMemory(8*segBytes), [16]byte{1}, [16]byte{2})
			for i := range byte(7) {
				n := 300_000 + 100_000*uint32(i)
				e := Entry{ID: [32]byte{i}, PLen: n, CLen: n}
				rec := bytes.Repeat([]byte{i + 1, i, 0}, int(e.Bytes()))[:e.Bytes()]
				if _, err := whole.Append(e, rec); err != nil {
					t.Fatal(err)
				}
				if bytes.IndexByte(kept, i) >= 0 {
					if _, err := alone.Append(e, rec); err != nil {
						t.Fatal(err)
					}
				}
			}
			whole.Keep(func(e Entry) bool { return bytes.IndexByte(kept, e.ID[0]) >= 0 })
			if whole.Len() != len(kept) || whole.Bytes() != alone.Bytes() || m.lent != len(alone.segs) {
				t.Fatalf("%d records, %d bytes in %d pieces; want %d, %d in %d", whole.Len(), whole.Bytes(), m.lent, len(kept), alone.Bytes(), len(alone.segs))
			}
			if len(kept) == 0 {
				return
			}
			_, got := whole.Finish()
			if _, want := alone.Finish(); got != want {
				t.Error("they are different packs")
			}
		})
	}
}
