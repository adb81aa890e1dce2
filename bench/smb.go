//go:build linux && amd64

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
)

const (
	smbBytes = 512 << 20
	smbPart  = 512 << 10 // what a worker asks for at once
)

// A smbReader is one way to read the whole file.
type smbReader struct {
	name        string
	connections int
	read        func(ctx context.Context, f *smb.File) error
}

// smb compares reading a file from a share that wants encryption and signing
// with smbclient's get of the same file, in turns.
func (b *bench) smb(ctx context.Context) error {
	if _, err := exec.LookPath("smbclient"); err != nil {
		fmt.Println("smb: smbclient is not installed, left out")
		return nil
	}
	dir := b.path("smb")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s, err := smbtest.Start(ctx, smbtest.Options{Dir: dir})
	if errors.Is(err, smbtest.ErrMissing) {
		fmt.Printf("smb: %v, left out\n", err)
		return nil
	}
	if err != nil {
		return err
	}
	defer s.Stop()
	disk, err := os.Create(filepath.Join(dir, "disk.raw"))
	if err != nil {
		return err
	}
	_, err = io.CopyN(disk, rand.Reader, smbBytes)
	if err := errors.Join(err, disk.Close()); err != nil {
		return err
	}
	auth := b.path("smb-user")
	if err := os.WriteFile(auth, []byte("username = "+smbtest.User+"\npassword = "+smbtest.Password+"\n"), 0o600); err != nil {
		return err
	}
	defer os.Remove(auth)

	readers := []smbReader{{"front to back, one reader", 1, sequential}}
	for _, n := range []int{1, 2, 4} {
		readers = append(readers, smbReader{fmt.Sprintf("%d workers", runtime.GOMAXPROCS(0)+2), n, workers})
	}
	var theirs []time.Duration
	ours := make([][]time.Duration, len(readers))
	cpu := make([][]time.Duration, len(readers))
	for range b.runs {
		begun := time.Now()
		get := exec.CommandContext(ctx, "smbclient", "//127.0.0.1/"+smbtest.Share, "-p", strconv.Itoa(s.Port), "-A", auth,
			"--client-protection=encrypt", "-c", "get disk.raw /dev/null")
		if out, err := get.CombinedOutput(); err != nil {
			return fmt.Errorf("smbclient: %w\n%s", err, out)
		}
		theirs = append(theirs, time.Since(begun))
		for i, r := range readers {
			var before, after syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			begun := time.Now()
			if err := readShare(ctx, s, r); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			ours[i] = append(ours[i], time.Since(begun))
			syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			cpu[i] = append(cpu[i], time.Duration(after.Utime.Nano()+after.Stime.Nano()-before.Utime.Nano()-before.Stime.Nano()))
		}
	}
	slices.Sort(theirs)
	rate := func(d time.Duration) float64 { return smbBytes / 1e6 / d.Seconds() }
	fmt.Printf("\nsmb: a file of %d MiB from Samba on loopback, encrypted, sign-in included (median of %d)\n", smbBytes>>20, b.runs)
	fmt.Printf("%-34s %12s %8s %10s %7s\n", "reader", "connections", "MB/s", "CPU s/GB", "ratio")
	fmt.Printf("%-34s %12d %8.0f %10s %7s\n", "smbclient get", 1, rate(mid(theirs)), "-", "-")
	for i, r := range readers {
		fmt.Printf("%-34s %12d %8.0f %10.2f %7.2f\n", r.name, r.connections, rate(mid(ours[i])), mid(cpu[i]).Seconds()/(smbBytes/1e9), mid(theirs).Seconds()/mid(ours[i]).Seconds())
	}
	fmt.Println("ratio: our rate over smbclient's; at least 0.9 is asked")
	return nil
}

func readShare(ctx context.Context, s *smbtest.Server, r smbReader) error {
	c, err := smb.Dial(ctx, smb.Target{Host: "127.0.0.1", Port: s.Port, User: smbtest.User, Password: secret.New([]byte(smbtest.Password)), Connections: r.connections})
	if err != nil {
		return err
	}
	defer c.Close()
	f, err := c.Open(ctx, smb.Path{Share: smbtest.Share, Name: "disk.raw"}, "")
	if err != nil {
		return err
	}
	defer f.Close()
	return r.read(ctx, f)
}

// sequential reads as a plain copy does.
func sequential(_ context.Context, f *smb.File) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(f, 0, f.Bytes()), make([]byte, smbPart))
	return err
}

// workers reads as a backup and a conversion do.
func workers(ctx context.Context, f *smb.File) error {
	var next atomic.Int64
	errs := make([]error, runtime.GOMAXPROCS(0)+2)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			p := make([]byte, smbPart)
			for ctx.Err() == nil {
				off := next.Add(smbPart) - smbPart
				if off >= f.Bytes() {
					return
				}
				if _, err := f.ReadAt(p, off); err != nil && err != io.EOF {
					errs[i] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}
