package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/demo"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// The demo's VM, and what its guest writes.
const (
	demoVM       = "web01"
	demoAgain    = "web01-again"
	demoWrites   = 10 // a second, to each disk
	systemBytes  = 2 << 30
	dataBytes    = 1 << 30
	systemFill   = 96 << 20
	dataFill     = 64 << 20
	changedBytes = 8 << 20
)

func demoCommand() *cobra.Command {
	var backstay, dir string
	c := &cobra.Command{
		Use:   "demo --backstay FILE",
		Short: "Back up and restore a VM of a simulated Hyper-V host",
		Long: `Simulates a Hyper-V host on loopback, whose files a real Samba shares, and runs
backstay against it as people would: list, backup, a guest that writes,
incremental backup, restore to files and as a new VM of that host. What is
restored is compared with what the guest wrote. It needs root and Samba, and
leaves nothing behind.`,
		Example: `  backstay-sim demo --backstay bin/backstay`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			exe, err := filepath.Abs(backstay)
			if err != nil {
				return err
			}
			return runDemo(c.Context(), c.OutOrStdout(), exe, dir)
		},
	}
	c.Flags().StringVar(&backstay, "backstay", "bin/backstay", "the program that does the work")
	c.Flags().StringVar(&dir, "dir", "", "a new directory for everything (default: a temporary one)")
	return c
}

// A story is one run of the demo.
type story struct {
	demo.Teller
	backstay, dir string
	host          *host.Host
	vars          []variable
	seed          uint64
	expected      []string // files with what the disks held when the newest backup was taken
}

// A variable stands for a long argument where commands are shown.
type variable struct{ name, value string }

func runDemo(ctx context.Context, out io.Writer, backstay, dir string) (err error) {
	s := &story{Teller: demo.Teller{Out: out, Start: time.Now()}, backstay: backstay, dir: dir}
	if dir == "" {
		s.dir, err = os.MkdirTemp("", "backstay-demo-")
	} else {
		err = os.Mkdir(dir, 0o755)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(s.dir)) }()
	s.Chapter("A simulated Hyper-V host")
	samba, err := startSamba(ctx, filepath.Join(s.dir, "host", "C"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, samba.Stop()) }()
	if s.host, err = host.New(host.Options{Dir: filepath.Join(s.dir, "host"), Name: "HV01"}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.host.Close()) }()
	e, err := hyperv.Serve(s.host, "HV01", hyperv.Options{User: smbtest.User, Password: smbtest.Password})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	if err := s.prepare(e, samba.Addr()); err != nil {
		return err
	}
	// The guest writes until the story is over.
	guest, stop := context.WithCancel(ctx)
	wrote := make(chan error, 1)
	go func() { wrote <- s.host.Guest(guest, demoVM, demoWrites, 7) }()
	defer func() { stop(); err = errors.Join(err, <-wrote) }()
	for _, part := range []func(context.Context) error{s.first, s.second, s.restore, s.onTheHost} {
		if err := part(ctx); err != nil {
			return fmt.Errorf("demo: %w", err)
		}
	}
	s.Chapter("Done")
	s.Say("No Windows took part: docs/design/hyperv-evidence.md says of each thing that this host does on what it rests.")
	s.Say("Cleaning up: %s goes, and nothing runs on.", s.dir)
	return nil
}

// startSamba tries again where somebody took its port.
func startSamba(ctx context.Context, dir string) (samba *smbtest.Server, err error) {
	for range 3 {
		samba, err = smbtest.Start(ctx, smbtest.Options{Dir: dir})
		if err == nil || errors.Is(err, smbtest.ErrMissing) || ctx.Err() != nil {
			break
		}
	}
	return samba, err
}

// prepare makes the VM and says where all is.
func (s *story) prepare(e *hyperv.Endpoint, smb string) error {
	if _, err := s.host.AddVM(host.Spec{Name: demoVM, Disks: []host.DiskSpec{{Bytes: systemBytes}, {Bytes: dataBytes}}}); err != nil {
		return err
	}
	if err := errors.Join(s.write(0, 1<<20, systemFill), s.write(1, 0, dataFill)); err != nil {
		return err
	}
	for name, text := range map[string]string{"password": rand.Text(), "host-password": smbtest.Password} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text+"\n"), 0o600); err != nil {
			return err
		}
	}
	u, err := url.Parse(e.URL)
	if err != nil {
		return err
	}
	query := fmt.Sprintf(`?smb=%s&share=C:\=%s&fingerprint=sha256:%s`, smb, smbtest.Share, e.Fingerprint)
	source := "hyperv://" + smbtest.User + "@" + u.Host
	s.vars = []variable{{"HOST", source + query}, {"VM", source + "/" + demoVM + query}, {"AGAIN", source + "/" + demoAgain + query}}
	s.Say("It answers WinRM on %s, HTTPS with NTLM; a Samba shares its C: on %s, encrypted. All state is in %s.", u.Host, smb, s.dir)
	s.Say("Its VM %s runs a guest that says it is Windows, with two disks, and writes all the time.", demoVM)
	s.Say("With BACKSTAY_REPO, BACKSTAY_PASSWORD_FILE, BACKSTAY_HOST_PASSWORD_FILE, and")
	for _, v := range s.vars {
		s.Say("%s='%s'", v.name, v.value)
	}
	return nil
}

// write writes as the guest, something else each time.
func (s *story) write(disk int, off, n int64) error {
	s.seed++
	return s.host.Write(demoVM, disk, off, n, s.seed)
}

// run runs one command, with its long arguments shown as variables.
func (s *story) run(ctx context.Context, args ...string) error {
	c := demo.Command{Program: s.backstay, Shown: demo.Quoted(args), Hidden: []string{"--state-dir", filepath.Join(s.dir, "state")}}
	for i, a := range args {
		for _, v := range s.vars {
			if a == "$"+v.name {
				args[i], c.Shown[i] = v.value, `"`+a+`"`
			}
		}
	}
	c.Args = args
	c.Env = []string{"BACKSTAY_REPO=" + filepath.Join(s.dir, "repo"), "BACKSTAY_PASSWORD_FILE=" + filepath.Join(s.dir, "password"),
		"BACKSTAY_HOST_PASSWORD_FILE=" + filepath.Join(s.dir, "host-password")}
	return s.Run(ctx, c)
}

func (s *story) first(ctx context.Context) error {
	s.Chapter("The first backup, while the guest writes")
	for _, args := range [][]string{{"repo", "init"}, {"vm", "list", "$HOST"}, {"backup", "$VM"}} {
		if err := s.run(ctx, args...); err != nil {
			return err
		}
	}
	s.Say("The host made a checkpoint with the guest's writers, its frozen VHDX files were read over SMB, and then it became a reference point.")
	return nil
}

func (s *story) second(ctx context.Context) error {
	s.Chapter("It changes, and is backed up again")
	if err := s.write(1, 512<<20, changedBytes); err != nil {
		return err
	}
	s.Say("The guest wrote %d MiB at once, and goes on with its small writes. The host kept track of them, so only that is read.", changedBytes>>20)
	if err := s.run(ctx, "backup", "$VM"); err != nil {
		return err
	}
	return s.run(ctx, "point", "list")
}

// expect writes what the disks held when the newest backup was taken.
func (s *story) expect() error {
	points := s.host.Instances("root/virtualization/v2", "Msvm_VirtualSystemReferencePoint")
	if len(points) != 1 {
		return fmt.Errorf("the host has %d reference points; the newest backup leaves one", len(points))
	}
	for disk, bytes := range []int64{systemBytes, dataBytes} {
		name := filepath.Join(s.dir, fmt.Sprintf("expected%d.raw", disk))
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		err = errors.Join(f.Truncate(bytes), s.host.Expected(demoVM, disk, points[0].Get("InstanceID").String(), f), f.Close())
		if err != nil {
			return err
		}
		s.expected = append(s.expected, name)
	}
	return nil
}

func (s *story) restore(ctx context.Context) error {
	s.Chapter("It comes back, as files")
	restored := filepath.Join(s.dir, "restored")
	if err := s.run(ctx, "restore", demoVM, "--to", restored+"/", "--format", "vhdx"); err != nil {
		return err
	}
	if err := s.expect(); err != nil {
		return err
	}
	s.Say("The simulator knows what the guest had written when the checkpoint was taken:")
	return s.compare(ctx, restored)
}

// compare compares the disks in a directory with what they have to hold.
func (s *story) compare(ctx context.Context, dir string) error {
	disks, err := filepath.Glob(filepath.Join(dir, "*.vhdx"))
	if err != nil {
		return err
	}
	if len(disks) != len(s.expected) {
		return fmt.Errorf("in %s are %s", dir, strings.Join(disks, ", "))
	}
	for i, d := range disks {
		if err := s.run(ctx, "image", "compare", d, s.expected[i]); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) onTheHost(ctx context.Context) error {
	s.Chapter("And as a VM of the host")
	for _, args := range [][]string{{"restore", demoVM, "--to", "$AGAIN", "--folder", `C:\VMs`, "--start"}, {"vm", "list", "$HOST"}} {
		if err := s.run(ctx, args...); err != nil {
			return err
		}
	}
	s.Say("Its disks, where the host has them:")
	return s.compare(ctx, s.host.Local(`C:\VMs\`+demoAgain))
}
