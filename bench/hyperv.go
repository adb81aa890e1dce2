//go:build linux && amd64

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/wsman"
)

// hypervHuge is the largest disk that a VHDX can have.
const hypervHuge = 64 << 40

// hyperv measures backups of a VM of a simulated Hyper-V host, whose files a
// real Samba serves encrypted.
func (b *bench) hyperv(ctx context.Context) error {
	if _, err := exec.LookPath("smbclient"); err != nil {
		fmt.Println("hyperv: smbclient is not installed, left out")
		return nil
	}
	defer os.RemoveAll(b.path("hyperv-repo"))
	parts := map[string]func(context.Context, *hypervLab) error{"backups": b.hypervBackups, "reads": b.hypervReads, "restores": b.hypervRestores, "calls": b.hypervCalls}
	var l *hypervLab
	defer func() {
		if l != nil {
			l.stop()
		}
	}()
	for _, name := range strings.Split(b.hypervParts, ",") {
		if name == "empty" {
			if err := b.hypervEmpty(ctx); err != nil {
				return err
			}
			continue
		}
		part := parts[name]
		if part == nil {
			return fmt.Errorf("no part %q", name)
		}
		if l == nil {
			begun := time.Now()
			var err error
			l, err = startHyperV(ctx, b.path("hyperv"), b.hypervBytes, image.CreateOptions{BlockBytes: hypervBlock}, false)
			if errors.Is(err, smbtest.ErrMissing) {
				fmt.Printf("hyperv: %v, left out\n", err)
				return nil
			}
			if err != nil {
				return err
			}
			fmt.Printf("\nhyperv: a disk of %.1f GiB with %.1f GiB of data that compress to a quarter, made in %.0f s\n", gib(l.bytes), gib(l.data()), time.Since(begun).Seconds())
		}
		if err := part(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// A hypervLine is one line of the table of backups.
type hypervLine struct {
	name    string
	changed int64 // bytes that the guest wrote before
	all     []hypervBackup
}

// hypervBackups measures a full backup and incrementals of it.
func (b *bench) hypervBackups(ctx context.Context, l *hypervLab) error {
	repo := b.path("hyperv-repo")
	lines := []*hypervLine{{name: "full"}, {name: "incremental, 64 KiB scattered"}, {name: "incremental, 1 MiB clustered"},
		{name: "the first, without audit"}, {name: "the second, without audit"},
		{name: "full, 20 ms away"}, {name: "incremental, scattered, 20 ms away"}}
	for range b.runs {
		for i, line := range lines {
			slow, args := i >= 3, []string(nil)
			switch i {
			case 0, 5:
				if err := b.fresh([]string{"hyperv-repo"}, b.exe, "repo", "init", "--quiet", "--repo", repo)(); err != nil {
					return err
				}
			case 1, 3, 6:
				n, err := l.change(hypervUnit)
				if err != nil {
					return err
				}
				line.changed = n
			case 2, 4:
				n, err := l.change(1 << 20)
				if err != nil {
					return err
				}
				line.changed = n
			}
			if i == 3 || i == 4 {
				args = append(args, "--audit", "0")
			}
			rtt := time.Duration(0)
			if i >= 5 {
				rtt = hypervAway
			}
			l.away(rtt)
			if err := exec.CommandContext(ctx, "sync").Run(); err != nil {
				return err
			}
			one, err := b.hypervBackup(ctx, l, repo, slow, args...)
			if err != nil {
				return fmt.Errorf("%s: %w", line.name, err)
			}
			want := "incremental"
			if i == 0 || i == 5 {
				want = "full"
			}
			if err := one.mode(want); err != nil {
				return fmt.Errorf("%s: %w", line.name, err)
			}
			line.all = append(line.all, one)
		}
	}
	fmt.Printf("\nhyperv: backups, 1 %% of the data changed before each incremental (median of %d)\n", b.runs)
	fmt.Printf("%-36s %8s %8s %9s %9s %8s %9s %8s\n", "backup", "wall s", "to full", "read MB", "audit MB", "RSS MiB", "requests", "sign-ins")
	full := hypervMedian(lines[0].all)
	for i, line := range lines {
		m := hypervMedian(line.all)
		base, conns := full, "-"
		if i >= 5 {
			base = hypervMedian(lines[5].all)
		}
		if i >= 3 {
			conns = strconv.FormatInt(m.conns, 10)
		}
		s := m.Disks[0].Stats
		fmt.Printf("%-36s %8.2f %8.3f %9.1f %9.1f %8d %9d %8s\n", line.name, m.wall.Seconds(), m.wall.Seconds()/base.wall.Seconds(),
			float64(s.Read)/1e6, float64(s.Audit)/1e6, m.rss>>20, m.requests, conns)
	}
	fmt.Println("to full: wall time over the full backup's of the same distance; at most 0.05 is asked on 64 GiB with 16 GiB of data")
	for _, line := range lines[3:5] {
		m := hypervMedian(line.all)
		fmt.Printf("%-36s %.1f MB changed, %.1f MB came over the network, all of SMB counted: %.3f for each byte; at most 1.1 is asked\n",
			line.name, float64(line.changed)/1e6, float64(m.network)/1e6, float64(m.network)/float64(line.changed))
	}
	return nil
}

// hypervMedian is the backup whose time is the median.
func hypervMedian(all []hypervBackup) hypervBackup {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b hypervBackup) int { return int(a.wall - b.wall) })
	return all[len(all)/2]
}

// hypervAway is the round trip of a host that is far away.
const hypervAway = 20 * time.Millisecond

// A hypervReader is one way to read all data of the disk. It gives how long it
// took.
type hypervReader struct {
	name        string
	connections int
	read        func(ctx context.Context, l *hypervLab, slow bool, connections int) (time.Duration, error)
}

// hypervReads compares reading the disk with smbclient's get of its file, near
// and far, in turns.
func (b *bench) hypervReads(ctx context.Context, l *hypervLab) error {
	readers := []hypervReader{
		{"smbclient get", 1, b.getFile},
		{"the file, one reader", 1, readFile(sequential)},
		{"the file, workers", 1, readFile(workers)},
		{"the file, workers", 2, readFile(workers)},
		{"the disk, as a backup reads it", smb.DefaultConnections, readDisk},
	}
	for _, rtt := range []time.Duration{0, hypervAway} {
		l.away(rtt)
		took := make([][]time.Duration, len(readers))
		for range b.runs {
			for i, r := range readers {
				t, err := r.read(ctx, l, rtt > 0, r.connections)
				if err != nil {
					return fmt.Errorf("%s: %w", r.name, err)
				}
				took[i] = append(took[i], t)
			}
		}
		fmt.Printf("\nhyperv: reading %.1f GB of data of the dynamic VHDX from Samba, encrypted, round trips of %v more (median of %d)\n", float64(l.data())/1e9, rtt, b.runs)
		fmt.Printf("%-36s %12s %8s %7s\n", "reader", "connections", "MB/s", "ratio")
		for i, r := range readers {
			slices.Sort(took[i])
			t := mid(took[i]).Seconds()
			fmt.Printf("%-36s %12d %8.0f %7.2f\n", r.name, r.connections, float64(l.data())/1e6/t, mid(took[0]).Seconds()/t)
		}
	}
	fmt.Println("ratio: our rate over smbclient's; at least 0.9 is asked")
	return nil
}

// getFile reads the disk's file with smbclient.
func (b *bench) getFile(ctx context.Context, l *hypervLab, slow bool, _ int) (time.Duration, error) {
	return b.smbclient(ctx, l, slow, fmt.Sprintf(`get VMs\%s\%[1]s.vhdx /dev/null`, hypervVM))
}

// smbclient runs one of its commands and gives how long that took.
func (b *bench) smbclient(ctx context.Context, l *hypervLab, slow bool, command string) (time.Duration, error) {
	auth := b.path("hyperv-user")
	if err := os.WriteFile(auth, []byte("username = "+smbtest.User+"\npassword = "+smbtest.Password+"\n"), 0o600); err != nil {
		return 0, err
	}
	defer os.Remove(auth)
	begun := time.Now()
	cmd := exec.CommandContext(ctx, "smbclient", "//127.0.0.1/"+smbtest.Share, "-p", strconv.Itoa(l.smbPort(slow)), "-A", auth,
		"--client-protection=encrypt", "-c", command)
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("smbclient: %w\n%s", err, out)
	}
	return time.Since(begun), nil
}

// readFile reads the disk's file with our client.
func readFile(read func(context.Context, *smb.File) error) func(context.Context, *hypervLab, bool, int) (time.Duration, error) {
	return func(ctx context.Context, l *hypervLab, slow bool, connections int) (time.Duration, error) {
		begun := time.Now()
		c, err := smb.Dial(ctx, smb.Target{Host: "127.0.0.1", Port: l.smbPort(slow), User: smbtest.User, Password: secret.New([]byte(smbtest.Password)), Connections: connections})
		if err != nil {
			return 0, err
		}
		defer c.Close()
		f, err := c.Open(ctx, smb.Path{Share: smbtest.Share, Name: fmt.Sprintf(`VMs\%s\%[1]s.vhdx`, hypervVM)}, "")
		if err != nil {
			return 0, err
		}
		defer f.Close()
		err = read(ctx, f)
		return time.Since(begun), err
	}
}

// readDisk reads the data of the disk through the driver, as a backup does that
// has nothing else to do. The checkpoint is not counted.
func readDisk(ctx context.Context, l *hypervLab, slow bool, _ int) (took time.Duration, err error) {
	u, name, err := hyperv.ParseSource(l.source(hypervVM, slow))
	if err != nil {
		return 0, err
	}
	d, err := hyperv.Open(ctx, hyperv.Options{Host: u, Password: secret.New([]byte(smbtest.Password)), StateDir: filepath.Join(l.dir, "state")})
	if err != nil {
		return 0, err
	}
	defer d.Close()
	s, err := d.Begin(ctx, name, hypervisor.Options{RepoID: "00000000000000000000000000000000"})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.Abort(ctx)) }()
	disk := s.Disks()[0]
	begun := time.Now()
	extents := make(chan extent.Extent)
	errs := make([]error, disk.(hypervisor.DeepDisk).Reads())
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			p := make([]byte, smbPart)
			for e := range extents {
				if errs[i] != nil {
					continue
				}
				if n, err := disk.ReadAt(p[:e.Len], e.Off); int64(n) < e.Len {
					errs[i] = err
				}
			}
		})
	}
	err = eachPart(ctx, disk, extents)
	close(extents)
	wg.Wait()
	return time.Since(begun), errors.Join(append(errs, err)...)
}

// eachPart sends what a disk has of data, in parts that a worker reads at once.
func eachPart(ctx context.Context, disk hypervisor.Disk, to chan<- extent.Extent) error {
	size := disk.Info().SizeBytes
	for off := int64(0); off < size; off += 1 << 30 {
		data, err := disk.Data(ctx, extent.Extent{Off: off, Len: min(1<<30, size-off)})
		if err != nil {
			return err
		}
		for _, e := range data.List() {
			for e.Len > 0 {
				n := min(e.Len, smbPart)
				to <- extent.Extent{Off: e.Off, Len: n}
				e.Off, e.Len = e.Off+n, e.Len-n
			}
		}
	}
	return nil
}

// hypervCalls measures a request of WS-Management, and making a connection.
func (b *bench) hypervCalls(ctx context.Context, l *hypervLab) error {
	sealed, err := l.serve(true)
	if err != nil {
		return err
	}
	defer sealed.Close()
	pin, err := wsman.ParseFingerprint(l.winrm.Fingerprint)
	if err != nil {
		return err
	}
	of := wsman.NewRef("Msvm_ImageManagementService", "CreationClassName", "Msvm_ImageManagementService")
	fmt.Printf("\nhyperv: Get by WS-Management, on a connection that is there\n%-36s %12s %12s\n", "", "sign-in ms", "request ms")
	for _, way := range []struct {
		name string
		cfg  wsman.Config
	}{{"HTTPS", wsman.Config{URL: l.winrm.URL, Pin: &pin}}, {"HTTP, sealed", wsman.Config{URL: sealed.URL}}} {
		way.cfg.User, way.cfg.Password = smbtest.User, secret.New([]byte(smbtest.Password))
		const requests = 200
		var first, rest []time.Duration
		for range 5 {
			c, err := wsman.New(way.cfg)
			if err != nil {
				return err
			}
			for i := range requests {
				begun := time.Now()
				if _, err := c.Get(ctx, of); err != nil {
					c.Close()
					return err
				}
				if i == 0 {
					first = append(first, time.Since(begun))
				} else {
					rest = append(rest, time.Since(begun))
				}
			}
			c.Close()
		}
		slices.Sort(first)
		slices.Sort(rest)
		fmt.Printf("%-36s %12.2f %12.2f\n", way.name, (mid(first)-mid(rest)).Seconds()*1000, mid(rest).Seconds()*1000)
	}
	return nil
}

// hypervEmpty backs up the largest empty disk there is, with the smallest
// blocks that Windows would give it and with small ones.
func (b *bench) hypervEmpty(ctx context.Context) error {
	fmt.Printf("\nhyperv: an empty disk of %d TiB\n%-36s %8s %8s %9s\n", int64(hypervHuge>>40), "backup", "wall s", "RSS MiB", "requests")
	for _, block := range []int64{hypervBlock, 2 << 20} {
		l, err := startHyperV(ctx, b.path("hyperv-empty"), hypervHuge, image.CreateOptions{BlockBytes: block}, true)
		if err != nil {
			return err
		}
		err = b.hypervEmptyOnce(ctx, l, block)
		if err := errors.Join(err, l.stop()); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) hypervEmptyOnce(ctx context.Context, l *hypervLab, block int64) error {
	repo := b.path("hyperv-repo")
	if err := b.fresh([]string{"hyperv-repo"}, b.exe, "repo", "init", "--quiet", "--repo", repo)(); err != nil {
		return err
	}
	for _, want := range []string{"full", "incremental"} {
		one, err := b.hypervBackup(ctx, l, repo, true)
		if err == nil {
			err = one.mode(want)
		}
		if err != nil {
			return fmt.Errorf("an empty disk: %w", err)
		}
		fmt.Printf("%-36s %8.2f %8d %9d\n", fmt.Sprintf("%s, blocks of %d MiB", want, block>>20), one.wall.Seconds(), one.rss>>20, one.requests)
	}
	return nil
}
