package repo

import (
	"testing"

	"github.com/backstay/backstay/internal/repo/internal/index"
)

// Each chunk is learned in the pack that holds it, also where one index object
// names several packs.
func TestALookLearnsWhereChunksLie(t *testing.T) {
	st, writer := newRepo(t)
	reader := mustOpen(t, st)
	h, err := reader.held(bg)
	if err != nil {
		t.Fatal(err)
	}
	const packs = 3
	content := noise(91, packs*testChunk)
	s, err := writer.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(bg)
	w, err := s.Disk(bg, int64(len(content)), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(packs) {
		if _, err := w.Put(bg, i, cut(content, i)); err != nil {
			t.Fatal(err)
		}
		if err := s.flush(bg); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.writeIndex(bg); err != nil {
		t.Fatal(err)
	}
	everyoneDies() // as if the writer were another process
	if news, err := reader.lookForNews(bg, h); !news || err != nil {
		t.Fatal(news, err)
	}
	stored := writer.current()
	kit := writer.worker(1)
	defer writer.idle(1, kit)
	for i := range int64(packs) {
		k := index.KeyOf(kit.ID(cut(content, i)))
		want, ok := stored.table.Fresh(k)
		if !ok {
			t.Fatalf("chunk %d is not stored", i)
		}
		got, ok := h.table.Fresh(k)
		if !ok || h.packs[got.Pack].id != stored.packs[want.Pack].id || got.Off != want.Off {
			t.Errorf("chunk %d lies in pack %x, the look found %v in %x", i, stored.packs[want.Pack].id[:4], ok, h.packs[got.Pack].id[:4])
		}
	}
}
