package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Labels of the file systems that the guest looks for.
const (
	RootLabel = "LABROOT" // mounted on /data, where the workload writes
	DataLabel = "LABDATA" // mounted on /data2
)

// DiskOptions are what CreateDisk may be told.
type DiskOptions struct {
	SizeBytes int64  // 0 for 256 MiB
	Format    string // "raw" or "qcow2"; "" for what the name's end says
	Label     string // "" for RootLabel

	// Bootable puts a boot loader, the kernel and the initramfs before the file
	// system, which then is the second partition.
	Bootable bool

	// FillBytes is how much generated content the file system begins with, in
	// files below /fill that "workload check -dir" can judge; Seed chooses
	// which.
	FillBytes int64
	Seed      int64
}

// CreateDisk makes a disk image with an ext4 file system, over its whole
// length if nothing boots from it. It fails if there is a file of that name.
func (g *Guest) CreateDisk(ctx context.Context, name string, o DiskOptions) error {
	if err := g.createDisk(ctx, name, o); err != nil {
		return fmt.Errorf("create disk %s: %w", name, err)
	}
	return nil
}

func (g *Guest) createDisk(ctx context.Context, name string, o DiskOptions) error {
	if o.SizeBytes == 0 {
		o.SizeBytes = 256 << 20
	}
	if o.Format == "" {
		o.Format = strings.TrimPrefix(filepath.Ext(name), ".")
	}
	if o.Label == "" {
		o.Label = RootLabel
	}
	if _, err := os.Lstat(name); err == nil {
		return os.ErrExist
	}
	work, err := os.MkdirTemp(filepath.Dir(name), ".disk-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	tree, raw := filepath.Join(work, "tree"), filepath.Join(work, "raw")
	if err := os.MkdirAll(filepath.Join(tree, "fill"), 0o755); err != nil {
		return err
	}
	if o.FillBytes > 0 {
		err := runQuiet(exec.CommandContext(ctx, g.Workload, "fill", "-dir", filepath.Join(tree, "fill"),
			"-bytes", strconv.FormatInt(o.FillBytes, 10), "-seed", strconv.FormatInt(o.Seed, 10)))
		if err != nil {
			return err
		}
	}
	if err := os.WriteFile(raw, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(raw, o.SizeBytes); err != nil {
		return err
	}
	var from int64 // where the file system begins
	if o.Bootable {
		if from, err = writeBoot(raw, g.boot, o.SizeBytes); err != nil {
			return err
		}
	}
	err = runQuiet(exec.CommandContext(ctx, "/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-L", o.Label, "-d", tree,
		"-E", fmt.Sprintf("offset=%d", from), raw, strconv.FormatInt((o.SizeBytes-from)>>10, 10)+"k"))
	if err != nil {
		return err
	}
	switch o.Format {
	case "raw":
		return os.Rename(raw, name)
	case "qcow2":
		made := filepath.Join(work, "qcow2")
		if err := runQuiet(exec.CommandContext(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, made)); err != nil {
			return err
		}
		return os.Rename(made, name)
	}
	return fmt.Errorf("no disk format %q: raw or qcow2", o.Format)
}
