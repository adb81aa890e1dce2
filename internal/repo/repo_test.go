package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/vm"
)

var (
	bg       = context.Background()
	cheap    = KDF{Passes: 1, MemoryKiB: 64, Threads: 1}
	password = secret.New([]byte("correct horse"))
	testKey  = Key{Passphrase: password}
)

const testChunk = chunk.MinBytes

func mustInit(t testing.TB, st blob.Store) {
	t.Helper()
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, Parity: true}); err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, st blob.Store) *Repository {
	t.Helper()
	r, err := Open(bg, st, testKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func newRepo(t testing.TB) (*mem.Store, *Repository) {
	st := mem.New()
	mustInit(t, st)
	return st, mustOpen(t, st)
}

// noise is n bytes that do not compress and depend on seed alone.
func noise(seed uint64, n int64) []byte {
	b := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
	return b
}

// text is n bytes that compress.
func text(seed uint64, n int64) []byte {
	var b bytes.Buffer
	for i := 0; int64(b.Len()) < n; i++ {
		fmt.Fprintf(&b, "line %d of file %d\n", i, seed)
	}
	return b.Bytes()[:n]
}

// backup stores content as the disk "vda" of a new point of name and gives its
// ref. Chunks that are equal in prev are not mentioned.
func backup(ctx context.Context, r *Repository, name string, content []byte, prev *point.RestorePoint, prevContent []byte) (p *point.RestorePoint, err error) {
	err = backupAs(ctx, r, name, content, prev, prevContent, func(made *point.RestorePoint) { p = made })
	return p, err
}

// backupAs calls before with the point that is about to be committed.
func backupAs(ctx context.Context, r *Repository, name string, content []byte, prev *point.RestorePoint, prevContent []byte, before func(*point.RestorePoint)) error {
	s, err := r.Begin(ctx, SessionOptions{})
	if err != nil {
		return err
	}
	defer s.Abort(ctx)
	var pm point.ManifestID
	if prev != nil {
		pm = prev.Disks[0].Manifest
	}
	w, err := s.Disk(ctx, int64(len(content)), pm)
	if err != nil {
		return err
	}
	for i := range chunk.Count(int64(len(content)), testChunk) {
		part := cut(content, i)
		if prev != nil && bytes.Equal(part, cut(prevContent, i)) {
			continue
		}
		if _, err := w.Put(ctx, i, part); err != nil {
			return err
		}
	}
	m, err := w.Finish(ctx)
	if err != nil {
		return err
	}
	xml, err := s.PutBlob(ctx, []byte("<domain>"+name+"</domain>"))
	if err != nil {
		return err
	}
	p := newPoint(name, m, int64(len(content)))
	p.Config = map[string]point.Blob{"domain.xml": xml}
	before(p)
	return s.Commit(ctx, p)
}

var pointClock struct {
	sync.Mutex
	n int
}

func newPoint(name string, m point.ManifestID, size int64) *point.RestorePoint {
	pointClock.Lock()
	defer pointClock.Unlock()
	pointClock.n++
	at := time.Unix(1_700_000_000+int64(pointClock.n), 0).UTC()
	return &point.RestorePoint{
		ID: point.NewID(at, [4]byte{byte(pointClock.n), byte(pointClock.n >> 8)}), VM: name, Time: at,
		Disks: []point.Disk{{Disk: vm.Disk{ID: "vda", SizeBytes: size}, Manifest: m, Mode: point.Full}},
	}
}

// cut is chunk i of content, nil behind its end.
func cut(content []byte, i int64) []byte {
	off := i * testChunk
	if off >= int64(len(content)) {
		return nil
	}
	return content[off:min(off+testChunk, int64(len(content)))]
}

func mustBackup(t testing.TB, r *Repository, name string, content []byte, prev *point.RestorePoint, prevContent []byte) *point.RestorePoint {
	t.Helper()
	p, err := backup(bg, r, name, content, prev, prevContent)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// readDisk gives a point's disk through ReadAt.
func readDisk(r *Repository, p *point.RestorePoint) ([]byte, error) {
	d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	out := make([]byte, d.Size())
	_, err = d.ReadAt(out, 0)
	return out, err
}

// read gives a point's disk through ReadAt and checks that both ways of Fetch
// agree with it.
func read(r *Repository, p *point.RestorePoint) ([]byte, error) {
	out, err := readDisk(r, p)
	if err != nil {
		return nil, err
	}
	d, err := r.OpenDisk(bg, p.Disks[0].Manifest)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	all := extent.Extent{Len: d.Size()}
	var mu sync.Mutex
	for _, ordered := range []bool{false, true} {
		got := make([]byte, d.Size())
		last := int64(-1)
		err := d.Fetch(bg, all, FetchOptions{Ordered: ordered}, func(off int64, data []byte) error {
			mu.Lock()
			defer mu.Unlock()
			if ordered && off <= last {
				return fmt.Errorf("chunk at %d after %d", off, last)
			}
			last = off
			copy(got[off:], data)
			return nil
		})
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(got, out) {
			return nil, errors.New("Fetch and ReadAt disagree")
		}
	}
	b, err := r.ReadBlob(bg, p.Config["domain.xml"])
	if err != nil {
		return nil, err
	}
	if string(b) != "<domain>"+p.VM+"</domain>" {
		return nil, fmt.Errorf("domain.xml is %q", b)
	}
	return out, nil
}

func mustRead(t testing.TB, r *Repository, p *point.RestorePoint, want []byte) {
	t.Helper()
	got, err := read(r, p)
	if err != nil {
		t.Fatalf("%s: %v", p.Ref(), err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: content differs", p.Ref())
	}
}

func TestDisksComeBack(t *testing.T) {
	for _, c := range []struct {
		name string
		data []byte
	}{
		{"0 bytes", nil},
		{"one byte", []byte{7}},
		{"one zero byte", []byte{0}},
		{"exactly one chunk", noise(1, testChunk)},
		{"one byte into the second", noise(2, testChunk+1)},
		{"only zeros", make([]byte, 5*testChunk+17)},
		{"text, noise, zeros and a short end", append(append(text(3, 3*testChunk), make([]byte, 2*testChunk)...), noise(4, 12345)...)},
		{"the same chunk many times", bytes.Repeat(text(5, testChunk), 9)},
		{"more than a page", append(make([]byte, 1500*testChunk), text(6, 2*testChunk)...)},
	} {
		t.Run(c.name, func(t *testing.T) {
			st, r := newRepo(t)
			p := mustBackup(t, r, "web01", c.data, nil, nil)
			mustRead(t, r, p, c.data)
			again := mustOpen(t, st)
			got, err := again.Point(bg, "web01", "")
			if err != nil {
				t.Fatal(err)
			}
			if got.ID != p.ID || got.SizeBytes() != int64(len(c.data)) {
				t.Errorf("newest point is %+v", got)
			}
			mustRead(t, again, got, c.data)
		})
	}
}

func TestIncrementsAndResizes(t *testing.T) {
	a := append(noise(1, 40*testChunk), noise(2, 1000)...)
	grown := append(bytes.Clone(a), make([]byte, 3*testChunk)...)
	copy(grown[41*testChunk+5:], "written into the new part")
	shrunk := bytes.Clone(a[:20*testChunk+77])
	changed := bytes.Clone(a)
	copy(changed[7*testChunk+1:], "a change")
	clear(changed[9*testChunk : 11*testChunk])
	for _, c := range []struct {
		name string
		next []byte
	}{{"same size", changed}, {"grown", grown}, {"shrunk", shrunk}, {"unchanged", a}, {"shrunk to nothing", nil}} {
		t.Run(c.name, func(t *testing.T) {
			_, r := newRepo(t)
			p := mustBackup(t, r, "web01", a, nil, nil)
			q := mustBackup(t, r, "web01", c.next, p, a)
			mustRead(t, r, q, c.next)
			mustRead(t, r, p, a)
			if c.name == "unchanged" && p.Disks[0].Manifest != q.Disks[0].Manifest {
				t.Error("an unchanged disk got another manifest")
			}
		})
	}
}

func TestWrongKeys(t *testing.T) {
	st, _ := newRepo(t)
	if _, err := Open(bg, st, Key{Passphrase: secret.New([]byte("wrong"))}); !errors.Is(err, fault.ErrKey) {
		t.Errorf("wrong passphrase: %v", err)
	}
	if _, err := Open(bg, st, Key{}); !errors.Is(err, fault.ErrKey) {
		t.Errorf("no key: %v", err)
	}
	if err := Init(bg, st, InitOptions{Passphrase: password, KDF: cheap}); !errors.Is(err, fault.ErrExists) {
		t.Errorf("second Init: %v", err)
	}
	if _, err := Open(bg, mem.New(), testKey); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("empty store: %v", err)
	}
}

func newTestMemory(limit int64) *pack.Memory { return pack.NewMemory(limit) }

// faultyPuts fails every Put under prefix.
func faultyPuts(st blob.Store, prefix string, with error) blob.Store {
	return blobtest.Faulty(st, func(c blobtest.Call) error {
		if c.Op == blobtest.OpPut && strings.HasPrefix(c.Name, prefix) {
			return with
		}
		return nil
	})
}
