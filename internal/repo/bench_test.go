package repo

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// sink is a store that forgets packs, so that benchmarks measure us.
type sink struct{ *mem.Store }

func (s sink) Put(ctx context.Context, name string, body io.ReaderAt, size int64) error {
	if len(name) > 5 && name[:5] == packPrefix {
		return nil
	}
	return s.Store.Put(ctx, name, body, size)
}

// benchData is 128 MiB of files of this machine, which compress like a
// guest's.
func benchData(b *testing.B) []byte {
	b.Helper()
	var out []byte
	for _, dir := range []string{"/usr/lib", "/usr/bin"} {
		filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || len(out) >= 128<<20 {
				return nil
			}
			data, _ := os.ReadFile(path)
			out = append(out, data[:min(len(data), 4<<20)]...)
			return nil
		})
	}
	if len(out) < 128<<20 {
		b.Skip("too few files in /usr")
	}
	return out[:128<<20]
}

func benchRepo(b *testing.B, st blob.Store) *Repository {
	if err := Init(bg, st, InitOptions{Passphrase: password, KDF: cheap}); err != nil {
		b.Fatal(err)
	}
	return mustOpen(b, st)
}

func benchDisk(b *testing.B, r *Repository, data []byte) (*Session, *DiskWriter) {
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		b.Fatal(err)
	}
	w, err := s.Disk(bg, int64(len(data)), "")
	if err != nil {
		b.Fatal(err)
	}
	return s, w
}

func putAll(b *testing.B, w *DiskWriter, data []byte) {
	const size = chunk.DefaultBytes
	for i := range int64(len(data) / size) {
		if _, err := w.Put(bg, i, data[i*size:(i+1)*size]); err != nil {
			b.Fatal(err)
		}
	}
}

// benchPoint makes a restore point of a disk that holds data.
func benchPoint(b *testing.B, r *Repository, data []byte) point.ManifestID {
	s, w := benchDisk(b, r, data)
	putAll(b, w, data)
	m, err := w.Finish(bg)
	if err != nil {
		b.Fatal(err)
	}
	if err := s.Commit(bg, newPoint("web01", m, int64(len(data)))); err != nil {
		b.Fatal(err)
	}
	return m
}

func BenchmarkPutNew(b *testing.B) {
	data := benchData(b)
	r := benchRepo(b, sink{mem.New()})
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		r.forget()
		s, w := benchDisk(b, r, data)
		putAll(b, w, data)
		if err := s.flush(bg); err != nil {
			b.Fatal(err)
		}
		r.forget()
		s.Abort(bg)
	}
}

func BenchmarkPutDuplicate(b *testing.B) {
	data := benchData(b)
	r := benchRepo(b, mem.New())
	s, w := benchDisk(b, r, data)
	putAll(b, w, data)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		putAll(b, w, data)
	}
	s.Abort(bg)
}

func BenchmarkFetch(b *testing.B) {
	data := benchData(b)
	r := benchRepo(b, mem.New())
	m := benchPoint(b, r, data)
	d, err := r.OpenDisk(bg, m)
	if err != nil {
		b.Fatal(err)
	}
	for _, o := range []struct {
		name string
		FetchOptions
	}{{"any order", FetchOptions{}}, {"ordered", FetchOptions{Ordered: true}}} {
		b.Run(o.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				err := d.Fetch(bg, extent.Extent{Len: d.Size()}, o.FetchOptions, func(int64, []byte) error { return nil })
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRefill is what an incremental costs the repository for chunks of
// which the guest changed 64 KiB: read, filled, named, and stored as overlays.
func BenchmarkRefill(b *testing.B) {
	data := benchData(b)
	r := benchRepo(b, mem.New())
	m := benchPoint(b, r, data)
	const size, part = chunk.DefaultBytes, 64 << 10
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	buf := make([]byte, size)
	for n := 0; b.Loop(); n++ {
		s, err := r.Begin(bg, SessionOptions{})
		if err != nil {
			b.Fatal(err)
		}
		w, err := s.Disk(bg, int64(len(data)), m)
		if err != nil {
			b.Fatal(err)
		}
		for i := range int64(len(data) / size) {
			if err := w.ReadPrevious(bg, i, buf); err != nil {
				b.Fatal(err)
			}
			at := i * part % size
			copy(buf[at:at+part], data[(i*7919+int64(n)*104729+4321)%(int64(len(data))-part):])
			if p, err := w.Put(bg, i, buf); err != nil || p.Kind != New {
				b.Fatal(p, err)
			}
		}
		s.Abort(bg)
	}
}
