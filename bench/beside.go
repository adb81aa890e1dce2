//go:build linux && amd64

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
)

// What beside works on. Every second chunk of the old disk is garbage, so that a
// vacuum rewrites all of its packs.
const (
	besideOld   = 2 << 30   // bytes of the old disk
	besideNew   = 768 << 20 // bytes of the backup that is measured
	besidePart  = 16 << 20  // of it, how much a part is: a latency each
	besideChunk = chunk.DefaultBytes
)

// beside measures what a backup loses to a vacuum that works at the same time in
// a process of its own: the latencies of its parts, alone and beside it, in turns.
func (b *bench) beside(ctx context.Context) error {
	dir := b.path("beside")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var alone, with []time.Duration
	var rewritten int64
	var vacuumed []time.Duration
	for run := range b.runs {
		for _, vacuum := range []bool{false, true} {
			path := fmt.Sprintf("%s/%d-%v", dir, run, vacuum)
			parts, v, err := b.besideOnce(ctx, path, uint64(run), vacuum)
			if err != nil {
				return err
			}
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			if !vacuum {
				alone = append(alone, parts...)
				continue
			}
			with = append(with, parts[:v.parts]...)
			rewritten += v.report.RewrittenBytes
			vacuumed = append(vacuumed, v.took)
		}
	}
	slices.Sort(alone)
	slices.Sort(with)
	if len(with) == 0 {
		return errors.New("no vacuum was under way while a part was stored")
	}
	fmt.Printf("\nbeside: latencies of the parts of a backup, %d MiB of new data each, through %d workers into a directory, in ms (%d runs)\n", besidePart>>20, runtime.GOMAXPROCS(0)+2, b.runs)
	fmt.Printf("%-34s %8s %8s %8s %8s %8s\n", "", "parts", "p50", "p90", "p99", "most")
	for _, l := range []struct {
		name string
		all  []time.Duration
	}{{"alone", alone}, {"while a vacuum copied", with}} {
		fmt.Printf("%-34s %8d %8.1f %8.1f %8.1f %8.1f\n", l.name, len(l.all), ms(l.all, 50), ms(l.all, 90), ms(l.all, 99), ms(l.all, 100))
	}
	fmt.Printf("slower by %.1f %% at p50 and %.1f %% at p99; less than 5 %% is asked at p99. A vacuum copied %.0f MB, in %.1f s (median)\n",
		100*(ms(with, 50)/ms(alone, 50)-1), 100*(ms(with, 99)/ms(alone, 99)-1), float64(rewritten)/1e6/float64(b.runs), mid(vacuumed).Seconds())
	return nil
}

// ms is a percentile of sorted durations, in milliseconds.
func ms(sorted []time.Duration, percent int) float64 {
	i := min(len(sorted)-1, len(sorted)*percent/100)
	return sorted[i].Seconds() * 1000
}

// A besideVacuum is what ran beside a backup.
type besideVacuum struct {
	parts  int           // of the backup that were stored before it only waited, or ended
	took   time.Duration // until then
	report repo.VacuumReport
}

// besideOnce makes a repository with garbage in it, and backs up into it with
// or without a vacuum beside.
func (b *bench) besideOnce(ctx context.Context, path string, seed uint64, vacuum bool) (parts []time.Duration, v besideVacuum, err error) {
	st, err := file.Create(path)
	if err != nil {
		return nil, v, err
	}
	defer st.Close()
	key := repo.Key{Passphrase: secret.New([]byte(passphrase))}
	if err := repo.Init(ctx, st, repo.InitOptions{Passphrase: key.Passphrase, Parity: true}); err != nil {
		return nil, v, err
	}
	r, err := repo.Open(ctx, st, key)
	if err != nil {
		return nil, v, err
	}
	defer r.Close()
	if err := makeGarbage(ctx, r, seed); err != nil {
		return nil, v, err
	}
	s, err := r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		return nil, v, err
	}
	defer s.Abort(ctx)
	ended := make(chan error, 1)
	var start, copied time.Time
	if vacuum {
		cmd := exec.CommandContext(ctx, b.exe, "repo", "vacuum", "--quiet", "--json", "--repo", path)
		cmd.Env = append(os.Environ(), b.env()...)
		var out bytes.Buffer
		cmd.Stdout = &out
		talk, err := cmd.StderrPipe()
		if err != nil {
			return nil, v, err
		}
		start = time.Now()
		if err := cmd.Start(); err != nil {
			return nil, v, err
		}
		go func() {
			// When it says that it waits for the backup all is copied.
			for lines := bufio.NewScanner(talk); lines.Scan(); {
				if copied.IsZero() {
					copied = time.Now()
				}
			}
			err := cmd.Wait()
			if copied.IsZero() {
				copied = time.Now()
			}
			if err == nil {
				err = json.Unmarshal(out.Bytes(), &v.report)
			}
			ended <- err
		}()
	}
	parts, ends, err := backUpParts(ctx, s, seed)
	if vacuum {
		if verr := <-ended; verr != nil {
			return nil, v, fmt.Errorf("vacuum: %w", verr)
		}
		v.took = copied.Sub(start)
		for _, end := range ends {
			if end.Before(copied) {
				v.parts++
			}
		}
	}
	return parts, v, err
}

// makeGarbage stores a disk and a second point of it that does without every
// other chunk, and deletes the first.
func makeGarbage(ctx context.Context, r *repo.Repository, seed uint64) error {
	s, err := r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		return err
	}
	defer s.Abort(ctx)
	w, err := s.Disk(ctx, besideOld, "")
	if err != nil {
		return err
	}
	p := make([]byte, besideChunk)
	for i := range int64(besideOld / besideChunk) {
		fill(p, seed<<32|uint64(i))
		if _, err := w.Put(ctx, i, p); err != nil {
			return err
		}
	}
	m, err := w.Finish(ctx)
	if err != nil {
		return err
	}
	first := benchPoint("old", m, besideOld)
	if err := s.Commit(ctx, first); err != nil {
		return err
	}
	s, err = r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		return err
	}
	defer s.Abort(ctx)
	if w, err = s.Disk(ctx, besideOld, m); err != nil {
		return err
	}
	for i := int64(0); i < besideOld/besideChunk; i += 2 {
		if err := w.Hole(i); err != nil {
			return err
		}
	}
	if m, err = w.Finish(ctx); err != nil {
		return err
	}
	second := benchPoint("old", m, besideOld)
	second.Time = first.Time.Add(time.Second)
	if err := s.Commit(ctx, second); err != nil {
		return err
	}
	return r.DeletePoint(ctx, first.VM, first.ID)
}

// backUpParts stores new data part by part and says how long each took and when
// it was done: a part is done when every chunk of it is in a pack, which is in
// memory or further.
func backUpParts(ctx context.Context, s *repo.Session, seed uint64) (parts []time.Duration, ends []time.Time, err error) {
	w, err := s.Disk(ctx, besideNew, "")
	if err != nil {
		return nil, nil, err
	}
	const n = besidePart / besideChunk
	buf := make([]byte, besidePart)
	for _, part := range cutParts() {
		for i := range int64(n) {
			fill(buf[i*besideChunk:][:besideChunk], 1<<63|seed<<32|uint64(part.Off/besideChunk+i))
		}
		errs := make([]error, runtime.GOMAXPROCS(0)+2)
		var wg sync.WaitGroup
		jobs := make(chan int64, n)
		start := time.Now()
		for k := range errs {
			wg.Go(func() {
				for i := range jobs {
					if _, err := w.Put(ctx, part.Off/besideChunk+i, buf[i*besideChunk:][:besideChunk]); err != nil {
						errs[k] = err
					}
				}
			})
		}
		for i := range int64(n) {
			jobs <- i
		}
		close(jobs)
		wg.Wait()
		parts, ends = append(parts, time.Since(start)), append(ends, time.Now())
		if err := errors.Join(errs...); err != nil {
			return nil, nil, err
		}
	}
	m, err := w.Finish(ctx)
	if err != nil {
		return nil, nil, err
	}
	return parts, ends, s.Commit(ctx, benchPoint("new", m, besideNew))
}

func cutParts() (out []extent.Extent) {
	for off := int64(0); off < besideNew; off += besidePart {
		out = append(out, extent.Extent{Off: off, Len: besidePart})
	}
	return out
}

// fill makes a chunk of which half compresses.
func fill(p []byte, seed uint64) {
	src := rand.NewPCG(seed, 11)
	for off := 0; off < len(p); off += 8 {
		if off&4095 < 2048 {
			v := src.Uint64()
			for i := range 8 {
				p[off+i] = byte(v >> (8 * i))
			}
		} else {
			p[off] = byte(off >> 12)
		}
	}
}
