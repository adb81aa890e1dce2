//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
)

// makeDisk makes the raw image once: an ext4 file system of b.virtual bytes
// with b.files bytes of this machine's own programs and libraries on it, made
// by mke2fs without a mount. Real files differ from machine to machine; the
// ratios of one run are what counts.
func (b *bench) makeDisk(ctx context.Context) error {
	b.disk = filepath.Join(b.dir, "disk.raw")
	if _, err := os.Stat(b.disk); err == nil {
		return nil
	}
	tree := filepath.Join(b.dir, "tree")
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	n, err := stage(tree, b.files)
	if err != nil {
		return err
	}
	part := b.disk + ".part"
	os.Remove(part)
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-d", tree, part, fmt.Sprint(b.virtual/1024)+"k")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mke2fs: %w", err)
	}
	fmt.Printf("disk: %.1f GiB virtual, %.2f GiB of files from /usr and /opt\n", gib(b.virtual), gib(n))
	return os.Rename(part, b.disk)
}

// stage copies regular files into tree until they come to want bytes.
func stage(tree string, want int64) (int64, error) {
	var n int64
	full := errors.New("enough")
	for round := 0; n < want; round++ {
		before := n
		for _, root := range []string{"/usr", "/opt"} {
			err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return nil
				}
				from, err := os.Open(path)
				if err != nil {
					return nil
				}
				defer from.Close()
				// A machine with few files gets them again, each shifted by a few
				// bytes, so that no tool deduplicates the repetition.
				var shift []byte
				for i := range round {
					shift = append(shift, byte(i), byte(n), byte(n>>8))
				}
				to := filepath.Join(tree, fmt.Sprint(round), path)
				if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
					return err
				}
				copied, err := writeFrom(to, io.LimitReader(io.MultiReader(bytes.NewReader(shift), from), want-n))
				if err != nil {
					return err
				}
				if n += copied; n >= want {
					return full
				}
				return nil
			})
			if errors.Is(err, full) {
				return n, nil
			}
			if err != nil {
				return n, err
			}
		}
		if n == before {
			return n, errors.New("no files found to fill the disk with")
		}
	}
	return n, nil
}

// writeFrom copies r into a new file. A stream and not the whole file at once:
// the peak memory of a child counts from this process's at the fork.
func writeFrom(path string, r io.Reader) (int64, error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(f, r)
	return n, errors.Join(err, f.Close())
}

// change rewrites about one percent of the image in extents of 64 KiB.
func change(path string, seed uint64) (int64, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	const unit = 64 << 10
	r := rand.New(rand.NewPCG(seed, 1))
	src := rand.NewChaCha8([32]byte{byte(seed)})
	buf := make([]byte, unit)
	var n int64
	for n < st.Size()/100 {
		src.Read(buf[:unit/2]) // half of it compresses
		if _, err := f.WriteAt(buf, r.Int64N(st.Size()/unit)*unit); err != nil {
			return n, err
		}
		n += unit
	}
	return n, f.Sync()
}

// warm reads the file once, so that every tool starts from the page cache.
func warm(path string) error {
	return exec.Command("sh", "-c", "cat \"$1\" >/dev/null", "sh", path).Run()
}

func gib(n int64) float64 { return float64(n) / (1 << 30) }

func treeBytes(dir string) int64 {
	var n int64
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if st, err := d.Info(); err == nil {
				n += st.Size()
			}
		}
		return nil
	})
	return n
}
