//go:build linux && amd64

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A sample is one run of one tool.
type sample struct {
	wall, cpu time.Duration
	peakRSS   int64 // bytes, of the largest process
	written   int64 // bytes that were to go to a disk, by the kernel's count
}

// A tool is one way to do the job at hand. prepare runs before each measured
// run and is not counted.
type tool struct {
	name    string
	needs   string // program that must be there
	env     []string
	prepare func() error
	args    []string
	size    func() int64 // bytes that it stored, nil where that means nothing
}

// A row is a tool's medians.
type row struct {
	tool
	sample
	stored int64
}

// compare runs all tools in turn, runs times, and prints a table of medians
// with ratios to the first tool.
func (b *bench) compare(ctx context.Context, title string, data int64, tools []tool) ([]row, error) {
	samples := make([][]sample, len(tools))
	stored := make([]int64, len(tools))
	for run := range b.runs {
		for i, t := range tools {
			if i > 0 && !b.peers {
				continue
			}
			if _, err := exec.LookPath(t.needs); t.needs != "" && err != nil {
				if run == 0 {
					fmt.Printf("%s: %s is not installed, left out\n", title, t.needs)
				}
				continue
			}
			if t.prepare != nil {
				if err := t.prepare(); err != nil {
					return nil, fmt.Errorf("%s: prepare: %w", t.name, err)
				}
			}
			syscall.Sync()
			s, err := b.measure(ctx, t)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", t.name, err)
			}
			samples[i] = append(samples[i], s)
			if t.size != nil {
				stored[i] = t.size()
			}
		}
	}
	var rows []row
	fmt.Printf("\n%s (median of %d)\n%-34s %8s %8s %9s %9s %10s %7s\n", title, b.runs, "tool", "wall s", "CPU s", "CPU s/GB", "RSS MiB", "stored MB", "ratio")
	for i, t := range tools {
		if len(samples[i]) == 0 {
			continue
		}
		r := row{tool: t, sample: median(samples[i]), stored: stored[i]}
		rows = append(rows, r)
		size := "-"
		if r.stored > 0 {
			size = fmt.Sprintf("%.1f", float64(r.stored)/1e6)
		}
		fmt.Printf("%-34s %8.2f %8.2f %9.2f %9d %10s %7.3f\n", t.name, r.wall.Seconds(), r.cpu.Seconds(),
			r.cpu.Seconds()/(float64(data)/1e9), r.peakRSS>>20, size, rows[0].wall.Seconds()/r.wall.Seconds())
	}
	fmt.Println("ratio: backstay's wall time over the tool's; smaller is better for backstay")
	return rows, nil
}

func (b *bench) measure(ctx context.Context, t tool) (sample, error) {
	cmd := exec.CommandContext(ctx, t.args[0], t.args[1:]...)
	cmd.Env = append(os.Environ(), t.env...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return sample{}, fmt.Errorf("%s: %w\n%s", strings.Join(t.args, " "), err, out.String())
	}
	syscall.Sync()
	s := sample{wall: time.Since(start), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		s.peakRSS = ru.Maxrss << 10
		s.written = ru.Oublock << 9
	}
	return s, nil
}

func median(s []sample) sample {
	mid := func(f func(sample) int64) int64 {
		v := make([]int64, len(s))
		for i := range s {
			v[i] = f(s[i])
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	return sample{
		wall:    time.Duration(mid(func(s sample) int64 { return int64(s.wall) })),
		cpu:     time.Duration(mid(func(s sample) int64 { return int64(s.cpu) })),
		peakRSS: mid(func(s sample) int64 { return s.peakRSS }),
		written: mid(func(s sample) int64 { return s.written }),
	}
}
