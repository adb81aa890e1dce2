//go:build linux && amd64

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const passphrase = "bench"

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) env() []string {
	return []string{
		"BACKSTAY_PASSWORD=" + passphrase, "RESTIC_PASSWORD=" + passphrase, "BORG_PASSPHRASE=" + passphrase,
		"RESTIC_CACHE_DIR=" + b.path("restic-cache"), "BORG_BASE_DIR=" + b.path("borg-base"),
		"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
	}
}

// fresh removes what is there and runs a command that makes it anew.
func (b *bench) fresh(names []string, args ...string) func() error {
	return func() error {
		for _, n := range names {
			if err := os.RemoveAll(b.path(n)); err != nil {
				return err
			}
		}
		if len(args) == 0 {
			return nil
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), b.env()...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
}

func (b *bench) size(name string) func() int64 {
	return func() int64 { return treeBytes(b.path(name)) }
}

// The five ways to make a first backup of the disk.
func (b *bench) fullTools() []tool {
	env := b.env()
	return []tool{
		{name: "backstay backup", env: env, args: []string{b.exe, "backup", b.disk, "--format", "raw", "--vm", "bench", "--repo", b.path("backstay-repo"), "--quiet"},
			prepare: b.fresh([]string{"backstay-repo"}, b.exe, "repo", "init", "--quiet", "--repo", b.path("backstay-repo")), size: b.size("backstay-repo")},
		{name: "zstd -1 -T2 (no encryption)", needs: "zstd", args: []string{"zstd", "-q", "-f", "-1", "-T2", b.disk, "-o", b.path("disk.zst")},
			prepare: b.fresh([]string{"disk.zst"}), size: b.size("disk.zst")},
		{name: "qemu-img convert -c (zstd)", needs: "qemu-img", args: []string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", b.disk, b.path("disk.qcow2")},
			prepare: b.fresh([]string{"disk.qcow2"}), size: b.size("disk.qcow2")},
		{name: "borg create (fixed 512K, zstd,1)", needs: "borg", env: env,
			args:    []string{"borg", "create", "--compression", "zstd,1", "--chunker-params", "fixed,524288", b.path("borg-repo") + "::a", b.disk},
			prepare: b.fresh([]string{"borg-repo", "borg-base"}, "borg", "init", "-e", "repokey-blake2", b.path("borg-repo")), size: b.size("borg-repo")},
		{name: "restic backup", needs: "restic", env: env, args: []string{"restic", "-q", "-r", b.path("restic-repo"), "backup", b.disk},
			prepare: b.fresh([]string{"restic-repo", "restic-cache"}, "restic", "-q", "-r", b.path("restic-repo"), "init"), size: b.size("restic-repo")},
	}
}

func (b *bench) full(ctx context.Context) error {
	if err := b.makeDisk(ctx); err != nil {
		return err
	}
	if err := warm(b.disk); err != nil {
		return err
	}
	_, err := b.compare(ctx, "full backup of a raw image, encrypted", b.files, b.fullTools())
	b.backedUp = err == nil
	return err
}

// ensureRepos makes the repositories that rescan and restore start from.
func (b *bench) ensureRepos(ctx context.Context) error {
	if b.backedUp {
		return nil
	}
	if err := b.makeDisk(ctx); err != nil {
		return err
	}
	b.backedUp = true
	for _, t := range b.fullTools() {
		if t.needs == "zstd" || t.needs != "" && !b.peers {
			continue
		}
		if _, err := exec.LookPath(t.needs); t.needs != "" && err != nil {
			continue
		}
		if err := t.prepare(); err != nil {
			return err
		}
		if _, err := b.measure(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// rescan: one percent of the image has changed and nobody tracked it.
func (b *bench) rescan(ctx context.Context) error {
	if err := b.ensureRepos(ctx); err != nil {
		return err
	}
	image := b.disk
	seed := uint64(0)
	// Every tool meets a newly changed image in each of its runs, so that none
	// can skip what it has seen.
	mutate := func() error {
		seed++
		if _, err := change(image, seed); err != nil {
			return err
		}
		return warm(image)
	}
	env := b.env()
	_, err := b.compare(ctx, "incremental of an image file by hash, 1 % changed", b.files, []tool{
		{name: "backstay backup", env: env, prepare: mutate, args: []string{b.exe, "backup", image, "--format", "raw", "--vm", "bench", "--repo", b.path("backstay-repo"), "--quiet"}},
		{name: "restic backup (re-scan)", needs: "restic", env: env, prepare: mutate, args: []string{"restic", "-q", "-r", b.path("restic-repo"), "backup", image}},
	})
	// The image has changed: the next case wants a new one.
	os.Remove(b.disk)
	b.backedUp = false
	return err
}

func (b *bench) restore(ctx context.Context) error {
	if err := b.ensureRepos(ctx); err != nil {
		return err
	}
	if err := warm(b.disk); err != nil {
		return err
	}
	out := b.path("out.raw")
	env := b.env()
	abs := b.disk
	rows, err := b.compare(ctx, "restore to a raw image", b.files, []tool{
		{name: "backstay restore", env: env, prepare: b.fresh([]string{"out.raw"}), args: []string{b.exe, "restore", "bench", "--to", out, "--repo", b.path("backstay-repo"), "--quiet"}},
		{name: "cp --sparse=always", args: []string{"cp", "--sparse=always", abs, out}, prepare: b.fresh([]string{"out.raw"})},
		{name: "qemu-img convert (zstd qcow2)", needs: "qemu-img", prepare: b.fresh([]string{"out.raw"}), args: []string{"qemu-img", "convert", "-f", "qcow2", "-O", "raw", b.path("disk.qcow2"), out}},
		{name: "restic restore", needs: "restic", env: env, prepare: b.fresh([]string{"restic-out"}), args: []string{"restic", "-q", "-r", b.path("restic-repo"), "restore", "latest", "--target", b.path("restic-out")}},
		{name: "borg extract --sparse", needs: "borg", env: env, prepare: b.fresh([]string{"borg-out"}), args: []string{"sh", "-c", "mkdir " + b.path("borg-out") + " && cd " + b.path("borg-out") + " && borg extract --sparse " + b.path("borg-repo") + "::a"}},
	})
	if err != nil {
		return err
	}
	_ = rows
	// What was restored last is compared, so that a fast wrong answer shows.
	if err := b.fresh([]string{"out.raw"}, b.exe, "restore", "bench", "--to", out, "--repo", b.path("backstay-repo"), "--quiet")(); err != nil {
		return err
	}
	return b.fresh(nil, "cmp", abs, out)()
}
