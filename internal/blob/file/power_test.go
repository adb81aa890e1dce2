package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/fault"
)

// A story of puts, creates and deletes, and what each name may hold after it.
type history struct {
	st blob.Store
	// possible are the contents that each name may have; nil is absence. An
	// acknowledged call leaves one, a failed one adds one.
	possible map[string][][]byte
	failed   bool
}

func (h *history) do(t *testing.T, name string, data []byte, call func() error) {
	if h.failed {
		return
	}
	if h.possible[name] == nil {
		h.possible[name] = [][]byte{nil}
	}
	switch err := call(); {
	case err == nil:
		h.possible[name] = [][]byte{data}
	case errors.Is(err, filetest.ErrPowerCut):
		h.possible[name] = append(h.possible[name], data)
		h.failed = true
	default:
		t.Fatalf("%s: %v", name, err)
	}
}

func (h *history) put(t *testing.T, name string, data []byte) {
	r, n := blobtest.Body(data)
	h.do(t, name, data, func() error { return h.st.Put(t.Context(), name, r, n) })
}

func (h *history) create(t *testing.T, name string, data []byte) {
	r, n := blobtest.Body(data)
	h.do(t, name, data, func() error { return h.st.Create(t.Context(), name, r, n) })
}

func (h *history) delete(t *testing.T, name string) {
	h.do(t, name, nil, func() error { return h.st.Delete(t.Context(), name) })
}

// Whenever the power goes, everything acknowledged is there, everything else
// is whole or absent, and the store goes on working.
func TestPowerCuts(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	content := func(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, 700*(i+1)) }
	for cut := 0; ; cut++ {
		disk := filetest.New()
		disk.CutAfter(cut)
		h := &history{st: file.OpenFS(disk, "disk"), possible: map[string][][]byte{}}
		h.create(t, "repo.json", content(0))
		h.put(t, "data/aa/1", content(1))
		h.put(t, "data/ab/2", content(2))
		h.put(t, "idx/1", content(3))
		h.create(t, "outcome/1", content(4))
		h.put(t, "data/aa/1", content(5))
		h.delete(t, "data/ab/2")
		h.create(t, "data/ab/2", content(6))
		h.put(t, "empty", []byte{})
		h.delete(t, "idx/1")
		for range 8 {
			verifyAfterCut(t, h, disk.Reboot(rng), cut)
		}
		if t.Failed() {
			return
		}
		if !disk.Off() {
			t.Logf("%d operations, each cut 8 times", cut)
			return
		}
	}
}

func verifyAfterCut(t *testing.T, h *history, disk *filetest.Disk, cut int) {
	t.Helper()
	st := file.OpenFS(disk, "disk")
	var want []string
	for name, versions := range h.possible {
		got, err := blobtest.Read(t.Context(), st, name)
		if errors.Is(err, fault.ErrNotFound) {
			got, err = nil, nil
		} else {
			want = append(want, name)
		}
		if err != nil {
			t.Errorf("cut %d: %s: %v", cut, name, err)
			continue
		}
		ok := slices.ContainsFunc(versions, func(v []byte) bool { return (v == nil) == (got == nil) && bytes.Equal(v, got) })
		if !ok {
			t.Errorf("cut %d: %s holds %d bytes (absent: %v), which is none of the %d it may", cut, name, len(got), got == nil, len(versions))
		}
	}
	slices.Sort(want)
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || !slices.Equal(names, want) {
		t.Errorf("cut %d: list %q, %v; want %q", cut, names, err, want)
	}
	for name := range h.possible {
		put(t, st, name, "again")
	}
	if left, err := disk.ReadDir("tmp"); err != nil || len(left) > 0 {
		t.Errorf("cut %d: %v left in tmp, %v", cut, left, err)
	}
}

// What a listing showed to a second process survives, even if the writer had
// not yet learned that its object is durable: somebody may build on it.
func TestListedIsDurable(t *testing.T) {
	disk := filetest.New()
	writer, reader := file.OpenFS(disk, "disk"), file.OpenFS(disk, "disk")
	put(t, writer, "data/aa/old", "x")
	stuck, done := make(chan struct{}), make(chan struct{})
	var seen atomic.Bool
	disk.Hook(func(op, name string) error {
		if op == "syncdir" && name == "data/aa" && seen.CompareAndSwap(false, true) {
			close(stuck)
			<-done
		}
		return nil
	})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		r, n := blobtest.Body([]byte("new"))
		_ = writer.Put(t.Context(), "data/aa/new", r, n)
	}()
	select {
	case <-stuck:
	case <-finished:
		t.Fatal("a put ended without syncing its directory")
	}
	names, err := blobtest.Names(t.Context(), reader, "data/")
	if err != nil || !slices.Equal(names, []string{"data/aa/new", "data/aa/old"}) {
		t.Fatalf("list: %q, %v", names, err)
	}
	for i := range 50 {
		after := file.OpenFS(disk.Reboot(rand.New(rand.NewPCG(uint64(i), 0))), "disk")
		if got, err := blobtest.Read(t.Context(), after, "data/aa/new"); err != nil || string(got) != "new" {
			t.Fatal(fmt.Errorf("reboot %d: %q, %v", i, got, err))
		}
	}
	disk.Cut()
	close(done)
	<-finished
}
