//go:build linux && amd64

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	mrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/smb/smbtest"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
	"github.com/backstay/backstay/sim/hyperv/wsman"
)

const (
	hypervVM    = "bench"
	hypervUnit  = 64 << 10 // what change tracking tells apart
	hypervBlock = 32 << 20 // of the VHDX, as Windows makes it
	// The disk has runs of data with nothing between them.
	hypervRun  = 64 << 20
	hypervStep = 4 * hypervRun
)

// A hypervLab is a simulated host with one VM, whose disk a real Samba serves.
// Both are reached directly, or through a delay that counts bytes.
type hypervLab struct {
	dir      string
	samba    *smbtest.Server
	host     *host.Host
	winrm    *sim.Endpoint
	requests atomic.Int64 // to WinRM
	slowSMB  *delay
	slowRM   *delay
	bytes    int64 // of the disk
	file     string
	rand     *mrand.Rand
}

// startHyperV makes the host in dir. The VM's disk is empty but for a quarter
// of it, unless empty is set.
func startHyperV(ctx context.Context, dir string, size int64, o image.CreateOptions, empty bool) (l *hypervLab, err error) {
	l = &hypervLab{dir: dir, bytes: size, rand: mrand.New(mrand.NewPCG(1, uint64(size)))}
	defer func() {
		if err != nil {
			l.stop()
		}
	}()
	if err := os.RemoveAll(dir); err != nil { // of a run that was killed
		return l, err
	}
	path := fmt.Sprintf(`C:\VMs\%s\%[1]s.vhdx`, hypervVM)
	l.file = filepath.Join(dir, "C", "VMs", hypervVM, hypervVM+".vhdx")
	if err := os.MkdirAll(filepath.Dir(l.file), 0o755); err != nil {
		return l, err
	}
	o.VirtualBytes = size
	if err := makeVHDX(ctx, l.file, o, empty); err != nil {
		return l, err
	}
	if l.samba, err = smbtest.Start(ctx, smbtest.Options{Dir: filepath.Join(dir, "C")}); err != nil {
		return l, err
	}
	if l.host, err = host.New(host.Options{Dir: dir, Granule: hypervUnit, VolumeBytes: 128 << 40}); err != nil {
		return l, err
	}
	if _, err := l.host.AddVM(host.Spec{Name: hypervVM, Disks: []host.DiskSpec{{Path: path, Exists: true}}}); err != nil {
		return l, err
	}
	if l.winrm, err = l.serve(false); err != nil {
		return l, err
	}
	at, err := url.Parse(l.winrm.URL)
	if err != nil {
		return l, err
	}
	if l.slowRM, err = newDelay(at.Host); err != nil {
		return l, err
	}
	l.slowSMB, err = newDelay(l.samba.Addr())
	return l, err
}

// serve answers WS-Management and counts requests.
func (l *hypervLab) serve(http bool) (*sim.Endpoint, error) {
	return sim.Serve(l.host, "HV01", sim.Options{User: smbtest.User, Password: smbtest.Password, HTTP: http, Fault: func(string) wsman.Trouble {
		l.requests.Add(1)
		return wsman.None
	}})
}

// stop ends everything and removes the files. It may be called twice.
func (l *hypervLab) stop() error {
	var errs []error
	for _, d := range []*delay{l.slowSMB, l.slowRM} {
		if d != nil {
			d.close()
		}
	}
	if l.winrm != nil {
		errs = append(errs, l.winrm.Close())
	}
	if l.host != nil {
		errs = append(errs, l.host.Close())
	}
	if l.samba != nil {
		errs = append(errs, l.samba.Stop())
	}
	l.slowSMB, l.slowRM, l.winrm, l.host, l.samba = nil, nil, nil, nil, nil
	return errors.Join(append(errs, os.RemoveAll(l.dir))...)
}

// data is how many bytes of the disk are none of its holes.
func (l *hypervLab) data() int64 { return l.bytes / (hypervStep / hypervRun) }

// away puts the host that much further away, for who goes through the delays.
func (l *hypervLab) away(roundTrip time.Duration) {
	l.slowSMB.roundTrip(roundTrip)
	l.slowRM.roundTrip(roundTrip)
}

// smbPort is where the files are, directly or through the delay.
func (l *hypervLab) smbPort(slow bool) int {
	if slow {
		return l.slowSMB.l.Addr().(*net.TCPAddr).Port
	}
	return l.samba.Port
}

// source is how a VM is reached, directly or through the delays.
func (l *hypervLab) source(vm string, slow bool) string {
	at, _ := url.Parse(l.winrm.URL)
	rm, files := at.Host, l.samba.Addr()
	if slow {
		rm, files = l.slowRM.addr(), l.slowSMB.addr()
	}
	return fmt.Sprintf(`hyperv://%s@%s/%s?smb=%s&share=C:\=%s&fingerprint=sha256:%s`, smbtest.User, rm, vm, files, smbtest.Share, l.winrm.Fingerprint)
}

// makeVHDX makes the disk: runs of data that compress to a quarter.
func makeVHDX(ctx context.Context, path string, o image.CreateOptions, empty bool) error {
	w, err := vhdx.Create(path, o)
	if err != nil {
		return err
	}
	defer w.Close()
	var seed [32]byte
	rand.Read(seed[:])
	src := mrand.NewChaCha8(seed)
	p := make([]byte, 1<<20)
	for off := int64(0); off < o.VirtualBytes && !empty; off += int64(len(p)) {
		if off%hypervStep >= hypervRun {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		quarter(p, src)
		if _, err := w.WriteAt(p[:min(int64(len(p)), o.VirtualBytes-off)], off); err != nil {
			return err
		}
	}
	return w.Finish()
}

// quarter fills p with what compresses to a quarter.
func quarter(p []byte, src io.Reader) {
	const part = 1 << 10
	for i := 0; i+4*part <= len(p); i += 4 * part {
		src.Read(p[i : i+part])
		for j := 1; j < 4; j++ {
			copy(p[i+j*part:], p[i:i+part])
		}
	}
}

// change writes a hundredth of the data as the guest: each piece in another
// place, runs of a multiple of hypervUnit. It gives how many bytes those are.
func (l *hypervLab) change(run int64) (int64, error) {
	want := max(l.data()/100/run, 1)
	seen := map[int64]bool{}
	for int64(len(seen)) < want {
		off := l.rand.Int64N(l.bytes/hypervStep)*hypervStep + l.rand.Int64N(hypervRun/run)*run
		if seen[off] {
			continue
		}
		seen[off] = true
		if err := l.host.Write(hypervVM, 0, off, run, l.rand.Uint64()|1); err != nil {
			return 0, err
		}
	}
	return want * run, nil
}

// A hypervBackup is one backup and what it cost.
type hypervBackup struct {
	vmBackup
	wall     time.Duration
	rss      int64 // bytes
	requests int64 // to WinRM
	conns    int64 // to WinRM, if they went through the delay
	network  int64 // bytes that came over SMB, if they went through the delay
}

// hypervBackup runs backstay backup, through the delays if slow.
func (b *bench) hypervBackup(ctx context.Context, l *hypervLab, repo string, slow bool, args ...string) (out hypervBackup, err error) {
	requests, conns, network := l.requests.Load(), l.slowRM.conns.Load(), l.slowSMB.down.Load()
	var text string
	out.wall, out.rss, text, err = b.backstay(ctx, l, append([]string{"backup", l.source(hypervVM, slow), "--repo", repo, "--json"}, args...)...)
	if err != nil {
		return out, err
	}
	out.requests, out.conns, out.network = l.requests.Load()-requests, l.slowRM.conns.Load()-conns, l.slowSMB.down.Load()-network
	if err := json.Unmarshal([]byte(text), &out.vmBackup); err != nil {
		return out, err
	}
	if len(out.Disks) != 1 {
		return out, fmt.Errorf("%d disks were backed up", len(out.Disks))
	}
	return out, nil
}

// backstay runs one of its commands, and gives how long that took, the peak of
// its memory in bytes and what it printed.
func (b *bench) backstay(ctx context.Context, l *hypervLab, args ...string) (took time.Duration, rss int64, stdout string, err error) {
	cmd := exec.CommandContext(ctx, b.exe, append(args, "--state-dir", filepath.Join(l.dir, "state"), "--quiet")...)
	cmd.Env = append(os.Environ(), append(b.env(), "BACKSTAY_HOST_PASSWORD="+smbtest.Password)...)
	var out, talk strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &talk
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, "", err
	}
	peak := watchPeak(cmd.Process.Pid)
	err = cmd.Wait()
	took, rss = time.Since(begun), peak()
	if err != nil {
		err = fmt.Errorf("backstay %s: %w\n%s%s", args[0], err, out.String(), talk.String())
	}
	return took, rss, out.String(), err
}

// mode fails if the backup was of another kind: a figure of something else
// would be worse than none.
func (h hypervBackup) mode(want string) error {
	if got := h.Disks[0].Mode; got != want {
		return fmt.Errorf("a backup was %q and not %q", got, want)
	}
	return nil
}

// watchPeak looks at the memory of a process until it ends, and gives its peak
// in bytes. What wait4 says would count from this process's at the fork.
func watchPeak(pid int) func() int64 {
	stop, done := make(chan struct{}), make(chan struct{})
	peak := int64(0)
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(status)) {
				if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
					n, _ := strconv.ParseInt(f[1], 10, 64)
					peak = max(peak, min(n, math.MaxInt64>>10)<<10)
				}
			}
		}
	}()
	return func() int64 { close(stop); <-done; return peak }
}
