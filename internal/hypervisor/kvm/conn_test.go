//go:build linux

package kvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

func TestRemoteHosts(t *testing.T) {
	for _, source := range []string{"kvm+tcp://192.0.2.1/system", "kvm+tcp://example.com/system", "kvm+fax://192.0.2.1/system"} {
		uri, _, err := ParseSource(source)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := dialer(uri); !errors.Is(err, fault.ErrUnsupported) {
			t.Errorf("%s: %v", source, err)
		}
	}
	for _, source := range []string{"kvm+tcp://localhost/system", "kvm+tcp://[::1]/system", "kvm+ssh://me@192.0.2.1/system"} {
		uri, _, err := ParseSource(source)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := dialer(uri); err != nil {
			t.Errorf("%s: %v", source, err)
		}
	}
	uri, _, _ := ParseSource("kvm+ssh://me@192.0.2.1/system")
	d := &Driver{conn: newConn(uri)}
	if _, err := d.Begin(context.Background(), "web01", hypervisor.Options{RepoID: "aaaaaaaa"}); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("backup over the network: %v", err)
	}
}

// A libvirt that hangs ends the call, not us; and one that goes away is not
// waited for.
func TestLibvirtDoesNotAnswer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hang := make(chan net.Conn, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			hang <- c // nobody ever answers
		}
	}()
	uri, _, _ := ParseSource("kvm:///system?socket=" + socket)
	c := newConn(uri)
	start := time.Now()
	err = c.do(context.Background(), 200*time.Millisecond, func(*libvirt.Libvirt) error { return nil })
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 2*time.Minute {
		t.Errorf("%v after %v", err, time.Since(start))
	}
	go func() { time.Sleep(100 * time.Millisecond); (<-hang).Close(); (<-hang).Close() }()
	err = c.do(context.Background(), 5*time.Minute, func(*libvirt.Libvirt) error { return nil })
	if !errors.Is(err, errLost) {
		t.Errorf("a libvirt that hung up: %v", err)
	}
}

// A job that may yet begin is not taken for one that is not there.
func TestJobThatNobodySawBegin(t *testing.T) {
	for _, c := range []struct {
		err    error
		unsure bool
	}{
		{nil, false}, {libvirt.Error{Code: uint32(libvirt.ErrOperationTimeout)}, false}, {errNotRunning, false},
		{errLost, true}, {fmt.Errorf("libvirt did not answer: %w", context.DeadlineExceeded), true},
	} {
		if got := unanswered(c.err); got != c.unsure {
			t.Errorf("%v: unanswered %v", c.err, got)
		}
	}
	for _, c := range []struct {
		job, now string
		want     bool
	}{{"", "", true}, {"a backup", "", false}, {"a backup", "/ours", true}, {"a backup", "/other", false}} {
		if got := settled(c.job, c.now, "/ours"); got != c.want {
			t.Errorf("libvirt does %q on %q: settled %v", c.job, c.now, got)
		}
	}
	for kind, kept := range map[string]bool{kindFreeze: false, kindNBD: false, kindJob: true, kindScratch: true, kindCheckpoint: true} {
		if ofJob(journal.Entry{Kind: kind}) != kept {
			t.Errorf("%s: kept %v", kind, !kept)
		}
	}
}
