package copies

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
)

var bg = context.Background()

// counted is a store of objects that counts its reads.
func counted(t *testing.T, objects map[string]int) (src Source, reads *int) {
	st := mem.New()
	for name, n := range objects {
		if err := st.Put(bg, name, bytes.NewReader(bytes.Repeat([]byte(name[len(name)-1:]), n)), int64(n)); err != nil {
			t.Fatal(err)
		}
	}
	reads = new(int)
	return blobtest.Faulty(st, func(c blobtest.Call) error {
		if c.Op == blobtest.OpReadAt {
			*reads++
		}
		return nil
	}), reads
}

func mustRead(t *testing.T, s Source, name string, off, n int64) {
	t.Helper()
	b := make([]byte, n)
	if k, err := s.(interface {
		ReadAt(context.Context, string, []byte, int64) (int, error)
	}).ReadAt(bg, name, b, off); k != int(n) || err != nil && err != io.EOF || !bytes.Equal(b, bytes.Repeat([]byte(name[len(name)-1:]), int(n))) {
		t.Fatalf("%s: %d bytes, %v", name, k, err)
	}
}

type reader struct{ *Dir }

func (r reader) Size(ctx context.Context, name string) (int64, error) { return r.src.Size(ctx, name) }

func open(t *testing.T, src Source, parent string, max int64) reader {
	d := New(src, parent, "repo", max)
	t.Cleanup(d.Close)
	return reader{d}
}

// An object is read from the store once, also by the next process.
func TestAnObjectIsReadOnce(t *testing.T) {
	src, reads := counted(t, map[string]int{"idx/l1/a": 5000})
	dir := t.TempDir()
	for range 2 {
		d := open(t, src, dir, 1<<20)
		for off := range int64(10) {
			mustRead(t, d, "idx/l1/a", off*10, 4000)
		}
		b := make([]byte, 10)
		if n, err := d.ReadAt(bg, "idx/l1/a", b, 4995); n != 5 || err != io.EOF {
			t.Errorf("over the end: %d, %v", n, err)
		}
	}
	if *reads != 1 {
		t.Errorf("%d reads of the store", *reads)
	}
}

// The directory never holds more than it may, and what does not fit is read
// from the store.
func TestTheSizeIsBounded(t *testing.T) {
	src, _ := counted(t, map[string]int{"x/a": 400, "x/b": 400, "x/c": 400, "x/d": 5000})
	dir := t.TempDir()
	d := open(t, src, dir, 1000)
	for range 3 {
		for _, name := range []string{"x/a", "x/b", "x/c", "x/d"} {
			mustRead(t, d, name, 0, 100)
		}
	}
	var total int64
	filepath.Walk(dir, func(_ string, info os.FileInfo, _ error) error {
		if info.Mode().IsRegular() {
			total += info.Size()
		}
		return nil
	})
	if total == 0 || total > 1000 {
		t.Errorf("%d bytes in the directory", total)
	}
}

// Whoever empties or breaks the directory costs time and nothing else; a copy
// that is dropped is made again.
func TestCopiesMayVanish(t *testing.T) {
	src, reads := counted(t, map[string]int{"x/a": 400})
	dir := t.TempDir()
	d := open(t, src, dir, 1000)
	mustRead(t, d, "x/a", 0, 100)
	os.WriteFile(filepath.Join(dir, "repo", "a"), bytes.Repeat([]byte("z"), 400), 0o600)
	if !d.Drop("x/a") || d.Drop("x/a") {
		t.Error("dropped not once")
	}
	mustRead(t, d, "x/a", 0, 100)
	d.Only(func(string) bool { return false })
	os.RemoveAll(dir)
	mustRead(t, open(t, src, filepath.Join(t.TempDir()), 10), "x/a", 0, 100)
	mustRead(t, d, "x/a", 0, 100)
	d.Drop("x/a")
	mustRead(t, d, "x/a", 0, 100)
	if *reads < 3 {
		t.Errorf("%d reads", *reads)
	}
}
