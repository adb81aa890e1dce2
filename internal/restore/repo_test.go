package restore

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/vm"
)

// backedUp is a repository in memory that holds one point of one disk.
func backedUp(t *testing.T, content []byte) (*mem.Store, Repository, *point.RestorePoint) {
	t.Helper()
	ctx := t.Context()
	st := mem.New()
	password := secret.New([]byte("correct horse"))
	if err := repo.Init(ctx, st, repo.InitOptions{Passphrase: password, KDF: repo.KDF{Passes: 1, MemoryKiB: 64, Threads: 1}}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(ctx, st, repo.Key{Passphrase: password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	s, err := r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Disk(ctx, int64(len(content)), "")
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(content))
	for i := range chunk.Count(size, step) {
		if _, err := w.Put(ctx, i, content[i*step:i*step+chunk.Len(i, size, step)]); err != nil {
			t.Fatal(err)
		}
	}
	id, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 22, 3, 15, 0, 0, time.UTC)
	p := &point.RestorePoint{ID: point.NewID(now, [4]byte{1}), VM: "web01", Time: now,
		Disks: []point.Disk{{Disk: vm.Disk{ID: "vda", SizeBytes: size, Format: "qcow2"}, Manifest: id}}}
	if err := s.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	return st, Of(r), p
}

func TestFromARepository(t *testing.T) {
	content := newDisk(9<<20+512, 0, 3, 4, 17, 18).content
	_, r, p := backedUp(t, content)
	src, err := r.OpenDisk(t.Context(), p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	target := filepath.Join(t.TempDir(), "disk.raw")
	if _, err := Disk(t.Context(), "vda", src, target, Options{}); err != nil {
		t.Fatal(err)
	}
	same := func() {
		t.Helper()
		if got, _ := os.ReadFile(target); !bytes.Equal(got, content) {
			t.Error("other bytes")
		}
	}
	same()
	f, err := os.OpenFile(target, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("dirt"), 3*step+9)
	f.WriteAt([]byte("dirt"), 8*step)
	f.WriteAt([]byte("dirt"), int64(len(content))-4)
	f.Close()
	res, err := InPlace(t.Context(), r, src, target, Options{})
	if err != nil || res.WrittenBytes != step+512 || res.ZeroedBytes != step {
		t.Errorf("in place: %+v, %v", res, err)
	}
	same()
	if _, err := Directory(t.Context(), r, p, filepath.Join(t.TempDir(), "out"), Options{}); err != nil {
		t.Error(err)
	}
}

func TestDamageInTheRepositoryIsNeverRestored(t *testing.T) {
	content := newDisk(9<<20, 0, 3, 4, 17).content
	st, r, p := backedUp(t, content)
	for o, err := range st.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		if o.Bytes < 1<<20 { // the pack with the data is the only large object
			continue
		}
		if err := st.Damage(o.Name, func(p []byte) []byte { p[len(p)/2] ^= 1; return p }); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	src, err := r.OpenDisk(t.Context(), p.Disks[0].Manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	_, err = Disk(t.Context(), "vda", src, filepath.Join(dir, "disk.qcow2"), Options{})
	if !errors.Is(err, fault.ErrCorrupt) || !strings.Contains(err.Error(), "pack ") {
		t.Errorf("got %v", err)
	}
	if _, err := Directory(t.Context(), r, p, filepath.Join(dir, "all"), Options{}); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("directory: %v", err)
	}
	if ls(t, dir) != "" {
		t.Errorf("left %q", ls(t, dir))
	}
}
