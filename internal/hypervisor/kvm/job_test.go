//go:build linux

package kvm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/point"
)

// libvirt refuses a job that names what is no disk to it, whatever its owner
// has called it, and backs up each disk that the job does not name.
func TestJobNamesDisksAndNothingElse(t *testing.T) {
	var x libvirtxml.Domain
	if err := x.Unmarshal(manyDisks); err != nil {
		t.Fatal(err)
	}
	b := &beginning{dir: "/s", socket: "/s/nbd.sock", checkpoint: "backstay-aaaaaaaa-1"}
	for _, e := range disks(&x, nil) {
		b.add(e)
		if e.Excluded == "" {
			b.plans = append(b.plans, decision{mode: point.Full, track: true})
		}
	}
	job, checkpoint, err := b.describeJob()
	if err != nil || len(checkpoint) != 1 {
		t.Fatal(checkpoint, err)
	}
	for _, text := range []string{job, checkpoint[0]} {
		if strings.Contains(text, "ua-tape") || strings.Contains(text, "hdb") {
			t.Errorf("names what is no disk:\n%s", text)
		}
		for _, name := range []string{"vda", "vdb", "sda", "vdc", "vdd", "vde", "vdf", "vdg", "hda"} {
			if !strings.Contains(text, `name="`+name+`"`) {
				t.Errorf("%s is not named:\n%s", name, text)
			}
		}
	}
	for _, d := range b.machine.Disks {
		if d.ID == "hda" {
			t.Error("a CD counts as a disk that is not protected")
		}
	}
	if len(b.machine.Disks) != 9 {
		t.Errorf("disks of the machine: %v", b.machine.Disks)
	}
	if n := strings.Count(job, `backup="yes"`); n != len(b.defs) || n == 0 {
		t.Errorf("%d disks of %d are backed up", n, len(b.defs))
	}
}

func TestFreezeThatIsStillOurs(t *testing.T) {
	now := time.Now()
	uri, _, _ := ParseSource("kvm:///system")
	e := freezeEntry(&domain{conn: newConn(uri)}, now)
	if bootID() == "" || !stillOurs(e, bootID(), now) || !stillOurs(e, bootID(), now.Add(oursLonger-time.Minute)) {
		t.Errorf("a fresh freeze is not ours: %v", e)
	}
	old := journal.Entry{Kind: kindFreeze, Name: e.Name} // as older versions wrote it
	if stillOurs(e, bootID(), now.Add(oursLonger+time.Second)) || stillOurs(e, "another", now) || stillOurs(old, bootID(), now) || stillOurs(old, "", now) {
		t.Error("a freeze that may be somebody else's is taken for ours")
	}
}

// Who has only QEMU's arguments is not given its files.
func TestProcessThatPassesForQEMU(t *testing.T) {
	uuid := newUUID()
	cmd := exec.Command("sh", "-c", "read x", "-uuid", uuid, "-x")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if uid, gid := processOwner(uuid); uid != -1 || gid != -1 {
		t.Errorf("it has the owner %d:%d", uid, gid)
	}
	for exe, want := range map[string]bool{"/usr/bin/qemu-system-x86_64": true, "/usr/bin/qemu-system-aarch64 (deleted)": true,
		"/usr/libexec/qemu-kvm": true, "/bin/dash": false, "/usr/bin/qemu-img": false, "/tmp/qemu-system-x/sh": false} {
		if qemuName(exe) != want {
			t.Errorf("%s: %v", exe, !want)
		}
	}
}

// A snapshot that is made or committed between looking and locking is noticed.
func TestChainThatChangesWhileItIsLocked(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, name := range []string{a, b} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		answers [2][]imageInfo
		between func() error
		want    error
	}{
		"as before": {answers: [2][]imageInfo{{{Name: a}}, {{Name: a, Format: "now"}}}},
		"snapshot":  {answers: [2][]imageInfo{{{Name: a}}, {{Name: b}, {Name: a}}}, want: fault.ErrLocked},
		"rebased":   {answers: [2][]imageInfo{{{Name: a}}, {{Name: b}}}, want: fault.ErrLocked},
		"another file of that name": {answers: [2][]imageInfo{{{Name: a}}, {{Name: a}}}, between: func() error { return os.Rename(b, a) },
			want: fault.ErrLocked},
	} {
		s, n := &session{beginning: &beginning{}}, 0
		chain, err := s.lockChain(func() ([]imageInfo, error) {
			if n++; n == 2 && c.between != nil {
				if err := c.between(); err != nil {
					return nil, err
				}
			}
			return c.answers[n-1], nil
		})
		if !errors.Is(err, c.want) || err == nil && chain[0].Format != "now" {
			t.Errorf("%s: %v, %v", name, chain, err)
		}
		s.stopNBD()
		os.WriteFile(b, nil, 0o600)
	}
}
