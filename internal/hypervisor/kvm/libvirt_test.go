//go:build linux && amd64

package kvm

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/lab"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// Repositories of the tests.
const (
	repoA = "aaaaaaaa0123456789"
	repoB = "bbbbbbbb0123456789"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == WatchdogArg {
		os.Exit(WatchdogMain(os.Stdin, os.Stdout))
	}
	if order := os.Getenv(victimEnv); order != "" {
		victim(order)
	}
	code := m.Run()
	if bench.stop != nil {
		bench.stop()
	}
	os.Exit(code)
}

// bench is the one libvirt and the one guest that all tests share: starting
// them takes longer than most tests.
var bench struct {
	once  sync.Once
	err   error
	stop  func()
	lab   *lab.Libvirt
	guest *lab.Guest
	web   *lab.VM
}

// A host is a driver on the bench, with a state of its own.
type host struct {
	*testing.T
	*Driver
	ctx context.Context
	lab *lab.Libvirt
	web *lab.VM // vda: the guest's own disk; vdb: empty, 64 MiB, for the tests to write; vdc: raw
}

// newHost gives a driver and the shared guest, running, its agent answering
// unless agent is false. It skips where there is no libvirt, unless it must
// not.
func newHost(t *testing.T) *host {
	t.Helper()
	needLibvirt(t)
	bench.once.Do(func() { bench.err = startBench() })
	if bench.err != nil {
		t.Fatal(bench.err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	t.Cleanup(cancel)
	h := &host{T: t, ctx: ctx, lab: bench.lab, web: bench.web}
	h.Driver = h.open(t.TempDir())
	return h
}

func needLibvirt(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "only root may start a libvirt"
	}
	for _, p := range []string{"libvirtd", "qemu-system-x86_64", "qemu-nbd"} {
		if _, err := exec.LookPath(p); err != nil {
			why = err.Error()
		}
	}
	switch {
	case why == "" && !testing.Short():
	case os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1":
		t.Fatal("may not be skipped here: ", why)
	case testing.Short():
		t.Skip("needs a guest")
	default:
		t.Skip(why)
	}
}

func startBench() error {
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Minute) // other labs may have to end first
	defer cancel()
	dir, err := os.MkdirTemp("", "bskvm")
	if err != nil {
		return err
	}
	bench.stop = func() { os.RemoveAll(dir) }
	if bench.guest, err = lab.Build(ctx, "", lab.BuildOptions{}); err != nil {
		return err
	}
	if bench.lab, err = lab.StartLibvirt(ctx, dir, lab.LibvirtOptions{}); err != nil {
		return err
	}
	bench.stop = func() {
		bench.lab.Stop()
		os.RemoveAll(dir)
	}
	if err := bench.guest.CreateDisk(ctx, bench.lab.Path("vda.qcow2"), lab.DiskOptions{}); err != nil {
		return err
	}
	for name, args := range map[string]string{"vdb.qcow2": "-f qcow2", "vdc.raw": "-f raw"} {
		create := append([]string{"create", "-q"}, strings.Fields(args)...)
		if out, err := exec.Command("qemu-img", append(create, bench.lab.Path(name), "64M")...).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	bench.web, err = bench.lab.Define(ctx, bench.guest, lab.VMOptions{Name: "web01", Every: 50 * time.Millisecond, Disks: []lab.VMDisk{
		{Path: bench.lab.Path("vda.qcow2")}, {Path: bench.lab.Path("vdb.qcow2")}, {Path: bench.lab.Path("vdc.raw")}}})
	if err != nil {
		return err
	}
	return nil
}

// open makes a driver that keeps its state in dir.
func (h *host) open(dir string) *Driver {
	h.Helper()
	uri, _, err := ParseSource(h.lab.KVM(""))
	if err != nil {
		h.Fatal(err)
	}
	d, err := Open(h.ctx, Options{URI: uri, StateDir: dir, ScratchDir: h.lab.Path("scratch"),
		Log: slog.New(slog.NewTextHandler(h.Output(), nil))})
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() { d.Close() })
	return d
}

// up sees that the guest runs and that its agent answers: an agent that
// connects in the middle of a backup makes libvirt wait for 30 s.
func (h *host) up() {
	h.Helper()
	state, err := h.web.State(h.ctx)
	if err == nil && state == "shut off" {
		err = h.web.Start(h.ctx)
	}
	if err == nil {
		err = h.web.WaitAgent(h.ctx)
	}
	h.ok(err)
}

func (h *host) ok(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// write does what the guest would: it writes n bytes of one value to a disk.
func (h *host) write(disk string, off, n int64, value byte) {
	h.Helper()
	alias := map[string]string{"vda": "virtio-disk0", "vdb": "virtio-disk1", "vdc": "virtio-disk2", "vdd": "virtio-disk3"}[disk]
	out, err := h.lab.Virsh(h.ctx, "qemu-monitor-command", h.web.Name, "--hmp",
		fmt.Sprintf(`qemu-io -d /machine/peripheral/%s/virtio-backend "write -P %d %d %d"`, alias, value, off, n))
	h.ok(err)
	if strings.Contains(strings.ToLower(out), "error") || strings.Contains(out, "failed") {
		h.Fatalf("write to %s: %s", disk, out)
	}
}

// A backup is what a session gave, kept in memory.
type backup struct {
	hypervisor.Session
	images map[vm.DiskID][]byte
	ids    map[vm.DiskID]hypervisor.PreviousDisk
}

// begin starts a session on top of prev, which may be nil.
func (h *host) begin(d *Driver, repo string, prev *backup, o hypervisor.Options) (*backup, error) {
	h.Helper()
	o.RepoID = repo
	if o.Consistency == "" {
		o.Consistency = vm.Crash
	}
	if prev != nil {
		o.Previous = prev.ids
	}
	s, err := d.Begin(h.ctx, h.web.Name, o)
	if err != nil {
		return nil, err
	}
	b := &backup{Session: s, images: map[vm.DiskID][]byte{}, ids: map[vm.DiskID]hypervisor.PreviousDisk{}}
	h.Cleanup(func() { s.Abort(context.Background()) }) // only if the test forgot
	for _, k := range s.Disks() {
		b.ids[k.Info().ID] = hypervisor.PreviousDisk{SizeBytes: k.Info().SizeBytes, ChangeID: k.ChangeID()}
	}
	return b, nil
}

// read reads all disks whole, and checks each incremental: the previous image
// with the changed extents written over it must be what is read.
func (h *host) read(b, prev *backup) {
	h.Helper()
	for _, k := range b.Disks() {
		id, size := k.Info().ID, k.Info().SizeBytes
		img := make([]byte, size)
		if n, err := k.ReadAt(img, 0); int64(n) != size {
			h.Fatalf("disk %s: read %d of %d bytes: %v", id, n, size, err)
		}
		all := extent.Extent{Len: size}
		data, err := k.Data(h.ctx, all)
		h.ok(err)
		sparse := make([]byte, size)
		for _, e := range data.List() {
			copy(sparse[e.Off:e.End()], img[e.Off:e.End()])
		}
		if !bytes.Equal(sparse, img) {
			h.Errorf("disk %s has bytes where Data reports none", id)
		}
		b.images[id] = img
		if mode, _ := k.Mode(); mode == point.Incremental {
			changed, err := k.Changed(h.ctx, all)
			h.ok(err)
			patched := make([]byte, size)
			copy(patched, prev.images[id])
			for _, e := range changed.List() {
				copy(patched[e.Off:e.End()], img[e.Off:e.End()])
			}
			if !bytes.Equal(patched, img) {
				h.Errorf("disk %s: the previous image with the changed extents is not the image; first difference at %d", id, firstDifference(patched, img))
			}
			h.Logf("disk %s: %d bytes changed", id, changed.Bytes())
		}
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// backup is one whole backup, committed.
func (h *host) backup(repo string, prev *backup, o hypervisor.Options) *backup {
	h.Helper()
	start := time.Now()
	b, err := h.begin(h.Driver, repo, prev, o)
	h.ok(err)
	begun := time.Now()
	h.read(b, prev)
	read := time.Now()
	h.ok(b.Commit(h.ctx))
	h.Logf("begin %v, read %v, commit %v", begun.Sub(start).Round(time.Millisecond), read.Sub(begun).Round(time.Millisecond), time.Since(read).Round(time.Millisecond))
	return b
}

// modes says how the disks were read: "vda incremental, vdb full (new disk)".
func (b *backup) modes() string {
	var out []string
	for _, k := range b.Disks() {
		mode, reason := k.Mode()
		text := fmt.Sprintf("%s %s", k.Info().ID, mode)
		if reason != "" {
			text += " (" + reason + ")"
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func (h *host) wantModes(b *backup, want string) {
	h.Helper()
	if got := b.modes(); got != want {
		h.Errorf("disks were read as\n     %s\nwant %s", got, want)
	}
}

// wantClean checks that nothing of ours is left on the host but the
// checkpoints that are named.
func (h *host) wantClean(checkpoints ...string) {
	h.Helper()
	list, err := h.lab.Virsh(h.ctx, "checkpoint-list", h.web.Name, "--name")
	h.ok(err)
	got := strings.Fields(list)
	want := map[string]bool{}
	for _, c := range checkpoints {
		want[c] = true
	}
	if len(got) != len(want) {
		h.Errorf("checkpoints %v, want %v", got, checkpoints)
	}
	for _, c := range got {
		if !want[c] {
			h.Errorf("checkpoint %s is left", c)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(h.scratchDir, "*")); len(left) > 0 {
		h.Errorf("scratch files are left: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(h.stateDir, "kvm", "journal", "*")); len(left) > 0 {
		h.Errorf("journals are left: %v", left)
	}
	if job, err := h.dom().job(h.ctx); err != nil || job != "" {
		h.Errorf("a job is left: %s %v", job, err)
	}
	for _, name := range h.bitmaps() {
		if !want[name] {
			h.Errorf("bitmap %s is left", name)
		}
	}
}

func (h *host) dom() *domain {
	h.Helper()
	dom, err := h.Driver.lookup(h.ctx, h.web.Name)
	h.ok(err)
	return dom
}

// bitmaps are the names of all bitmaps of a running VM's disks.
func (h *host) bitmaps() []string {
	h.Helper()
	var out []string
	if on, err := h.dom().active(h.ctx); err != nil || !on {
		return nil
	}
	nodes, err := h.dom().nodes(h.ctx)
	h.ok(err)
	for _, n := range nodes {
		for _, b := range n.Bitmaps {
			out = append(out, b.Name)
		}
	}
	return out
}

// checkpoint is the one that b leaves behind.
func (b *backup) checkpoint() string {
	for _, p := range b.ids {
		if c := baseOf(p); c != "" {
			return c
		}
	}
	return ""
}

// reset brings the VM to a state without checkpoints of ours.
func (h *host) reset() {
	h.Helper()
	h.ok(h.ResetTracking(h.ctx, h.web.Name, repoA))
	h.ok(h.ResetTracking(h.ctx, h.web.Name, repoB))
}
