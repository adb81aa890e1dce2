package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A Host is where a restored VM is to live, as a hypervisor driver has it.
type Host interface {
	// Exists says whether the host has a VM called name.
	Exists(ctx context.Context, name string) (bool, error)

	// ImageDir is the directory on this machine where the host's disk images
	// are kept.
	ImageDir(ctx context.Context) (string, error)

	// Define makes the VM, and starts it if asked to. After an error there is
	// no VM of that name and nobody uses its disks.
	Define(ctx context.Context, d Definition) (hypervisor.Built, error)
}

// A Definition describes the VM that a Host shall make.
type Definition struct {
	Name    string
	Machine vm.Machine              // as it was
	Config  map[string][]byte       // the files of its definition: "domain.xml", "nvram"
	Disks   map[vm.DiskID]DiskImage // all that the restore point holds
	Start   bool
}

// A DiskImage is a restored disk on its host.
type DiskImage struct {
	Path   string // absolute
	Format image.Format
}

// VMOptions say what VM to make.
type VMOptions struct {
	Options        // without Force: a restore never replaces a VM
	Name    string // of the new VM
	Start   bool
}

// bootable is the format of a disk that a VM runs from: the one it had, if QEMU
// likes to run from it.
func bootable(d point.Disk) image.Format {
	if formatOf(d) == image.Raw && d.Format == string(image.Raw) {
		return image.Raw
	}
	return image.Qcow2
}

// VM restores all disks of p to the host's image directory and makes a VM of
// them. A VM of that name is never replaced: fault.ErrExists. After an error
// neither the VM nor any of its disks exist.
func VM(ctx context.Context, r Repository, p *point.RestorePoint, h Host, o VMOptions) (PointResult, error) {
	start := time.Now()
	res := PointResult{Point: p.Ref(), Target: o.Name}
	if o.Name == "" {
		return res, errors.New("the new VM needs a name")
	}
	if o.Force {
		return res, fmt.Errorf("VM %s: a restore never replaces a VM: %w", o.Name, fault.ErrUnsupported)
	}
	switch taken, err := h.Exists(ctx, o.Name); {
	case err != nil:
		return res, err
	case taken:
		return res, fmt.Errorf("VM %s: %w", o.Name, fault.ErrExists)
	}
	dir, err := h.ImageDir(ctx)
	if err != nil {
		return res, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return res, err
	}
	d := Definition{Name: o.Name, Machine: p.Machine, Config: map[string][]byte{}, Disks: map[vm.DiskID]DiskImage{}, Start: o.Start}
	for _, name := range sortedNames(p.Config) {
		if d.Config[name], err = r.ReadBlob(ctx, p.Config[name]); err != nil {
			return res, fmt.Errorf("restore %s: file %s: %w", p.Ref(), name, err)
		}
	}
	names := map[string]bool{}
	work, err := o.plan(p, bootable, func(d point.Disk, f image.Format) string {
		return diskFile(vm.DiskID(o.Name+"-"+string(d.ID)), f, names)
	})
	if err != nil {
		return res, err
	}
	for _, w := range work {
		if _, err := os.Lstat(filepath.Join(dir, w.file)); !errors.Is(err, fs.ErrNotExist) {
			return res, fmt.Errorf("%s: %w", filepath.Join(dir, w.file), errors.Join(err, fault.ErrExists))
		}
	}
	st, err := stageIn(dir, fileName(o.Name))
	if err != nil {
		return res, err
	}
	defer st.discard()
	if res.Disks, err = o.disks(ctx, r, p, st, work); err != nil {
		return res, err
	}
	files, err := st.files() // a disk may consist of several
	if err != nil {
		return res, err
	}
	if err := st.publish(""); err != nil {
		return res, fmt.Errorf("restore %s: %w", p.Ref(), err)
	}
	for i := range res.Disks {
		path := filepath.Join(dir, work[i].file)
		res.Disks[i].Target = path
		d.Disks[work[i].disk.ID] = DiskImage{Path: path, Format: work[i].format}
	}
	built, err := h.Define(ctx, d)
	if err != nil {
		for _, f := range files {
			err = errors.Join(err, os.Remove(filepath.Join(dir, f)))
		}
		return res, fmt.Errorf("VM %s: %w", o.Name, err)
	}
	res.VM, res.Warnings, res.Duration = &built, built.Warnings, time.Since(start)
	return res, nil
}
