package repo

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/point"
)

// victimContent is the disk of the VM k<seed>: two thirds are of all VMs.
func victimContent(seed uint64) []byte {
	var b []byte
	for i := range uint64(16) {
		n := i
		if i%3 == 0 {
			n = 10_000 + seed*100 + i
		}
		b = append(b, noise(n, testChunk)...)
	}
	return append(b, text(seed, 7000)...)
}

// beVictim is the process that TestKilledAtAnyMoment kills.
func beVictim(r *Repository, what string, seed uint64) error {
	beatEvery, pollEvery = 20*time.Millisecond, 5*time.Millisecond
	points, err := r.Points(bg)
	if err != nil {
		return err
	}
	fmt.Println("begins")
	switch what {
	case "backup":
		var prev *point.RestorePoint
		var old []byte
		if len(points) > 0 {
			prev = points[seed%uint64(len(points))]
			n, _ := strconv.ParseUint(prev.VM[1:], 10, 64)
			old = victimContent(n)
		}
		p, err := backup(bg, r, "k"+strconv.FormatUint(seed, 10), victimContent(seed), prev, old)
		if err != nil {
			return err
		}
		fmt.Println("committed", p.Ref())
	case "vacuum":
		if len(points) > 6 {
			p := points[seed%uint64(len(points))]
			fmt.Println("deletes", p.Ref())
			if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
				return err
			}
		}
		if _, err := r.Vacuum(bg, VacuumOptions{Patience: time.Minute}); err != nil {
			return err
		}
	case "check":
		if _, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil {
			return err
		}
		if _, err := r.Repair(bg, RepairOptions{}); err != nil {
			return err
		}
	}
	fmt.Println("done")
	return nil
}

// Real processes that back up, vacuum, delete, check and repair are killed at
// any moment, one after the other in one repository and two at once. What they
// said is so, every point that can be seen is whole, and nobody has to repair
// anything.
func TestKilledAtAnyMoment(t *testing.T) {
	kills := 30
	switch {
	case os.Getenv("BACKSTAY_SOAK") != "":
		kills = 500
	case testing.Short():
		kills = 4
	}
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	st, err := file.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, Parity: true}); err != nil {
		t.Fatal(err)
	}
	must, may := map[string]bool{}, map[string]bool{} // points that are to be there, and that may be gone
	saw := map[string]int{}
	usual := 50 * time.Millisecond // from "begins" to the end
	killed := 0
	for round := uint64(0); killed < kills; round++ {
		whats := []string{[]string{"backup", "backup", "backup", "vacuum", "check"}[rnd.IntN(5)]}
		if rnd.IntN(3) == 0 {
			whats = append(whats, []string{"backup", "vacuum"}[rnd.IntN(2)])
		}
		type victim struct {
			what   string
			cmd    *exec.Cmd
			out    *bufio.Reader
			errs   *bytes.Buffer
			began  time.Time
			waited chan string
		}
		var victims []*victim
		for i, what := range whats {
			v := &victim{what: what, cmd: player(dir, "victim", what, round*2+uint64(i)+1), errs: &bytes.Buffer{}, waited: make(chan string, 1)}
			v.cmd.Stderr = v.errs
			out, err := v.cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			v.out = bufio.NewReader(out)
			if err := v.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			victims = append(victims, v)
		}
		for _, v := range victims {
			line, _ := v.out.ReadString('\n')
			v.began = time.Now()
			go func() {
				said := line
				for {
					more, err := v.out.ReadString('\n')
					if said += more; err != nil {
						v.waited <- said
						return
					}
				}
			}()
		}
		time.Sleep(time.Duration(rnd.Int64N(int64(usual)*5/4 + 1)))
		for i, v := range victims {
			if i > 0 && rnd.IntN(2) == 0 {
				continue // this one lives on
			}
			_ = v.cmd.Process.Kill()
		}
		for _, v := range victims {
			said := <-v.waited
			err := v.cmd.Wait()
			for line := range strings.Lines(said) {
				what, ref, _ := strings.Cut(strings.TrimSpace(line), " ")
				switch what {
				case "committed":
					must[ref] = true
				case "deletes":
					may[ref] = true
				}
			}
			switch {
			case strings.Contains(said, "done"):
				saw[v.what+" done"]++
				usual = (usual*7 + min(time.Since(v.began), 4*usual)) / 8
			case err != nil && !v.cmd.ProcessState.Exited():
				saw[v.what+" killed"]++
				killed++
			case strings.Contains(v.errs.String(), "locked"), strings.Contains(v.errs.String(), "not found"), strings.Contains(v.errs.String(), "revoked"):
				saw[v.what+" refused"]++ // beside another
			default:
				t.Errorf("seed %d, round %d: %s said %q, %q: %v", seed, round, v.what, said, v.errs, err)
			}
		}
		r, err := Open(bg, st, testKey)
		if err != nil {
			t.Fatal(err)
		}
		points, err := r.Points(bg)
		if err != nil {
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
		there := map[string]bool{}
		for _, p := range points {
			there[p.Ref()] = true
			n, _ := strconv.ParseUint(p.VM[1:], 10, 64)
			if got, err := readDisk(r, p); err != nil || !bytes.Equal(got, victimContent(n)) {
				t.Fatalf("seed %d, round %d: %s is lost: %v", seed, round, p.Ref(), err)
			}
		}
		for ref := range must {
			if !there[ref] && !may[ref] {
				t.Fatalf("seed %d, round %d: %s was reported committed, and is gone", seed, round, ref)
			}
			if !there[ref] {
				delete(must, ref)
			}
		}
		if round%10 == 9 {
			mustCheck(t, r, CheckOptions{ReadData: true})
		}
		// Few enough, so that a round takes no longer than the first.
		for len(points) > 8 {
			p := points[rnd.IntN(len(points))]
			delete(must, p.Ref())
			if err := r.DeletePoint(bg, p.VM, p.ID); err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
			if points, err = r.Points(bg); err != nil {
				t.Fatal(err)
			}
		}
		r.Close()
		if t.Failed() {
			return
		}
	}
	finish(t, st)
	r := mustOpen(t, st)
	mustCheck(t, r, CheckOptions{ReadData: true})
	for _, prefix := range []string{sessionPrefix, beatPrefix, vacuumPrefix} {
		if left := names(t, st, prefix); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
	t.Logf("%d kills, seed %d: %v", killed, seed, saw)
}
