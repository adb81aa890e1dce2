package index

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

func TestVectors(t *testing.T) {
	in := struct {
		Repo   vectors.Hex
		Packs  []Pack
		Object vectors.Hex
	}{Repo: vectors.Fill(0, 16), Packs: []Pack{
		{ID: [32]byte(vectors.Fill(0x10, 32)), Bytes: 4711, Entries: []Entry{{Key(vectors.Fill(0x40, 16)), 64, 1000}, {Key(vectors.Fill(0x50, 16)), 1156, 5}}},
		{ID: [32]byte(vectors.Fill(0x20, 32)), Bytes: 96, Entries: []Entry{}},
	}}
	in.Object = Encode([16]byte(in.Repo), in.Packs)
	vectors.Load(t, "index", &in)
	if got := Encode([16]byte(in.Repo), in.Packs); !bytes.Equal(got, in.Object) {
		t.Errorf("%x", got)
	}
	n := 0
	err := Decode([16]byte(in.Repo), in.Object, func(p Pack) error {
		if want := in.Packs[n]; p.ID != want.ID || p.Bytes != want.Bytes || len(p.Entries) != len(want.Entries) {
			t.Errorf("%+v", p)
		}
		n++
		return nil
	})
	if err != nil || n != 2 {
		t.Errorf("%d packs, %v", n, err)
	}
	for i := range in.Object {
		bad := bytes.Clone(in.Object)
		bad[i] ^= 4
		if Decode([16]byte(in.Repo), bad, func(Pack) error { return nil }) == nil {
			t.Fatalf("a flip at %d is not found", i)
		}
	}
}

func TestTableAgreesWithAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var table Table
		model := map[Key]Place{}
		key := func() (k Key) { // few shards, colliding starts
			k[0] = byte(rapid.IntRange(0, 1).Draw(t, "shard"))
			k[15] = byte(rapid.IntRange(0, 3).Draw(t, "slot")) << 6
			k[1] = byte(rapid.IntRange(0, 255).Draw(t, "rest"))
			return k
		}
		for range rapid.IntRange(0, 300).Draw(t, "inserts") {
			k, p := key(), Place{rapid.Uint32Range(0, 9).Draw(t, "pack"), rapid.Uint32().Draw(t, "off"), 1}
			replace := rapid.Bool().Draw(t, "replace")
			table.Insert(k, p, func(Place) bool { return replace })
			if _, ok := model[k]; !ok || replace {
				model[k] = p
			}
		}
		if table.Len() != int64(len(model)) {
			t.Fatalf("%d chunks, want %d", table.Len(), len(model))
		}
		for k, want := range model {
			if got, ok := table.Lookup(k); !ok || got != want {
				t.Fatalf("%x is at %v, want %v", k, got, want)
			}
		}
		n := 0
		for k, p := range table.All() {
			if model[k] != p {
				t.Fatalf("All gives %x %v", k, p)
			}
			n++
		}
		if n != len(model) {
			t.Fatalf("All gives %d chunks, want %d", n, len(model))
		}
	})
}

// The table must stay small: docs/design/repository.md promises its size.
func TestBytesForAChunk(t *testing.T) {
	var table Table
	const n = 300_000
	var k Key
	for i := range uint32(n) {
		sum := seal.Hash([]byte{byte(i), byte(i >> 8), byte(i >> 16)})
		k = Key(sum[:16])
		table.Insert(k, Place{}, nil)
	}
	if per := float64(table.Bytes()) / n; per < 32 || per > 44 {
		t.Errorf("%.1f bytes for a chunk", per)
	}
}

// Index objects come from stores that nobody trusts.
func FuzzDecode(f *testing.F) {
	repo := [16]byte{1}
	b := Encode(repo, []Pack{{Bytes: 99, Entries: []Entry{{Key{1}, 64, 9}}}})
	f.Add(b, false)
	f.Add(b[:len(b)-sumBytes], true)
	f.Fuzz(func(t *testing.T, data []byte, mend bool) {
		if mend {
			sum := seal.Hash(data)
			data = append(bytes.Clone(data), sum[:]...)
		}
		stop := errors.New("enough")
		n := 0
		Decode(repo, data, func(p Pack) error {
			if n += len(p.Entries); n*entryBytes > len(data) {
				t.Error("more entries than bytes")
			}
			if n > 1000 {
				return stop
			}
			return nil
		})
	})
}
