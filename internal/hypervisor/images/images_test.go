package images_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/drivertest"
	"github.com/backstay/backstay/internal/hypervisor/images"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/image/raw"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

func openRaw(path string) (image.Image, error) { return raw.OpenPath(path) }

func newFile(t *testing.T, name string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, path string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	drivertest.Run(t, func(t *testing.T) drivertest.Subject {
		path := newFile(t, "disk.raw", 4<<20+12345)
		return drivertest.Subject{
			Driver: images.New("web01", []images.File{{ID: "disk.raw", Path: path}}, openRaw),
			Name:   "web01", Disk: "disk.raw", Still: true,
			Write: func(off int64, data []byte) { write(t, path, off, data) },
		}
	})
}

func begin(t *testing.T, d *images.Driver, o hypervisor.Options) hypervisor.Session {
	t.Helper()
	o.Consistency = vm.PreferApplication
	s, err := d.Begin(t.Context(), "web01", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Abort(t.Context()) })
	return s
}

// Whatever happens to a file while it is read, the run does not pass.
func TestChangedWhileRead(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, path string)
		want string
	}{
		{"shrinks", func(t *testing.T, path string) { os.Truncate(path, 1<<20) }, "shrank from 4194304 to 1048576 bytes"},
		{"grows", func(t *testing.T, path string) { os.Truncate(path, 8<<20) }, "changed while it was read"},
		{"is written to", func(t *testing.T, path string) {
			time.Sleep(20 * time.Millisecond) // the clock of file systems is that coarse
			write(t, path, 0, []byte("x"))
		}, "changed while it was read"},
		{"is replaced", func(t *testing.T, path string) {
			st, _ := os.Stat(path)
			os.WriteFile(path+".new", make([]byte, 4<<20), 0o600)
			os.Chtimes(path+".new", st.ModTime(), st.ModTime())
			os.Rename(path+".new", path)
		}, "changed while it was read"},
		{"vanishes", func(t *testing.T, path string) { os.Remove(path) }, "no such file"},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			path := newFile(t, "disk.raw", 4<<20)
			s := begin(t, images.New("web01", []images.File{{ID: "disk.raw", Path: path}}, openRaw), hypervisor.Options{})
			d := s.Disks()[0]
			if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
				t.Fatalf("before anything happened: %v", err)
			}
			c.do(t, path)
			_, readErr := d.ReadAt(make([]byte, 4096), 2<<20)
			err := s.(hypervisor.Checker).Check(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("check: %v; want %q and the path", err, c.want)
			}
			if c.name == "shrinks" && (readErr == nil || !strings.Contains(readErr.Error(), c.want)) {
				t.Errorf("read behind the new end: %v, want %q", readErr, c.want)
			}
		})
	}
}

// The bytes of an image may lie in other files than the one that was named.
func TestExtentChangedWhileRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	w, err := open.Create(path, image.VMDK, image.CreateOptions{Variant: "monolithicFlat", VirtualBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	opener := func(path string) (image.Image, error) { return open.Open(path, open.Options{}) }
	s := begin(t, images.New("web01", []images.File{{ID: "disk.vmdk", Path: path}}, opener), hypervisor.Options{})
	c := s.(hypervisor.Checker)
	if err := c.Check(t.Context()); err != nil {
		t.Fatalf("before anything happened: %v", err)
	}
	time.Sleep(20 * time.Millisecond) // the clock of file systems is that coarse
	flat := strings.TrimSuffix(path, ".vmdk") + "-flat.vmdk"
	write(t, flat, 1<<20, []byte("x"))
	if err := c.Check(t.Context()); err == nil || !strings.Contains(err.Error(), flat+": it changed while it was read") {
		t.Errorf("check: %v", err)
	}
}

func TestSeveralFilesAreDisksInOrder(t *testing.T) {
	a, b := newFile(t, "b.raw", 1<<20), newFile(t, "a.raw", 2<<20)
	s := begin(t, images.New("web01", []images.File{{ID: "b.raw", Path: a}, {ID: "a.raw", Path: b}}, openRaw), hypervisor.Options{})
	if len(s.Disks()) != 2 || s.Disks()[0].Info().ID != "b.raw" || s.Disks()[1].Info().SizeBytes != 2<<20 {
		t.Errorf("disks %+v", s.Machine().Disks)
	}
}

// Two hosts that back up files of one name must not be taken for one.
func TestTheHostIsNamed(t *testing.T) {
	d := images.New("web01", []images.File{{ID: "disk.raw", Path: newFile(t, "disk.raw", 1<<20)}}, openRaw)
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	list, err := d.Machines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []vm.Machine{list[0], begin(t, d, hypervisor.Options{}).Machine()} {
		if m.Host != host || m.HostID == "" || strings.TrimSpace(m.HostID) != m.HostID {
			t.Errorf("host %q, id %q", m.Host, m.HostID)
		}
	}
}

func TestEqualNamesAreRefused(t *testing.T) {
	a, b := newFile(t, "a.raw", 1<<20), newFile(t, "a.raw", 1<<20)
	d := images.New("web01", []images.File{{ID: "a.raw", Path: a}, {ID: "a.raw", Path: b}}, openRaw)
	if _, err := d.Begin(t.Context(), "web01", hypervisor.Options{}); !errors.Is(err, fault.ErrExists) || !strings.Contains(err.Error(), a) || !strings.Contains(err.Error(), b) {
		t.Errorf("%v: want fault.ErrExists with both paths", err)
	}
}

func TestModes(t *testing.T) {
	path := newFile(t, "disk.raw", 1<<20)
	for _, c := range []struct {
		prev map[vm.DiskID]hypervisor.PreviousDisk
		want point.Mode
		why  string
	}{
		{nil, point.Full, "first backup"},
		{map[vm.DiskID]hypervisor.PreviousDisk{"disk.raw": {SizeBytes: 1 << 20}}, point.Compared, "nothing tracks changes of an image file"},
		{map[vm.DiskID]hypervisor.PreviousDisk{"disk.raw": {SizeBytes: 1 << 19}}, point.Compared, "its size was 524288 bytes and is 1048576"},
		{map[vm.DiskID]hypervisor.PreviousDisk{"other": {SizeBytes: 1 << 19}}, point.Full, "first backup"},
	} {
		s := begin(t, images.New("web01", []images.File{{ID: "disk.raw", Path: path}}, openRaw), hypervisor.Options{Previous: c.prev})
		mode, reason := s.Disks()[0].Mode()
		if mode != c.want || !strings.Contains(reason, c.why) {
			t.Errorf("%v: %s, %q; want %s, %q", c.prev, mode, reason, c.want, c.why)
		}
		s.Abort(t.Context())
	}
}

// What nobody can freeze reaches no more than crash, and is refused where more
// was asked for.
func TestConsistency(t *testing.T) {
	path := newFile(t, "disk.raw", 1<<20)
	for ask, ok := range map[vm.Consistency]bool{vm.RequireApplication: false, vm.Filesystem: false, vm.PreferApplication: true, vm.Crash: true} {
		d := images.New("web01", []images.File{{ID: "disk.raw", Path: path}}, openRaw)
		s, err := d.Begin(t.Context(), "web01", hypervisor.Options{Consistency: ask})
		if ok != (err == nil) || !ok && !errors.Is(err, fault.ErrConsistency) {
			t.Errorf("%s: %v", ask, err)
		}
		if err == nil {
			if s.Grade() != vm.GradeCrash || len(s.Warnings()) > 0 {
				t.Errorf("%s: %s, %q", ask, s.Grade(), s.Warnings())
			}
			s.Abort(t.Context())
		}
	}
}

func TestFailingBeginLeavesNothingOpen(t *testing.T) {
	path := newFile(t, "disk.raw", 1<<20)
	closed := 0
	d := images.New("web01", []images.File{{ID: "disk.raw", Path: path}, {ID: "none", Path: path + ".none"}}, func(path string) (image.Image, error) {
		img, err := raw.OpenPath(path)
		return countClose{img, &closed}, err
	})
	if _, err := d.Begin(t.Context(), "web01", hypervisor.Options{}); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("%v, want fault.ErrNotFound", err)
	}
	if closed != 1 {
		t.Errorf("%d images closed, want 1", closed)
	}
}

type countClose struct {
	image.Image
	n *int
}

func (c countClose) Close() error { *c.n++; return c.Image.Close() }

func TestHolesAreNotData(t *testing.T) {
	path := newFile(t, "disk.raw", 64<<20)
	write(t, path, 32<<20, bytes.Repeat([]byte{1}, 1<<20))
	s := begin(t, images.New("web01", []images.File{{ID: "disk.raw", Path: path}}, openRaw), hypervisor.Options{})
	set, err := s.Disks()[0].Data(t.Context(), extent.Extent{Len: 64 << 20})
	if err != nil || !set.Contains(extent.Extent{Off: 32 << 20, Len: 1 << 20}) {
		t.Errorf("data %v, %v", set.List(), err)
	}
	if set.Bytes() > 8<<20 {
		t.Logf("this file system has no holes: %d bytes of data", set.Bytes())
	}
	if _, err := s.Disks()[0].ReadAt(make([]byte, 1), 64<<20); err != io.EOF {
		t.Errorf("behind the end: %v", err)
	}
}
