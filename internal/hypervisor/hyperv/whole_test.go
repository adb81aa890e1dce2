package hyperv_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/drivertest"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/internal/vm"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// A lab is a simulated host with one VM, whose files a real Samba serves.
type lab struct {
	host *host.Host
	name string // of the VM
	url  *url.URL

	mu   sync.Mutex
	disk []byte // of the VM, the first
}

var labs atomic.Int32

// newLab makes a host whose files lie in dir, in which a folder C is what samba
// serves. The VM of each has its own name, and so its own folder.
func newLab(t *testing.T, dir string, samba *smbtest.Server, o sim.Options, disks ...int64) *lab {
	t.Helper()
	if os.Getenv(realHost) != "" {
		t.Skip("it says what goes wrong on its host, and so needs a simulated one")
	}
	l := &lab{name: fmt.Sprintf("web%02d", labs.Add(1)), disk: make([]byte, disks[0])}
	h, err := host.New(host.Options{Dir: dir, JobTime: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	spec := host.Spec{Name: l.name}
	for _, n := range disks {
		spec.Disks = append(spec.Disks, host.DiskSpec{Bytes: n})
	}
	if _, err := h.AddVM(spec); err != nil {
		t.Fatal(err)
	}
	o.User, o.Password = smbtest.User, smbtest.Password
	e, err := sim.Serve(h, "HV01", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	at, err := url.Parse(e.URL)
	if err != nil {
		t.Fatal(err)
	}
	source := fmt.Sprintf(`hyperv://%s@%s?smb=%s&share=C:\=%s&fingerprint=sha256:%s`, smbtest.User, at.Host, samba.Addr(), smbtest.Share, e.Fingerprint)
	if o.HTTP {
		source, _, _ = strings.Cut(strings.Replace(source, "hyperv:", "hyperv+http:", 1), "&fingerprint")
	}
	u, _, err := hyperv.ParseSource(source)
	if err != nil {
		t.Fatal(err)
	}
	l.host, l.url = h, u
	return l
}

func (l *lab) open(t *testing.T) *hyperv.Driver {
	t.Helper()
	d, err := hyperv.Open(t.Context(), hyperv.Options{Host: l.url, Password: secret.New([]byte(smbtest.Password)), StateDir: imagetest.MemoryDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// write writes as the guest does.
func (l *lab) write(t *testing.T, off int64, p []byte) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	copy(l.disk[off:], p)
	if err := l.host.WriteBytes(l.name, 0, off, p); err != nil {
		t.Fatal(err)
	}
}

// The driver over its real protocols, against the simulator and Samba, or
// against the host that BACKSTAY_HYPERV_URL names.
func TestConformanceOfTheWholePath(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	if source := os.Getenv(realHost); source != "" {
		drivertest.Run(t, func(t *testing.T) drivertest.Subject { return realSubject(t, source) })
		return
	}
	dir := imagetest.MemoryDir(t)
	samba := smbtest.Run(t, smbtest.Options{Dir: filepath.Join(dir, "C")})
	drivertest.Run(t, func(t *testing.T) drivertest.Subject {
		l := newLab(t, dir, samba, sim.Options{}, 4<<20)
		return drivertest.Subject{Driver: l.open(t), Name: l.name, Disk: "scsi0:0", Tracks: true,
			Write:        func(off int64, p []byte) { l.write(t, off, p) },
			LoseTracking: l.host.LoseTracking,
		}
	})
}

// What a host may do wrong costs a full read or a failed backup, and never a
// wrong restore point or a leftover.
func TestTroubleOfTheWholePath(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	dir := imagetest.MemoryDir(t)
	samba := smbtest.Run(t, smbtest.Options{Dir: filepath.Join(dir, "C")})
	l := newLab(t, dir, samba, sim.Options{HTTP: true}, 4<<20)
	d := l.open(t)
	var prev map[vm.DiskID]hypervisor.PreviousDisk
	backUp := func(c vm.Consistency) (hypervisor.Session, error) {
		t.Helper()
		s, err := d.Begin(t.Context(), l.name, hypervisor.Options{RepoID: "00112233445566778899aabbccddeeff", Consistency: c, Previous: prev})
		if err != nil {
			return nil, err
		}
		got := make([]byte, len(l.disk))
		if _, err := s.Disks()[0].ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if !bytes.Equal(got, l.disk) {
			t.Error("what is read is not what the guest wrote")
		}
		if err := s.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		prev = map[vm.DiskID]hypervisor.PreviousDisk{"scsi0:0": {SizeBytes: int64(len(l.disk)), ChangeID: s.Disks()[0].ChangeID()}}
		return s, nil
	}
	mode := func(what string, want point.Mode) {
		t.Helper()
		l.write(t, 100_000, []byte(what))
		s, err := backUp(vm.Crash)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got, reason := s.Disks()[0].Mode(); got != want {
			t.Errorf("%s: %s (%s), want %s", what, got, reason, want)
		}
	}
	trouble := func(change func(*host.Trouble)) { l.host.SetTrouble(change) }
	mode("the first", point.Full)
	mode("the second", point.Incremental)
	trouble(func(x *host.Trouble) { x.ShortAnswers = 1 << 20 })
	mode("answers of 1 MiB", point.Incremental)
	trouble(func(x *host.Trouble) { *x = host.Trouble{EmptyProgress: true} })
	mode("answers without progress", point.Full)
	trouble(func(x *host.Trouble) { *x = host.Trouble{NoAffected: true} })
	mode("no rows of what a job made", point.Incremental)
	mode("no rows, again", point.Incremental)
	trouble(func(x *host.Trouble) { *x = host.Trouble{Refuse: map[string]uint32{"CreateSnapshot": 32775}} })
	mode("busy for a moment", point.Incremental)
	trouble(func(x *host.Trouble) { *x = host.Trouble{UnequalArrays: true} })
	mode("a reference point without an id", point.Incremental)
	trouble(func(x *host.Trouble) { *x = host.Trouble{} })
	mode("after that", point.Full)
	trouble(func(x *host.Trouble) {
		*x = host.Trouble{FailJob: map[string]string{"CreateSnapshot": "the guest's writers failed"}}
	})
	s, err := backUp(vm.PreferApplication)
	if err != nil {
		t.Fatal(err)
	}
	if w := strings.Join(s.Warnings(), "\n"); s.Grade() != vm.GradeCrash || !strings.Contains(w, "writers failed") {
		t.Errorf("grade %s, %q", s.Grade(), w)
	}
	trouble(func(x *host.Trouble) {
		*x = host.Trouble{FailJob: map[string]string{"CreateSnapshot": "the guest's writers failed"}}
	})
	if _, err := backUp(vm.Filesystem); !errors.Is(err, fault.ErrConsistency) {
		t.Errorf("%v", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "C", "VMs", l.name, "*", "*.avhdx"))
	if err != nil || len(left) > 0 {
		t.Errorf("left on the host: %v, %v", left, err)
	}
}
