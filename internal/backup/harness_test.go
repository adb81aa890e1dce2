package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/hypervisor/fake"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/vm"
)

const (
	kib   = 1 << 10
	mib   = 1 << 20
	unit  = 256 * kib // of the tests' repositories
	grain = 64 * kib  // of the fake's change tracking
)

var password = secret.New([]byte("correct horse"))

// A world is a host with the VM web01, a repository, and what every restore
// point must hold.
type world struct {
	*testing.T
	store blob.Store // the disk itself, without faults
	host  *fake.Host
	vm    *fake.VM
	clock *clock
	want  map[string]map[vm.DiskID][]byte // by the points' refs
	audit float64
}

// A clock goes on by a second whenever it is asked.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(time.Second)
	return c.t
}

func newWorld(t *testing.T, st blob.Store) *world {
	t.Helper()
	err := repo.Init(t.Context(), st, repo.InitOptions{ChunkBytes: unit, Passphrase: password, KDF: repo.KDF{Passes: 1, MemoryKiB: 64, Threads: 1}})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, store: st, clock: &clock{t: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)}, want: map[string]map[vm.DiskID][]byte{}, audit: -1}
	w.host = fake.New("host1", w.clock.now)
	w.vm = w.host.Add("web01")
	return w
}

// open opens the repository through st, which is the world's store or a faulty
// view of it.
func (w *world) open(st blob.Store) (*repo.Repository, error) {
	return repo.Open(w.Context(), st, repo.Key{Passphrase: password})
}

func (w *world) mustOpen() *repo.Repository {
	w.Helper()
	r, err := w.open(w.store)
	if err != nil {
		w.Fatal(err)
	}
	return r
}

func (w *world) job() backup.Job {
	return backup.Job{Driver: w.host, Name: "web01", Source: "fake://host1/web01", Consistency: vm.Filesystem}
}

func (w *world) options(r *repo.Repository) backup.Options {
	return backup.Options{Repo: r, Now: w.clock.now, Audit: w.audit}
}

// try backs web01 up through st and remembers what its point must hold.
func (w *world) try(ctx context.Context, st blob.Store, disks ...vm.DiskID) backup.Result {
	r, err := w.open(st)
	if err != nil {
		return backup.Result{Err: err}
	}
	defer r.Close()
	return w.tryIn(ctx, r, disks...)
}

func (w *world) tryIn(ctx context.Context, r *repo.Repository, disks ...vm.DiskID) backup.Result {
	if len(disks) == 0 {
		disks = []vm.DiskID{"vda"}
	}
	now := map[vm.DiskID][]byte{}
	for _, d := range disks {
		now[d] = w.vm.Contents(d)
	}
	res := backup.Run(ctx, w.options(r), []backup.Job{w.job()})[0]
	if res.Point != nil {
		w.want[res.Point.Ref()] = now
	}
	return res
}

// backUp must go well.
func (w *world) backUp(disks ...vm.DiskID) backup.Result {
	w.Helper()
	res := w.try(w.Context(), w.store, disks...)
	if res.Err != nil {
		w.Fatal(res.Err)
	}
	return res
}

// verify reads every point that exists in st and compares it, byte by byte,
// with what the VM held then. Points that nobody heard of are compared with
// one of maybe. It gives the refs of all points.
func (w *world) verify(st blob.Store, maybe ...map[vm.DiskID][]byte) []string {
	w.Helper()
	r, err := w.open(st)
	if err != nil {
		w.Errorf("open: %v", err)
		return nil
	}
	defer r.Close()
	points, err := r.Points(w.Context())
	if err != nil {
		w.Errorf("list points: %v", err)
	}
	var refs []string
	for _, p := range points {
		refs = append(refs, p.Ref())
		var got = map[vm.DiskID][]byte{}
		for _, d := range p.Disks {
			if got[d.ID], err = readDisk(w.Context(), r, d); err != nil {
				w.Errorf("%s: disk %s: %v", p.Ref(), d.ID, err)
				return refs
			}
		}
		candidates := maybe
		if want := w.want[p.Ref()]; want != nil {
			candidates = []map[vm.DiskID][]byte{want}
		}
		if !slices.ContainsFunc(candidates, func(c map[vm.DiskID][]byte) bool { return equalDisks(got, c) }) {
			w.Errorf("%s is not what the VM held", p.Ref())
		}
		for name, b := range p.Config {
			if _, err := r.ReadBlob(w.Context(), b); err != nil {
				w.Errorf("%s: %s: %v", p.Ref(), name, err)
			}
		}
	}
	return refs
}

func equalDisks(a, b map[vm.DiskID][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for id := range a {
		if !bytes.Equal(a[id], b[id]) {
			return false
		}
	}
	return true
}

func readDisk(ctx context.Context, r *repo.Repository, d point.Disk) ([]byte, error) {
	disk, err := r.OpenDisk(ctx, d.Manifest)
	if err != nil {
		return nil, err
	}
	defer disk.Close()
	p := make([]byte, disk.Size())
	if n, err := disk.ReadAt(p, 0); n < len(p) && err != nil {
		return nil, err
	}
	if _, err := disk.ReadAt(make([]byte, 1), disk.Size()); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("behind the end: %v", err)
	}
	return p, nil
}

// noise is n bytes that do not compress and depend on seed alone.
func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(p)
	return p
}

// wantDisk checks how the first disk was read.
func (w *world) wantDisk(res backup.Result, mode point.Mode, reason string) point.Disk {
	w.Helper()
	if res.Err != nil {
		w.Fatal(res.Err)
	}
	d := res.Point.Disks[0]
	if d.Mode != mode || !bytes.Contains([]byte(d.Reason), []byte(reason)) || mode == point.Incremental && d.Reason != "" {
		w.Errorf("mode %s (%s), want %s (%s)", d.Mode, d.Reason, mode, reason)
	}
	return d
}

// wantClean checks what a backup leaves on the host: no snapshot and n
// checkpoints.
func (w *world) wantClean(n int) {
	w.Helper()
	if snapshot, checkpoints := w.vm.Left(); snapshot || len(checkpoints) != n {
		w.Errorf("left on the host: snapshot %v, checkpoints %q; want %d", snapshot, checkpoints, n)
	}
}

// fill gives each chunk of a disk a byte of data.
func (w *world) fill(disk vm.DiskID, chunks int64) {
	for i := range chunks {
		w.vm.Write(disk, i*unit+unit/2, []byte{1})
	}
}

// memWorld is a world with one empty disk and a repository in memory.
func memWorld(t *testing.T, diskBytes int64) *world {
	t.Helper()
	w := newWorld(t, mem.New())
	w.vm.AddDisk("vda", diskBytes)
	return w
}
