package repo

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
)

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

// beWriter is the process that TestStoppedWriters stops. It makes one point,
// slowly.
func beWriter(r *Repository, name string, seed uint64) error {
	beatEvery = 50 * time.Millisecond
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
		return err
	}
	return nil
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
	var mu sync.Mutex
	saw := map[string]int{}
	slots := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for run := range runs {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			what := stopOne(t, uint64(run))
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

// told is what a process says; begun is closed at the first of it.
type told struct {
	text  []byte
	begun chan struct{}
}

func (o *told) Write(p []byte) (int, error) {
	if len(o.text) == 0 {
		close(o.begun)
	}
	o.text = append(o.text, p...)
	return len(p), nil
}

func stopOne(t *testing.T, seed uint64) string {
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
	var errs bytes.Buffer
	out := &told{begun: make(chan struct{})}
	cmd := player(dir, "writer", "vm", seed)
	cmd.Stdout, cmd.Stderr = out, &errs
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return ""
	}
	if seed%5 > 0 { // else it may be stopped before it has begun, as all would be by a busy machine
		select {
		case <-out.begun:
		case <-time.After(5 * time.Minute): // then it has nothing to say, which is an error below
		}
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
	case bytes.Contains(out.text, []byte("committed")):
		said = "committed"
	case bytes.Contains(out.text, []byte("fenced")):
		said = "fenced"
	case !kill || err == nil:
		t.Errorf("seed %d: the writer said %q, %q: %v", seed, out.text, &errs, err)
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
