//go:build linux && amd64

// Command bench compares backstay with its peers on the same bytes in the same
// run, and prints medians and ratios:
//
//	go run ./bench                    # everything; the running VM needs root and libvirt
//	go run ./bench -only full,restore # only these
//	go run ./bench -runs 7 -dir /fast # more runs, another disk
//	go run ./bench -only history      # 60 days of a disk, dropped and cleaned up, against restic and borg
//	go run ./bench -only limits       # the repository against hash, libzstd and AES alone
//	go run ./bench -only beside       # a backup beside a vacuum
//	go run ./bench -only smb          # reading a share against smbclient; needs root
//	go run ./bench -only hyperv       # a VM of a simulated Hyper-V host; needs root and Samba
//
// It needs restic, borg, qemu-img and zstd; what is missing is left out and
// said so. Every time is wall time up to the end of a sync of the file system,
// from a warm page cache.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if disk := os.Getenv(limitsChild); disk != "" {
		if err := measureLimits(ctx, disk); err != nil {
			fmt.Fprintln(os.Stderr, "bench: limits:", err)
			os.Exit(1)
		}
		return
	}
	var b bench
	only := flag.String("only", "full,restore,rescan,vm,images,history,limits,beside,smb,hyperv", "comma-separated, in this order: full, restore, rescan, vm, images, history, limits, beside, smb, hyperv")
	flag.StringVar(&b.dir, "dir", filepath.Join(os.TempDir(), "backstay-bench"), "work directory; 40 GiB are needed")
	flag.IntVar(&b.runs, "runs", 5, "runs of each tool; the median counts")
	flag.Int64Var(&b.virtual, "virtual", 8<<30, "virtual size of the disk in bytes")
	flag.Int64Var(&b.files, "files", 4<<30+512<<20, "bytes of real files on it")
	flag.Int64Var(&b.historyBytes, "history-size", 1<<30, "bytes of the disk of history")
	flag.IntVar(&b.historyDays, "history-days", 60, "days of history; the default takes some 12 GiB")
	flag.Int64Var(&b.hypervBytes, "hyperv-size", 8<<30, "virtual size of the disk of hyperv; a quarter is data, and half as much is taken at most")
	flag.StringVar(&b.hypervParts, "hyperv-parts", "backups,reads,restores,calls,empty", "comma-separated: what of hyperv to measure")
	flag.BoolVar(&b.peers, "peers", true, "run the other tools too")
	flag.Parse()
	if err := b.run(ctx, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	dir            string
	runs           int
	virtual, files int64
	peers          bool

	historyBytes int64
	historyDays  int
	hypervBytes  int64
	hypervParts  string

	exe  string // backstay
	disk string // the raw image

	backedUp bool // every tool's repository holds the disk as it is
}

func (b *bench) run(ctx context.Context, cases []string) error {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	b.exe = filepath.Join(b.dir, "backstay")
	build := exec.CommandContext(ctx, "go", "build", "-o", b.exe, "github.com/backstay/backstay/cmd/backstay")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go build: %w", err)
	}
	for _, c := range cases {
		var err error
		switch c {
		case "full":
			err = b.full(ctx)
		case "rescan":
			err = b.rescan(ctx)
		case "restore":
			err = b.restore(ctx)
		case "vm":
			err = b.vm(ctx)
		case "images":
			err = b.images(ctx)
		case "history":
			err = b.history(ctx)
		case "limits":
			err = b.limits(ctx)
		case "beside":
			err = b.beside(ctx)
		case "smb":
			err = b.smb(ctx)
		case "hyperv":
			err = b.hyperv(ctx)
		default:
			err = fmt.Errorf("no such case")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c, err)
		}
	}
	return nil
}
