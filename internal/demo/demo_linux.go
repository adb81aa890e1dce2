package demo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/backstay/backstay/internal/lab"
)

// The demo's machine, small enough for a machine that is emulated.
const (
	vmName      = "web01"
	systemBytes = 512 << 20
	dataBytes   = 1 << 30
	fillBytes   = 160 << 20 // on the data disk when the story begins
	changeBytes = 12 << 20  // what the guest adds before the second backup

	// scratchDir is where the KVM driver keeps what guests overwrite meanwhile.
	scratchDir = "/var/lib/libvirt/backstay"
)

// A story is one run of the demo.
type story struct {
	Teller
	o     Options
	dir   string
	guest *lab.Guest
	host  *lab.Libvirt
	vm    *lab.VM
	disks []string
	saved int64 // records that the newest backup must hold
}

func run(ctx context.Context, o Options) (err error) {
	s := &story{Teller: Teller{Out: o.Out, Start: time.Now()}, o: o}
	// A machine has its scratch directory already, or gets it back without.
	if _, err := os.Stat(scratchDir); errors.Is(err, fs.ErrNotExist) {
		defer os.Remove(scratchDir) // refused unless it is empty
	}
	remove, err := s.makeDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	defer func() {
		if s.host != nil {
			err = errors.Join(err, s.host.Stop())
		}
	}()
	for _, part := range []func(context.Context) error{s.buildGuest, s.startGuest, s.fullBackup, s.incremental, s.disaster, s.comeBack} {
		if err := part(ctx); err != nil {
			return err
		}
	}
	s.Chapter("Done")
	s.Say("The VM was running, was destroyed with its disks, and runs again; its own check found every record and file sound.")
	s.Say("Cleaning up: %s goes, and nothing runs on. The guest's packages stay in the cache for the next time.", s.dir)
	return nil
}

// makeDir makes the state directory. What it returns takes away everything
// that is in it by then, and the directory itself if it was not there before.
func (s *story) makeDir() (remove func() error, err error) {
	if s.o.Dir == "" {
		if s.dir, err = os.MkdirTemp("", "backstay-demo-"); err != nil {
			return nil, err
		}
		return func() error { return os.RemoveAll(s.dir) }, nil
	}
	if s.dir, err = filepath.Abs(s.o.Dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return func() error { return os.RemoveAll(s.dir) }, os.MkdirAll(s.dir, 0o755)
	case err != nil:
		return nil, err
	case len(entries) > 0:
		return nil, fmt.Errorf("%s is not empty, and the demo would remove what is in it", s.dir)
	}
	return func() error {
		entries, err := os.ReadDir(s.dir)
		for _, e := range entries {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.dir, e.Name())))
		}
		return err
	}, nil
}

func (s *story) buildGuest(ctx context.Context) (err error) {
	s.Chapter("A small Linux guest")
	s.Say("All state is in %s.", s.dir)
	start := time.Now()
	if s.guest, err = lab.Build(ctx, "", lab.BuildOptions{Log: s.Say}); err != nil {
		return err
	}
	s.Say("Debian's kernel %s, busybox and the QEMU guest agent, ready after %s.", s.guest.KernelVersion, Seconds(time.Since(start)))
	// While the disks are made, a guest tries whether /dev/kvm is worth its name.
	kvm := make(chan bool, 1)
	go func() { kvm <- lab.ProbeKVM(ctx, s.guest) }()
	start = time.Now()
	s.disks = []string{filepath.Join(s.dir, "system.qcow2"), filepath.Join(s.dir, "data.qcow2")}
	err = s.guest.CreateDisk(ctx, s.disks[0], lab.DiskOptions{SizeBytes: systemBytes, Bootable: true})
	if err == nil {
		err = s.guest.CreateDisk(ctx, s.disks[1], lab.DiskOptions{SizeBytes: dataBytes, Label: lab.DataLabel, FillBytes: fillBytes, Seed: 1})
	}
	works := <-kvm
	if err != nil {
		return err
	}
	s.Say("Two disks, %s to boot from and %s with %s of files, made in %s.", size(systemBytes), size(dataBytes), size(fillBytes), Seconds(time.Since(start)))

	start = time.Now()
	if s.host, err = lab.StartLibvirt(ctx, s.dir, lab.LibvirtOptions{KVM: works, Log: s.Say}); err != nil {
		return err
	}
	s.vm, err = s.host.Define(ctx, s.guest, lab.VMOptions{
		Name: vmName, FromDisk: true, KVM: works,
		Disks: []lab.VMDisk{{Path: s.disks[0]}, {Path: s.disks[1]}},
	})
	if err != nil {
		return err
	}
	s.Say("A libvirt of its own runs the VM %s, ready after %s.", vmName, Seconds(time.Since(start)))
	if !works {
		s.Say("No KVM here that can run a guest, so the processor is emulated: booting takes seconds, not one.")
	}
	return nil
}

func (s *story) startGuest(ctx context.Context) error {
	s.Chapter("The VM boots, and starts to work")
	if err := s.boot(ctx, func() error { return s.vm.Start(ctx) }); err != nil {
		return err
	}
	s.Say("A program in it now writes some 50 records a second: a line in a log, then a block with a checksum.")
	s.Say("At each boot, before it goes on, it reads all of them and says whether they are sound.")
	return nil
}

// boot waits until a VM that start has started answers, and lets it speak.
func (s *story) boot(ctx context.Context, start func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := start(); err != nil {
		return err
	}
	began := time.Now()
	if err := s.vm.WaitAgent(ctx); err != nil {
		return err
	}
	s.Say("Its agent answers after %s. What the guest says about its disk:", Seconds(time.Since(began)))
	said, err := s.vm.Verify(ctx)
	if err != nil {
		return err
	}
	s.Quote(said)
	if !strings.HasPrefix(said, "WORKLOAD VERIFY OK") {
		return fmt.Errorf("the guest found its records damaged: %s", said)
	}
	number, err := strconv.ParseInt(said[strings.LastIndexByte(said, ' ')+1:], 10, 64)
	if err == nil && number < s.saved {
		err = fmt.Errorf("the guest has %d records; there were %d before the backup", number, s.saved)
	}
	return err
}

func (s *story) fullBackup(ctx context.Context) error {
	s.Chapter("The first backup, while it works")
	if err := os.WriteFile(filepath.Join(s.dir, "password"), []byte(rand.Text()+"\n"), 0o600); err != nil {
		return err
	}
	s.Say("With BACKSTAY_REPO=%s and a random passphrase in BACKSTAY_PASSWORD_FILE:", filepath.Join(s.dir, "repo"))
	if err := s.backstay(ctx, "repo", "init"); err != nil {
		return err
	}
	if err := s.backstay(ctx, "vm", "list", s.host.KVM("")); err != nil {
		return err
	}
	return s.backstay(ctx, "backup", s.host.KVM(vmName))
}

func (s *story) incremental(ctx context.Context) error {
	s.Chapter("It changes, and is backed up again")
	before, err := s.records(ctx)
	if err != nil {
		return err
	}
	_, err = s.vm.AgentExec(ctx, "/bin/workload", "fill", "-dir", "/data2/fill", "-bytes", strconv.Itoa(changeBytes), "-seed", "2")
	if err != nil {
		return err
	}
	after, err := s.records(ctx)
	if err != nil {
		return err
	}
	s.saved = after
	s.Say("The guest wrote %s of new files, and its records went from %d to %d.", size(changeBytes), before, after)
	s.Say("QEMU has kept a list of what was written, so only that is read.")
	if err := s.backstay(ctx, "backup", s.host.KVM(vmName)); err != nil {
		return err
	}
	return s.backstay(ctx, "point", "list")
}

// records asks how many records are in the guest's log, each of 64 bytes.
func (s *story) records(ctx context.Context) (int64, error) {
	out, err := s.vm.AgentExec(ctx, "/bin/stat", "-c", "%s", "/data/wl/log")
	if err != nil {
		return 0, err
	}
	bytes, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	return bytes / 64, err
}

func (s *story) disaster(ctx context.Context) error {
	s.Chapter("Disaster")
	if err := s.vm.Remove(ctx); err != nil {
		return err
	}
	for _, d := range s.disks {
		if err := os.Remove(d); err != nil {
			return err
		}
	}
	s.Say("The VM is destroyed and undefined, and its disks are deleted:")
	return s.backstay(ctx, "vm", "list", s.host.KVM(""))
}

func (s *story) comeBack(ctx context.Context) error {
	s.Chapter("It comes back")
	err := s.boot(ctx, func() error {
		return s.backstay(ctx, "restore", vmName, "--to", s.host.KVM(vmName), "--start")
	})
	if err != nil {
		return err
	}
	out, err := s.vm.AgentExec(ctx, "/bin/workload", "check", "-dir", "/data2/fill")
	if err != nil {
		return err
	}
	s.Say("And about the files on its data disk, the newest included:")
	s.Quote(out)
	if want := fmt.Sprintf("WORKLOAD CHECK OK bytes %d\n", fillBytes+changeBytes); out != want {
		return fmt.Errorf("the guest has %q, not %q", strings.TrimSpace(out), strings.TrimSpace(want))
	}
	return nil
}

// backstay runs one command.
func (s *story) backstay(ctx context.Context, args ...string) error {
	return s.Run(ctx, Command{Program: s.o.Backstay, Args: args, Hidden: []string{"--state-dir", filepath.Join(s.dir, "state")},
		Env: []string{"BACKSTAY_REPO=" + filepath.Join(s.dir, "repo"), "BACKSTAY_PASSWORD_FILE=" + filepath.Join(s.dir, "password")}})
}

// apart makes an interruption of ours reach a command from here alone.
func apart(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
}

func size(n int64) string { return humanize.IBytes(uint64(n)) }
