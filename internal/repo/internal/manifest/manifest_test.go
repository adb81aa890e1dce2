package manifest

import (
	"bytes"
	"reflect"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
	"github.com/backstay/backstay/internal/repo/internal/zstd"
)

type vector struct {
	Repo, Salt, MetaKey   vectors.Hex
	ChunkBytes, DiskBytes int64
	Base                  vectors.Hex
	Pages                 []vectorPage
	ID, File              vectors.Hex
}

type vectorPage struct {
	No           int64
	List         []vectors.Hex // ids, as the page lists them
	Positions    []uint16
	Bases        []uint16    `json:",omitempty"` // of the overlays among them
	Frame, Nonce vectors.Hex // Positions and Bases as a zstd frame
}

func (v *vector) build(t testing.TB) (ID, []byte) {
	meta := seal.Key(v.MetaKey)
	h := Header{Repo: [16]byte(v.Repo), Salt: [16]byte(v.Salt), ChunkBytes: v.ChunkBytes, DiskBytes: v.DiskBytes, Base: ID(v.Base)}
	w, err := newWriter(h, &meta)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range v.Pages {
		var ids []chunk.ID
		for _, id := range p.List {
			ids = append(ids, chunk.ID(id))
		}
		if err := w.add(p.No, w.coder.seal(p.No, ids, p.Frame, [12]byte(p.Nonce))); err != nil {
			t.Fatal(err)
		}
	}
	id, sp, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	defer sp.Close()
	file := make([]byte, sp.Size())
	if _, err := sp.ReadAt(file, 0); err != nil {
		t.Fatal(err)
	}
	return id, file
}

func frame(t testing.TB, positions []uint16) vectors.Hex {
	var plain []byte
	for _, p := range positions {
		plain = le.AppendUint16(plain, p)
	}
	f, err := zstd.New(1).Compress(nil, plain)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(f)
}

func sample(t testing.TB) []*vector {
	base := &vector{Repo: vectors.Fill(0, 16), Salt: vectors.Fill(0x20, 16), MetaKey: vectors.Fill(0x40, 32),
		ChunkBytes: chunk.MinBytes, DiskBytes: (2*Positions+3)*chunk.MinBytes - 5, Base: make([]byte, 32)}
	first := make([]uint16, Positions)
	first[0], first[2], first[1023] = 2, 1, 2
	base.Pages = []vectorPage{
		{0, []vectors.Hex{vectors.Fill(0x10, 32), vectors.Fill(0x50, 32)}, first, nil, frame(t, first), vectors.Fill(0x90, 12)},
		{2, []vectors.Hex{vectors.Fill(0x30, 32)}, []uint16{0, 1, 0}, nil, frame(t, []uint16{0, 1, 0}), vectors.Fill(0xa0, 12)},
	}
	id, _ := base.build(t)
	diff := &vector{Repo: base.Repo, Salt: vectors.Fill(0x21, 16), MetaKey: base.MetaKey, ChunkBytes: base.ChunkBytes, DiskBytes: base.DiskBytes, Base: id[:]}
	diff.Pages = []vectorPage{{2, nil, []uint16{0, 0, 0}, nil, frame(t, []uint16{0, 0, 0}), vectors.Fill(0xb0, 12)}}
	// The first id is the base of the second, a record of its own and the base
	// of the third.
	over := &vector{Repo: base.Repo, Salt: vectors.Fill(0x22, 16), MetaKey: base.MetaKey, ChunkBytes: base.ChunkBytes, DiskBytes: base.DiskBytes, Base: id[:]}
	list := []vectors.Hex{vectors.Fill(0x30, 32), vectors.Fill(0x50, 32), vectors.Fill(0x70, 32)}
	over.Pages = []vectorPage{{2, list, []uint16{2, 1, 3}, []uint16{1, 0, 1}, frame(t, []uint16{2, 1, 3, 1, 0, 1}), vectors.Fill(0xc0, 12)}}
	return []*vector{base, diff, over}
}

func TestVectors(t *testing.T) {
	vs := sample(t)
	for _, v := range vs {
		id, file := v.build(t)
		v.ID, v.File = id[:], file
	}
	vectors.Load(t, "manifest", &vs)
	for _, v := range vs {
		id, file := v.build(t)
		if !bytes.Equal(id[:], v.ID) || !bytes.Equal(file, v.File) {
			t.Fatalf("manifest %x is %x", id, file)
		}
		meta := seal.Key(v.MetaKey)
		f, err := Open(bytes.NewReader(v.File), int64(len(v.File)), id, [16]byte(v.Repo), &meta)
		if err != nil {
			t.Fatal(err)
		}
		if f.Written() != len(v.Pages) || f.DiskBytes != v.DiskBytes || f.Differential() != (ID(v.Base) != ID{}) {
			t.Errorf("%+v", f.Header)
		}
		for i, want := range v.Pages {
			p, err := f.Page(i)
			if err != nil || f.PageNo(i) != want.No {
				t.Fatal(err)
			}
			for k, at := range want.Positions {
				var record, on chunk.ID
				if at > 0 {
					record = chunk.ID(want.List[at-1])
				}
				if want.Bases != nil && want.Bases[k] > 0 {
					on = chunk.ID(want.List[want.Bases[k]-1])
					record = meta.Overlays().ID(record, on)
				}
				if p.Data[k] != (at > 0) || at > 0 && (p.IDs[k] != record || p.Base(k) != on) {
					t.Errorf("page %d position %d is wrong", want.No, k)
				}
			}
		}
	}
}

func TestEveryFlippedBitOfAFileIsFound(t *testing.T) {
	v := sample(t)[0]
	id, file := v.build(t)
	for i := range file {
		bad := bytes.Clone(file)
		bad[i] ^= 1 << (i % 8)
		f, err := Open(bytes.NewReader(bad), int64(len(bad)), id, [16]byte(v.Repo), nil)
		for k := 0; err == nil && k < f.Written(); k++ {
			_, err = f.Needs(k)
		}
		if err == nil {
			t.Fatalf("a flip at %d is not found", i)
		}
	}
	for n := range file {
		if _, err := Open(bytes.NewReader(file[:n]), int64(n), id, [16]byte(v.Repo), nil); err == nil {
			t.Fatalf("cut at %d is not found", n)
		}
	}
}

func TestASpoolMovesToAFile(t *testing.T) {
	s := NewSpool()
	s.limit = 100
	var want []byte
	for i := range 50 {
		part := bytes.Repeat([]byte{byte(i)}, i)
		want = append(want, part...)
		if _, err := s.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, len(want))
	if _, err := s.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) || s.Size() != int64(len(want)) || s.file == nil {
		t.Errorf("%v", err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

func TestADraftKeepsPagesThatDoNotFit(t *testing.T) {
	d := NewDraft()
	defer d.Close()
	d.limit = 4
	for round := range 3 {
		for no := range int64(40) {
			if no%3 == 0 && round == 0 {
				for i := range int64(Positions) {
					d.SetHole(no*Positions + i)
				}
			}
			var base chunk.ID
			if no%2 == 0 && round == 1 {
				base = chunk.ID{7, byte(no)}
			}
			if err := d.Set(no*Positions+int64(round), chunk.ID{byte(no), byte(round)}, base); no%3 != 0 && err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := len(d.Pages()); n != 40 {
		t.Errorf("%d pages", n)
	}
	for no := range int64(40) {
		p, err := d.Page(no)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			want := Data
			if i == 3 {
				if want = Nothing; no%3 == 0 {
					want = Hole
				}
			}
			if p.Said[i] != want || want == Data && p.IDs[i] != (chunk.ID{byte(no), byte(i)}) {
				t.Fatalf("page %d position %d: %d %v", no, i, p.Said[i], p.IDs[i])
			}
			if p.Base(i) != (chunk.ID{}) != (no%2 == 0 && i == 1) || p.Base(i) != (chunk.ID{}) && p.Base(i) != (chunk.ID{7, byte(no)}) {
				t.Fatalf("page %d position %d: base %v", no, i, p.Base(i))
			}
		}
	}
	if s, err := d.Said(99 * Positions); s != Nothing || err != nil {
		t.Errorf("%d, %v", s, err)
	}
}

// What a page says comes back, and it lists the bases of overlays among what it
// needs.
func TestPagesWithOverlays(t *testing.T) {
	meta := seal.Key(vectors.Fill(0x40, 32))
	h := Header{ChunkBytes: chunk.MinBytes, DiskBytes: Positions * chunk.MinBytes}
	for _, overlays := range []int{0, 1, Positions} {
		p := Page{IDs: make([]chunk.ID, Positions), Data: make([]bool, Positions)}
		for i := range Positions {
			var base chunk.ID
			if i < overlays {
				base = chunk.ID{2, byte(i), byte(i >> 8)}
			}
			p.Set(i, chunk.ID{1, byte(i), byte(i >> 8)}, base)
		}
		w, err := NewWriter(h, &meta)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Page(0, p); err != nil {
			t.Fatal(err)
		}
		id, sp, err := w.Finish()
		if err != nil {
			t.Fatal(err)
		}
		defer sp.Close()
		f, err := Open(sp, sp.Size(), id, h.Repo, &meta)
		if err != nil {
			t.Fatal(err)
		}
		got, err := f.Page(0)
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%d overlays: %v", overlays, err)
		}
		needs, err := f.Needs(0)
		if err != nil || len(needs) != Positions+overlays {
			t.Fatalf("%d overlays: %d ids, %v", overlays, len(needs), err)
		}
		for i := range overlays {
			for _, id := range []chunk.ID{p.Bases[i], meta.Overlays().ID(p.IDs[i], p.Bases[i])} {
				if !slices.Contains(needs, id) {
					t.Fatalf("%d overlays: the list lacks what position %d needs", overlays, i)
				}
			}
		}
	}
}

// Manifests come from stores that nobody trusts. Whatever the bytes say, Open
// must not panic, loop, or allocate more than the file could justify.
func FuzzOpen(f *testing.F) {
	for _, v := range sample(f) {
		_, file := v.build(f)
		f.Add(file)
	}
	meta := seal.Key(vectors.Fill(0x40, 32))
	repo := [16]byte(vectors.Fill(0, 16))
	f.Fuzz(func(t *testing.T, data []byte) {
		// Give it the id that it would have, to get behind that check.
		var id ID
		if n, err := readFooter(bytes.NewReader(data), max(int64(len(data)), footerBytes)); err == nil && n < 1000 {
			if at := int64(len(data)) - footerBytes - n*entryBytes; at >= headerBytes {
				id = ID(seal.Hash(data[:headerBytes], data[at:at+n*entryBytes]))
			}
		}
		m, err := Open(bytes.NewReader(data), int64(len(data)), id, repo, &meta)
		if err != nil {
			return
		}
		for i := range m.Written() {
			m.Needs(i)
			m.Page(i)
		}
	})
}
