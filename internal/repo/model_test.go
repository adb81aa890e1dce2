package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/manifest"
)

// sparse is a disk as a model: its chunks; those that are absent are holes.
type sparse struct {
	size  int64
	chunk map[int64][]byte
}

// resized is what becomes of d when nothing is said but another size.
func (d *sparse) resized(size int64) *sparse {
	out := &sparse{size, map[int64][]byte{}}
	for i, c := range d.chunk {
		if i < chunk.Count(size, testChunk) {
			out.chunk[i] = make([]byte, chunk.Len(i, size, testChunk))
			copy(out.chunk[i], c)
		}
	}
	return out
}

// Many disks, many points, deletes and vacuums in any order: all that exists
// reads as it was written.
func TestPointsAgreeWithAModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		st := mem.New()
		if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, Parity: true}); err != nil {
			t.Fatal(err)
		}
		r, err := Open(bg, st, testKey)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { r.Close() }()
		type kept struct {
			p *point.RestorePoint
			d *sparse
		}
		var points []kept
		// Disks of many pages, so that differentials are written.
		const pages = 12
		step := map[string]func(*rapid.T){
			"backup": func(t *rapid.T) {
				s, err := r.Begin(bg, SessionOptions{Level: rapid.SampledFrom([]Level{LevelNone, LevelFast, LevelHigh}).Draw(t, "level")})
				if err != nil {
					t.Fatal(err)
				}
				defer s.Abort(bg)
				d := &sparse{size: rapid.Int64Range(0, pages*manifest.Positions*testChunk).Draw(t, "size"), chunk: map[int64][]byte{}}
				prev := point.ManifestID("")
				if len(points) > 0 && rapid.Bool().Draw(t, "incremental") {
					old := rapid.SampledFrom(points).Draw(t, "previous")
					prev = old.p.Disks[0].Manifest
					if rapid.IntRange(0, 3).Draw(t, "resize") > 0 {
						d.size = old.d.size
					}
					d = old.d.resized(d.size)
				}
				n := chunk.Count(d.size, testChunk)
				w, err := s.Disk(bg, d.size, prev)
				if err != nil {
					t.Fatal(err)
				}
				put := func(i int64, seed uint64) {
					var err error
					if delete(d.chunk, i); seed == 0 {
						err = w.Hole(i)
					} else {
						d.chunk[i] = noise(seed, chunk.Len(i, d.size, testChunk))
						_, err = w.Put(bg, i, d.chunk[i])
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if n > 0 {
					for range rapid.IntRange(0, 8).Draw(t, "writes") {
						put(rapid.Int64Range(0, n-1).Draw(t, "at"), rapid.Uint64Range(0, 30).Draw(t, "seed"))
					}
				}
				m, err := w.Finish(bg)
				if err != nil {
					t.Fatal(err)
				}
				p := newPoint("vm", m, d.size)
				if rapid.IntRange(0, 9).Draw(t, "abort") == 0 {
					return
				}
				if err := s.Commit(bg, p); err != nil {
					t.Fatal(err)
				}
				points = append(points, kept{p, d})
			},
			"delete": func(t *rapid.T) {
				if len(points) == 0 {
					t.Skip()
				}
				i := rapid.IntRange(0, len(points)-1).Draw(t, "which")
				if err := r.DeletePoint(bg, "vm", points[i].p.ID); err != nil {
					t.Fatal(err)
				}
				points = append(points[:i], points[i+1:]...)
			},
			"vacuum": func(t *rapid.T) {
				if _, err := r.Vacuum(bg, VacuumOptions{}); err != nil {
					t.Fatal(err)
				}
			},
			"reopen": func(t *rapid.T) {
				r.Close()
				if r, err = Open(bg, st, testKey); err != nil {
					t.Fatal(err)
				}
			},
		}
		step["again"] = step["backup"]
		t.Repeat(step)
		for _, k := range points {
			d, err := r.OpenDisk(bg, k.p.Disks[0].Manifest)
			if err != nil {
				t.Fatal(err)
			}
			seen := map[int64]bool{}
			err = d.Fetch(bg, extent.Extent{Len: d.Size()}, FetchOptions{Ordered: true}, func(off int64, data []byte) error {
				i := off / testChunk
				seen[i] = true
				if want := k.d.chunk[i]; !bytes.Equal(data, want) {
					return fmt.Errorf("%s: chunk %d is wrong", k.p.Ref(), i)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range k.d.chunk {
				if !seen[i] && !chunk.IsZero(want) {
					t.Fatalf("%s: chunk %d is a hole", k.p.Ref(), i)
				}
			}
		}
		rep, err := r.Check(bg, CheckOptions{ReadData: true})
		if err != nil || len(rep.Findings) > 0 {
			t.Fatalf("%v %v", rep.Findings, err)
		}
	})
}

func TestSessionsShareChunks(t *testing.T) {
	st, r := newRepo(t)
	const vms = 4
	common := noise(1, 20*testChunk)
	contents := make([][]byte, vms)
	for i := range contents {
		contents[i] = append(bytes.Clone(common), noise(uint64(100+i), 5*testChunk+int64(i))...)
	}
	points := make([]*point.RestorePoint, vms)
	var wg sync.WaitGroup
	for i := range vms {
		wg.Go(func() {
			p, err := parallel(bg, r, fmt.Sprintf("vm%d", i), contents[i])
			if err != nil {
				t.Error(err)
				return
			}
			points[i] = p
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for i, p := range points {
		mustRead(t, r, p, contents[i])
		mustRead(t, mustOpen(t, st), p, contents[i])
	}
	// Later everything is known.
	s, _ := r.Begin(bg, SessionOptions{})
	defer s.Abort(bg)
	w, _ := s.Disk(bg, int64(len(common)), "")
	for i := range int64(20) {
		if put, err := w.Put(bg, i, cut(common, i)); err != nil || put.Kind != Known {
			t.Errorf("chunk %d: %+v, %v", i, put, err)
		}
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
}

// parallel backs a VM of two disks up with several workers for each.
func parallel(ctx context.Context, r *Repository, name string, content []byte) (*point.RestorePoint, error) {
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		return nil, err
	}
	defer s.Abort(ctx)
	var ms [2]point.ManifestID
	var errs [2]error
	var disks sync.WaitGroup
	for k := range ms {
		disks.Go(func() {
			w, err := s.Disk(ctx, int64(len(content)), "")
			if err != nil {
				errs[k] = err
				return
			}
			jobs := make(chan int64)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					for i := range jobs {
						if _, err := w.Put(ctx, i, cut(content, i)); err != nil {
							errs[k] = err
						}
					}
				})
			}
			for i := range chunk.Count(int64(len(content)), testChunk) {
				jobs <- i
			}
			close(jobs)
			wg.Wait()
			if errs[k] == nil {
				ms[k], errs[k] = w.Finish(ctx)
			}
		})
	}
	disks.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	xml, err := s.PutBlob(ctx, []byte("<domain>"+name+"</domain>"))
	if err != nil {
		return nil, err
	}
	p := newPoint(name, ms[0], int64(len(content)))
	other := p.Disks[0]
	other.ID, other.Manifest = "vdb", ms[1]
	p.Disks = append(p.Disks, other)
	p.Config = map[string]point.Blob{"domain.xml": xml}
	return p, s.Commit(ctx, p)
}

// More open packs than there is memory for: nobody waits for ever.
func TestStreamsShareLittleMemory(t *testing.T) {
	st := mem.New()
	mustInit(t, st)
	r := mustOpen(t, st)
	r.mem = newTestMemory(6 << 20)
	ctx, cancel := context.WithTimeout(bg, 10*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			if _, err := parallel(ctx, r, fmt.Sprintf("vm%d", i), noise(uint64(i+1), 30*testChunk)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	mustCheck(t, r, CheckOptions{ReadData: true})
}

// A mostly empty disk of 10 TiB costs little time, memory and space.
func TestTenTiB(t *testing.T) {
	st := mem.New()
	if err := Init(bg, st, InitOptions{Passphrase: password, KDF: cheap}); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, st)
	const size = 10<<40 + 4711
	at := map[int64][]byte{0: text(1, 512<<10), 12_345_678: text(2, 512<<10), chunk.Count(size, 512<<10) - 1: text(3, 4711)}
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(bg, size, "")
	if err != nil {
		t.Fatal(err)
	}
	for i, plain := range at {
		if _, err := w.Put(bg, i, plain); err != nil {
			t.Fatal(err)
		}
	}
	m, err := w.Finish(bg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(bg, newPoint("big", m, size)); err != nil {
		t.Fatal(err)
	}
	d, err := r.OpenDisk(bg, m)
	if err != nil {
		t.Fatal(err)
	}
	data, err := d.Data(bg, extent.Extent{Len: size})
	if err != nil || len(data.List()) != 3 || data.Bytes() != 2*512<<10+4711 {
		t.Fatalf("%v %v", data, err)
	}
	for i, want := range at {
		got := make([]byte, len(want))
		if _, err := d.ReadAt(got, i*512<<10); err != nil || !bytes.Equal(got, want) {
			t.Errorf("chunk %d is wrong: %v", i, err)
		}
	}
	n, _ := st.Size(bg, manifestName(m))
	if n > 1024 {
		t.Errorf("the manifest has %d bytes", n)
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
}

// A full disk of 10 TiB has 640 MiB of ids: they must pass through, not stay.
func TestAFullManifestNeedsLittleMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a few seconds")
	}
	st := mem.New()
	mustInit(t, st)
	r := mustOpen(t, st)
	const chunks = 400 * manifest.Positions // 13 MB of ids
	d := manifest.NewDraft()
	defer d.Close()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var id chunk.ID
	for i := range int64(chunks) {
		id[0], id[1], id[2], id[31] = byte(i), byte(i>>8), byte(i>>16), 1
		if err := d.Set(i, id, chunk.ID{}); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 10<<20 {
		t.Errorf("%d bytes in memory for %d chunks", grown, chunks)
	}
	for i := range int64(400) {
		p, err := d.Page(i)
		if err != nil {
			t.Fatal(err)
		}
		if at := i * manifest.Positions; p.IDs[5][0] != byte(at+5) || p.IDs[5][1] != byte((at+5)>>8) || p.IDs[5][2] != byte((at+5)>>16) {
			t.Fatalf("page %d came back wrong", i)
		}
	}
	runtime.KeepAlive(r)
}

// A failing store fails the session, and says why.
func TestErrorsOfTheStoreComeThrough(t *testing.T) {
	st := mem.New()
	mustInit(t, st)
	full := faultyPuts(st, packPrefix, fault.ErrNoSpace)
	r := mustOpen(t, full)
	_, err := backup(bg, r, "web01", noise(1, 3*testChunk), nil, nil)
	if !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("%v", err)
	}
	if n := count(t, st, sessionPrefix); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}
