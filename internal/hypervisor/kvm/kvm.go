// Package kvm drives KVM virtual machines through libvirt: it holds one still
// by a checkpoint and a pull-mode backup job, and reads it over NBD.
//
// libvirt does the work and has rules of its own; docs/design/kvm.md lists
// each rule with the situation that it answers. Reading happens on the host
// itself, since the disks are served on a unix socket there.
package kvm

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/url"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/vm"
)

// WatchdogArg, as the first argument of our own executable, asks for
// WatchdogMain instead of the command line.
const WatchdogArg = "backstay-thaw-watchdog"

// Options say which libvirt to speak to, and where to keep what.
type Options struct {
	URI        *url.URL // kvm:///system, as ParseSource gives it
	StateDir   string   // journal and locks; "" for /var/lib/backstay
	ScratchDir string   // on the host, with room for what guests write meanwhile; "" for /var/lib/libvirt/backstay
	Log        *slog.Logger
	Exe        string // our own executable, started as the thaw watchdog; "" for the running one

	// FreezeHook says that the guests' agents run a freeze hook. It is needed
	// only where an agent forbids reading files, so that the driver can't see
	// for itself.
	FreezeHook bool
}

// DefineOptions say what VM to make from restored disks.
type DefineOptions struct {
	Name        string
	DomainXML   []byte               // as the restore point keeps it; empty for VMs of other hypervisors
	Machine     *vm.Machine          // what is known where there is no DomainXML; may be nil
	Definition  *vm.Definition       // what another hypervisor said of it; may be nil
	Bus         string               // of Buses, for disks of VMs without a DomainXML; "" to choose one
	Disks       map[vm.DiskID]string // path of each restored disk
	DiskFormats map[vm.DiskID]string // "raw", "qcow2", …
	NVRAM       []byte               // empty for none
	Start       bool
	KeepMACs    bool // new addresses otherwise, so that two VMs never share one
}

// ParseSource takes apart "kvm:///system/NAME?socket=PATH": which libvirt, and
// the name of a VM there, empty for "kvm:///system". A "/" in a name is
// written %2F. Remote libvirts are kvm+ssh://HOST/system, kvm+tls://HOST/system
// and, to the machine itself alone, kvm+tcp://localhost/system.
func ParseSource(source string) (uri *url.URL, name string, err error) {
	u, err := url.Parse(source)
	if err != nil {
		return nil, "", fmt.Errorf("source %q: %w", source, err)
	}
	if s, _, _ := strings.Cut(u.Scheme, "+"); s != "kvm" {
		return nil, "", fmt.Errorf("source %q is no kvm: URL", source)
	}
	if _, has := u.User.Password(); has {
		return nil, "", fmt.Errorf("source %s: a password does not belong in a source", u.Redacted())
	}
	parts := strings.Split(strings.TrimPrefix(u.EscapedPath(), "/"), "/")
	if parts[0] != "system" && parts[0] != "session" || len(parts) > 2 {
		return nil, "", fmt.Errorf("source %q: want kvm:///system/NAME, with any / in NAME written %%2F", source)
	}
	if len(parts) == 2 {
		if name, err = url.PathUnescape(parts[1]); err != nil {
			return nil, "", fmt.Errorf("source %q: %w", source, err)
		}
	}
	u.Path, u.RawPath, u.Fragment = "/"+parts[0], "", ""
	return u, name, nil
}

// libvirtURI is uri as libvirt's own programs write it.
func libvirtURI(uri *url.URL) *url.URL {
	u := *uri
	u.Scheme = "qemu" + strings.TrimPrefix(u.Scheme, "kvm")
	return &u
}

// checkpointPrefix begins the names of everything that we make for one
// repository on a host.
func checkpointPrefix(repoID string) (string, error) {
	if len(repoID) < 8 || strings.ContainsFunc(repoID[:8], func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z')
	}) {
		return "", fmt.Errorf("repository id %q: %w", repoID, fault.ErrUnsupported)
	}
	return "backstay-" + repoID[:8] + "-", nil
}

// newUUID is a random one, version 4.
func newUUID() string {
	var u [16]byte
	rand.Read(u[:]) // never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return formatUUID(u)
}

// parseUUID reads what formatUUID writes.
func parseUUID(s string) (u [16]byte, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if len(s) != 36 || err != nil || copy(u[:], b) != len(u) || len(b) != len(u) {
		return u, fmt.Errorf("%q is no UUID: %w", s, fault.ErrUnsupported)
	}
	return u, nil
}

func formatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
