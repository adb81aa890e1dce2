//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/backstay/backstay/internal/lab"
)

// How often the guest is frozen for the freeze figures.
const freezes = 20

// A vmBackup is what backstay backup --json says of one VM.
type vmBackup struct {
	ID        string `json:"id"`
	FrozenFor int64  `json:"frozen_for_ns"`
	Host      int64  `json:"host_ns"` // in calls of the hypervisor, the freeze included
	Disks     []struct {
		ID    string `json:"id"`
		Mode  string `json:"mode"`
		Stats struct {
			Read    int64 `json:"read_bytes"`
			Changed int64 `json:"changed_bytes"`
			Audit   int64 `json:"audit_bytes"`
		} `json:"stats"`
	} `json:"disks"`
}

// vm measures the incremental of a running VM, 1 % changed, against restic's
// re-scan of a raw copy of the same state, and the freeze of the guest.
func (b *bench) vm(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, for libvirt")
	}
	if err := b.makeDisk(ctx); err != nil {
		return err
	}
	guest, err := lab.Build(ctx, "", lab.BuildOptions{})
	if err != nil {
		return err
	}
	dir := b.path("lab")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	lv, err := lab.StartLibvirt(ctx, dir, lab.LibvirtOptions{})
	if err != nil {
		return err
	}
	defer lv.Stop()
	sys, data := lv.Path("vda.qcow2"), lv.Path("vdb.qcow2")
	if err := guest.CreateDisk(ctx, sys, lab.DiskOptions{}); err != nil {
		return err
	}
	if err := b.fresh(nil, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", b.disk, data)(); err != nil {
		return err
	}
	// The guest is to be idle while it is measured, so nothing writes by itself.
	m, err := lv.Define(ctx, guest, lab.VMOptions{Name: "backstay-bench", NoWorkload: true, Disks: []lab.VMDisk{{Path: sys}, {Path: data}}})
	if err != nil {
		return err
	}
	if err := m.Start(ctx); err != nil {
		return err
	}
	if err := m.WaitAgent(ctx); err != nil {
		return err
	}
	if err := b.fresh([]string{"vm-repo", "vm-restic"}, b.exe, "repo", "init", "--quiet", "--repo", b.path("vm-repo"))(); err != nil {
		return err
	}
	if _, _, err := b.backupVM(ctx, lv); err != nil { // the full
		return err
	}
	peers := b.peers
	if _, err := exec.LookPath("restic"); err != nil {
		fmt.Println("vm: restic is not installed, left out")
		peers = false
	}
	copyOf := func(id string) error {
		return b.fresh([]string{"vm.raw"}, b.exe, "restore", "backstay-bench/"+id, "--disk", "vdb", "--to", b.path("vm.raw"), "--repo", b.path("vm-repo"), "--quiet")()
	}
	restic := tool{name: "restic", env: b.env(), args: []string{"restic", "-q", "-r", b.path("vm-restic"), "backup", b.path("vm.raw")}}
	if peers {
		if err := b.fresh(nil, "restic", "-q", "-r", b.path("vm-restic"), "init")(); err != nil {
			return err
		}
		first, _, err := b.backupVM(ctx, lv)
		if err != nil {
			return err
		}
		if err := copyOf(first.ID); err != nil {
			return err
		}
		if _, err := b.measure(ctx, restic); err != nil {
			return err
		}
	}

	var walls, hosts, resticWalls []time.Duration
	var worst float64
	for run := range b.runs {
		if err := guestChange(ctx, m, b.virtual, run); err != nil {
			return err
		}
		got, s, err := b.backupVM(ctx, lv)
		if err != nil {
			return err
		}
		walls, hosts = append(walls, s.wall), append(hosts, time.Duration(got.Host))
		for _, d := range got.Disks {
			if d.ID != "vdb" {
				continue
			}
			if d.Mode != "incremental" {
				return fmt.Errorf("run %d was %s, not incremental", run, d.Mode)
			}
			ratio := float64(d.Stats.Read-d.Stats.Audit) / float64(d.Stats.Changed)
			worst = max(worst, ratio)
			fmt.Printf("incremental %d: tracking named %.1f MB, read %.1f MB (ratio %.3f) and %.1f MB for the audit, %.2f s, of it %.2f s in libvirt's calls\n", run+1,
				float64(d.Stats.Changed)/1e6, float64(d.Stats.Read-d.Stats.Audit)/1e6, ratio, float64(d.Stats.Audit)/1e6, s.wall.Seconds(), time.Duration(got.Host).Seconds())
		}
		if peers {
			if err := copyOf(got.ID); err != nil {
				return err
			}
			if err := warm(b.path("vm.raw")); err != nil {
				return err
			}
			rs, err := b.measure(ctx, restic)
			if err != nil {
				return err
			}
			resticWalls = append(resticWalls, rs.wall)
		}
	}
	fmt.Printf("\nincremental of the running VM, 1 %% changed (median of %d)\n", b.runs)
	w, h := mid(walls), mid(hosts)
	fmt.Printf("backstay %.2f s, of it %.2f s in libvirt's calls and the freeze; read at most %.3f of what tracking named, plus the audit\n", w.Seconds(), h.Seconds(), worst)
	if peers {
		r := mid(resticWalls)
		fmt.Printf("restic's re-scan of a raw copy %.2f s; ratio %.3f without libvirt's calls, %.3f with them\n", r.Seconds(), (w-h).Seconds()/r.Seconds(), w.Seconds()/r.Seconds())
	}

	var frozen []time.Duration
	for range freezes {
		got, _, err := b.backupVM(ctx, lv)
		if err != nil {
			return err
		}
		frozen = append(frozen, time.Duration(got.FrozenFor))
	}
	slices.Sort(frozen)
	fmt.Printf("\nfreeze of the guest, %d backups: median %.3f s, worst %.3f s\n", len(frozen), frozen[len(frozen)/2].Seconds(), frozen[len(frozen)-1].Seconds())
	return nil
}

// backupVM backs the VM up once and says what it read.
func (b *bench) backupVM(ctx context.Context, lv *lab.Libvirt) (vmBackup, sample, error) {
	args := []string{"backup", lv.KVM("backstay-bench"), "--repo", b.path("vm-repo"), "--state-dir", b.path("state"), "--json", "--quiet", "--consistency", "filesystem", "--freeze-limit", "30s"}
	cmd := exec.CommandContext(ctx, b.exe, args...)
	cmd.Env = append(os.Environ(), b.env()...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return vmBackup{}, sample{}, fmt.Errorf("backup: %w\n%s", err, out.String())
	}
	syscall.Sync()
	s := sample{wall: time.Since(start)}
	var got vmBackup
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		return got, s, fmt.Errorf("backup --json: %w", err)
	}
	return got, s, nil
}

// guestChange lets the guest rewrite one percent of its second disk, in
// extents of 64 KiB spread over it.
func guestChange(ctx context.Context, m *lab.VM, virtual int64, run int) error {
	n := virtual / 100 / (64 << 10)
	step := virtual / (64 << 10) / n
	_, err := m.Shell(ctx, fmt.Sprintf(`dd if=/dev/urandom of=/tmp/r bs=64k count=1 2>/dev/null
i=0; while [ $i -lt %d ]; do dd if=/tmp/r of=/dev/vdb bs=64k count=1 seek=$((i*%d+%d)) conv=notrunc 2>/dev/null; i=$((i+1)); done; sync`, n, step, run%int(step)))
	return err
}

func mid(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}
