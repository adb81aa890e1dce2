// Package images makes a source of virtual disk images: files that no
// hypervisor holds open. Nothing tracks their changes, so everything is read.
package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A File is one image to be a disk of the VM.
type File struct {
	ID   vm.DiskID
	Path string
}

// A Driver knows one VM, whose disks are image files.
type Driver struct {
	name  string
	files []File
	open  func(path string) (image.Image, error)

	mu   sync.Mutex
	busy bool
}

// New makes the driver of a VM of that name. Open opens an image read-only;
// the paths are what the user wrote.
func New(name string, files []File, open func(path string) (image.Image, error)) *Driver {
	return &Driver{name: name, files: files, open: open}
}

// Machines gives the one VM. The images are not opened for it.
func (d *Driver) Machines(context.Context) ([]vm.Machine, error) {
	m := d.machine()
	for _, f := range d.files {
		m.Disks = append(m.Disks, vm.Disk{ID: f.ID, Source: f.Path})
	}
	return []vm.Machine{m}, nil
}

// machine is the VM without its disks. Its host is this one, so that disks of
// one name from two hosts are not taken for one.
func (d *Driver) machine() vm.Machine {
	m := vm.Machine{Name: d.name, Hypervisor: "images"}
	m.Host, _ = os.Hostname() // without a name nothing is told apart by it
	m.HostID = m.Host
	if id, err := os.ReadFile(machineID); err == nil && len(bytes.TrimSpace(id)) > 0 {
		m.HostID = string(bytes.TrimSpace(id))
	}
	return m
}

// machineID is the file by which a Linux system knows itself from others.
const machineID = "/etc/machine-id"

// Close does nothing: a Session holds the files.
func (d *Driver) Close() error { return nil }

// Begin opens the images and notes what their files look like, so that Check
// sees whether somebody wrote to them. A block device that is mounted, or that
// another program holds for itself, gives fault.ErrLocked.
func (d *Driver) Begin(ctx context.Context, name string, o hypervisor.Options) (hypervisor.Session, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if name != d.name {
		return nil, fmt.Errorf("VM %s: %w", name, fault.ErrNotFound)
	}
	for i, f := range d.files {
		for _, g := range d.files[:i] {
			if f.ID == g.ID {
				return nil, fmt.Errorf("%s and %s would be disks of one name, %s: %w", g.Path, f.Path, f.ID, fault.ErrExists)
			}
		}
	}
	switch o.Consistency {
	case vm.RequireApplication, vm.Filesystem:
		return nil, fmt.Errorf("an image file can't be frozen, and %s was asked for: %w", o.Consistency, fault.ErrConsistency)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy {
		return nil, fmt.Errorf("VM %s is being backed up: %w", name, fault.ErrLocked)
	}
	s := &session{driver: d, taken: time.Now(), machine: d.machine()}
	for _, f := range d.files {
		if err := s.add(f, o); err != nil {
			s.closeDisks()
			return nil, err
		}
	}
	if len(s.disks) == 0 {
		return nil, hypervisor.ErrNoDisk
	}
	d.busy = true
	return s, nil
}

type session struct {
	driver   *Driver
	taken    time.Time
	machine  vm.Machine
	disks    []hypervisor.Disk
	warnings []string
	once     sync.Once
}

func (s *session) add(f File, o hypervisor.Options) error {
	for _, id := range o.Exclude {
		if id == f.ID {
			s.machine.Disks = append(s.machine.Disks, vm.Disk{ID: f.ID, Source: f.Path, Excluded: "excluded on request"})
			return nil
		}
	}
	before, err := os.Stat(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("image %s: %w", f.Path, fault.ErrNotFound)
	}
	if err != nil {
		return err
	}
	var held io.Closer
	if before.Mode()&(fs.ModeDevice|fs.ModeCharDevice) == fs.ModeDevice {
		if held, err = hold(f.Path); err != nil {
			return err
		}
		s.warnings = append(s.warnings, fmt.Sprintf("%s is a block device, and nobody can tell whether it was written to while it was read", f.Path))
	}
	img, watched, err := s.open(f.Path, before)
	if err != nil {
		if held != nil {
			held.Close()
		}
		return err
	}
	info := vm.Disk{ID: f.ID, SizeBytes: img.Size(), Format: string(img.Info().Format), Source: f.Path}
	d := &disk{img: img, held: held, info: info, watched: watched, mode: point.Full, reason: "first backup"}
	if prev, ok := o.Previous[f.ID]; ok {
		d.mode, d.reason = point.Compared, "nothing tracks changes of an image file"
		if prev.SizeBytes != info.SizeBytes {
			d.reason += fmt.Sprintf("; its size was %d bytes and is %d", prev.SizeBytes, info.SizeBytes)
		}
	}
	// What is odd about the image is odd about the restore point.
	for _, w := range img.Info().Warnings {
		s.warnings = append(s.warnings, fmt.Sprintf("%s: %s", f.Path, w))
	}
	s.machine.Disks = append(s.machine.Disks, info)
	s.disks = append(s.disks, d)
	return nil
}

// A watch is one file and what it looked like before it was read.
type watch struct {
	path   string
	before fs.FileInfo
}

// open opens an image and gives all files that it is read from. Which those
// are, only the open image tells, and it has read from them by then. So one of
// several files is opened again when all were looked at.
func (s *session) open(path string, before fs.FileInfo) (image.Image, []watch, error) {
	watched := []watch{{path, before}}
	img, err := s.driver.open(path)
	if err != nil {
		return nil, nil, err
	}
	files := img.Info().Files
	if len(files) == 0 {
		return img, watched, nil
	}
	img.Close()
	for _, name := range files {
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(path), name)
		}
		before, err := os.Stat(name)
		if err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", path, err)
		}
		watched = append(watched, watch{name, before})
	}
	if img, err = s.driver.open(path); err != nil {
		return nil, nil, err
	}
	if !slices.Equal(img.Info().Files, files) {
		img.Close()
		return nil, nil, fmt.Errorf("image %s: %w", path, ErrChanged)
	}
	return img, watched, nil
}

func (s *session) Machine() vm.Machine          { return s.machine }
func (s *session) Config() []vm.ConfigFile      { return nil }
func (s *session) Disks() []hypervisor.Disk     { return s.disks }
func (s *session) Taken() time.Time             { return s.taken }
func (s *session) Grade() vm.Grade              { return vm.GradeCrash }
func (s *session) FrozenFor() time.Duration     { return 0 }
func (s *session) Warnings() []string           { return s.warnings }
func (s *session) Commit(context.Context) error { return s.end() }
func (s *session) Abort(context.Context) error  { return s.end() }

// Check fails if an image was written to while it was read: what was read is
// then no moment of the disk.
func (s *session) Check(context.Context) error {
	for _, d := range s.disks {
		if err := d.(*disk).unchanged(); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) end() error {
	s.once.Do(func() {
		s.closeDisks()
		s.driver.mu.Lock()
		s.driver.busy = false
		s.driver.mu.Unlock()
	})
	return nil
}

func (s *session) closeDisks() {
	for _, d := range s.disks {
		d := d.(*disk)
		d.img.Close()
		if d.held != nil {
			d.held.Close()
		}
	}
}

type disk struct {
	img     image.Image
	held    io.Closer // keeps others off; nil for none
	info    vm.Disk
	watched []watch
	mode    point.Mode
	reason  string
}

func (d *disk) Info() vm.Disk              { return d.info }
func (d *disk) Mode() (point.Mode, string) { return d.mode, d.reason }
func (d *disk) ChangeID() string           { return "" }

// ReadAt reads the virtual disk. A read that fails because the file shrank
// says so.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.img.ReadAt(p, off)
	if n < len(p) {
		if changed := d.unchanged(); changed != nil {
			return n, changed
		}
	}
	return n, err
}

// ErrChanged says that somebody writes to the image: what was read of it is no
// moment of the disk.
var ErrChanged = errors.New("it changed while it was read")

func (d *disk) unchanged() error {
	for _, w := range d.watched {
		if err := w.unchanged(); err != nil {
			return err
		}
	}
	return nil
}

func (w watch) unchanged() error {
	now, err := os.Stat(w.path)
	if err != nil {
		return fmt.Errorf("image %s: %w", w.path, err)
	}
	if now.Size() < w.before.Size() {
		return fmt.Errorf("image %s shrank from %d to %d bytes: %w", w.path, w.before.Size(), now.Size(), ErrChanged)
	}
	if !now.ModTime().Equal(w.before.ModTime()) || now.Size() != w.before.Size() || !os.SameFile(now, w.before) {
		return fmt.Errorf("image %s: %w", w.path, ErrChanged)
	}
	return nil
}

func (d *disk) Data(ctx context.Context, within extent.Extent) (extent.Set, error) {
	var out extent.Set
	for e, err := range d.img.Extents(ctx, within) {
		if err != nil {
			return out, err
		}
		if e.Kind == image.Data {
			out.Add(e.Extent)
		}
	}
	return out, nil
}

func (d *disk) Changed(context.Context, extent.Extent) (extent.Set, error) {
	return extent.Set{}, hypervisor.ErrTrackingLost
}
