// Package images makes a source of virtual disk images: files that no
// hypervisor holds open. Nothing tracks their changes, so everything is read.
package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
	m := vm.Machine{Name: d.name, Hypervisor: "images"}
	for _, f := range d.files {
		m.Disks = append(m.Disks, vm.Disk{ID: f.ID, Source: f.Path})
	}
	return []vm.Machine{m}, nil
}

// Close does nothing: a Session holds the files.
func (d *Driver) Close() error { return nil }

// Begin opens the images and notes what they look like, so that Check sees
// whether somebody wrote to them.
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
	s := &session{driver: d, taken: time.Now(), machine: vm.Machine{Name: d.name, Hypervisor: "images"}}
	for _, f := range d.files {
		if err := s.add(f, o); err != nil {
			s.closeDisks()
			return nil, err
		}
	}
	d.busy = true
	return s, nil
}

type session struct {
	driver  *Driver
	taken   time.Time
	machine vm.Machine
	disks   []hypervisor.Disk
	once    sync.Once
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
	img, err := s.driver.open(f.Path)
	if err != nil {
		return err
	}
	info := vm.Disk{ID: f.ID, SizeBytes: img.Size(), Format: string(img.Info().Format), Source: f.Path}
	d := &disk{img: img, info: info, before: before, mode: point.Full, reason: "first backup"}
	if prev, ok := o.Previous[f.ID]; ok {
		d.mode, d.reason = point.Compared, "nothing tracks changes of an image file"
		if prev.SizeBytes != info.SizeBytes {
			d.reason += fmt.Sprintf("; its size was %d bytes and is %d", prev.SizeBytes, info.SizeBytes)
		}
	}
	s.machine.Disks = append(s.machine.Disks, info)
	s.disks = append(s.disks, d)
	return nil
}

func (s *session) Machine() vm.Machine          { return s.machine }
func (s *session) Config() []vm.ConfigFile      { return nil }
func (s *session) Disks() []hypervisor.Disk     { return s.disks }
func (s *session) Taken() time.Time             { return s.taken }
func (s *session) Grade() vm.Grade              { return vm.GradeCrash }
func (s *session) FrozenFor() time.Duration     { return 0 }
func (s *session) Warnings() []string           { return nil }
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
		d.(*disk).img.Close()
	}
}

type disk struct {
	img    image.Image
	info   vm.Disk
	before fs.FileInfo
	mode   point.Mode
	reason string
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

// errChanged says that somebody writes to the image.
var errChanged = errors.New("it changed while it was read; shut the VM down, or back it up through its hypervisor")

func (d *disk) unchanged() error {
	now, err := os.Stat(d.info.Source)
	if err != nil {
		return fmt.Errorf("image %s: %w", d.info.Source, err)
	}
	if now.Size() < d.before.Size() {
		return fmt.Errorf("image %s shrank from %d to %d bytes: %w", d.info.Source, d.before.Size(), now.Size(), errChanged)
	}
	if !now.ModTime().Equal(d.before.ModTime()) || now.Size() != d.before.Size() || !os.SameFile(now, d.before) {
		return fmt.Errorf("image %s: %w", d.info.Source, errChanged)
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
