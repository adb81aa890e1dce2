package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/images"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/vm"
)

// imageJobs makes jobs of image files: one VM of all with --vm, otherwise one
// each. Every image is opened once beforehand, so that a wrong name or format
// shows before anything is stored.
func (a *app) imageJobs(template backup.Job, files []source, in imageInput) ([]backup.Job, error) {
	opener := func(path string) (image.Image, error) {
		return in.open(path, false)
	}
	seen := map[string]string{}
	var disks []images.File
	for _, f := range files {
		name := filepath.Base(f.text)
		if other, ok := seen[name]; ok {
			what := "VMs"
			if template.VM != "" {
				what = "disks of one VM"
			}
			return nil, usage("%s and %s would be %s of one name, %s; rename one, or back them up as different --vm", other, f.text, what, name)
		}
		seen[name] = f.text
		if _, err := os.Stat(f.text); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, withHint(fmt.Errorf("image %s: %w", f.text, fault.ErrNotFound), "a SOURCE is an image file or kvm:///system/NAME")
			}
			return nil, err
		}
		img, err := opener(f.text)
		if err != nil {
			return nil, err
		}
		img.Close()
		disks = append(disks, images.File{ID: vm.DiskID(name), Path: f.text})
	}
	var jobs []backup.Job
	if template.VM != "" && len(disks) > 0 {
		j := template
		j.Name, j.Source = template.VM, filepath.Dir(disks[0].Path)
		if abs, err := filepath.Abs(j.Source); err == nil {
			j.Source = abs
		}
		j.Driver = images.New(j.Name, disks, opener)
		return []backup.Job{j}, nil
	}
	for _, d := range disks {
		j := template
		j.Name, j.Source = string(d.ID), d.Path
		if abs, err := filepath.Abs(d.Path); err == nil {
			j.Source = abs
		}
		j.Driver = images.New(j.Name, []images.File{d}, opener)
		jobs = append(jobs, j)
	}
	return jobs, nil
}
