package repo

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

// The writer of TestStoppedWriters is this test binary, told so by these.
const (
	writerDir  = "BACKSTAY_TEST_WRITER_DIR"
	writerName = "BACKSTAY_TEST_WRITER_NAME"
	writerSeed = "BACKSTAY_TEST_WRITER_SEED"
)

func init() {
	if dir := os.Getenv(writerDir); dir != "" {
		beatEvery = 50 * time.Millisecond
		seed, _ := strconv.ParseUint(os.Getenv(writerSeed), 10, 64)
		os.Exit(writeFor(dir, os.Getenv(writerName), seed))
	}
}

// stoppedContent is what a writer with that seed stores. Half of its chunks are
// those of every other.
func stoppedContent(seed uint64) []byte {
	var b []byte
	for i := range uint64(12) {
		n := i
		if i%2 == 1 {
			n = 1000 + seed*100 + i
		}
		b = append(b, noise(n, testChunk)...)
	}
	return b
}

// writeFor is the process: it makes one point, slowly.
func writeFor(dir, name string, seed uint64) int {
	st, err := file.Open(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer st.Close()
	r, err := Open(bg, st, testKey)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("begins")
	content := stoppedContent(seed)
	s, err := r.Begin(bg, SessionOptions{})
	if err == nil {
		err = slowly(s, name, content)
		s.Abort(bg)
	}
	switch {
	case err == nil:
		fmt.Println("committed")
	case errors.Is(err, fault.ErrFenced):
		fmt.Println("fenced")
	default:
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func slowly(s *Session, name string, content []byte) error {
	w, err := s.Disk(bg, int64(len(content)), "")
	if err != nil {
		return err
	}
	for i := range int64(len(content)) / testChunk {
		if _, err := w.Put(bg, i, cut(content, i)); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	m, err := w.Finish(bg)
	if err != nil {
		return err
	}
	xml, err := s.PutBlob(bg, []byte("<domain>"+name+"</domain>"))
	if err != nil {
		return err
	}
	p := newPoint(name, m, int64(len(content)))
	p.Config = map[string]point.Blob{"domain.xml": xml}
	return s.Commit(bg, p)
}

// Real processes are stopped by SIGSTOP at any moment, for longer or shorter
// than a vacuum waits, while what their chunks rest on is deleted and vacuumed
// away; or they are killed. Whatever they then report is so.
func TestStoppedWriters(t *testing.T) {
	runs := 50
	if testing.Short() {
		runs = 5
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	saw := map[string]int{}
	slots := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for run := range runs {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			what := stopOne(t, exe, uint64(run))
			mu.Lock()
			defer mu.Unlock()
			saw[what]++
		})
	}
	wg.Wait()
	t.Logf("%d runs: %v", runs, saw)
	if runs >= 50 && (saw["committed"] == 0 || saw["fenced"] == 0 || saw["killed"] == 0) {
		t.Errorf("not everything happened: %v", saw)
	}
}

func stopOne(t *testing.T, exe string, seed uint64) string {
	rnd := rand.New(rand.NewPCG(seed, 3))
	dir := t.TempDir()
	st, err := file.Open(dir)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer st.Close()
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
		t.Error(err)
		return ""
	}
	r, err := Open(bg, st, testKey)
	if err != nil {
		t.Error(err)
		return ""
	}
	// What half of the writer's chunks are found in, and what goes.
	other := stoppedContent(seed + 500)
	gone, err := backup(bg, r, "gone", other, nil, nil)
	if err != nil {
		t.Error(err)
		return ""
	}
	var out, errs bytes.Buffer
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), writerDir+"="+dir, writerName+"=vm", writerSeed+"="+strconv.FormatUint(seed, 10))
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return ""
	}
	time.Sleep(time.Duration(rnd.IntN(500)) * time.Millisecond)
	_ = cmd.Process.Signal(syscall.SIGSTOP)
	if err := r.DeletePoint(bg, gone.VM, gone.ID); err != nil {
		t.Error(err)
	}
	vacuum := make(chan error, 1)
	go func() {
		_, err := r.Vacuum(bg, VacuumOptions{Patience: time.Second})
		vacuum <- err
	}()
	kill := rnd.IntN(5) == 0
	time.Sleep(time.Duration(rnd.IntN(2000)) * time.Millisecond)
	if kill {
		_ = cmd.Process.Kill()
	}
	_ = cmd.Process.Signal(syscall.SIGCONT)
	err = cmd.Wait()
	if verr := <-vacuum; verr != nil {
		t.Errorf("seed %d: vacuum: %v", seed, verr)
	}
	said := "killed"
	switch {
	case bytes.Contains(out.Bytes(), []byte("committed")):
		said = "committed"
	case bytes.Contains(out.Bytes(), []byte("fenced")):
		said = "fenced"
	case !kill || err == nil:
		t.Errorf("seed %d: the writer said %q, %q: %v", seed, &out, &errs, err)
	}
	for range 2 {
		fresh, err := Open(bg, st, testKey)
		if err != nil {
			t.Error(err)
			return said
		}
		points, err := fresh.Points(bg)
		if err != nil || said == "committed" && len(points) != 1 || said == "fenced" && len(points) != 0 {
			t.Errorf("seed %d: it said %s, and there are %d points: %v", seed, said, len(points), err)
		}
		for _, p := range points {
			if got, err := read(fresh, p); err != nil || !bytes.Equal(got, stoppedContent(seed)) {
				t.Errorf("seed %d: %s is lost: %v", seed, p.Ref(), err)
			}
		}
		if rep, err := fresh.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) > 0 {
			t.Errorf("seed %d: %+v, %v", seed, rep.Findings, err)
		}
		if _, err := fresh.Vacuum(bg, VacuumOptions{Patience: time.Second}); err != nil {
			t.Errorf("seed %d: vacuum at the end: %v", seed, err)
		}
	}
	return said
}
