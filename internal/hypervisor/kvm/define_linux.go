package kvm

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
)

// defaultImageDir is libvirt's own, where no pool says otherwise.
const defaultImageDir = "/var/lib/libvirt/images"

// ImageDir is where disks of new VMs belong: the directory of the pool
// "default", or libvirt's own.
func (d *Driver) ImageDir(ctx context.Context) (string, error) {
	var text string
	err := d.again(ctx, callTimeout, func(l *libvirt.Libvirt) error {
		pool, err := l.StoragePoolLookupByName("default")
		if err != nil {
			return err
		}
		text, err = l.StoragePoolGetXMLDesc(pool, 0)
		return err
	})
	if code(err) == libvirt.ErrNoStoragePool {
		return defaultImageDir, nil
	}
	if err != nil {
		return "", err
	}
	var p struct {
		XMLName xml.Name `xml:"pool"`
		Type    string   `xml:"type,attr"`
		Path    string   `xml:"target>path"`
	}
	if err := xml.Unmarshal([]byte(text), &p); err != nil {
		return "", fmt.Errorf("pool default: %w", err)
	}
	if p.Type != "dir" && p.Type != "fs" && p.Type != "netfs" || p.Path == "" {
		return defaultImageDir, nil
	}
	return p.Path, nil
}

// Define makes a new VM of restored disks: with a UUID of its own, and without
// checkpoints. After an error there is none. The disks stay in either case.
// Errors: fault.ErrExists if there is a VM of that name.
func (d *Driver) Define(ctx context.Context, o DefineOptions) (hypervisor.Built, error) {
	built, err := d.define(ctx, o)
	if err != nil {
		return built, fmt.Errorf("define VM %q: %w", o.Name, err)
	}
	return built, nil
}

func (d *Driver) define(ctx context.Context, o DefineOptions) (built hypervisor.Built, err error) {
	if o.Name == "" || strings.Contains(o.Name, "/") {
		return built, fmt.Errorf("libvirt takes no such name: %w", fault.ErrUnsupported)
	}
	if len(o.NVRAM) > 0 && !isLocal(d.uri) {
		return built, fmt.Errorf("its UEFI variables can't be stored on %s from here: %w", d.uri.Host, fault.ErrUnsupported)
	}
	c := newConn(d.uri)
	defer c.close()
	switch _, err := c.lookup(ctx, o.Name); {
	case err == nil:
		return built, fault.ErrExists
	case !errors.Is(err, fault.ErrNotFound) || errors.Is(err, errNotRunning):
		return built, err
	}
	var undo []func()
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			undo[i]()
		}
	}()
	nvram := ""
	if len(o.NVRAM) > 0 {
		if nvram, err = d.writeNVRAM(ctx, o); err != nil {
			return built, err
		}
		undo = append(undo, func() { os.Remove(nvram) })
	}
	x, built, err := d.definition(ctx, o, nvram)
	if err != nil {
		return built, err
	}
	built.Name, built.UUID, built.How = o.Name, x.UUID, "definition"
	text, err := x.Marshal()
	if err != nil {
		return built, err
	}
	id, err := parseUUID(x.UUID)
	if err != nil {
		return built, err
	}
	dom := libvirt.Domain{Name: o.Name, UUID: id, ID: -1}
	if err := ctx.Err(); err != nil {
		return built, err
	}
	// From here on it may be there, whatever we are told: the UUID is ours, so
	// that what has it is ours to take away.
	undo = append(undo, func() { c.remove(ctx, dom) })
	// Neither call is to be interrupted: libvirt would go on without us, and
	// a VM that starts behind our back runs on disks that are being removed.
	whole := context.WithoutCancel(ctx)
	err = c.do(whole, callTimeout, func(l *libvirt.Libvirt) error {
		_, err := l.DomainDefineXML(text)
		return err
	})
	if err == nil {
		err = ctx.Err()
	}
	if err != nil || !o.Start {
		return built, err
	}
	err = c.do(whole, beginTimeout, func(l *libvirt.Libvirt) error { return l.DomainCreate(dom) })
	if err == nil {
		err = ctx.Err()
	}
	built.Running = err == nil
	return built, err
}

// remove stops and undefines a VM of which nobody knows how far its making
// went.
func (c *conn) remove(ctx context.Context, dom libvirt.Domain) {
	ctx, cancel := withTimeout(ctx, endTimeout)
	defer cancel()
	c.patient = true
	// That it does not run is no obstacle, and neither is any other answer.
	c.again(ctx, callTimeout, func(l *libvirt.Libvirt) error { return l.DomainDestroy(dom) })
	c.again(ctx, callTimeout, func(l *libvirt.Libvirt) error {
		return l.DomainUndefineFlags(dom, libvirt.DomainUndefineNvram|libvirt.DomainUndefineManagedSave)
	})
}

// definition chooses between the stored definition and a neutral one.
func (d *Driver) definition(ctx context.Context, o DefineOptions, nvram string) (*libvirtxml.Domain, hypervisor.Built, error) {
	if len(o.DomainXML) == 0 {
		host, err := d.platform(ctx)
		if err != nil {
			return nil, hypervisor.Built{}, err
		}
		return neutral(o, host, nvram)
	}
	x, dropped, err := redefine(o, nvram)
	var built hypervisor.Built
	for _, what := range dropped {
		built.Warnings = append(built.Warnings, "the new VM lacks "+what)
	}
	return x, built, err
}

// platform asks what libvirt can run.
func (d *Driver) platform(ctx context.Context) (p platform, err error) {
	err = d.again(ctx, callTimeout, func(l *libvirt.Libvirt) error {
		text, err := l.ConnectGetCapabilities()
		p = platformOf(text)
		return err
	})
	return p, err
}

// writeNVRAM puts the UEFI variables beside the first disk: libvirt's own
// directory for them is closed to others.
func (d *Driver) writeNVRAM(ctx context.Context, o DefineOptions) (string, error) {
	dir := ""
	for _, path := range o.Disks {
		if at := filepath.Dir(path); dir == "" || at < dir {
			dir = at
		}
	}
	if dir == "" {
		var err error
		if dir, err = d.ImageDir(ctx); err != nil {
			return "", err
		}
	}
	name := filepath.Join(dir, o.Name+"_VARS.fd")
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("%s: %w", name, fault.ErrExists)
	}
	if err != nil {
		return "", err
	}
	_, err = f.Write(o.NVRAM)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(name)
		return "", err
	}
	return name, nil
}
