package repo

import (
	"encoding/binary"
	"encoding/hex"
	"io"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// scaleEnv is how many chunks TestManyChunks makes up instead of its own
// number. 500 million take 15 GB of disk.
const scaleEnv = "BACKSTAY_INDEX_CHUNKS"

// Chunks and packs of a repository that there is not, by number. They ascend as
// their numbers do.
type madeUp struct{ chunks, packs uint64 }

func (m madeUp) key(i uint64) (k index.Key) {
	step, _ := bits.Div64(1, 0, m.chunks)
	x := mix(i)
	low, _ := bits.Mul64(x, step)
	binary.BigEndian.PutUint64(k[:], i*step+low)
	binary.LittleEndian.PutUint64(k[8:], mix(x))
	return k
}

func (m madeUp) place(i uint64) (pack, off, clen uint32) {
	x := mix(^i)
	return uint32(x % m.packs), uint32(x>>32) % (32 << 20), 300_000
}

func (m madeUp) pack(i uint64) (id [32]byte) {
	step, _ := bits.Div64(1, 0, m.packs)
	binary.BigEndian.PutUint64(id[:], i*step)
	binary.BigEndian.PutUint64(id[8:], mix(i))
	return id
}

func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// A repository of many chunks opens without reading its index, and takes the
// memory and the disk that docs/design/repository.md promises.
func TestManyChunks(t *testing.T) {
	if testing.Short() {
		t.Skip("it writes half a gigabyte")
	}
	const perPack = 340
	m := madeUp{chunks: 20_000_000}
	if s := os.Getenv(scaleEnv); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil || n < perPack {
			t.Fatalf("%s=%q", scaleEnv, s)
		}
		m.chunks = n
	}
	m.packs = m.chunks / perPack
	dir := t.TempDir()
	st, err := file.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	mustInit(t, st)
	start, spent := time.Now(), cpuTime()
	said := func(what string, n uint64) {
		cpu := cpuTime() - spent
		t.Logf("%-28s %8.2f s, %8.2f s of a processor, %12.0f /s of that", what, time.Since(start).Seconds(), cpu.Seconds(), float64(n)/cpu.Seconds())
		start, spent = time.Now(), cpuTime()
	}
	packs := make([]index.RunPack, m.packs)
	for i := range packs {
		packs[i] = index.RunPack{ID: m.pack(uint64(i)), Bytes: 64 << 20}
		makeUpPack(t, dir, packs[i])
	}
	said("packs made up", m.packs)
	writeMadeUp(t, mustOpen(t, st), m, packs)
	packs = nil
	said("chunks written", m.chunks)
	var disk int64
	for o, err := range st.List(bg, runPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		disk += o.Bytes
	}

	before := heap()
	r := mustOpen(t, st)
	start, spent = time.Now(), cpuTime()
	h, err := r.held(bg)
	if err != nil {
		t.Fatal(err)
	}
	said("opened", m.chunks)
	if h.table.Len() != int64(m.chunks) || len(h.findings) != 0 || h.table.FreshLen() != 0 {
		t.Fatalf("%d chunks, %d of them in memory, %v", h.table.Len(), h.table.FreshLen(), h.findings)
	}
	for _, run := range h.table.Runs() {
		if err := run.LoadFilters(bg); err != nil {
			t.Fatal(err)
		}
	}
	said("filters loaded", m.chunks)
	memory := heap() - before
	perTB := func(n int64) float64 { return float64(n) / float64(m.chunks) * 2e6 / 1e6 }
	t.Logf("%.2f MB of memory and %.2f MB of disk for 2 million chunks", perTB(memory), perTB(disk))
	if perTB(memory) > 3 || perTB(disk) > 60 {
		t.Error("that is more than 3 and 60 MB")
	}

	rnd := rand.New(rand.NewPCG(1, 2))
	const lookups = 1_000_000
	wrong := 0
	start, spent = time.Now(), cpuTime()
	for range lookups {
		var k index.Key
		binary.LittleEndian.PutUint64(k[:], rnd.Uint64())
		binary.LittleEndian.PutUint64(k[8:], rnd.Uint64())
		_, ok, err := h.table.Lookup(bg, k)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			wrong++
		}
	}
	said("lookups, not stored", lookups)
	const hits = lookups / 10
	for range hits {
		i := rnd.Uint64N(m.chunks)
		p, ok, err := h.table.Lookup(bg, m.key(i))
		if err != nil {
			t.Fatal(err)
		}
		if pack, off, clen := m.place(i); !ok || p != (index.Place{Pack: pack, Off: off, CLen: clen}) {
			wrong++
		}
	}
	said("lookups, stored", hits)
	keys := make([]index.Key, 1<<16) // as a restore asks
	for i := range keys {
		keys[i] = m.key(rnd.Uint64N(m.chunks))
	}
	keys = index.SortKeys(keys)
	res, err := h.table.Resolve(bg, keys)
	if err != nil {
		t.Fatal(err)
	}
	for i := range res {
		if !res[i].OK {
			wrong++
		}
	}
	said("lookups, stored, in a batch", uint64(len(keys)))
	if wrong > 0 {
		t.Errorf("%d lookups are wrong", wrong)
	}
	if m.chunks > 100_000_000 {
		return // to walk them takes as long as to make them up
	}
	n := uint64(0)
	err = h.table.Each(bg, func(k index.Key, p index.Place) error {
		if n%1000 == 0 && k != m.key(n) {
			t.Errorf("chunk %d is %x", n, k)
		}
		n++
		return nil
	})
	if err != nil || n != m.chunks {
		t.Errorf("%d chunks in order, want %d: %v", n, m.chunks, err)
	}
	said("walked", m.chunks)
}

// makeUpPack makes a file that looks like a pack from outside.
func makeUpPack(t *testing.T, dir string, p index.RunPack) {
	s := hex.EncodeToString(p.ID[:])
	sub := filepath.Join(dir, "data", s[:2])
	f, err := os.Create(filepath.Join(sub, s))
	if os.IsNotExist(err) {
		if err = os.MkdirAll(sub, 0o700); err == nil {
			f, err = os.Create(filepath.Join(sub, s))
		}
	}
	if err == nil {
		err = f.Truncate(int64(p.Bytes))
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

func writeMadeUp(t *testing.T, r *Repository, m madeUp, packs []index.RunPack) {
	id, bin, err := newID()
	if err != nil {
		t.Fatal(err)
	}
	w, err := index.NewRunWriter(index.RunOptions{
		Repo: r.id, ID: bin, Generation: 1, Packs: packs,
		Spool: func() index.Spool { return manifest.NewSpool() },
		Put: func(n int, body io.ReaderAt, size int64) error {
			name := runPrefix + id
			if n >= 0 {
				name = index.PartName(name, n)
			}
			return r.st.Put(bg, name, body, size)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for i := range m.chunks {
		pack, off, clen := m.place(i)
		if err := w.Add(m.key(i), pack, off, clen); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// cpuTime is what this process used of processors: others may use them too.
func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// heap is the memory in use after a collection.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
