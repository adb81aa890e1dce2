package file_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/fault"
)

// pieces are the names and lengths of what is kept back in dir.
func pieces(t *testing.T, dir string) (bytes int64, n int) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, ".reserve"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, e := range entries {
		st, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		bytes += st.Size()
	}
	return bytes, len(entries)
}

// The first writer keeps room back, the next one makes what is missing or was
// half made, and nobody sees an object in it.
func TestRoomIsKeptBack(t *testing.T) {
	dir := t.TempDir()
	st := create(t, dir)
	if _, n := pieces(t, dir); n != 0 {
		t.Errorf("%d pieces before anything was written", n)
	}
	put(t, st, "a", "a")
	if bytes, n := pieces(t, dir); bytes != 1<<20 || n != 8 {
		t.Errorf("%d bytes in %d pieces are kept back, want 1 MiB in 8", bytes, n)
	}
	if names, err := blobtest.Names(t.Context(), st, ""); err != nil || len(names) != 1 {
		t.Errorf("%v, %v; want a alone", names, err)
	}
	if err := os.Remove(filepath.Join(dir, ".reserve", "3")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, ".reserve", "5"), 100); err != nil {
		t.Fatal(err)
	}
	put(t, create(t, dir), "b", "b")
	if bytes, n := pieces(t, dir); bytes != 1<<20 || n != 8 {
		t.Errorf("%d bytes in %d pieces after the next writer, want 1 MiB in 8", bytes, n)
	}
}

// On a disk, or with a quota, that is full who frees room may write small
// objects, as long as room that was kept back is left; others may not.
func TestOnlyWhoFreesHasWhatIsKeptBack(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("these are the errors of unix")
	}
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		disk := filetest.New()
		st := file.OpenFS(disk, "disk")
		st.KeepReserve()
		put(t, st, "a", strings.Repeat("a", 1<<20))
		missing := 2 // pieces until there is room for the next object
		disk.Hook(func(op, name string) error {
			switch {
			case op == "remove" && strings.HasPrefix(name, ".reserve/"):
				missing--
			case op == "write" && missing > 0:
				return full
			}
			return nil
		})
		freeing := blob.Freeing(t.Context())
		r, n := blobtest.Body([]byte("b"))
		if err := st.Create(t.Context(), "b", r, n); !errors.Is(err, fault.ErrNoSpace) || missing != 2 {
			t.Errorf("%v: a backup wrote (%v), or was let have %d pieces", full, err, 2-missing)
		}
		big, n := blobtest.Body(make([]byte, 1<<20+1))
		if err := st.Put(freeing, "big", big, n); !errors.Is(err, fault.ErrNoSpace) || missing != 2 {
			t.Errorf("%v: %v; %d pieces were let go for what they have no room for", full, err, 2-missing)
		}
		r, n = blobtest.Body([]byte("b"))
		if err := st.Create(freeing, "b", r, n); err != nil || missing != 0 {
			t.Errorf("%v: %v, %d pieces more would have been needed", full, err, missing)
		}
		if err := st.Create(freeing, "b", r, n); !errors.Is(err, fault.ErrExists) {
			t.Errorf("%v: created twice: %v", full, err)
		}
		missing = 100
		if err := st.Put(freeing, "c", r, n); !errors.Is(err, fault.ErrNoSpace) {
			t.Errorf("%v: %v, when nothing is left to let go", full, err)
		}
		if left, err := disk.ReadDir(".reserve"); err != nil || len(left) > 0 {
			t.Errorf("%v: %v left, %v", full, left, err)
		}

		// What is deleted makes room, and that is kept back again.
		missing = 0
		if err := st.Delete(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if left, err := disk.ReadDir(".reserve"); err != nil || len(left) != 8 {
			t.Errorf("%v: %v kept back, %v; want 8 pieces", full, left, err)
		}
	}
}
