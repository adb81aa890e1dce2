package lab

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed keeper.sh
var keeperScript string

// atOnce is how many labs may run on a machine. Emulation is slow, and guests
// that starve each other fail tests that have nothing wrong.
const atOnce = 2

// LibvirtOptions are what StartLibvirt may be told.
type LibvirtOptions struct {
	Log func(format string, args ...any) // nil for silence
	KVM bool                             // hardware virtualisation; ask ProbeKVM first
}

// A Libvirt is a private libvirtd and the guests it runs. Its methods are safe
// for concurrent use, Restart and Stop excepted.
type Libvirt struct {
	dir    string
	slot   *os.File
	keeper *exec.Cmd
	leash  io.Closer // the keeper ends when this is closed
	daemon *exec.Cmd
	ended  chan struct{} // closed when daemon is gone

	vms map[string]*VM
}

// StartLibvirt runs a libvirtd whose configuration, sockets and logs are below
// dir, which is made if it isn't there; Stop leaves the directory's other
// files alone. Disk images may lie in dir (see Path) or anywhere that the user
// libvirt-qemu can reach: StartLibvirt lets everybody enter dir and those of
// its parents that lie below the directory for temporary files.
//
// Where too many labs run already it waits for one to end, until ctx is done.
// It needs root and a libvirtd to run.
func StartLibvirt(ctx context.Context, dir string, o LibvirtOptions) (*Libvirt, error) {
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	l, err := startLibvirt(ctx, dir, o)
	if err != nil {
		return nil, fmt.Errorf("start the lab's libvirt: %w", err)
	}
	return l, nil
}

func startLibvirt(ctx context.Context, dir string, o LibvirtOptions) (*Libvirt, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("only root can")
	}
	for _, p := range []string{"libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "unshare", "nsenter"} {
		if _, err := exec.LookPath(p); err != nil {
			return nil, fmt.Errorf("%w; the packages libvirt-daemon-system, libvirt-clients, qemu-system-x86 and qemu-utils have it", err)
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := letIn(dir); err != nil {
		return nil, err
	}
	l := &Libvirt{dir: dir, vms: map[string]*VM{}}
	if n := len(l.socket()); n > 107 {
		return nil, fmt.Errorf("the socket's name %s has %d bytes, more than the 107 that Linux can take", l.socket(), n)
	}
	if l.slot, err = takeSlot(ctx, o.Log); err != nil {
		return nil, err
	}
	if err := l.startKeeper(o.KVM); err != nil {
		l.slot.Close()
		return nil, err
	}
	if err = l.writeConfig(); err == nil {
		err = l.startDaemon(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, l.Stop())
	}
	return l, nil
}

// takeSlot waits until fewer than atOnce labs run on this machine.
func takeSlot(ctx context.Context, log func(string, ...any)) (*os.File, error) {
	const name = "/run/lock/backstay-lab-"
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	for waits := 0; ; waits++ {
		for i := range atOnce {
			try, cancel := context.WithTimeout(ctx, time.Millisecond)
			f, err := lockFile(try, name+strconv.Itoa(i))
			cancel()
			if err == nil {
				return f, nil
			}
			if !errors.Is(err, context.DeadlineExceeded) {
				return nil, err
			}
		}
		if waits == 0 {
			log("waiting for one of the %d labs on this machine to end", atOnce)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another lab to end: %w", ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// letIn gives everybody the right to pass through dir, and through those of
// its parents that are temporary and ours.
func letIn(dir string) error {
	tmp := filepath.Clean(os.TempDir())
	for d := dir; d != tmp && d != "/" && (d == dir || strings.HasPrefix(d, tmp+"/")); d = filepath.Dir(d) {
		info, err := os.Stat(d)
		if err != nil {
			return err
		}
		if mode := info.Mode().Perm(); mode&0o055 != 0o055 {
			if err := os.Chmod(d, mode|0o055); err != nil {
				return err
			}
		}
	}
	for d := dir; d != "/"; d = filepath.Dir(d) {
		info, err := os.Stat(d)
		if err != nil {
			return err
		}
		if info.Mode().Perm()&1 == 0 {
			return fmt.Errorf("QEMU runs as libvirt-qemu and may not enter %s: choose another directory", d)
		}
	}
	return nil
}

// startKeeper makes the namespace and waits until it is there.
func (l *Libvirt) startKeeper(kvm bool) error {
	accelerator := "tcg"
	if kvm {
		accelerator = "kvm"
	}
	// A session of its own: ^C at the terminal ends the lab in our order.
	l.keeper = exec.Command("unshare", "--mount", "sh", "-c", keeperScript, "backstay-lab-keeper", l.dir, accelerator)
	l.keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var complaints bytes.Buffer
	l.keeper.Stderr = &complaints
	leash, err := l.keeper.StdinPipe()
	if err != nil {
		return err
	}
	out, err := l.keeper.StdoutPipe()
	if err != nil {
		return err
	}
	if err := l.keeper.Start(); err != nil {
		return err
	}
	l.leash = leash
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		leash.Close()
		l.keeper.Wait()
		return fmt.Errorf("make a mount namespace: %s", bytes.TrimSpace(complaints.Bytes()))
	}
	return nil
}

// writeConfig says what differs from libvirt's defaults. Those of qemu.conf
// stay as they are where a real host would have them so: QEMU runs as
// libvirt-qemu, and libvirt hands it the files it may open.
func (l *Libvirt) writeConfig() error {
	conf := "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n" +
		"log_outputs = \"3:file:/var/log/libvirt/libvirtd.log\"\n"
	if err := os.WriteFile(filepath.Join(l.dir, "etc/libvirtd.conf"), []byte(conf), 0o644); err != nil {
		return err
	}
	// The pool "default" is where disks of new VMs belong.
	images, err := escape(l.Path("images"))
	if err != nil {
		return err
	}
	pool := "<pool type='dir'><name>default</name><target><path>" + images + "</path></target></pool>\n"
	if err := os.MkdirAll(l.Path("images"), 0o755); err != nil {
		return err
	}
	if err := os.MkdirAll(l.Path("etc/storage"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(l.Path("etc/storage/default.xml"), []byte(pool), 0o644); err != nil {
		return err
	}
	// "file": the guests' logs and serial ports need no virtlogd. No namespaces:
	// libvirt would make a new /dev and stumble over what the keeper mounted there.
	qemu := "security_driver = \"none\"\nstdio_handler = \"file\"\nnamespaces = []\n"
	return os.WriteFile(filepath.Join(l.dir, "etc/qemu.conf"), []byte(qemu), 0o644)
}

func (l *Libvirt) startDaemon(ctx context.Context) error {
	pidFile := filepath.Join(l.dir, "libvirtd.pid")
	os.Remove(pidFile) // of a daemon that was killed
	l.daemon = exec.Command("nsenter", "--mount", "--root", "--target", strconv.Itoa(l.keeper.Process.Pid), "--",
		"libvirtd", "-f", "/etc/libvirt/libvirtd.conf", "-p", pidFile)
	l.daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	said, err := os.OpenFile(filepath.Join(l.dir, "log/libvirtd.out"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer said.Close()
	l.daemon.Stdout, l.daemon.Stderr = said, said
	if err := l.daemon.Start(); err != nil {
		return err
	}
	l.ended = make(chan struct{})
	go func(daemon *exec.Cmd, ended chan struct{}) {
		daemon.Wait()
		close(ended)
	}(l.daemon, l.ended)

	// The first answer may take some seconds: libvirt asks QEMU what it can do.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		_, err := l.Virsh(ctx, "version", "--daemon")
		if err == nil {
			return nil
		}
		select {
		case <-l.ended:
			log, _ := os.ReadFile(said.Name())
			return fmt.Errorf("libvirtd ended at once: %s", bytes.TrimSpace(log))
		case <-ctx.Done():
			return fmt.Errorf("libvirtd does not answer: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Dir is the directory that StartLibvirt was given, as an absolute name.
func (l *Libvirt) Dir() string { return l.dir }

// Path is the name of a file in the lab's directory.
func (l *Libvirt) Path(name string) string { return filepath.Join(l.dir, name) }

func (l *Libvirt) socket() string { return filepath.Join(l.dir, "run/libvirt-sock") }

// Socket is the name of libvirtd's Unix socket.
func (l *Libvirt) Socket() string { return l.socket() }

// URI is what libvirt's own programs call the lab.
func (l *Libvirt) URI() string { return "qemu:///system?socket=" + l.socket() }

// KVM is the same for Backstay: the URL of a VM of the lab, or of the lab
// itself for an empty name.
func (l *Libvirt) KVM(name string) string {
	if name != "" {
		name = "/" + name
	}
	return "kvm:///system" + name + "?socket=" + l.socket()
}

// Virsh runs one command of libvirt's shell and returns what it printed.
func (l *Libvirt) Virsh(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c", l.URI()}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("virsh %s: %w: %s", args[0], err, bytes.TrimSpace(complaints.Bytes()))
	}
	return string(out), nil
}

// Restart ends libvirtd and starts another. The guests go on running, as they
// do when a host upgrades its libvirt.
func (l *Libvirt) Restart(ctx context.Context) error {
	if err := l.endDaemon(); err != nil {
		return fmt.Errorf("restart libvirtd: %w", err)
	}
	if err := l.startDaemon(ctx); err != nil {
		return fmt.Errorf("restart libvirtd: %w", err)
	}
	return nil
}

func (l *Libvirt) endDaemon() error {
	if l.daemon == nil || l.daemon.Process == nil {
		return nil
	}
	l.daemon.Process.Signal(syscall.SIGTERM)
	select {
	case <-l.ended:
		return nil
	case <-time.After(15 * time.Second):
	}
	l.daemon.Process.Kill()
	select {
	case <-l.ended:
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("process %d survives being killed", l.daemon.Process.Pid)
	}
}

// Stop destroys and undefines every guest, also those that somebody else
// defined here, and ends libvirtd. Afterwards nothing of the lab runs, and
// nothing of it is left outside its directory. It may be called twice.
func (l *Libvirt) Stop() error {
	if l.leash == nil {
		return nil
	}
	// Cleaning up has a time of its own: the caller's is often over.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var errs []error
	if l.daemon != nil {
		names, err := l.Virsh(ctx, "list", "--all", "--name")
		if err == nil {
			for _, name := range strings.Fields(names) {
				if err := (&VM{lab: l, Name: name}).Remove(ctx); err != nil {
					errs = append(errs, err)
				}
			}
		}
		errs = append(errs, l.endDaemon())
	}
	l.leash.Close()
	l.leash = nil
	l.keeper.Wait() // its own end comes after the last QEMU's
	for _, name := range []string{"libvirtd.pid", "no-kvm", "etc", "run", "cache", "qemu"} {
		errs = append(errs, os.RemoveAll(filepath.Join(l.dir, name)))
	}
	l.slot.Close()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stop the lab: %w", err)
	}
	return nil
}
