package cli

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/hypervisor/kvm"
)

// A source is what a command line names to be backed up: a VM on a host, or
// an image file (scheme is empty).
type source struct {
	text   string // as it was written
	scheme string
	host   *url.URL // without the VM
	vm     string   // empty where only a host is named
}

// parseSource tells URLs from file names. A one-letter scheme is a Windows
// drive.
func parseSource(s string) (source, error) {
	scheme, _, isURL := strings.Cut(s, "://")
	if !isURL || len(scheme) < 2 {
		return source{text: s}, nil
	}
	switch kind, _, _ := strings.Cut(scheme, "+"); kind {
	case "kvm":
		host, name, err := kvm.ParseSource(s)
		if err != nil {
			return source{}, usageError{err}
		}
		return source{text: s, scheme: scheme, host: host, vm: name}, nil
	case "hyperv":
		host, name, err := hyperv.ParseSource(s)
		if err != nil {
			return source{}, usageError{err}
		}
		return source{text: s, scheme: scheme, host: host, vm: name}, nil
	case "vsphere":
		return source{}, fmt.Errorf("source %s: %s hosts: %w", s, scheme, fault.ErrUnsupported)
	}
	return source{}, usage("source %q: unknown scheme %q: want an image file, kvm:///system/NAME or hyperv://USER@HOST/NAME", s, scheme)
}

// A kind is which hypervisor a source is of: "kvm", "hyperv".
func (s source) kind() string {
	kind, _, _ := strings.Cut(s.scheme, "+")
	return kind
}

// openDriver connects to the host that s names.
func (a *app) openDriver(ctx context.Context, s source, o driverOptions) (hypervisor.Driver, error) {
	// A driver that is none must be a nil interface.
	if s.kind() == "hyperv" {
		d, err := a.openHyperV(ctx, s, o)
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	d, err := a.openKVM(ctx, s, o.kvm)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// driverOptions are what the flags of a command say to any driver.
type driverOptions struct {
	kvm    kvm.Options
	hyperv hyperv.Options
	host   credentials // of the host: only its password
}

func (a *app) openKVM(ctx context.Context, s source, o kvm.Options) (*kvm.Driver, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	o.URI, o.StateDir, o.Log, o.Exe = s.host, a.stateDir, a.log(), exe
	d, err := kvm.Open(ctx, o)
	if err != nil {
		if !errors.Is(err, fault.ErrUnsupported) {
			err = withHint(err, `is libvirt running, and may this user speak to it? try "virsh -c qemu:///system list"; another socket is named as kvm:///system/NAME?socket=PATH`)
		}
		return nil, err
	}
	return d, nil
}
