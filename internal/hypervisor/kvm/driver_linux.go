package kvm

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/vm"
)

// A Driver speaks to one libvirt.
type Driver struct {
	*conn
	stateDir   string
	scratchDir string
	exe        string
	freezeHook bool
	log        *slog.Logger

	hostMu   sync.Mutex
	hostName string
	hostUUID string

	// afterFreeze is called between the freeze and the snapshot; tests wait there.
	afterFreeze func()
}

var (
	_ hypervisor.Driver           = (*Driver)(nil)
	_ hypervisor.TrackingResetter = (*Driver)(nil)
)

// Open connects to libvirt. fault.ErrNotFound says that none is running there.
func Open(ctx context.Context, o Options) (*Driver, error) {
	d := &Driver{conn: newConn(o.URI), stateDir: o.StateDir, scratchDir: o.ScratchDir,
		exe: o.Exe, freezeHook: o.FreezeHook, log: o.Log}
	if d.stateDir == "" {
		d.stateDir = "/var/lib/backstay"
	}
	if d.scratchDir == "" {
		d.scratchDir = "/var/lib/libvirt/backstay"
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.exe == "" {
		exe, err := os.Executable()
		if err != nil {
			return nil, err
		}
		d.exe = exe
	}
	if _, _, err := d.host(ctx); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// Close ends the driver's own connection. Sessions have theirs.
func (d *Driver) Close() error {
	d.close()
	return nil
}

// host is the host's name and libvirt's UUID for it.
func (d *Driver) host(ctx context.Context) (name, uuid string, err error) {
	d.hostMu.Lock()
	defer d.hostMu.Unlock()
	if d.hostUUID != "" {
		return d.hostName, d.hostUUID, nil
	}
	var caps string
	err = d.again(ctx, callTimeout, func(l *libvirt.Libvirt) (err error) {
		if name, err = l.ConnectGetHostname(); err != nil {
			return err
		}
		caps, err = l.ConnectGetCapabilities()
		return err
	})
	if err != nil {
		return "", "", err
	}
	var c struct {
		XMLName xml.Name `xml:"capabilities"`
		UUID    string   `xml:"host>uuid"`
	}
	if err := xml.Unmarshal([]byte(caps), &c); err != nil {
		return "", "", fmt.Errorf("capabilities of libvirt at %s: %w", d.uri.Redacted(), err)
	}
	d.hostName, d.hostUUID = name, c.UUID
	return name, c.UUID, nil
}

// Machines lists all VMs with their disks. A disk whose size libvirt can't
// tell, such as one whose file is missing, has the size 0.
func (d *Driver) Machines(ctx context.Context) ([]vm.Machine, error) {
	var list []libvirt.Domain
	err := d.again(ctx, callTimeout, func(l *libvirt.Libvirt) (err error) {
		list, _, err = l.ConnectListAllDomains(1, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	out := make([]vm.Machine, 0, len(list))
	for _, dom := range list {
		m, err := d.machine(ctx, &domain{d.conn, dom.Name, dom.UUID})
		if errors.Is(err, fault.ErrNotFound) && !errors.Is(err, errNotRunning) {
			continue // removed while we looked
		}
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

func (d *Driver) machine(ctx context.Context, dom *domain) (vm.Machine, error) {
	state, _, err := dom.state(ctx)
	if err != nil {
		return vm.Machine{}, err
	}
	_, def, err := dom.xml(ctx, 0)
	if err != nil {
		return vm.Machine{}, err
	}
	m, err := d.describe(ctx, dom, state)
	if err != nil {
		return vm.Machine{}, err
	}
	for _, e := range disks(def, nil) {
		if e.Excluded == "" {
			e.SizeBytes, _ = dom.size(ctx, string(e.ID))
		}
		m.Disks = append(m.Disks, e.Disk)
	}
	return m, nil
}

// describe is a machine without its disks.
func (d *Driver) describe(ctx context.Context, dom *domain, state libvirt.DomainState) (vm.Machine, error) {
	host, hostID, err := d.host(ctx)
	return vm.Machine{Name: dom.name, Host: host, HostID: hostID, UUID: dom.uuid(),
		Hypervisor: "kvm", State: stateWord(state)}, err
}

// A lock keeps other runs of ours away from one VM.
type lock = journal.Lock

func (d *Driver) lock(dom *domain) (*lock, error) {
	deadline := time.Now().Add(reapOthersTimeout + 5*time.Second)
	for again := false; ; again = true { // at least twice: who has just taken it has not written what for
		l, who, err := d.tryLock(dom, "")
		switch {
		case l != nil || err != nil:
			return l, err
		case again && !strings.HasSuffix(who, tidying) || time.Now().After(deadline):
			return nil, fmt.Errorf("VM %q: another backup of it is running (%s): %w", dom.name, who, fault.ErrLocked)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// tidying, after the name of a lock's holder, says that it will be free soon.
const tidying = ", cleaning up"

// tryLock gives a nil lock and its holder where somebody else has it. what is
// told to others, after our name.
func (d *Driver) tryLock(dom *domain, what string) (l *lock, who string, err error) {
	return journal.TryLock(filepath.Join(d.stateDir, "kvm"), dom.uuid(), what)
}

// openJournal finds the journal; it is made with the first backup, not by
// listing VMs.
func (d *Driver) openJournal() (*journal.Journal, error) {
	return journal.Open(filepath.Join(d.stateDir, "kvm", "journal"))
}

// ResetTracking deletes the checkpoints and bitmaps that we made on a VM for
// one repository. The next backup reads everything.
func (d *Driver) ResetTracking(ctx context.Context, name, repoID string) error {
	prefix, err := checkpointPrefix(repoID)
	if err != nil {
		return err
	}
	c := newConn(d.uri)
	defer c.close()
	dom, err := c.lookup(ctx, name)
	if err != nil {
		return err
	}
	l, err := d.lock(dom)
	if err != nil {
		return err
	}
	defer l.Unlock()
	return dom.dropCheckpoints(ctx, prefix, "")
}

// makeScratch makes the directory of one run, which QEMU must be able to
// write.
func makeScratch(dir string, uid, gid int) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	if uid >= 0 {
		if err := os.Chown(dir, uid, gid); err != nil && !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("scratch directory: %w", err)
		}
	}
	return nil
}

// freeBytes is what an unprivileged process such as QEMU may still write.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// withTimeout gives cleaning up a context that outlasts the caller's.
func withTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

// isLocal says whether uri's libvirt shares our files and sockets.
func isLocal(uri *url.URL) bool { return transport(uri) == "unix" || transport(uri) == "tcp" }
