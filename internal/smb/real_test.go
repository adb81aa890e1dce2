package smb_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
)

// Starting Samba takes its time, so the tests share what they leave running.
var shared, sharedPlain *smbtest.Server

func TestMain(m *testing.M) {
	code := m.Run()
	for _, s := range []*smbtest.Server{shared, sharedPlain} {
		if s != nil {
			s.Stop()
		}
	}
	os.Exit(code)
}

func server(t *testing.T) *smbtest.Server {
	t.Helper()
	return smbtest.Shared(t, &shared, smbtest.Options{})
}

// plainServer can't encrypt.
func plainServer(t *testing.T) *smbtest.Server {
	t.Helper()
	return smbtest.Shared(t, &sharedPlain, smbtest.Options{Plain: true})
}

// long keeps the short run short.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes some seconds")
	}
}

func target(s *smbtest.Server) smb.Target {
	return smb.Target{Host: "127.0.0.1", Port: s.Port, User: smbtest.User, Password: secret.New([]byte(smbtest.Password))}
}

func dial(t *testing.T, target smb.Target) *smb.Client {
	t.Helper()
	c, err := smb.Dial(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func on(name string) smb.Path { return smb.Path{Share: smbtest.Share, Name: name} }

// put makes a file of n random bytes on the server's share.
func put(t *testing.T, s *smbtest.Server, name string, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	rand.Read(p)
	if err := os.WriteFile(filepath.Join(s.Dir, name), p, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func openFile(t *testing.T, c *smb.Client, name string) *smb.File {
	t.Helper()
	f, err := c.Open(t.Context(), on(name), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// readers reads f at random from several goroutines until each has done n
// reads, and wants what content says.
func readers(t *testing.T, f *smb.File, content []byte, goroutines, n int) {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			r := mrand.New(mrand.NewPCG(seed, uint64(g)))
			p := make([]byte, 3<<20)
			for range n {
				off := r.Int64N(int64(len(content)))
				want := content[off:min(off+r.Int64N(int64(len(p))), int64(len(content)))]
				ctx := context.Background()
				if g%2 == 0 {
					ctx = t.Context()
				}
				got, err := f.ReadAtContext(ctx, p[:len(want)], off)
				if err != nil || !bytes.Equal(p[:got], want) {
					t.Errorf("read of %d bytes at %d: %d, %v; equal: %v", len(want), off, got, err, bytes.Equal(p[:got], want))
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestReads(t *testing.T) {
	s := server(t)
	content := put(t, s, "disk.vhdx", 24<<20+12345)
	c := dial(t, target(s))
	f := openFile(t, c, "disk.vhdx")
	if f.Bytes() != int64(len(content)) || f.Identity() == "" {
		t.Fatalf("%d bytes, identity %q", f.Bytes(), f.Identity())
	}
	t.Run("many at once", func(t *testing.T) { readers(t, f, content, 8, 5) })
	t.Run("front to back", func(t *testing.T) {
		c := dial(t, target(s)) // for which nothing is on its way any more
		f := openFile(t, c, "disk.vhdx")
		before := c.BytesRead()
		got, err := io.ReadAll(io.NewSectionReader(f, 0, f.Bytes()))
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		// Nothing of what was read ahead was read twice.
		if moved := c.BytesRead() - before; moved > f.Bytes() {
			t.Errorf("%d bytes came for %d", moved, f.Bytes())
		}
	})
	t.Run("the end", func(t *testing.T) {
		p := make([]byte, 100)
		if n, err := f.ReadAt(p, f.Bytes()-10); n != 10 || err != io.EOF || !bytes.Equal(p[:10], content[len(content)-10:]) {
			t.Errorf("%d, %v", n, err)
		}
		if n, err := f.ReadAt(p, f.Bytes()); n != 0 || err != io.EOF {
			t.Errorf("%d, %v", n, err)
		}
		if n, err := f.ReadAt(p, -1); n != 0 || err == nil {
			t.Errorf("%d, %v", n, err)
		}
	})
	t.Run("scattered reads take nothing along", func(t *testing.T) {
		c := dial(t, target(s))
		f := openFile(t, c, "disk.vhdx")
		before := c.BytesRead()
		p := make([]byte, 64<<10)
		for i := range int64(100) {
			if _, err := f.ReadAt(p, i*200<<10); err != nil {
				t.Fatal(err)
			}
		}
		if moved := c.BytesRead() - before; moved != 100*64<<10 {
			t.Errorf("%d bytes came for %d", moved, 100*64<<10)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.ReadAtContext(ctx, make([]byte, 1<<20), 0); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		readers(t, f, content, 2, 2) // which disturbed nobody
	})
}

// Several readers that go through a file together share what is read ahead, of
// which the memory serves again. Some of them give up on the way.
func TestReadAheadForSeveral(t *testing.T) {
	long(t)
	s := server(t)
	content := put(t, s, "long.vhdx", 96<<20)
	f := openFile(t, dial(t, target(s)), "long.vhdx")
	const part = 300_000 // so that most parts lie in two blocks, and every byte is asked for twice
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			p := make([]byte, 2*part)
			for i := next.Add(1) - 1; i*part < int64(len(content)); i = next.Add(1) - 1 {
				want := content[i*part : min((i+2)*part, int64(len(content)))]
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if i%7 == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Millisecond)
				}
				n, err := f.ReadAtContext(ctx, p[:len(want)], i*part)
				cancel()
				if errors.Is(err, context.DeadlineExceeded) {
					continue
				}
				if err != nil || !bytes.Equal(p[:n], want) {
					t.Errorf("read of %d bytes at %d: %d, %v; equal: %v", len(want), i*part, n, err, bytes.Equal(p[:n], want))
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestSignedOnlyIsAChoice(t *testing.T) {
	long(t)
	s := plainServer(t)
	content := put(t, s, "disk.vhdx", 5<<20)
	to := target(s)
	to.Protection = smb.SignedOnly
	f := openFile(t, dial(t, to), "disk.vhdx")
	readers(t, f, content, 4, 5)

	// Who does not choose it is not given it.
	_, err := smb.Dial(t.Context(), target(s))
	if !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), "does not encrypt") {
		t.Errorf("a host that does not encrypt: %v", err)
	}
}

// A host that can encrypt and does not ask for it gets nothing else from us.
func TestEncryptsUnasked(t *testing.T) {
	long(t)
	s := smbtest.Run(t, smbtest.Options{Global: "smb encrypt = if_required"})
	content := put(t, s, "disk.vhdx", 3<<20)
	f := openFile(t, dial(t, target(s)), "disk.vhdx")
	readers(t, f, content, 2, 3)
}

func TestOutage(t *testing.T) {
	long(t)
	s := server(t)
	content := put(t, s, "disk.vhdx", 32<<20)
	f := openFile(t, dial(t, target(s)), "disk.vhdx")
	var wg sync.WaitGroup
	wg.Go(func() {
		readers(t, f, content, 4, 25)
	})
	for range 2 {
		time.Sleep(50 * time.Millisecond)
		s.Kill()
		if err := s.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	// And once more for certain, whenever the readers were done.
	s.Kill()
	wg.Go(func() { readers(t, f, content, 2, 3) })
	if err := s.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
}

func TestOutageThatDoesNotEnd(t *testing.T) {
	long(t)
	s := server(t)
	put(t, s, "disk.vhdx", 1<<20)
	to := target(s)
	to.Outage = 300 * time.Millisecond
	f := openFile(t, dial(t, to), "disk.vhdx")
	s.Kill()
	_, err := f.ReadAt(make([]byte, 10), 4096)
	if err := s.Run(t.Context()); err != nil { // for the tests that come
		t.Fatal(err)
	}
	var smbErr *smb.Error
	if !errors.As(err, &smbErr) || smbErr.Offset != 4096 || !strings.HasPrefix(err.Error(), `\\127.0.0.1\vm\disk.vhdx: read at 4096: `) || !strings.Contains(err.Error(), "tried again for") {
		t.Error(err)
	}
}

func TestReplacedDuringAnOutage(t *testing.T) {
	long(t)
	s := server(t)
	path := filepath.Join(s.Dir, "disk.vhdx")
	for name, change := range map[string]func() error{
		"another file": func() error {
			// The old file lives on, so that its number isn't given out again.
			return errors.Join(os.Rename(path, path+".old"), os.WriteFile(path, make([]byte, 1<<20), 0o600))
		},
		"longer": func() error { return os.Truncate(path, 2<<20) },
		"written to": func() error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("x"), 0)
				err = errors.Join(err, f.Close())
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			put(t, s, "disk.vhdx", 1<<20)
			f := openFile(t, dial(t, target(s)), "disk.vhdx")
			s.Kill()
			time.Sleep(20 * time.Millisecond) // the clock of file systems is that coarse
			err := change()
			if err = errors.Join(err, s.Run(t.Context())); err != nil {
				t.Fatal(err)
			}
			if _, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, smb.ErrChanged) {
				t.Error(err)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	s := server(t)
	put(t, s, "disk.vhdx", 1000)
	if err := os.MkdirAll(filepath.Join(s.Dir, "dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	wrong := target(s)
	wrong.Password = secret.New([]byte("not it"))
	if _, err := smb.Dial(t.Context(), wrong); !errors.Is(err, fault.ErrDenied) || strings.Contains(err.Error(), "not it") {
		t.Errorf("wrong password: %v", err)
	}
	anonymous := target(s)
	anonymous.User, anonymous.Password = "", secret.Bytes{}
	if _, err := smb.Dial(t.Context(), anonymous); err == nil {
		t.Error("nobody in particular was let in")
	}
	c := dial(t, target(s))
	for _, x := range []struct {
		path  smb.Path
		class error
	}{
		{on("missing.vhdx"), fault.ErrNotFound},
		{on(`missing\disk.vhdx`), fault.ErrNotFound},
		{smb.Path{Share: "missing", Name: "disk.vhdx"}, fault.ErrNotFound},
		{on("dir"), nil},
		{on(`..\disk.vhdx`), nil},
		{on(`dir\..\disk.vhdx`), nil},
		{on("disk.vhdx:stream"), nil},
		{on("NUL"), nil},
		{on("dir/disk.vhdx"), nil},
		{smb.Path{Share: `vm\dir`, Name: "disk.vhdx"}, nil},
		{smb.Path{Share: "IPC$", Name: "srvsvc"}, nil},
	} {
		f, err := c.Open(t.Context(), x.path, "")
		if err == nil {
			f.Close()
		}
		if err == nil || x.class != nil && !errors.Is(err, x.class) {
			t.Errorf("%s: %v", x.path, err)
		}
	}
}

func TestWritesAndDirectories(t *testing.T) {
	s := server(t)
	c := dial(t, target(s))
	ctx := t.Context()
	t.Cleanup(func() { os.RemoveAll(filepath.Join(s.Dir, "restore")); os.RemoveAll(filepath.Join(s.Dir, "web01")) })
	if err := c.Mkdir(ctx, on("restore")); err != nil {
		t.Fatal(err)
	}
	if err := c.Mkdir(ctx, on("restore")); !errors.Is(err, fault.ErrExists) {
		t.Errorf("mkdir again: %v", err)
	}
	want := make([]byte, 8<<20+100)
	rand.Read(want)
	f, err := c.Create(ctx, on(`restore\disk.vhdx`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Create(ctx, on(`restore\disk.vhdx`)); !errors.Is(err, fault.ErrExists) {
		t.Errorf("create again: %v", err)
	}
	var wg sync.WaitGroup
	for off := 0; off < len(want); off += 3 << 20 {
		wg.Go(func() {
			part := want[off:min(off+3<<20, len(want))]
			if n, err := f.WriteAt(part, int64(off)); n != len(part) || err != nil {
				t.Error(n, err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(f.Truncate(10<<20), f.Sync(), f.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("written after Close")
	}
	got, err := os.ReadFile(filepath.Join(s.Dir, "restore/disk.vhdx"))
	if err != nil || !bytes.Equal(got, append(want, make([]byte, 10<<20-len(want))...)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}

	put(t, s, "restore/other", 10)
	if err := c.Rename(ctx, on(`restore\disk.vhdx`), on(`restore\other`)); !errors.Is(err, fault.ErrExists) {
		t.Errorf("rename over another file: %v", err)
	}
	if err := c.Rename(ctx, on("restore"), on("web01")); err != nil {
		t.Error(err)
	}
	list, err := c.List(ctx, on("web01"))
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, i := range list {
		stat, err := c.Stat(ctx, on("web01").Join(i.Name))
		if err != nil || stat.Bytes != i.Bytes || stat.Dir || !stat.Written.Equal(i.Written) {
			t.Errorf("%+v, %+v, %v", i, stat, err)
		}
	}
	if err := c.Remove(ctx, on("web01")); !errors.Is(err, smb.ErrNotEmpty) {
		t.Errorf("a directory that is not empty: %v", err)
	}
	if err := errors.Join(c.Remove(ctx, on(`web01\other`)), c.Remove(ctx, on(`web01\disk.vhdx`)), c.Remove(ctx, on("web01"))); err != nil {
		t.Error(err)
	}
	if _, err := c.Stat(ctx, on("web01")); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("after removal: %v", err)
	}
	space, err := c.Space(ctx, on(""))
	if err != nil || space.Free <= 0 || space.Free > space.Total {
		t.Errorf("%+v, %v", space, err)
	}
	if err := c.Room(ctx, on(""), space.Total+1); !errors.Is(err, fault.ErrNoSpace) {
		t.Errorf("room: %v", err)
	}
}

// What a host had not stored when it went away is not written again by guess.
func TestWriterEndsWithItsConnection(t *testing.T) {
	long(t)
	s := server(t)
	os.Remove(filepath.Join(s.Dir, "new.vhdx"))
	f, err := dial(t, target(s)).Create(t.Context(), on("new.vhdx"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if err := s.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := f.WriteAt(make([]byte, 4096), 4096); err == nil {
			t.Fatal("went on after the host was gone")
		}
	}
	if err := f.Sync(); err == nil {
		t.Error("synced what may be gone")
	}
}

func TestManyFiles(t *testing.T) {
	s := server(t)
	c := dial(t, target(s))
	var wg sync.WaitGroup
	for i := range 12 {
		name := fmt.Sprintf("disk%d.vhdx", i)
		content := put(t, s, name, 1<<20+i)
		f := openFile(t, c, name)
		wg.Go(func() { readers(t, f, content, 2, 4) })
	}
	wg.Wait()
}
