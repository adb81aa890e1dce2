//go:build linux && amd64

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/nbd"
)

// The disk of this case is smaller than that of the others, since there are
// so many pairs.
const (
	imagesVirtual = 2 << 30
	imagesFiles   = 1 << 30
	randomReads   = 8000
	readBytes     = 64 << 10
)

// A diskFormat is what we and qemu-img call one format.
type diskFormat struct {
	ours image.Format
	qemu string
	args []string // of qemu-img, when it writes
}

var diskFormats = []diskFormat{
	{image.Raw, "raw", nil},
	{image.Qcow2, "qcow2", nil},
	{image.VHD, "vpc", []string{"-o", "force_size=on"}},
	{image.VHDX, "vhdx", nil},
	{image.VMDK, "vmdk", nil},
}

// images measures what a user of disk images alone would notice: converting
// between all pairs of formats, compressing, and random reads.
func (b *bench) images(ctx context.Context) error {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		fmt.Println("images: qemu-img is not installed, left out")
		return nil
	}
	small := *b
	small.dir, small.virtual, small.files = b.path("images"), imagesVirtual, imagesFiles
	if err := os.MkdirAll(small.dir, 0o755); err != nil {
		return err
	}
	for _, f := range []func(context.Context) error{small.makeDisk, small.makeSources, small.convertPairs, small.compress, small.readRandomly} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) source(f diskFormat) string {
	if f.ours == image.Raw {
		return b.disk
	}
	return b.path("source." + string(f.ours))
}

// makeSources lets qemu-img make the images that both tools read.
func (b *bench) makeSources(ctx context.Context) error {
	for _, f := range diskFormats {
		path := b.source(f)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		args := append([]string{"qemu-img", "convert", "-f", "raw", "-O", f.qemu}, f.args...)
		if err := b.fresh(nil, append(args, b.disk, path)...)(); err != nil {
			return err
		}
	}
	return nil
}

// convertPairs runs every pair in turn with both tools, from a warm page
// cache to the end of a sync.
func (b *bench) convertPairs(ctx context.Context) error {
	fmt.Printf("\nimage convert, uncompressed (median of %d): seconds of ours / of qemu-img convert -W -m 4 = ratio; at most 1 is wanted\n%-8s", b.runs, "from\\to")
	for _, to := range diskFormats {
		fmt.Printf(" %20s", to.ours)
	}
	fmt.Println()
	worst := 0.0
	for _, from := range diskFormats {
		if err := warm(b.source(from)); err != nil {
			return err
		}
		fmt.Printf("%-8s", from.ours)
		for _, to := range diskFormats {
			ours := tool{name: "backstay", args: []string{b.exe, "image", "convert", "--quiet", "-f", string(from.ours), "-O", string(to.ours), b.source(from), b.path("out")}}
			args := append([]string{"qemu-img", "convert", "-W", "-m", "4", "-f", from.qemu, "-O", to.qemu}, to.args...)
			theirs := tool{name: "qemu-img", args: append(args, b.source(from), b.path("out"))}
			x, y, err := b.duel(ctx, ours, theirs)
			if err != nil {
				return err
			}
			ratio := x.wall.Seconds() / y.wall.Seconds()
			worst = max(worst, ratio)
			fmt.Printf(" %6.2f/%6.2f = %4.2f", x.wall.Seconds(), y.wall.Seconds(), ratio)
		}
		fmt.Println()
	}
	fmt.Printf("worst ratio %.2f\n", worst)
	// What was written last is compared, so that a fast wrong answer shows.
	last := diskFormats[len(diskFormats)-1]
	if err := b.fresh([]string{"out"}, b.exe, "image", "convert", "--quiet", "-O", string(last.ours), "-f", "raw", b.disk, b.path("out"))(); err != nil {
		return err
	}
	return b.fresh(nil, "qemu-img", "compare", "-q", "-f", "raw", "-F", last.qemu, b.disk, b.path("out"))()
}

// duel measures two tools that both write b.path("out"), in turn, and calls
// their size after each run.
func (b *bench) duel(ctx context.Context, ours, theirs tool) (x, y sample, err error) {
	var xs, ys []sample
	for range b.runs {
		for _, c := range []struct {
			tool
			samples *[]sample
		}{{ours, &xs}, {theirs, &ys}} {
			if err := b.fresh([]string{"out"})(); err != nil {
				return x, y, err
			}
			// What the last run left behind must not be written in this one.
			if err := exec.Command("sync").Run(); err != nil {
				return x, y, err
			}
			s, err := b.measure(ctx, c.tool)
			if err != nil {
				return x, y, fmt.Errorf("%s: %w", c.name, err)
			}
			*c.samples = append(*c.samples, s)
			if c.size != nil {
				c.size()
			}
		}
	}
	return median(xs), median(ys), nil
}

// compress writes the two compressed formats, at qemu-img's level.
func (b *bench) compress(ctx context.Context) error {
	if err := warm(b.disk); err != nil {
		return err
	}
	fmt.Printf("\nimage convert, compressed (median of %d)\n%-28s %10s %10s %12s %10s %10s %11s\n", b.runs, "", "ours s", "qemu s", "times faster", "ours MB", "qemu MB", "size ratio")
	for _, c := range []struct {
		name       string
		ours, qemu []string
	}{
		{"qcow2, zlib", []string{"-O", "qcow2", "--compression", "zlib"}, []string{"-c", "-O", "qcow2"}},
		{"qcow2, zstd", []string{"-O", "qcow2", "--compression", "zstd"}, []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}},
		{"vmdk streamOptimized, zlib", []string{"-O", "vmdk", "--variant", "streamOptimized"}, []string{"-O", "vmdk", "-o", "subformat=streamOptimized"}},
	} {
		out := b.path("out")
		var sizes [2]int64
		note := func(i int) func() int64 {
			return func() int64 {
				sizes[i] = treeBytes(out)
				return sizes[i]
			}
		}
		ours := append([]string{b.exe, "image", "convert", "--quiet", "-f", "raw"}, append(c.ours, b.disk, out)...)
		theirs := append([]string{"qemu-img", "convert", "-W", "-m", "4", "-f", "raw"}, append(c.qemu, b.disk, out)...)
		x, y, err := b.duel(ctx, tool{name: "backstay", args: ours, size: note(0)},
			tool{name: "qemu-img", args: theirs, size: note(1)})
		if err != nil {
			return err
		}
		fmt.Printf("%-28s %10.2f %10.2f %12.2f %10.1f %10.1f %11.3f\n", c.name, x.wall.Seconds(), y.wall.Seconds(), y.wall.Seconds()/x.wall.Seconds(),
			float64(sizes[0])/1e6, float64(sizes[1])/1e6, float64(sizes[0])/float64(sizes[1]))
	}
	fmt.Println("at least 1.2 times faster and at most 1.03 of the size is wanted")
	return nil
}

// readRandomly reads pieces at random offsets of the same files, by our own
// readers and through qemu-nbd.
func (b *bench) readRandomly(ctx context.Context) error {
	if _, err := exec.LookPath("qemu-nbd"); err != nil {
		fmt.Println("images: qemu-nbd is not installed, left out")
		return nil
	}
	fmt.Printf("\nrandom reads of %d KiB, MiB/s (median of %d)\n%-8s %12s %14s %8s %12s %14s %8s\n", readBytes>>10, b.runs, "", "ours, 1", "qemu-nbd, 1", "ratio", "ours, 2", "qemu-nbd, 2", "ratio")
	for _, f := range diskFormats[1:] {
		if err := warm(b.source(f)); err != nil {
			return err
		}
		fmt.Printf("%-8s", f.ours)
		for _, readers := range []int{1, 2} {
			var ours, theirs []time.Duration
			for range b.runs {
				x, err := b.ownReads(f, readers)
				if err != nil {
					return err
				}
				y, err := b.nbdReads(ctx, f, readers)
				if err != nil {
					return err
				}
				ours, theirs = append(ours, x), append(theirs, y)
			}
			rate := func(d []time.Duration) float64 {
				slices.Sort(d)
				return float64(randomReads*readBytes) / (1 << 20) / d[len(d)/2].Seconds()
			}
			x, y := rate(ours), rate(theirs)
			fmt.Printf(" %12.0f %14.0f %8.2f", x, y, x/y)
		}
		fmt.Println()
	}
	return nil
}

func (b *bench) ownReads(f diskFormat, readers int) (time.Duration, error) {
	img, err := open.Open(b.source(f), open.Options{Format: f.ours})
	if err != nil {
		return 0, err
	}
	defer img.Close()
	return timeReads(img, img.Size(), readers)
}

func (b *bench) nbdReads(ctx context.Context, f diskFormat, readers int) (time.Duration, error) {
	socket := b.path("nbd.sock")
	os.Remove(socket)
	server := exec.CommandContext(ctx, "qemu-nbd", "-r", "-t", "-e", "4", "-f", f.qemu, "-k", socket, b.source(f))
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		return 0, err
	}
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	c, err := nbd.Dial(ctx, nbd.Target{Network: "unix", Address: socket, Connections: readers})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return timeReads(c, c.Size(), readers)
}

// timeReads lets readers share the reads, which are the same every time.
func timeReads(r io.ReaderAt, size int64, readers int) (time.Duration, error) {
	errs := make(chan error, readers)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range readers {
		wg.Go(func() {
			p := make([]byte, readBytes)
			rnd := rand.New(rand.NewPCG(uint64(i), 7))
			for range randomReads / readers {
				if n, err := r.ReadAt(p, rnd.Int64N(size/readBytes)*readBytes); n < len(p) {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	select {
	case err := <-errs:
		return 0, err
	default:
		return took, nil
	}
}
