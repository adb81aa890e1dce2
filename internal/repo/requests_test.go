package repo

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// farAway is a store that is read as object storage is, where every call takes
// a round trip. It knows how many bytes were on their way at once.
type farAway struct {
	blob.Store
	trip          time.Duration
	flying, most  atomic.Int64
	reads, atOnce atomic.Int64
}

func (s *farAway) ReadShape() blob.ReadShape { return blob.Remote }

func (s *farAway) ReadAt(ctx context.Context, name string, p []byte, off int64) (int, error) {
	for n, most := s.flying.Add(int64(len(p))), s.most.Load(); n > most && !s.most.CompareAndSwap(most, n); most = s.most.Load() {
	}
	for n, most := s.reads.Add(1), s.atOnce.Load(); n > most && !s.atOnce.CompareAndSwap(most, n); most = s.atOnce.Load() {
	}
	defer s.flying.Add(-int64(len(p)))
	defer s.reads.Add(-1)
	time.Sleep(s.trip)
	return s.Store.ReadAt(ctx, name, p, off)
}

// The figures that object storage is paid by: at most 20 PUTs for a GB stored
// and 80 GETs for a GB restored of what does not compress, in both orders, and
// neither LIST nor HEAD for a chunk.
func TestRequestsPerGB(t *testing.T) {
	realBeats(t)
	noLooks(t)
	size := int64(1500 << 20)
	if testing.Short() {
		size = 320 << 20
	}
	const cut = chunk.DefaultBytes
	var mu sync.Mutex
	puts := map[string]int{} // by the first part of the name
	counted, n := blobtest.Count(blobtest.Faulty(mem.New(), func(c blobtest.Call) error {
		if kind, _, _ := strings.Cut(c.Name, "/"); c.Op == blobtest.OpPut || c.Op == blobtest.OpCreate {
			mu.Lock()
			puts[kind]++
			mu.Unlock()
		}
		return nil
	}))
	st := &farAway{Store: counted}
	if err := Init(bg, st, InitOptions{Passphrase: password, KDF: cheap}); err != nil {
		t.Fatal(err)
	}
	content := func(i int64) []byte { return noise(uint64(i)+1, cut) }
	type calls struct{ put, get, head, list int }
	since := func(was calls) calls {
		return calls{n.Calls(blobtest.OpPut) + n.Calls(blobtest.OpCreate) - was.put, n.Calls(blobtest.OpReadAt) - was.get,
			n.Calls(blobtest.OpSize) - was.head, n.Calls(blobtest.OpList) - was.list}
	}

	was := since(calls{})
	mu.Lock()
	clear(puts)
	mu.Unlock()
	r := mustOpen(t, st)
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(bg, size, "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range size / cut {
		if _, err := w.Put(bg, i, content(i)); err != nil {
			t.Fatal(err)
		}
	}
	m, err := w.Finish(bg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(bg, newPoint("web01", m, size)); err != nil {
		t.Fatal(err)
	}
	stored, _ := n.Bytes()
	did := since(was)
	gb := float64(stored) / 1e9
	mu.Lock()
	t.Logf("backup: %.1f PUTs/GB, %.1f GETs/GB, %d HEADs, %d LISTs; PUTs by kind %v", float64(did.put)/gb, float64(did.get)/gb, did.head, did.list, puts)
	// A beat is paid for time, not for bytes, and a test machine may be slow.
	did.put -= puts["beat"]
	mu.Unlock()
	// What a run costs however small it is weighs more in a short test.
	fixed := 0.0
	if testing.Short() {
		fixed = 8
	}
	if float64(did.put) > 20*gb+fixed {
		t.Errorf("%d PUTs for %.2f GB", did.put, gb)
	}
	if did.head > 8 || did.list > 24 {
		t.Errorf("a backup made %d HEADs and %d LISTs", did.head, did.list)
	}

	for _, o := range []FetchOptions{{}, {Ordered: true}} {
		was := since(calls{})
		r := mustOpen(t, st) // which knows nothing yet
		points, err := r.Points(bg)
		if err != nil || len(points) != 1 {
			t.Fatal(points, err)
		}
		d, err := r.OpenDisk(bg, points[0].Disks[0].Manifest)
		if err != nil {
			t.Fatal(err)
		}
		var got atomic.Int64
		err = d.Fetch(bg, extent.Extent{Len: size}, o, func(off int64, data []byte) error {
			if off%(16*cut) == 0 && !bytes.Equal(data, content(off/cut)) {
				return fmt.Errorf("chunk at %d differs", off)
			}
			got.Add(int64(len(data)))
			return nil
		})
		if err != nil || got.Load() != size {
			t.Fatalf("ordered %v: restored %d of %d bytes: %v", o.Ordered, got.Load(), size, err)
		}
		did := since(was)
		gb := float64(size) / 1e9
		t.Logf("restore, ordered %v: %.1f GETs/GB, %d HEADs, %d LISTs, %d MiB in flight", o.Ordered, float64(did.get)/gb, did.head, did.list, st.most.Load()>>20)
		if float64(did.get) > 80*gb+fixed {
			t.Errorf("ordered %v: %d GETs for %.2f GB", o.Ordered, did.get, gb)
		}
		if did.head > 8 || did.list > 24 {
			t.Errorf("ordered %v: a restore made %d HEADs and %d LISTs", o.Ordered, did.head, did.list)
		}
		if m := blob.Remote.Memory; st.most.Load() > m {
			t.Errorf("ordered %v: %d bytes were in flight, want at most %d", o.Ordered, st.most.Load(), m)
		}
	}
}

// Chunks that lie far apart cost a request each; then many are under way at
// once, however few processors there are.
func TestScatteredChunksAreReadManyAtOnce(t *testing.T) {
	st := &farAway{Store: mem.New()}
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, st)
	content := noise(5, 128<<20)
	p, err := backup(bg, r, "web01", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	const step = 20                  // chunks: more than what is rather read than skipped
	st.trip = 400 * time.Millisecond // a busy machine needs a while to begin them all
	d, err := r.OpenDisk(bg, point.ManifestID(p.Disks[0].Manifest))
	if err != nil {
		t.Fatal(err)
	}
	st.atOnce.Store(0)
	var got atomic.Int64
	err = d.Fetch(bg, extent.Extent{Len: d.Size()}, FetchOptions{Skip: func(i int64, _ chunk.ID) bool { return i%step != 0 }}, func(off int64, data []byte) error {
		if !bytes.Equal(data, cut(content, off/testChunk)) {
			return fmt.Errorf("chunk at %d differs", off)
		}
		got.Add(1)
		return nil
	})
	if want := (d.Chunks() + step - 1) / step; err != nil || got.Load() != want {
		t.Fatalf("got %d of %d chunks: %v", got.Load(), want, err)
	}
	if got := st.atOnce.Load(); got < 32 || got > int64(blob.Remote.InFlight) {
		t.Errorf("%d reads were under way at once", got)
	}
}

// Whoever waits for a buffer gets one when there is room, or hears that nobody
// wants it any more.
func TestBuffersKeepToTheirBytes(t *testing.T) {
	b := newBuffers(4 * bufferStep)
	one, err := b.get(bg, bufferStep)
	if err != nil {
		t.Fatal(err)
	}
	two, err := b.get(bg, 3*bufferStep)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	if _, err := b.get(ctx, 1); err == nil {
		t.Error("a fifth step was given of four")
	}
	b.put(one)
	if one, err = b.get(bg, 7); err != nil || len(one) != 7 {
		t.Errorf("%d bytes, %v", len(one), err)
	}
	b.put(one)
	b.put(two)
	// More than there may be in all is given alone.
	if all, err := b.get(bg, 9*bufferStep); err != nil || b.held != 9*bufferStep {
		t.Errorf("%d bytes of %d held, %v", len(all), b.held, err)
	}
}

// What is read ahead is what is there, at every edge of a piece.
func TestReadAhead(t *testing.T) {
	data := noise(1, 1000)
	reads := 0
	a := &aheadReader{src: readerAt(func(p []byte, off int64) (int, error) {
		reads++
		return bytes.NewReader(data).ReadAt(p, off)
	}), size: int64(len(data)), piece: 64}
	if err := iotest.TestReader(io.NewSectionReader(a, 0, int64(len(data))), data); err != nil {
		t.Error(err)
	}
	reads = 0
	for off := int64(0); off < 1000; off += 10 {
		p := make([]byte, 10)
		if n, err := a.ReadAt(p, off); n != 10 || err != nil || !bytes.Equal(p, data[off:off+10]) {
			t.Fatalf("at %d: %d, %v", off, n, err)
		}
	}
	if want := (1000 + 63) / 64; reads > want {
		t.Errorf("%d reads of %d pieces", reads, want)
	}
	if n, err := a.ReadAt(make([]byte, 10), 995); n != 5 || err != io.EOF {
		t.Errorf("across the end: %d, %v", n, err)
	}
}

type readerAt func(p []byte, off int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }
