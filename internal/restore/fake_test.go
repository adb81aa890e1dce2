package restore

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
)

const step = chunk.DefaultBytes

// need skips the test where a program is missing, unless tests may not skip.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
				t.Fatalf("%s is missing and this test may not be skipped", p)
			}
			t.Skipf("%s is missing", p)
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// A fakeRepo holds disks in memory, by manifest, and breaks on cue.
type fakeRepo struct {
	disks map[point.ManifestID]*fakeDisk
	blobs map[chunk.ID][]byte
}

func (r *fakeRepo) OpenDisk(_ context.Context, id point.ManifestID) (Source, error) {
	if d := r.disks[id]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("manifest %s: %w", id, fault.ErrNotFound)
}

func (r *fakeRepo) ReadBlob(_ context.Context, b point.Blob) ([]byte, error) {
	data, ok := r.blobs[b.Chunks[0]]
	if !ok {
		return nil, fault.Corrupt("pack 4f2a91c0", 8192, "gone")
	}
	return data, nil
}

func (r *fakeRepo) ChunkID(plain []byte) chunk.ID { return sha256.Sum256(plain) }

func (r *fakeRepo) blob(data string) point.Blob {
	id := r.ChunkID([]byte(data))
	if r.blobs == nil {
		r.blobs = map[chunk.ID][]byte{}
	}
	r.blobs[id] = []byte(data)
	return point.Blob{SizeBytes: int64(len(data)), Chunks: []chunk.ID{id}}
}

type fakeDisk struct {
	content []byte
	corrupt int64 // index of the chunk that can't be read, -1 for none
	lose    bool  // drops a chunk without a word
	during  func(index int64)
	fetched atomic.Int64 // bytes
}

// newDisk has data in the given chunks and holes elsewhere. Chunk 0 is only
// partly data.
func newDisk(size int, chunks ...int) *fakeDisk {
	d := &fakeDisk{content: make([]byte, size), corrupt: -1}
	r := rand.NewChaCha8([32]byte{byte(len(chunks))})
	for _, c := range chunks {
		r.Read(d.content[c*step : min((c+1)*step, size)])
	}
	if slices.Contains(chunks, 0) {
		clear(d.content[min(64<<10, size):min(300<<10, size)])
	}
	return d
}

func (d *fakeDisk) Size() int64       { return int64(len(d.content)) }
func (d *fakeDisk) ChunkBytes() int64 { return step }
func (d *fakeDisk) Close() error      { return nil }

func (d *fakeDisk) chunk(i int64) []byte {
	return d.content[i*step : i*step+chunk.Len(i, d.Size(), step)]
}

func (d *fakeDisk) Chunk(_ context.Context, i int64) (chunk.ID, bool, error) {
	p := d.chunk(i)
	if chunk.IsZero(p) {
		return chunk.ID{}, true, nil
	}
	return sha256.Sum256(p), false, nil
}

func (d *fakeDisk) Data(_ context.Context, within extent.Extent) (set extent.Set, err error) {
	for i := range chunk.Count(d.Size(), step) {
		if p := d.chunk(i); !chunk.IsZero(p) {
			set.Add(extent.Extent{Off: i * step, Len: int64(len(p))}.Intersect(within))
		}
	}
	return set, nil
}

func (d *fakeDisk) Fetch(ctx context.Context, within extent.Extent, o repo.FetchOptions, fn func(off int64, data []byte) error) error {
	var list []int64
	for i := within.Off / step; i < chunk.Count(within.End(), step); i++ {
		id, hole, _ := d.Chunk(ctx, i)
		if !hole && (o.Skip == nil || !o.Skip(i, id)) {
			list = append(list, i)
		}
	}
	if d.lose && len(list) > 0 {
		list = list[1:]
	}
	if !o.Ordered {
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	}
	for _, i := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if d.during != nil {
			d.during(i)
		}
		if i == d.corrupt {
			return fault.Corrupt("pack 4f2a91c0", 8192, "authentication failed")
		}
		p := slices.Clone(d.chunk(i))
		if err := fn(i*step, p); err != nil {
			return err
		}
		clear(p) // data is only lent
		d.fetched.Add(int64(len(p)))
	}
	return nil
}

// rawFile writes content as a sparse raw image and gives its path.
func rawFile(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "source.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	for i := range chunk.Count(int64(len(content)), 4096) {
		p := content[i*4096 : i*4096+chunk.Len(i, int64(len(content)), 4096)]
		if !chunk.IsZero(p) {
			if _, err := f.WriteAt(p, i*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	return path
}

// ls is what lies in dir.
func ls(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}
