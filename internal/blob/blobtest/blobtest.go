// Package blobtest holds the conformance suite that every store passes, and
// stores that break on cue.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
)

// Run runs the suite; create makes an empty store for each part of it and
// cleans up with t.
func Run(t *testing.T, create func(t *testing.T) blob.Store) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, blob.Store)
	}{
		{"what was put is read back", putAndRead},
		{"reads at the edges of an object", readEdges},
		{"put replaces", putReplaces},
		{"a replaced object is whole for every reader", replaceIsWhole},
		{"create refuses to replace", createRefuses},
		{"one of many creators wins", oneCreatorWins},
		{"a short or broken body stores nothing", badBody},
		{"what does not exist", missing},
		{"delete", deleteObject},
		{"list is ordered", listOrder},
		{"list by prefix", listPrefix},
		{"list ends early", listEndsEarly},
		{"list sees what returned before it", listFresh},
		{"bad names are refused", badNames},
		{"a cancelled context ends every call", cancelled},
		{"writers and readers together", together},
		{"locks", locks},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			st := create(t)
			c.run(t, st)
			if err := st.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
}

// Body makes the ReaderAt and the size that Put takes.
func Body(data []byte) (io.ReaderAt, int64) { return bytes.NewReader(data), int64(len(data)) }

// Read reads a whole object.
func Read(ctx context.Context, st blob.Store, name string) ([]byte, error) {
	size, err := st.Size(ctx, name)
	if err != nil {
		return nil, err
	}
	data := make([]byte, size)
	n, err := st.ReadAt(ctx, name, data, 0)
	if err == nil && int64(n) < size {
		err = io.ErrUnexpectedEOF
	}
	return data[:n], err
}

// Names lists the names of all objects with prefix.
func Names(ctx context.Context, st blob.Store, prefix string) ([]string, error) {
	var names []string
	for o, err := range st.List(ctx, prefix) {
		if err != nil {
			return names, err
		}
		names = append(names, o.Name)
	}
	return names, nil
}

// pattern is n bytes that differ by seed and by place.
func pattern(seed, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(seed*131 + i*7 + i>>8*13)
	}
	return p
}

func mustPut(t *testing.T, st blob.Store, name string, data []byte) {
	t.Helper()
	r, n := Body(data)
	if err := st.Put(t.Context(), name, r, n); err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
}

func mustHold(t *testing.T, st blob.Store, name string, want []byte) {
	t.Helper()
	got, err := Read(t.Context(), st, name)
	if err != nil {
		t.Errorf("read %s: %v", name, err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%s holds %d other bytes than the %d that were stored", name, len(got), len(want))
	}
}

func putAndRead(t *testing.T, st blob.Store) {
	for i, size := range []int{0, 1, 4095, 4096, 4097, 1<<20 + 1, 5 << 20} {
		name := fmt.Sprintf("a/b%d/c", i)
		data := pattern(i, size)
		mustPut(t, st, name, data)
		want := bytes.Clone(data)
		clear(data) // the store must not keep the caller's memory
		mustHold(t, st, name, want)
		if n, err := st.Size(t.Context(), name); err != nil || n != int64(size) {
			t.Errorf("size of %s: %d, %v; want %d", name, n, err, size)
		}
	}
}

func readEdges(t *testing.T, st blob.Store) {
	data := pattern(1, 1000)
	mustPut(t, st, "x", data)
	for _, c := range []struct {
		name   string
		off    int64
		length int
		want   int
		err    error
	}{
		{"whole", 0, 1000, 1000, nil},
		{"the last byte", 999, 1, 1, nil},
		{"one byte too many", 0, 1001, 1000, io.EOF},
		{"across the end", 990, 20, 10, io.EOF},
		{"at the end", 1000, 1, 0, io.EOF},
		{"far behind the end", 1 << 40, 1, 0, io.EOF},
		{"nothing", 10, 0, 0, nil},
	} {
		p := make([]byte, c.length)
		n, err := st.ReadAt(t.Context(), "x", p, c.off)
		if n != c.want || err != c.err {
			t.Errorf("%s: %d, %v; want %d, %v", c.name, n, err, c.want, c.err)
		}
		if c.want > 0 && !bytes.Equal(p[:n], data[c.off:c.off+int64(n)]) {
			t.Errorf("%s: other bytes", c.name)
		}
	}
	if _, err := st.ReadAt(t.Context(), "x", make([]byte, 1), -1); err == nil || err == io.EOF {
		t.Errorf("negative offset: %v", err)
	}
}

func putReplaces(t *testing.T, st blob.Store) {
	for i, size := range []int{100, 5000, 10, 0} {
		mustPut(t, st, "same/name", pattern(i, size))
		mustHold(t, st, "same/name", pattern(i, size))
	}
}

func replaceIsWhole(t *testing.T, st blob.Store) {
	const size = 256 << 10
	fill := func(b byte) []byte { return bytes.Repeat([]byte{b}, size) }
	mustPut(t, st, "x", fill(0))
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop.Store(true)
		for i := range 20 {
			r, n := Body(fill(byte(i)))
			if err := st.Put(t.Context(), "x", r, n); err != nil {
				t.Errorf("put: %v", err)
				return
			}
		}
	})
	p := make([]byte, size)
	for !stop.Load() {
		n, err := st.ReadAt(t.Context(), "x", p, 0)
		if n != size || err != nil {
			t.Errorf("read: %d, %v", n, err)
			break
		}
		if !bytes.Equal(p, fill(p[0])) {
			t.Error("a reader saw half of one version and half of another")
			break
		}
	}
	wg.Wait()
}

func createRefuses(t *testing.T, st blob.Store) {
	r, n := Body(pattern(1, 500))
	if err := st.Create(t.Context(), "one", r, n); err != nil {
		t.Fatalf("create: %v", err)
	}
	r, n = Body(pattern(2, 300))
	if err := st.Create(t.Context(), "one", r, n); !errors.Is(err, fault.ErrExists) {
		t.Errorf("second create: %v, want fault.ErrExists", err)
	}
	mustHold(t, st, "one", pattern(1, 500))
	mustPut(t, st, "two", nil)
	if err := st.Create(t.Context(), "two", r, n); !errors.Is(err, fault.ErrExists) {
		t.Errorf("create over an empty object that was put: %v, want fault.ErrExists", err)
	}
	mustHold(t, st, "two", nil)
}

func oneCreatorWins(t *testing.T, st blob.Store) {
	const creators = 8
	for round := range 10 {
		name := fmt.Sprintf("outcome/%d", round)
		var wg sync.WaitGroup
		errs := make([]error, creators)
		for i := range creators {
			wg.Go(func() {
				r, n := Body(pattern(i, 100+i))
				errs[i] = st.Create(t.Context(), name, r, n)
			})
		}
		wg.Wait()
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner >= 0:
				t.Fatalf("creators %d and %d both won", winner, i)
			case err == nil:
				winner = i
			case !errors.Is(err, fault.ErrExists):
				t.Errorf("creator %d: %v", i, err)
			}
		}
		if winner < 0 {
			t.Fatal("nobody won")
		}
		mustHold(t, st, name, pattern(winner, 100+winner))
	}
}

type brokenBody struct{ after int64 }

var errBody = errors.New("the body broke")

func (b brokenBody) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > b.after {
		return int(max(0, b.after-off)), errBody
	}
	return len(p), nil
}

func badBody(t *testing.T, st blob.Store) {
	mustPut(t, st, "old", []byte("old"))
	short := bytes.NewReader(pattern(1, 100))
	for name, call := range map[string]func(name string) error{
		"short put":     func(n string) error { return st.Put(t.Context(), n, short, 101) },
		"short create":  func(n string) error { return st.Create(t.Context(), n, short, 101) },
		"broken put":    func(n string) error { return st.Put(t.Context(), n, brokenBody{2 << 20}, 3<<20) },
		"broken create": func(n string) error { return st.Create(t.Context(), n, brokenBody{2 << 20}, 3<<20) },
		"negative size": func(n string) error { return st.Put(t.Context(), n, short, -1) },
	} {
		if err := call("new"); err == nil || errors.Is(err, fault.ErrExists) {
			t.Errorf("%s: %v, want an error", name, err)
		} else if strings.HasPrefix(name, "broken") && !errors.Is(err, errBody) {
			t.Errorf("%s: %v does not carry the body's error", name, err)
		}
		if err := call("old"); err == nil {
			t.Errorf("%s over an object: no error", name)
		}
	}
	mustHold(t, st, "old", []byte("old"))
	if _, err := st.Size(t.Context(), "new"); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("after failed puts: %v, want fault.ErrNotFound", err)
	}
	if names, err := Names(t.Context(), st, ""); err != nil || !slices.Equal(names, []string{"old"}) {
		t.Errorf("list: %q, %v", names, err)
	}
}

func missing(t *testing.T, st blob.Store) {
	mustPut(t, st, "dir/x", nil)
	for _, name := range []string{"none", "dir", "dir/y", "dir/x/y", "none/at/all"} {
		if _, err := st.Size(t.Context(), name); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("size of %s: %v, want fault.ErrNotFound", name, err)
		}
		if n, err := st.ReadAt(t.Context(), name, make([]byte, 10), 0); n != 0 || !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("read of %s: %d, %v, want fault.ErrNotFound", name, n, err)
		}
	}
	for _, prefix := range []string{"none", "none/", "dir/x/y"} {
		if names, err := Names(t.Context(), st, prefix); len(names) > 0 || err != nil {
			t.Errorf("list %q: %q, %v", prefix, names, err)
		}
	}
}

func deleteObject(t *testing.T, st blob.Store) {
	mustPut(t, st, "a/x", pattern(1, 100))
	mustPut(t, st, "a/y", pattern(2, 100))
	if _, err := st.ReadAt(t.Context(), "a/x", make([]byte, 10), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := st.Delete(t.Context(), "a/x"); err != nil {
			t.Errorf("delete: %v", err)
		}
		if n, err := st.ReadAt(t.Context(), "a/x", make([]byte, 10), 0); !errors.Is(err, fault.ErrNotFound) {
			t.Errorf("read after delete: %d, %v", n, err)
		}
	}
	if err := st.Delete(t.Context(), "never/was"); err != nil {
		t.Errorf("delete of what never was: %v", err)
	}
	mustHold(t, st, "a/y", pattern(2, 100))
	r, n := Body(pattern(3, 50))
	if err := st.Create(t.Context(), "a/x", r, n); err != nil {
		t.Errorf("create after delete: %v", err)
	}
	mustHold(t, st, "a/x", pattern(3, 50))
	for _, name := range []string{"a/x", "a/y"} {
		if err := st.Delete(t.Context(), name); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if names, err := Names(t.Context(), st, ""); err != nil || len(names) > 0 {
		t.Errorf("list after all deletes: %q, %v", names, err)
	}
	mustPut(t, st, "a/z", nil)
}

func listOrder(t *testing.T, st blob.Store) {
	// "-" and "." sort before "/", digits and letters behind it: a walk of
	// directories in their own order would get these wrong.
	names := []string{"a", "b/c", "b-c", "b.c", "b0", "b/c0/x", "b/c.x", "b/d", "z", "b0/x/y", "b-/q"}
	names = slices.DeleteFunc(names, func(n string) bool { return n == "b0" }) // cannot be beside b0/x
	for i, name := range names {
		mustPut(t, st, name, pattern(i, i))
	}
	got, err := Names(t.Context(), st, "")
	slices.Sort(names)
	if err != nil || !slices.Equal(got, names) {
		t.Errorf("list: %q, %v; want %q", got, err, names)
	}
}

func listPrefix(t *testing.T, st blob.Store) {
	for i, name := range []string{"pack/aa/1", "pack/aa/2", "pack/ab/3", "pack/b", "pac", "packs/x"} {
		mustPut(t, st, name, pattern(i, 10*i))
	}
	for prefix, want := range map[string][]string{
		"":          {"pac", "pack/aa/1", "pack/aa/2", "pack/ab/3", "pack/b", "packs/x"},
		"pac":       {"pac", "pack/aa/1", "pack/aa/2", "pack/ab/3", "pack/b", "packs/x"},
		"pack":      {"pack/aa/1", "pack/aa/2", "pack/ab/3", "pack/b", "packs/x"},
		"pack/":     {"pack/aa/1", "pack/aa/2", "pack/ab/3", "pack/b"},
		"pack/a":    {"pack/aa/1", "pack/aa/2", "pack/ab/3"},
		"pack/aa/":  {"pack/aa/1", "pack/aa/2"},
		"pack/aa/2": {"pack/aa/2"},
		"pack/b":    {"pack/b"},
		"q":         nil,
	} {
		got, err := Names(t.Context(), st, prefix)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("list %q: %q, %v; want %q", prefix, got, err, want)
		}
	}
	for o, err := range st.List(t.Context(), "pack/ab/") {
		if err != nil || o.Bytes != 20 {
			t.Errorf("%+v, %v: want 20 bytes", o, err)
		}
	}
}

func listEndsEarly(t *testing.T, st blob.Store) {
	for i := range 20 {
		mustPut(t, st, fmt.Sprintf("d%d/x", i), nil)
	}
	seen := 0
	for _, err := range st.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		if seen++; seen == 3 {
			break
		}
	}
	if seen != 3 {
		t.Errorf("saw %d", seen)
	}
}

func listFresh(t *testing.T, st blob.Store) {
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 10 {
				name := fmt.Sprintf("w%d/%d", i, j)
				r, n := Body(nil)
				if err := st.Create(t.Context(), name, r, n); err != nil {
					t.Errorf("create: %v", err)
				}
				names, err := Names(t.Context(), st, fmt.Sprintf("w%d/", i))
				if err != nil || len(names) != j+1 || !slices.Contains(names, name) {
					t.Errorf("list right after create %s: %q, %v", name, names, err)
				}
			}
		})
	}
	wg.Wait()
}

func badNames(t *testing.T, st blob.Store) {
	for _, name := range []string{
		"", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.hidden",
		"A", "a b", "a\\b", "a\x00b", "ä", "a:b", "tmp", "tmp/x", "lock", "lock/x", strings.Repeat("x", 300), strings.Repeat("x/", 600) + "x",
	} {
		r, n := Body([]byte("x"))
		if err := st.Put(t.Context(), name, r, n); err == nil {
			t.Errorf("put %q: no error", name)
		}
		if err := st.Create(t.Context(), name, r, n); err == nil {
			t.Errorf("create %q: no error", name)
		}
		if _, err := st.Size(t.Context(), name); err == nil {
			t.Errorf("size %q: no error", name)
		}
		if _, err := st.ReadAt(t.Context(), name, make([]byte, 1), 0); err == nil {
			t.Errorf("read %q: no error", name)
		}
		if err := st.Delete(t.Context(), name); err == nil {
			t.Errorf("delete %q: no error", name)
		}
	}
	if names, err := Names(t.Context(), st, ""); err != nil || len(names) > 0 {
		t.Errorf("list: %q, %v", names, err)
	}
}

func cancelled(t *testing.T, st blob.Store) {
	mustPut(t, st, "x", []byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r, n := Body([]byte("y"))
	_, errRead := st.ReadAt(ctx, "x", make([]byte, 1), 0)
	_, errSize := st.Size(ctx, "x")
	_, errList := Names(ctx, st, "")
	for op, err := range map[string]error{
		"put": st.Put(ctx, "x", r, n), "create": st.Create(ctx, "y", r, n), "delete": st.Delete(ctx, "x"),
		"read": errRead, "size": errSize, "list": errList,
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want context.Canceled", op, err)
		}
	}
	mustHold(t, st, "x", []byte("x"))
}

func together(t *testing.T, st blob.Store) {
	const workers, each = 8, 12
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				name := fmt.Sprintf("p/%d%d/x", i%3, w)
				data := pattern(w*100+i, 10000+w)
				r, n := Body(data)
				if err := st.Put(t.Context(), name, r, n); err != nil {
					t.Errorf("put %s: %v", name, err)
					return
				}
				if got, err := Read(t.Context(), st, name); err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %s: %d bytes, %v", name, len(got), err)
				}
				if i%4 == 3 {
					if err := st.Delete(t.Context(), name); err != nil {
						t.Errorf("delete %s: %v", name, err)
					}
				}
			}
		})
	}
	wg.Wait()
}

func locks(t *testing.T, st blob.Store) {
	l, ok := st.(blob.Locker)
	if !ok {
		return // nothing asked for any; a store that means to have them asserts so
	}
	take := func(exclusive bool) func() {
		t.Helper()
		release, err := l.Lock(t.Context(), "writer", exclusive)
		if err != nil {
			t.Fatalf("lock, exclusive %v: %v", exclusive, err)
		}
		return release
	}
	refuse := func(exclusive bool) {
		t.Helper()
		if _, err := l.Lock(t.Context(), "writer", exclusive); !errors.Is(err, fault.ErrLocked) {
			t.Errorf("lock, exclusive %v: %v, want fault.ErrLocked", exclusive, err)
		}
	}
	a, b := take(false), take(false)
	refuse(true)
	a()
	refuse(true)
	b()
	c := take(true)
	refuse(false)
	refuse(true)
	if release, err := l.Lock(t.Context(), "another", true); err != nil {
		t.Errorf("another lock: %v", err)
	} else {
		release()
	}
	c()
	c() // twice is no harm
	take(false)()
	if names, err := Names(t.Context(), st, ""); err != nil || len(names) > 0 {
		t.Errorf("locks are listed as objects: %q, %v", names, err)
	}
}
