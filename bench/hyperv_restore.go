//go:build linux && amd64

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
)

// hypervRestores compares restoring the VM under another name, a disk and a
// definition, with smbclient's put of the disk's file, near and far.
func (b *bench) hypervRestores(ctx context.Context, l *hypervLab) error {
	repo := b.path("hyperv-repo")
	if err := b.fresh([]string{"hyperv-repo"}, b.exe, "repo", "init", "--quiet", "--repo", repo)(); err != nil {
		return err
	}
	if _, err := b.hypervBackup(ctx, l, repo, false); err != nil {
		return err
	}
	n := 0
	for _, rtt := range []time.Duration{0, hypervAway} {
		l.away(rtt)
		var ours, theirs, client []time.Duration
		var peak int64
		for range b.runs {
			t, err := b.smbclient(ctx, l, rtt > 0, fmt.Sprintf(`put %s VMs\again.vhdx`, l.file))
			if err := errors.Join(err, os.Remove(filepath.Join(l.dir, "C", "VMs", "again.vhdx"))); err != nil {
				return err
			}
			theirs = append(theirs, t)
			t, err = writeFile(ctx, l, rtt > 0)
			if err := errors.Join(err, os.Remove(filepath.Join(l.dir, "C", "VMs", "again.vhdx"))); err != nil {
				return err
			}
			client = append(client, t)
			n++
			name := fmt.Sprintf("again%d", n)
			t, rss, _, err := b.backstay(ctx, l, "restore", hypervVM, "--repo", repo, "--to", l.source(name, rtt > 0), "--folder", `C:\VMs`)
			if err := errors.Join(err, os.RemoveAll(filepath.Join(l.dir, "C", "VMs", name))); err != nil {
				return err
			}
			ours, peak = append(ours, t), max(peak, rss)
		}
		slices.Sort(ours)
		slices.Sort(theirs)
		slices.Sort(client)
		rate := func(t []time.Duration) float64 { return float64(l.data()) / 1e6 / mid(t).Seconds() }
		fmt.Printf("\nhyperv: restoring %.1f GB of data to a new VM through Samba, encrypted, round trips of %v more (median of %d)\n", float64(l.data())/1e9, rtt, b.runs)
		fmt.Printf("%-36s %8s %8s %9s\n%-36s %8.0f %8s %9s\n%-36s %8.0f %8.2f %9s\n%-36s %8.0f %8.2f %9d\n", "writer", "MB/s", "ratio", "RSS MiB",
			"smbclient put", rate(theirs), "1.00", "-", "the file, 16 writers", rate(client), rate(client)/rate(theirs), "-", "backstay restore, all of it", rate(ours), rate(ours)/rate(theirs), peak>>20)
	}
	return nil
}

// writeFile writes the disk's file anew with our client, as a restore does that
// has nothing else to do. Like smbclient it does not wait for the host's disk.
func writeFile(ctx context.Context, l *hypervLab, slow bool) (time.Duration, error) {
	from, err := os.Open(l.file)
	if err != nil {
		return 0, err
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	c, err := smb.Dial(ctx, smb.Target{Host: "127.0.0.1", Port: l.smbPort(slow), User: smbtest.User, Password: secret.New([]byte(smbtest.Password))})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	f, err := c.Create(ctx, smb.Path{Share: smbtest.Share, Name: `VMs\again.vhdx`})
	if err != nil {
		return 0, err
	}
	var next atomic.Int64
	errs := make([]error, 16)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			p := make([]byte, smbPart)
			for errs[i] == nil {
				off := next.Add(smbPart) - smbPart
				if off >= info.Size() {
					return
				}
				n, err := from.ReadAt(p, off)
				if err == nil || err == io.EOF {
					_, err = f.WriteAt(p[:n], off)
				}
				errs[i] = err
			}
		})
	}
	wg.Wait()
	err = errors.Join(append(errs, f.Close())...)
	return time.Since(begun), err
}
