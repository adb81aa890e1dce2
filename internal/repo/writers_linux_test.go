package repo

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
)

// beOneOfMany makes a point of VM m<seed>. What all have in common is durable,
// and named in an index object, when it says "shared".
func beOneOfMany(r *Repository, _ string, seed uint64) error {
	claimPatience, claimPoll = 10*time.Minute, 20*time.Millisecond // also on a busy machine
	claimAnswer = claimPatience
	fmt.Println("opened")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	s, err := r.Begin(bg, SessionOptions{})
	if err != nil {
		return err
	}
	defer s.Abort(bg)
	content := manyContent(seed)
	w, err := s.Disk(bg, int64(len(content)), "")
	if err != nil {
		return err
	}
	for i := range int64(manyChunks) {
		if i == manyShared {
			if err := s.flush(bg); err != nil {
				return err
			}
			if err := s.writeIndex(bg); err != nil {
				return err
			}
			fmt.Println("shared")
		}
		if _, err := w.Put(bg, i, cut(content, i)); err != nil {
			return err
		}
	}
	m, err := w.Finish(bg)
	if err != nil {
		return err
	}
	if err := s.Commit(bg, newPoint("m"+strconv.FormatUint(seed, 10), m, int64(len(content)))); err != nil {
		return err
	}
	fmt.Println("committed")
	return nil
}

// Sixteen processes write one repository in a directory at once; 30 % of each
// disk is that of all others. Nothing is lost and nothing is stored twice, be it
// that all begin at the same moment, or each when the one before has stored, and
// not yet committed, what they have in common.
func TestManyWriters(t *testing.T) {
	writers := 16
	if testing.Short() {
		writers = 5
	}
	for _, apart := range []bool{false, true} {
		t.Run(map[bool]string{false: "together", true: "apart"}[apart], func(t *testing.T) {
			dir := t.TempDir()
			st, err := file.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap}); err != nil {
				t.Fatal(err)
			}
			type writer struct {
				cmd  *exec.Cmd
				out  *bufio.Reader
				errs bytes.Buffer
				in   func()
			}
			all := make([]*writer, writers)
			line := func(i int, want string) {
				t.Helper()
				if got, err := all[i].out.ReadString('\n'); got != want+"\n" {
					t.Fatalf("writer %d said %q, want %q: %v %s", i, got, want, err, &all[i].errs)
				}
			}
			for i := range all {
				w := &writer{cmd: player(dir, "one of many", "", uint64(i))}
				all[i] = w
				w.cmd.Stderr = &w.errs
				in, err := w.cmd.StdinPipe()
				if err != nil {
					t.Fatal(err)
				}
				w.in = func() { fmt.Fprintln(in) }
				out, err := w.cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				w.out = bufio.NewReader(out)
				if err := w.cmd.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { w.cmd.Process.Kill(); w.cmd.Wait() })
			}
			for i := range all {
				line(i, "opened")
			}
			for i := range all {
				all[i].in()
				if apart {
					line(i, "shared")
				}
			}
			for i := range all {
				if !apart {
					line(i, "shared")
				}
				line(i, "committed")
				if err := all[i].cmd.Wait(); err != nil {
					t.Errorf("writer %d: %v %s", i, err, &all[i].errs)
				}
			}
			check := func() {
				t.Helper()
				r := mustOpen(t, st)
				points, err := r.Points(bg)
				if err != nil || len(points) != writers {
					t.Fatalf("%d points: %v", len(points), err)
				}
				for _, p := range points {
					n, _ := strconv.ParseUint(p.VM[1:], 10, 64)
					if got, err := readDisk(r, p); err != nil || !bytes.Equal(got, manyContent(n)) {
						t.Errorf("%s is lost: %v", p.Ref(), err)
					}
				}
				mustCheck(t, r, CheckOptions{ReadData: true})
			}
			check()
			twice, bytes := duplicates(t, st)
			t.Logf("%d writers: %d of %d bytes are there twice (%.2f %%)", writers, twice, bytes, 100*float64(twice)/float64(bytes))
			if twice*1000 >= bytes {
				t.Errorf("%d of %d bytes are there twice", twice, bytes)
			}
			finish(t, st)
			check()
			if twice, bytes := duplicates(t, st); twice > 0 {
				t.Errorf("after a vacuum %d of %d bytes are there twice", twice, bytes)
			}
		})
	}
}

// A writer that began before another one had stored anything, and comes later to
// what both have, does not store it again, also where nobody keeps claims.
func TestAWriterSeesWhatOthersStoredMeanwhile(t *testing.T) {
	st, _ := newRepo(t)
	shared := noise(61, 10*testChunk)
	begin := func(own uint64) (*Session, *DiskWriter, []byte) {
		s, err := mustOpen(t, st).Begin(bg, SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		content := append(bytes.Clone(shared), noise(own, 2*testChunk)...)
		w, err := s.Disk(bg, int64(len(content)), "")
		if err != nil {
			t.Fatal(err)
		}
		return s, w, content
	}
	s1, w1, c1 := begin(62)
	s2, w2, c2 := begin(63)
	putAll := func(s *Session, w *DiskWriter, content []byte) {
		t.Helper()
		for i := range int64(len(content)) / testChunk {
			if _, err := w.Put(bg, i, cut(content, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	end := func(s *Session, w *DiskWriter, name string, content []byte) {
		t.Helper()
		m, err := w.Finish(bg)
		if err == nil {
			err = s.Commit(bg, newPoint(name, m, int64(len(content))))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	everyoneDies() // as if they were two processes
	putAll(s1, w1, c1)
	putAll(s2, w2, c2)
	indexed := indexAfter
	indexAfter = 0 // half a minute is over
	defer func() { indexAfter = indexed }()
	if err := s1.flush(bg); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Millisecond)
	end(s2, w2, "web02", c2)
	if twice, all := duplicates(t, st); twice > 0 {
		t.Errorf("%d of %d bytes are there twice", twice, all)
	}
	end(s1, w1, "web01", c1)
	r := mustOpen(t, st)
	points, err := r.Points(bg)
	if err != nil || len(points) != 2 {
		t.Fatalf("%d points: %v", len(points), err)
	}
	for i, want := range [][]byte{c1, c2} {
		if got, err := readDisk(r, points[i]); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is lost: %v", points[i].Ref(), err)
		}
	}
	mustCheck(t, r, CheckOptions{ReadData: true})
}
