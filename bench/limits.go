//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/DataDog/zstd"
	"github.com/zeebo/blake3"

	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/vm"
)

// limitsFiles is how much data limits works on, in memory.
const limitsFiles = 512 << 20

// limitsChild names the variable that makes this program measure once, in a
// process of its own, and print a paces as JSON.
const limitsChild = "BACKSTAY_BENCH_LIMITS"

// A pace is what some work took.
type pace struct {
	Bytes     int64
	Wall, CPU time.Duration
}

func (p pace) perCPU() float64  { return float64(p.Bytes) / 1e6 / p.CPU.Seconds() }
func (p pace) perWall() float64 { return float64(p.Bytes) / 1e6 / p.Wall.Seconds() }

// paces are the measurements of one process.
type paces struct {
	Stored int64 // bytes of the chunks when they are compressed
	// Each alone, by one thread, on all chunks: BLAKE3, libzstd there and back,
	// AES-256-GCM there and back of what libzstd gave, BLAKE3 of the same.
	Hash, Compress, Expand, Seal, Unseal, HashStored pace
	// The repository, with a store in memory.
	New, Duplicate, Verify, Scrub pace
}

// A bound is some work of the repository and the time that the functions it
// cannot do without take for it.
type bound struct {
	name  string
	of    string
	work  func(*paces) pace
	floor func(*paces) time.Duration
}

var bounds = []bound{
	{"new data", "hash + libzstd + seal", func(p *paces) pace { return p.New }, func(p *paces) time.Duration { return p.Hash.CPU + p.Compress.CPU + p.Seal.CPU }},
	{"the same, packs named", "and the hash of each pack", func(p *paces) pace { return p.New }, func(p *paces) time.Duration {
		return p.Hash.CPU + p.Compress.CPU + p.Seal.CPU + p.HashStored.CPU
	}},
	{"duplicate data", "hash", func(p *paces) pace { return p.Duplicate }, func(p *paces) time.Duration { return p.Hash.CPU }},
	{"check --read-data", "hash of the pack, open, libzstd, hash", func(p *paces) pace { return p.Verify }, func(p *paces) time.Duration {
		return p.HashStored.CPU + p.Unseal.CPU + p.Expand.CPU + p.Hash.CPU
	}},
	{"check --scrub, keyless", "hash of the pack", func(p *paces) pace { return p.Scrub }, func(p *paces) time.Duration { return p.HashStored.CPU }},
}

// limits compares the repository with the functions that it is made of, on one
// processor and on two.
func (b *bench) limits(ctx context.Context) error {
	l := *b
	l.dir, l.virtual, l.files = b.path("limits"), limitsFiles*5/4, limitsFiles
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(l.dir)
	if err := l.makeDisk(ctx); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cores := []int{1, 2}
	if runtime.NumCPU() < 2 {
		cores = cores[:1]
		fmt.Println("limits: this machine has one processor, so no scaling")
	}
	got := map[int][]paces{}
	for range b.runs {
		for _, n := range cores {
			// Pinned: a call of libzstd that takes long would otherwise leave
			// its processor's share to another thread.
			cmd := exec.CommandContext(ctx, "taskset", "-c", fmt.Sprintf("0-%d", n-1), self)
			cmd.Env = append(os.Environ(), limitsChild+"="+l.disk, fmt.Sprintf("GOMAXPROCS=%d", n))
			cmd.Stderr = os.Stderr
			out, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("taskset: %w", err)
			}
			var p paces
			if err := json.Unmarshal(out, &p); err != nil {
				return err
			}
			got[n] = append(got[n], p)
		}
	}
	one := got[1]
	mb := func(f func(*paces) pace) float64 {
		return middle(one, func(p *paces) float64 { return f(p).perCPU() })
	}
	fmt.Printf("\nlimits, MB/s of one processor's time on %.0f MB of chunks of 512 KiB that become %.0f MB (median of %d)\n", float64(one[0].Hash.Bytes)/1e6, float64(one[0].Stored)/1e6, b.runs)
	fmt.Printf("BLAKE3 %.0f, libzstd %.0f, back %.0f; of what is stored: AES-256-GCM %.0f, back %.0f, BLAKE3 %.0f\n",
		mb(func(p *paces) pace { return p.Hash }), mb(func(p *paces) pace { return p.Compress }), mb(func(p *paces) pace { return p.Expand }),
		mb(func(p *paces) pace { return p.Seal }), mb(func(p *paces) pace { return p.Unseal }), mb(func(p *paces) pace { return p.HashStored }))
	fmt.Printf("\nlimits: the repository over a store in memory, without parity\n%-24s %12s", "", "limit, MB/s")
	for _, n := range cores {
		fmt.Printf(" %8s %8s %8s", fmt.Sprintf("%d: wall", n), "CPU", "ratio")
	}
	fmt.Printf(" %8s   limit\n", "scaling")
	for _, w := range bounds {
		limit := middle(one, func(p *paces) float64 { return float64(w.work(p).Bytes) / 1e6 / w.floor(p).Seconds() })
		fmt.Printf("%-24s %12.0f", w.name, limit)
		for _, n := range cores {
			fmt.Printf(" %8.0f %8.0f %8.2f", middle(got[n], func(p *paces) float64 { return w.work(p).perWall() }),
				middle(got[n], func(p *paces) float64 { return w.work(p).perCPU() }),
				middle(got[n], func(p *paces) float64 { return w.floor(p).Seconds() / w.work(p).CPU.Seconds() }))
		}
		last := cores[len(cores)-1]
		fmt.Printf(" %8.2f   %s\n", middle(got[last], func(p *paces) float64 { return w.work(p).perWall() })/middle(one, func(p *paces) float64 { return w.work(p).perWall() }), w.of)
	}
	fmt.Println("limit: all functions named one after the other. ratio: the processor time that they take over what we take, in the same")
	fmt.Println("process; at least 0.85 is asked. wall, CPU: MB/s by the clock, and of a processor's time. scaling: by the clock")
	return nil
}

func middle(all []paces, f func(*paces) float64) float64 {
	v := make([]float64, len(all))
	for i := range all {
		v[i] = f(&all[i])
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// measureLimits is the process that measures.
func measureLimits(ctx context.Context, disk string) error {
	chunks, total, err := readChunks(disk)
	if err != nil {
		return err
	}
	p := paces{}
	if err := p.functions(chunks, total); err != nil {
		return err
	}
	if err := p.repository(ctx, chunks, total); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(p)
}

// readChunks gives the chunks of an image that are no holes.
func readChunks(path string) (chunks [][]byte, total int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	for {
		p := make([]byte, chunk.DefaultBytes)
		n, err := io.ReadFull(f, p)
		if n == len(p) && !chunk.IsZero(p) {
			chunks, total = append(chunks, p), total+int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return chunks, total, nil
		}
		if err != nil {
			return nil, 0, err
		}
	}
}

// functions measures each function alone, by this thread.
func (p *paces) functions(chunks [][]byte, total int64) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var key [32]byte
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	z := zstd.NewCtx()
	frames, sealed := make([][]byte, len(chunks)), make([][]byte, len(chunks))
	// One buffer serves all chunks, as it does in the repository; what comes
	// out is kept by a copy that is not counted.
	frame := make([]byte, zstd.CompressBound(chunk.DefaultBytes))
	room := make([]byte, 0, len(frame)+64)
	nonce := make([]byte, gcm.NonceSize())
	var sum [32]byte
	for i, c := range chunks {
		p.Hash.clock(syscall.RUSAGE_THREAD, len(c), func() {
			h.Reset()
			h.Write(c)
			h.Sum(sum[:0])
		})
		var out []byte
		var err error
		p.Compress.clock(syscall.RUSAGE_THREAD, len(c), func() { out, err = z.CompressLevel(frame, c, 1) })
		if err != nil {
			return err
		}
		if len(out) > len(c)-len(c)/20 {
			out = c // stored as it is
		}
		frames[i] = bytes.Clone(out)
		p.Stored += int64(len(out))
		p.Seal.clock(syscall.RUSAGE_THREAD, len(out), func() { room = gcm.Seal(room[:0], nonce, frames[i], nil) })
		sealed[i] = bytes.Clone(room)
	}
	plain := make([]byte, chunk.DefaultBytes)
	for i := range chunks {
		p.HashStored.clock(syscall.RUSAGE_THREAD, len(sealed[i]), func() {
			h.Reset()
			h.Write(sealed[i])
			h.Sum(sum[:0])
		})
		var err error
		p.Unseal.clock(syscall.RUSAGE_THREAD, len(sealed[i]), func() { room, err = gcm.Open(room[:0], nonce, sealed[i], nil) })
		if err == nil && len(room) < len(plain) {
			p.Expand.clock(syscall.RUSAGE_THREAD, len(plain), func() { _, err = z.DecompressInto(plain, frames[i]) })
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// clock adds the time that fn takes, of this thread or of the process.
func (p *pace) clock(who, n int, fn func()) {
	cpu, start := cpuTime(who), time.Now()
	fn()
	p.Wall += time.Since(start)
	p.CPU += cpuTime(who) - cpu
	p.Bytes += int64(n)
}

func cpuTime(who int) time.Duration {
	var ru syscall.Rusage
	syscall.Getrusage(who, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// repository measures ours with as many workers as a backup has.
func (p *paces) repository(ctx context.Context, chunks [][]byte, total int64) (err error) {
	st := mem.New()
	key := repo.Key{Passphrase: secret.New([]byte(passphrase))}
	if err := repo.Init(ctx, st, repo.InitOptions{Passphrase: key.Passphrase}); err != nil {
		return err
	}
	r, err := repo.Open(ctx, st, key)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, what := range []struct {
		pace *pace
		name string
	}{{&p.New, "a"}, {&p.Duplicate, "b"}} {
		runtime.GC()
		what.pace.clock(syscall.RUSAGE_SELF, int(total), func() { err = backUp(ctx, r, what.name, chunks, total) })
		if err != nil {
			return err
		}
	}
	keyless, err := repo.OpenKeyless(ctx, st)
	if err != nil {
		return err
	}
	defer keyless.Close()
	for _, what := range []struct {
		pace *pace
		r    *repo.Repository
		o    repo.CheckOptions
		n    int64
	}{{&p.Verify, r, repo.CheckOptions{ReadData: true}, total}, {&p.Scrub, keyless, repo.CheckOptions{Scrub: true}, p.Stored}} {
		runtime.GC()
		var report repo.CheckReport
		what.pace.clock(syscall.RUSAGE_SELF, int(what.n), func() { report, err = what.r.Check(ctx, what.o) })
		if err == nil && len(report.Findings) > 0 {
			err = report.Findings[0].Err
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// backUp stores chunks as one disk and commits.
func backUp(ctx context.Context, r *repo.Repository, name string, chunks [][]byte, total int64) error {
	s, err := r.Begin(ctx, repo.SessionOptions{})
	if err != nil {
		return err
	}
	defer s.Abort(ctx)
	w, err := s.Disk(ctx, total, "")
	if err != nil {
		return err
	}
	jobs := make(chan int)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for range runtime.GOMAXPROCS(0) + 2 {
		wg.Go(func() {
			for i := range jobs {
				if _, err := w.Put(ctx, int64(i), chunks[i]); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
				}
			}
		})
	}
	for i := range chunks {
		jobs <- i
	}
	close(jobs)
	wg.Wait()
	if failed != nil {
		return failed
	}
	m, err := w.Finish(ctx)
	if err != nil {
		return err
	}
	return s.Commit(ctx, benchPoint(name, m, total))
}

func benchPoint(name string, m point.ManifestID, size int64) *point.RestorePoint {
	now := time.Now().UTC().Truncate(time.Millisecond)
	var random [4]byte
	rand.Read(random[:])
	return &point.RestorePoint{
		ID: point.NewID(now, random), VM: name, Time: now,
		Disks: []point.Disk{{Disk: vm.Disk{ID: "vda", SizeBytes: size}, Manifest: m, Mode: point.Full}},
	}
}
