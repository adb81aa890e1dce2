package file_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/fault"
)

func TestConformance(t *testing.T) {
	t.Run("directory", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store { return create(t, t.TempDir()) })
	})
	t.Run("simulated disk", func(t *testing.T) {
		blobtest.Run(t, func(t *testing.T) blob.Store { return file.OpenFS(filetest.New(), "disk") })
	})
	t.Run("claims in a directory", func(t *testing.T) {
		blobtest.RunClaimer(t, func(t *testing.T) func() blob.Store {
			dir := t.TempDir()
			return func() blob.Store { return create(t, dir) }
		})
	})
	t.Run("claims on a simulated disk", func(t *testing.T) {
		blobtest.RunClaimer(t, func(t *testing.T) func() blob.Store {
			disk := filetest.New()
			return func() blob.Store { return file.OpenFS(disk, "disk") }
		})
	})
}

func create(t *testing.T, dir string) *file.Store {
	t.Helper()
	st, err := file.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

func put(t *testing.T, st blob.Store, name, data string) {
	t.Helper()
	r, n := blobtest.Body([]byte(data))
	if err := st.Put(t.Context(), name, r, n); err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
}

func TestOpenMissing(t *testing.T) {
	dir := t.TempDir()
	if _, err := file.Open(filepath.Join(dir, "none")); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("no directory: %v, want fault.ErrNotFound", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "plain"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := file.Open(filepath.Join(dir, "plain")); err == nil {
		t.Error("opened a plain file as a directory")
	}
	st := create(t, filepath.Join(dir, "a", "b", "c"))
	put(t, st, "x", "x")
}

func TestOnlyTheOwnerMayRead(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no such permissions on Windows")
	}
	dir := filepath.Join(t.TempDir(), "repo")
	put(t, create(t, dir), "data/aa/x", "x")
	for name, want := range map[string]os.FileMode{"": 0o700, "data": 0o700, "data/aa": 0o700, "data/aa/x": 0o600} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("%q: %v, %v; want %v", name, st.Mode().Perm(), err, want)
		}
	}
}

func TestLinksDoNotLeadOut(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	st := create(t, dir)
	if err := os.Symlink(outside, filepath.Join(dir, "dir")); err != nil {
		t.Skipf("no symbolic links here: %v", err)
	}
	if err := os.Symlink(secret, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dir/secret", "link"} {
		if n, err := st.ReadAt(t.Context(), name, make([]byte, 4), 0); err == nil || n > 0 {
			t.Errorf("read %s: %d bytes, %v", name, n, err)
		}
	}
	r, n := blobtest.Body([]byte("gone"))
	_ = st.Put(t.Context(), "link", r, n) // may replace the link, never what it leads to
	_ = st.Put(t.Context(), "dir/secret", r, n)
	_ = st.Put(t.Context(), "dir/new", r, n)
	_ = st.Delete(t.Context(), "dir/secret")
	if got, err := os.ReadFile(secret); err != nil || string(got) != "keep" {
		t.Errorf("outside: %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(outside, "new")); err == nil {
		t.Error("a file was made outside")
	}
}

// Files that are none of ours are not listed and hinder nobody.
func TestForeignFiles(t *testing.T) {
	dir := t.TempDir()
	st := create(t, dir)
	put(t, st, "a", "x")
	for _, name := range []string{".hidden", "README", "lost+found", "name with spaces"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	names, err := blobtest.Names(t.Context(), st, "")
	if err != nil || !slices.Equal(names, []string{"a"}) {
		t.Errorf("list: %q, %v", names, err)
	}
}

// A second process that replaces an object is seen through an open file.
func TestReplacedByAnother(t *testing.T) {
	dir := t.TempDir()
	a, b := create(t, dir), create(t, dir)
	put(t, a, "lease", "one")
	for _, want := range []string{"one", "two", "three and more"} {
		put(t, b, "lease", want)
		if got, err := blobtest.Read(t.Context(), a, "lease"); err != nil || string(got) != want {
			t.Errorf("read %q, %v; want %q", got, err, want)
		}
	}
	if err := b.Delete(t.Context(), "lease"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.ReadAt(t.Context(), "lease", make([]byte, 1), 0); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("deleted by another: %v, want fault.ErrNotFound", err)
	}
}

func TestManyOpenFiles(t *testing.T) {
	st := create(t, t.TempDir())
	for i := range 200 {
		put(t, st, fmt.Sprintf("d%d/x", i), fmt.Sprint(i))
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for _, i := range rand.Perm(200) {
				got, err := blobtest.Read(t.Context(), st, fmt.Sprintf("d%d/x", i))
				if err != nil || string(got) != fmt.Sprint(i) {
					t.Errorf("read %d: %q, %v", i, got, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestLockNamesItsHolder(t *testing.T) {
	dir := t.TempDir()
	a, b := create(t, dir), create(t, dir)
	release, err := a.Lock(t.Context(), "writer", true)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	_, err = b.Lock(t.Context(), "writer", false)
	if !errors.Is(err, fault.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d on ", os.Getpid())) {
		t.Errorf("%v: want fault.ErrLocked that names this process", err)
	}
}

func TestLeftTemporaryFilesAreSwept(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, "tmp", "0123")
	leave := func() {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(left), 0o700), os.WriteFile(left, []byte("half"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	leave()
	a := create(t, dir)
	if _, err := os.Stat(left); err != nil {
		t.Errorf("opening a store to read changed it: %v", err)
	}
	put(t, a, "x", "x")
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("nobody lives, and it was left: %v", err)
	}
	leave()
	b := create(t, dir)
	put(t, b, "y", "y")
	if _, err := os.Stat(left); err != nil {
		t.Errorf("removed while a writer lives that it may belong to: %v", err)
	}
}

func TestErrorsOfTheDiskHaveClasses(t *testing.T) {
	for _, c := range []struct {
		op   string
		err  error
		want error
	}{
		{"write", syscall.ENOSPC, fault.ErrNoSpace},
		{"create", syscall.ENOSPC, fault.ErrNoSpace},
		{"sync", syscall.ENOSPC, fault.ErrNoSpace},
		{"mkdir", syscall.EDQUOT, fault.ErrNoSpace},
		{"rename", syscall.ENOSPC, fault.ErrNoSpace},
		{"create", syscall.EROFS, fault.ErrReadOnly},
		{"mkdir", syscall.EACCES, fault.ErrReadOnly},
		{"write", syscall.EIO, syscall.EIO},
		{"sync", syscall.EIO, syscall.EIO},
		{"syncdir", syscall.EIO, syscall.EIO},
	} {
		if runtime.GOOS == "windows" {
			t.Skip("these are the errors of unix")
		}
		disk := filetest.New()
		st := file.OpenFS(disk, "disk")
		put(t, st, "a/x", "old")
		disk.Hook(func(op, name string) error {
			if op == c.op {
				return c.err
			}
			return nil
		})
		r, n := blobtest.Body([]byte("new"))
		if err := st.Put(t.Context(), "b/x", r, n); !errors.Is(err, c.want) {
			t.Errorf("%s fails with %v: %v, want %v", c.op, c.err, err, c.want)
		}
		disk.Hook(nil)
		if got, err := blobtest.Read(t.Context(), st, "a/x"); err != nil || string(got) != "old" {
			t.Errorf("%s fails with %v: %q, %v", c.op, c.err, got, err)
		}
		if left, err := disk.ReadDir("tmp"); err != nil || len(left) > 0 {
			t.Errorf("%s fails with %v: left %v, %v", c.op, c.err, left, err)
		}
		if c.op == "syncdir" {
			// What a failed sync of a directory lost, a second one may not tell:
			// this store does not trust it again, a new one starts from the disk.
			if err := st.Put(t.Context(), "b/y", r, n); !errors.Is(err, c.want) {
				t.Errorf("a directory whose sync failed is trusted: %v", err)
			}
			st = file.OpenFS(disk, "disk")
		}
		put(t, st, "b/x", "new")
	}
}

// A file whose sync failed never gets its name, whatever a second sync says.
func TestFailedSyncIsNotTrusted(t *testing.T) {
	disk := filetest.New()
	st := file.OpenFS(disk, "disk")
	failed := false
	disk.Hook(func(op, name string) error {
		if op == "sync" && !failed {
			failed = true
			return syscall.EIO
		}
		return nil
	})
	r, n := blobtest.Body([]byte("new"))
	if err := st.Create(t.Context(), "x", r, n); !errors.Is(err, syscall.EIO) {
		t.Errorf("create: %v, want EIO", err)
	}
	if _, err := st.Size(t.Context(), "x"); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("size: %v, want fault.ErrNotFound", err)
	}
}

// Puts that end together share the sync of their directory.
func TestDirectorySyncsAreShared(t *testing.T) {
	const writers = 16
	disk := filetest.New()
	st := file.OpenFS(disk, "disk")
	put(t, st, "d/first", "x")
	var syncs, renames atomic.Int32
	gate := make(chan struct{})
	disk.Hook(func(op, name string) error {
		switch {
		case op == "syncdir" && name == "d":
			if syncs.Add(1) == 1 {
				<-gate // the first is slow; all others gather behind it
			}
		case op == "rename":
			renames.Add(1)
		}
		return nil
	})
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() { put(t, st, fmt.Sprintf("d/%d", i), "x") })
	}
	for renames.Load() < writers {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	close(gate)
	wg.Wait()
	if n := syncs.Load(); n > 3 {
		t.Errorf("%d puts took %d syncs, want 3 at most", writers, n)
	}
}

func BenchmarkPutPack(b *testing.B) {
	st, err := file.Create(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 64<<20)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data)
	b.SetBytes(int64(len(data)))
	for i := range b.N {
		body, n := blobtest.Body(data)
		if err := st.Put(b.Context(), fmt.Sprintf("data/%02x/%d", i%4, i), body, n); err != nil {
			b.Fatal(err)
		}
	}
}

// What is set aside is out of every listing and every name's way, and stays on
// the disk until it is forgotten.
func TestSetAside(t *testing.T) {
	dir := t.TempDir()
	st := create(t, dir)
	put(t, st, "a/x", "first")
	put(t, st, "a/y", "other")
	for range 2 { // one that is gone is no error
		if err := st.SetAside(t.Context(), "a/x", "monday"); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || !slices.Equal(names, []string{"a/y"}) {
		t.Errorf("list: %q, %v", names, err)
	}
	if _, err := st.Size(t.Context(), "a/x"); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("size: %v", err)
	}
	put(t, st, "a/x", "second")
	if err := st.SetAside(t.Context(), "a/x", "monday"); !errors.Is(err, fault.ErrExists) {
		t.Errorf("a place that is taken: %v, want fault.ErrExists", err)
	}
	if b, err := blobtest.Read(t.Context(), st, "a/x"); err != nil || string(b) != "second" {
		t.Errorf("it holds %q, %v", b, err)
	}
	if err := st.SetAside(t.Context(), "a/x", "tuesday"); err != nil {
		t.Fatal(err)
	}
	for _, under := range []string{"", "..", "a/b", "../../x"} {
		if err := st.SetAside(t.Context(), "a/y", under); err == nil {
			t.Errorf("set aside under %q", under)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, ".aside", "monday", "a", "x")); err != nil || string(b) != "first" {
		t.Errorf("aside is %q, %v", b, err)
	}
	if n, err := st.ForgetAside(t.Context(), func(under string) bool { return under == "monday" }); err != nil || n != 1 {
		t.Errorf("forgot %d, %v", n, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, ".aside")); err != nil || len(left) != 1 || left[0].Name() != "tuesday" {
		t.Errorf("left %v, %v", left, err)
	}
	put(t, st, "b/x", "again")
	if err := st.SetAside(t.Context(), "b/x", "monday"); err != nil {
		t.Errorf("in a directory that was forgotten: %v", err)
	}
}
