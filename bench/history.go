//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// What history keeps of n+1 points: neither the oldest third nor every second of
// the others. The newest always stays.
func keptOf(n int) (keep []bool) {
	keep = make([]bool, n+1)
	for i := n; i > n/3; i -= 2 {
		keep[i] = true
	}
	return keep
}

// A keeper is one tool that keeps the history.
type keeper struct {
	name, needs string
	repo        string
	init        []string
	backup      func(day int) []string
	// Of these, forget drops restore points and clean frees their space.
	forget func(drop []bool) ([]string, error)
	clean  []string
}

// history gives each tool the same disk, changed by five percent a day, lets it
// drop two thirds of the points and then clean up, and restores the newest
// point beside a fresh full of the same bytes.
func (b *bench) history(ctx context.Context) error {
	h := *b
	h.dir, h.virtual, h.files = b.path("history"), b.historyBytes, b.historyBytes/2
	if err := os.RemoveAll(h.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(h.dir)
	if err := h.makeDisk(ctx); err != nil {
		return err
	}
	keepers, err := h.keepers()
	if err != nil {
		return err
	}
	if err := h.grow(ctx, keepers); err != nil {
		return err
	}
	if err := h.shrink(ctx, keepers); err != nil {
		return err
	}
	return h.restoreAged(ctx)
}

// keepers are those tools that are there, with empty repositories.
func (b *bench) keepers() (out []keeper, err error) {
	ours, borg, restic := b.path("repo"), b.path("borg"), b.path("restic")
	archive := func(day int) string { return fmt.Sprintf("day%03d", day) }
	all := []keeper{
		{name: "backstay", repo: ours, init: []string{b.exe, "repo", "init", "--quiet", "--repo", ours},
			backup: func(int) []string {
				return []string{b.exe, "backup", b.disk, "--format", "raw", "--vm", "bench", "--repo", ours, "--quiet"}
			},
			forget: func(drop []bool) ([]string, error) {
				ids, err := b.pointIDs(ours)
				return append([]string{b.exe, "point", "delete", "--quiet", "--repo", ours}, pick(ids, drop)...), err
			},
			clean: []string{b.exe, "repo", "vacuum", "--quiet", "--json", "--repo", ours}},
		{name: "restic", needs: "restic", repo: restic, init: []string{"restic", "-q", "-r", restic, "init"},
			backup: func(int) []string { return []string{"restic", "-q", "-r", restic, "backup", b.disk} },
			forget: func(drop []bool) ([]string, error) {
				ids, err := b.snapshotIDs(restic)
				return append([]string{"restic", "-q", "-r", restic, "forget"}, pick(ids, drop)...), err
			},
			clean: []string{"restic", "-q", "-r", restic, "prune"}},
		{name: "borg", needs: "borg", repo: borg, init: []string{"borg", "init", "-e", "repokey-blake2", borg},
			backup: func(day int) []string {
				return []string{"borg", "create", "--compression", "zstd,1", "--chunker-params", "fixed,524288", borg + "::" + archive(day), b.disk}
			},
			forget: func(drop []bool) ([]string, error) {
				var names []string
				for day := range drop {
					names = append(names, archive(day))
				}
				return append([]string{"borg", "delete", borg}, pick(names, drop)...), nil
			},
			clean: []string{"borg", "compact", borg}},
	}
	for i, k := range all {
		if i > 0 && !b.peers {
			continue
		}
		if _, err := exec.LookPath(k.needs); k.needs != "" && err != nil {
			fmt.Printf("history: %s is not installed, left out\n", k.needs)
			continue
		}
		if err := b.fresh(nil, k.init...)(); err != nil {
			return nil, err
		}
		out = append(out, k)
	}
	return out, nil
}

func pick(names []string, which []bool) (out []string) {
	for i, n := range names {
		if i < len(which) && which[i] {
			out = append(out, n)
		}
	}
	return out
}

// grow makes a first backup and one after each day.
func (b *bench) grow(ctx context.Context, keepers []keeper) error {
	// Not what is measured here, so nobody waits for a sync of the disk.
	first, later := make([]time.Duration, len(keepers)), make([][]time.Duration, len(keepers))
	sizes := make([]int64, len(keepers))
	var changed int64
	for day := range b.historyDays + 1 {
		if day > 0 {
			n, err := changeDay(b.disk, uint64(day))
			if err != nil {
				return err
			}
			changed += n
		}
		for i, k := range keepers {
			start := time.Now()
			if err := b.fresh(nil, k.backup(day)...)(); err != nil {
				return err
			}
			if took := time.Since(start); day == 0 {
				first[i], sizes[i] = took, treeBytes(k.repo)
			} else {
				later[i] = append(later[i], took)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	fmt.Printf("\nhistory: %.2f GiB of disk, %.2f GiB of files, %d days of %.1f %% change each\n%-10s %12s %14s %14s %16s\n", gib(b.virtual), gib(b.files),
		b.historyDays, 100*float64(changed)/float64(max(1, b.historyDays))/float64(b.virtual), "tool", "first, s", "a day, s", "first, MB", "a day, MB")
	for i, k := range keepers {
		var day time.Duration
		if len(later[i]) > 0 {
			day = mid(later[i])
		}
		fmt.Printf("%-10s %12.2f %14.2f %14.1f %16.1f\n", k.name, first[i].Seconds(), day.Seconds(), float64(sizes[i])/1e6,
			float64(treeBytes(k.repo)-sizes[i])/1e6/float64(max(1, b.historyDays)))
	}
	return nil
}

// shrink drops points and cleans up, once: what is gone cannot go again.
func (b *bench) shrink(ctx context.Context, keepers []keeper) error {
	keep := keptOf(b.historyDays)
	drop := make([]bool, len(keep))
	left := 0
	for i, k := range keep {
		if drop[i] = !k; k {
			left++
		}
	}
	fmt.Printf("\nhistory: %d of %d points dropped, then the space freed (once)\n%-10s %8s %8s %9s %9s %8s %8s %9s %9s %10s %10s %12s %10s\n", len(keep)-left, len(keep), "tool",
		"drop s", "ratio", "CPU s", "RSS MiB", "clean s", "ratio", "CPU s", "RSS MiB", "before MB", "after MB", "written MB", "per byte")
	var firstDrop, firstClean sample
	for i, k := range keepers {
		args, err := k.forget(drop)
		if err != nil {
			return err
		}
		before := treeBytes(k.repo)
		dropped, err := b.measure(ctx, tool{name: k.name, env: b.env(), args: args})
		if err != nil {
			return err
		}
		cleaned, err := b.measure(ctx, tool{name: k.name, env: b.env(), args: k.clean})
		if err != nil {
			return err
		}
		after := treeBytes(k.repo)
		if i == 0 {
			firstDrop, firstClean = dropped, cleaned
		}
		fmt.Printf("%-10s %8.2f %8.3f %9.2f %9d %8.2f %8.3f %9.2f %9d %10.1f %10.1f %12.1f %10.2f\n", k.name,
			dropped.wall.Seconds(), firstDrop.wall.Seconds()/dropped.wall.Seconds(), dropped.cpu.Seconds(), dropped.peakRSS>>20,
			cleaned.wall.Seconds(), firstClean.wall.Seconds()/cleaned.wall.Seconds(), cleaned.cpu.Seconds(), cleaned.peakRSS>>20,
			float64(before)/1e6, float64(after)/1e6, float64(cleaned.written)/1e6, float64(cleaned.written)/float64(max(1, before-after)))
	}
	fmt.Println("ratio: backstay's wall time over the tool's. per byte: what cleaning wrote to the disk, by the kernel's count,")
	fmt.Println("over what the repository shrank by; at most 2 is asked of backstay")
	return nil
}

// restoreAged restores the newest point of our history and of a repository that
// never held anything else, in turns.
func (b *bench) restoreAged(ctx context.Context) error {
	young, out := b.path("young"), b.path("out.raw")
	if err := b.fresh([]string{"young"}, b.exe, "repo", "init", "--quiet", "--repo", young)(); err != nil {
		return err
	}
	if err := b.fresh(nil, b.exe, "backup", b.disk, "--format", "raw", "--vm", "bench", "--repo", young, "--quiet")(); err != nil {
		return err
	}
	repos := []string{b.path("repo"), young}
	walls, samples := make([][]float64, 2), make([][]sample, 2)
	for range b.runs {
		for i, repo := range repos {
			os.Remove(out)
			syscall.Sync()
			s, err := b.measure(ctx, tool{name: "backstay restore", env: b.env(), args: []string{b.exe, "restore", "bench", "--to", out, "--repo", repo, "--quiet"}})
			if err != nil {
				return err
			}
			samples[i], walls[i] = append(samples[i], s), append(walls[i], s.wall.Seconds())
			if err := b.fresh(nil, "cmp", b.disk, out)(); err != nil {
				return err
			}
		}
	}
	aged, fresh := median(samples[0]), median(samples[1])
	fmt.Printf("\nhistory: restore of the newest point, compared with the disk (median of %d)\n%-44s %8.2f s %8.2f s of CPU\n%-44s %8.2f s %8.2f s of CPU\n", b.runs,
		fmt.Sprintf("after %d days and a vacuum", b.historyDays), aged.wall.Seconds(), aged.cpu.Seconds(), "of a fresh full of the same bytes", fresh.wall.Seconds(), fresh.cpu.Seconds())
	fmt.Printf("ratio of throughputs %.2f by the clock, %.2f by the processor; at least 0.7 is asked. Least and most seconds: %.2f to %.2f, %.2f to %.2f\n",
		fresh.wall.Seconds()/aged.wall.Seconds(), fresh.cpu.Seconds()/aged.cpu.Seconds(), slices.Min(walls[0]), slices.Max(walls[0]), slices.Min(walls[1]), slices.Max(walls[1]))
	return nil
}

// pointIDs are our points as they are named, oldest first.
func (b *bench) pointIDs(repo string) (ids []string, err error) {
	type row struct {
		VM, ID string
		Time   time.Time
	}
	var rows []row
	out, err := b.output(b.exe, "point", "list", "--json", "--repo", repo)
	for d := json.NewDecoder(bytes.NewReader(out)); err == nil && d.More(); {
		var r row
		if err = d.Decode(&r); err == nil {
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b row) int { return a.Time.Compare(b.Time) })
	for _, r := range rows {
		ids = append(ids, r.VM+"/"+r.ID)
	}
	return ids, err
}

// snapshotIDs are restic's snapshots, oldest first.
func (b *bench) snapshotIDs(repo string) (ids []string, err error) {
	var rows []struct {
		ID   string
		Time time.Time
	}
	out, err := b.output("restic", "-q", "-r", repo, "snapshots", "--json")
	if err == nil {
		err = json.Unmarshal(out, &rows)
	}
	for _, r := range rows {
		ids = append(ids, r.ID)
	}
	return ids, err
}

func (b *bench) output(args ...string) ([]byte, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), b.env()...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return out, err
}

// changeDay rewrites about five percent of the image, as a day does: seven
// tenths of that in runs of 1 MiB anywhere, files that came or were replaced; the
// rest in runs of 64 KiB within one sixteenth of the disk, which is a database's.
// Half of each 4 KiB written compresses.
func changeDay(path string, seed uint64) (n int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	rnd := rand.New(rand.NewPCG(seed, 5))
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 5})
	buf := make([]byte, 1<<20)
	write := func(size int, first, span int64) error {
		for off := 0; off < size; off += 4096 {
			src.Read(buf[off : off+2048])
		}
		at := first + rnd.Int64N(span/4096-int64(size)/4096+1)*4096
		_, err := f.WriteAt(buf[:size], at)
		n += int64(size)
		return err
	}
	day := st.Size() / 20
	for n < day*7/10 {
		if err := write(1<<20, 0, st.Size()); err != nil {
			return n, err
		}
	}
	for n < day {
		if err := write(64<<10, st.Size()/2, st.Size()/16); err != nil {
			return n, err
		}
	}
	return n, f.Sync()
}
