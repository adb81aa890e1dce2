package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A PointResult says what a restore of a whole restore point did.
type PointResult struct {
	Point    string        `json:"point"` // as people name it
	Target   string        `json:"target"`
	Disks    []Result      `json:"disks"`
	Files    []string      `json:"files,omitempty"` // of the machine's definition
	Duration time.Duration `json:"duration_ns"`
	// VM is what was made of it; nil for images.
	VM *hypervisor.Built `json:"vm,omitempty"`
	// Warnings say what is not as it was.
	Warnings []string `json:"warnings,omitempty"`
}

// Select finds the disk called id in p; "" is its only disk. An id that is the
// number of a disk, counted from 0, will do where no disk is called so.
func Select(p *point.RestorePoint, id string) (point.Disk, error) {
	var names []string
	for i, d := range p.Disks {
		if string(d.ID) == id || id == "" && len(p.Disks) == 1 {
			return d, nil
		}
		names = append(names, fmt.Sprintf("%d (%s)", i, d.ID))
	}
	for i, d := range p.Disks {
		if fmt.Sprint(i) == id {
			return d, nil
		}
	}
	switch {
	case len(p.Disks) == 0:
		return point.Disk{}, fmt.Errorf("restore point %s holds no disk: %w", p.Ref(), fault.ErrNotFound)
	case id == "":
		return point.Disk{}, fmt.Errorf("restore point %s has several disks: choose one of %s", p.Ref(), strings.Join(names, ", "))
	}
	return point.Disk{}, fmt.Errorf("restore point %s: disk %q: %w: it has %s", p.Ref(), id, fault.ErrNotFound, strings.Join(names, ", "))
}

// Directory restores all disks of p into the directory target, each called by
// its disk's id, and the files of the machine's definition beside them. A
// target that does not exist appears whole or not at all; one that exists must
// be empty, unless o.Force. Without o.Format a disk keeps the format that it
// had.
func Directory(ctx context.Context, r Repository, p *point.RestorePoint, target string, o Options) (PointResult, error) {
	start := time.Now()
	res := PointResult{Point: p.Ref(), Target: target}
	st, err := stageDir(target, o.Force)
	if err != nil {
		return res, err
	}
	defer st.discard()
	names := map[string]bool{}
	for _, name := range sortedNames(p.Config) {
		file := fileName(name)
		if names[strings.ToLower(file)] {
			return res, fmt.Errorf("restore point %s has two files called %q", p.Ref(), file)
		}
		names[strings.ToLower(file)] = true
		data, err := r.ReadBlob(ctx, p.Config[name])
		if err != nil {
			return res, fmt.Errorf("restore %s: file %s: %w", p.Ref(), name, err)
		}
		if err := writeFile(filepath.Join(st.dir, file), data); err != nil {
			return res, fmt.Errorf("restore %s: %w", p.Ref(), classify(err))
		}
		res.Files = append(res.Files, filepath.Join(target, file))
	}
	work, err := o.plan(p, formatOf, func(d point.Disk, f image.Format) string { return diskFile(d.ID, f, names) })
	if err != nil {
		return res, err
	}
	if res.Disks, err = o.disks(ctx, r, p, st, work); err != nil {
		return res, err
	}
	if err := st.publish(""); err != nil {
		return res, fmt.Errorf("restore %s: %w", p.Ref(), err)
	}
	for i := range res.Disks {
		res.Disks[i].Target = filepath.Join(target, filepath.Base(res.Disks[i].Target))
	}
	res.Duration = time.Since(start)
	return res, nil
}

// FileOf is the name that Directory gives the image of the disk id of p, and
// the format: f, or where that is "" the one that the disk had.
func FileOf(p *point.RestorePoint, id vm.DiskID, f image.Format) (string, image.Format) {
	names := map[string]bool{}
	for _, name := range sortedNames(p.Config) {
		names[strings.ToLower(fileName(name))] = true
	}
	for _, d := range p.Disks {
		format := f
		if format == "" {
			format = formatOf(d)
		}
		if name := diskFile(d.ID, format, names); d.ID == id {
			return name, format
		}
	}
	return "", f
}

// A task is one disk to restore into a stage.
type task struct {
	disk   point.Disk
	format image.Format
	file   string // base name
}

func (o Options) plan(p *point.RestorePoint, own func(point.Disk) image.Format, name func(point.Disk, image.Format) string) ([]task, error) {
	if len(p.Disks) == 0 && len(p.Config) == 0 {
		return nil, fmt.Errorf("restore point %s holds no disk: %w", p.Ref(), fault.ErrNotFound)
	}
	var work []task
	for _, d := range p.Disks {
		f := o.Format
		if f == "" {
			f = own(d)
		}
		work = append(work, task{d, f, name(d, f)})
	}
	return work, nil
}

// formatOf is the format that d had, or raw for one that we do not write.
func formatOf(d point.Disk) image.Format {
	switch f := FormatOf("x." + d.Format); f {
	case image.Qcow2, image.VHD, image.VHDX, image.VMDK:
		return f
	}
	return image.Raw
}

// disks restores all the disks into st, one after the other: each uses all
// processors.
func (o Options) disks(ctx context.Context, r Repository, p *point.RestorePoint, st *stage, work []task) ([]Result, error) {
	var need int64
	each := make([]int64, len(work))
	sources := make([]Source, len(work))
	defer func() {
		for _, s := range sources {
			if s != nil {
				s.Close()
			}
		}
	}()
	for i, w := range work {
		var err error
		if sources[i], err = r.OpenDisk(ctx, w.disk.Manifest); err == nil {
			each[i], err = dataBytes(ctx, sources[i])
		}
		if err != nil {
			return nil, fmt.Errorf("restore %s: disk %s: %w", p.Ref(), w.disk.ID, err)
		}
		if err := o.checkSpace(st.dir, w.format, need+each[i]); err != nil {
			return nil, fmt.Errorf("restore %s: %w", p.Ref(), err)
		}
		need += each[i]
	}
	prog := newProgress(o.Progress, need)
	results := make([]Result, 0, len(work))
	for i, w := range work {
		start := time.Now()
		res, err := o.write(ctx, w.disk.ID, sources[i], filepath.Join(st.dir, w.file), w.format, each[i], prog, st.collides)
		if err != nil {
			return nil, fmt.Errorf("restore %s: disk %s: %w", p.Ref(), w.disk.ID, sized(err, need))
		}
		res.Duration = time.Since(start)
		results = append(results, res)
	}
	return results, nil
}

func sortedNames(m map[string]point.Blob) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// fileName makes a plain file name of s, which comes from a hypervisor: what
// could lead elsewhere or means something to a file system is written %XX.
func fileName(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c < ' ' || c == 0x7f || strings.IndexByte(`/\:*?"<>|%`, c) >= 0 || c == '.' && i == 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	if b.Len() == 0 {
		return "unnamed"
	}
	return b.String()
}

// diskFile names the image of a disk so that no other in taken has its name,
// even where case does not count. An id that is itself the name of an image
// loses its old extension.
func diskFile(id vm.DiskID, f image.Format, taken map[string]bool) string {
	base := fileName(string(id))
	short := base
	if FormatOf(base) != "" {
		short = strings.TrimSuffix(base, filepath.Ext(base))
	}
	name := short + Extension(f)
	for i := 1; taken[strings.ToLower(name)]; i++ {
		name = base + Extension(f)
		if i > 1 {
			name = fmt.Sprintf("%s-%d%s", base, i, Extension(f))
		}
	}
	taken[strings.ToLower(name)] = true
	return name
}
