//go:build linux && amd64

package kvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/vm"
)

// A VM that was defined from a backup boots and finds its records whole; one
// that can't be made leaves nothing behind.
func TestDefineFromBackup(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	b := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.RequireApplication, FreezeLimit: patient})
	o := DefineOptions{Name: "web02", DomainXML: b.Config()[0].Data, NVRAM: []byte("variables"), Start: true,
		Disks: map[vm.DiskID]string{}, DiskFormats: map[vm.DiskID]string{}}
	for id, img := range b.images {
		o.Disks[id], o.DiskFormats[id] = h.lab.Path("web02-"+string(id)+".raw"), "raw"
		h.ok(os.WriteFile(o.Disks[id], img, 0o600))
	}
	vars := h.lab.Path("web02_VARS.fd")
	new := h.lab.VM("web02")
	h.Cleanup(func() {
		new.Remove(context.Background())
	})
	h.ok(h.web.Destroy(h.ctx)) // the two share the file behind their serial port

	bad := o
	bad.Disks = map[vm.DiskID]string{"vda": h.lab.Path("not-there")}
	if _, err := h.Define(h.ctx, bad); err == nil {
		t.Error("a VM started without its disk")
	}
	if _, err := new.State(h.ctx); err == nil {
		t.Error("a VM that did not start is left defined")
	}
	if _, err := os.Stat(vars); err == nil {
		t.Error("its UEFI variables are left")
	}

	built, err := h.Define(h.ctx, o)
	h.ok(err)
	if built.Name != "web02" || !built.Running || len(built.Warnings) > 0 {
		t.Errorf("made %+v", built)
	}
	h.ok(new.WaitAgent(h.ctx))
	if said, err := new.Verify(h.ctx); err != nil || !strings.HasPrefix(said, "WORKLOAD VERIFY OK app-consistent") {
		t.Errorf("the restored guest says %q, %v", said, err)
	}
	if data, err := os.ReadFile(vars); err != nil || string(data) != "variables" {
		t.Errorf("UEFI variables: %q, %v", data, err)
	}
	if _, err := h.Define(h.ctx, o); !errors.Is(err, fault.ErrExists) {
		t.Errorf("a VM was replaced: %v", err)
	}
	dom, err := h.Driver.lookup(h.ctx, "web02")
	h.ok(err)
	if have, err := dom.checkpoints(h.ctx); err != nil || len(have) != 0 || dom.uuid() == h.dom().uuid() {
		t.Errorf("checkpoints %v, %v; UUID %s", have, err, dom.uuid())
	}
	if dir, err := h.ImageDir(h.ctx); err != nil || !filepath.IsAbs(dir) {
		t.Errorf("images go to %s: %v", dir, err)
	}
}

// Whoever stops a restore gets his disks back: no VM is left that runs on them.
func TestDefineInterrupted(t *testing.T) {
	h := newHost(t)
	h.image("half.qcow2", "-f", "qcow2")
	half := h.lab.VM("half")
	defer half.Remove(context.Background())
	o := DefineOptions{Name: "half", Machine: &vm.Machine{Disks: []vm.Disk{{ID: "a"}}}, Start: true,
		Disks: map[vm.DiskID]string{"a": h.lab.Path("half.qcow2")}, DiskFormats: map[vm.DiskID]string{"a": "qcow2"}}
	for wait := 5 * time.Millisecond; wait < time.Second; wait *= 2 {
		ctx, cancel := context.WithTimeout(h.ctx, wait)
		_, err := h.Define(ctx, o)
		cancel()
		state, gone := half.State(h.ctx)
		if (err == nil) != (gone == nil) {
			t.Fatalf("interrupted after %v: %v, and the VM is %q, %v", wait, err, state, gone)
		}
		if err == nil {
			break // it was faster
		}
	}
}

// Disks that came without a definition make a VM, too.
func TestDefineFromImages(t *testing.T) {
	h := newHost(t)
	h.image("foreign.qcow2", "-f", "qcow2")
	m := &vm.Machine{Disks: []vm.Disk{{ID: "os.vhdx"}}}
	_, err := h.Define(h.ctx, DefineOptions{Name: "foreign", Machine: m, Disks: map[vm.DiskID]string{"os.vhdx": h.lab.Path("foreign.qcow2")},
		DiskFormats: map[vm.DiskID]string{"os.vhdx": "qcow2"}})
	h.ok(err)
	defer h.lab.VM("foreign").Remove(context.Background())
	text, err := h.lab.VM("foreign").DomainXML(h.ctx)
	if err != nil || !strings.Contains(text, "foreign.qcow2") || !strings.Contains(text, "dev='sda' bus='sata'") {
		t.Errorf("%v\n%s", err, text)
	}
}
