package reposerver

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/blobtest"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/blob/retry"
)

// The test's own program is the server that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("RUN_REPOSERVER"); dir != "" {
		srv, err := Open(context.Background(), Options{Dir: dir, ImmutableFor: -1})
		if err == nil {
			var l net.Listener
			if l, err = net.Listen("tcp", os.Getenv("RUN_REPOSERVER_AT")); err == nil {
				err = srv.Serve(context.Background(), l)
			}
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// However often the server is killed while clients store, what they were told
// is stored is there, whole, and nothing is there by halves. Exactly one creator
// of each name wins.
func TestKilledAgainAndAgain(t *testing.T) {
	kills := 8
	if testing.Short() {
		kills = 2
	}
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	start := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "RUN_REPOSERVER="+dir, "RUN_REPOSERVER_AT="+addr)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for range 12_000 {
			if c, err := net.Dial("tcp", addr); err == nil {
				c.Close()
				return cmd
			}
			time.Sleep(25 * time.Millisecond)
		}
		cmd.Process.Kill()
		t.Fatal("the server does not answer")
		return nil
	}
	tokens, err := OpenTokens(t.Context(), dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer tokens.Close()
	tok, err := tokens.Add(t.Context(), "web01", Backup, []string{"r"})
	if err != nil {
		t.Fatal(err)
	}
	server := start()
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	stored := map[string]int{} // names that were acknowledged, and their lengths
	var clients sync.WaitGroup
	for c := range 3 {
		st, err := remote.Create(ctx, remote.Location{Host: addr, Repo: "r"}, tok)
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		patient := retry.Wrap(st, retry.Options{First: 5 * time.Millisecond, Longest: 100 * time.Millisecond})
		body := make([]byte, 6<<20)
		for i := range body {
			body[i] = byte(rand.Uint32())
		}
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				body := body[:1+(n*977_777)%len(body)]
				body[0] = byte(n)
				sum := blake3.Sum256(body)
				name := fmt.Sprintf("data/%02x/%s", c, hex.EncodeToString(sum[:]))
				call := patient.Put
				if n%2 == 0 {
					call = patient.Create
				}
				if err := call(ctx, name, bytes.NewReader(body), int64(len(body))); err != nil {
					if ctx.Err() == nil {
						t.Errorf("%s: %v", name, err)
					}
					return
				}
				mu.Lock()
				stored[name] = len(body)
				mu.Unlock()
			}
		})
	}
	for range kills {
		time.Sleep(time.Duration(20+random.IntN(300)) * time.Millisecond)
		server.Process.Kill()
		server.Wait()
		server = start()
	}
	time.Sleep(100 * time.Millisecond)
	waitFor(t, "something to be stored", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(stored) > 0
	})
	cancel()
	clients.Wait()
	st, err := remote.Open(t.Context(), remote.Location{Host: addr, Repo: "r"}, tok)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	found := 0
	for o, err := range st.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		b, err := blobtest.Read(t.Context(), st, o.Name)
		sum := blake3.Sum256(b)
		if err != nil || !strings.HasSuffix(o.Name, "/"+hex.EncodeToString(sum[:])) {
			t.Errorf("%s of %d bytes is not whole: %v", o.Name, o.Bytes, err)
		}
		if n, ok := stored[o.Name]; ok {
			if int64(n) != o.Bytes {
				t.Errorf("%s has %d bytes, want %d", o.Name, o.Bytes, n)
			}
			found++
		}
	}
	if found != len(stored) || found == 0 {
		t.Errorf("%d of %d objects that were acknowledged are there", found, len(stored))
	}
	t.Logf("%d objects, %d kills", found, kills)

	// What the killed ones left is gone once a new one has written.
	server.Process.Kill()
	server.Wait()
	server = start()
	body := []byte("the last")
	var again blob.Store = st
	name := hashed("data/", string(body))
	if err := retry.Wrap(again, retry.Options{First: time.Millisecond}).Put(t.Context(), name, bytes.NewReader(body), int64(len(body))); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "r", "tmp")); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
}

// Told to stop, the server lets a PUT that has begun end.
func TestStopLetsAPutEnd(t *testing.T) {
	g := serve(t, Options{ImmutableFor: -1})
	st := g.open("root", Admin, "r")
	began, goOn := make(chan struct{}), make(chan struct{})
	body := &slowBody{data: bytes.Repeat([]byte("x"), 3<<20), began: began, goOn: goOn}
	done := make(chan error, 1)
	go func() { done <- st.Put(context.Background(), "a", body, int64(len(body.data))) }()
	<-began
	stopped := make(chan struct{})
	go func() {
		g.stop()
		close(stopped)
	}()
	time.Sleep(100 * time.Millisecond)
	select {
	case <-stopped:
		t.Error("the server did not wait")
	default:
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Errorf("put: %v", err)
	}
	<-stopped
	if info, err := os.Stat(filepath.Join(g.dir, "r", "a")); err != nil || info.Size() != int64(len(body.data)) {
		t.Errorf("%v, %v", info, err)
	}
}

// A slowBody stops half-way, the second time that it is read.
type slowBody struct {
	data        []byte
	began, goOn chan struct{}

	mu    sync.Mutex
	reads int
}

func (b *slowBody) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 {
		b.mu.Lock()
		b.reads++
		b.mu.Unlock()
	}
	b.mu.Lock()
	sending := b.reads == 2 && off >= int64(len(b.data)/2)
	if sending {
		b.reads++
	}
	b.mu.Unlock()
	if sending {
		close(b.began)
		<-b.goOn
	}
	return bytes.NewReader(b.data).ReadAt(p, off)
}
