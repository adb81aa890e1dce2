package hyperv

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/drivertest"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/wsman"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// The driver's suite against the simulator, through its real protocol. Only the
// files are reached without SMB.
func TestConformanceOfTheSimulator(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for many jobs")
	}
	drivertest.Run(t, func(t *testing.T) drivertest.Subject {
		h, err := host.New(host.Options{Dir: t.TempDir(), JobTime: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
		if _, err := h.AddVM(host.Spec{Name: "web01", Disks: []host.DiskSpec{{Bytes: 8 << 20}}}); err != nil {
			t.Fatal(err)
		}
		e, err := sim.Serve(h, "HV01", sim.Options{User: "backup", Password: "secret"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
		pin, err := wsman.ParseFingerprint(e.Fingerprint)
		if err != nil {
			t.Fatal(err)
		}
		c, err := wsman.New(wsman.Config{URL: e.URL, User: "backup", Password: secret.New([]byte("secret")), Pin: &pin})
		if err != nil {
			t.Fatal(err)
		}
		d := newDriver(c, simFiles{h}, Options{Host: &url.URL{Scheme: "hyperv", Host: "hv01"}, StateDir: imagetest.MemoryDir(t)})
		d.poll = 5 * time.Millisecond
		t.Cleanup(func() { d.Close() })
		return drivertest.Subject{Driver: d, Name: "web01", Disk: "scsi0:0", Tracks: true, LoseTracking: h.LoseTracking,
			Write: func(off int64, data []byte) {
				if err := h.WriteBytes("web01", 0, off, data); err != nil {
					t.Error(err)
				}
			}}
	})
}

// simFiles are a simulated host's files where they lie.
type simFiles struct{ h *host.Host }

func (f simFiles) open(_ context.Context, name string) (image.File, error) {
	return image.OpenFile(f.h.Local(name))
}

func (f simFiles) list(_ context.Context, folder string) (names []string, err error) {
	all, err := os.ReadDir(f.h.Local(folder))
	for _, e := range all {
		if !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, classified(err)
}

func (f simFiles) size(_ context.Context, name string) (int64, error) {
	info, err := os.Stat(f.h.Local(name))
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f simFiles) space(context.Context, string) (int64, int64, error) {
	return 100 << 30, 200 << 30, nil
}

func (f simFiles) share(name string) (string, error) {
	drive, _, ok := strings.Cut(name, `:\`)
	if !ok || len(drive) != 1 {
		return "", fmt.Errorf("%s: %w", name, image.ErrNotAllowed)
	}
	return drive + "$", nil
}

func (f simFiles) close() error { return nil }

func (f simFiles) create(_ context.Context, name string) (image.Output, error) {
	out, err := os.OpenFile(f.h.Local(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, classified(err)
	}
	return out, nil
}

func (f simFiles) mkdir(_ context.Context, name string) error {
	return classified(os.Mkdir(f.h.Local(name), 0o755))
}

func (f simFiles) remove(_ context.Context, name string) error {
	return classified(os.Remove(f.h.Local(name)))
}

func (f simFiles) rename(_ context.Context, from, to string) error {
	if _, err := os.Stat(f.h.Local(to)); err == nil {
		return fault.ErrExists
	}
	return classified(os.Rename(f.h.Local(from), f.h.Local(to)))
}

func (f simFiles) room(context.Context, string, int64) error { return nil }

// classified says what SMB would.
func classified(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w", fault.ErrNotFound, err)
	case errors.Is(err, syscall.ENOTEMPTY):
		return fmt.Errorf("%w: %w", smb.ErrNotEmpty, err)
	case errors.Is(err, os.ErrExist):
		return fmt.Errorf("%w: %w", fault.ErrExists, err)
	}
	return err
}
