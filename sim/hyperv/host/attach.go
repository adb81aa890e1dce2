package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	gopath "path"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/sim/hyperv/cim"
)

// Subtypes of allocations.
const (
	subDisk   = "Microsoft:Hyper-V:Virtual Hard Disk"
	subMedium = "Microsoft:Hyper-V:Virtual CD/DVD Disk"
	subDirect = "Microsoft:Hyper-V:Physical Disk Drive"
)

// maxBaseline is how much of what a disk held when it was attached is kept, to
// say later what it must hold.
const maxBaseline = 1 << 30

func isHardDisk(p *cim.Instance) bool {
	return p.Class.Is("Msvm_StorageAllocationSettingData") && p.Get("ResourceType").Uint() == 31 && p.Get("ResourceSubType").String() == subDisk
}

// isMedium says whether p is a CD or DVD with a file in it.
func isMedium(p *cim.Instance) bool {
	return p.Class.Is("Msvm_StorageAllocationSettingData") && p.Get("ResourceSubType").String() == subMedium && p.Get("HostResource").String() != ""
}

// isSet says whether a file is a VHD set, which several VMs share.
func isSet(path string) bool { return strings.HasSuffix(strings.ToLower(path), ".vhds") }

// withoutCheckpoints names what checkpoints leave out: disks that are passed
// through, VHD sets. "" is nothing.
func (c *config) withoutCheckpoints() string {
	for _, p := range c.parts {
		source := p.Get("HostResource").String()
		if isHardDisk(p) && isSet(source) || p.Get("ResourceSubType").String() == subDirect && source != "" {
			return source
		}
	}
	return ""
}

func (h *Host) exists(path string) bool {
	info, err := os.Stat(h.local(path))
	return err == nil && info.Mode().IsRegular()
}

// usable says why the file that the allocation p names cannot be a disk of v.
func (h *Host) usable(v *vm, p *cim.Instance) error {
	path := p.Get("HostResource").String()
	refuse := func(why string) error {
		return problem{messageAttachment, fmt.Sprintf("Failed to open attachment '%s'. Error: '%s'", path, why)}
	}
	switch {
	case !fullPath(path):
		return refuse("The filename, directory name, or volume label syntax is incorrect. (0x8007007B)")
	case !h.exists(path):
		return refuse(notFoundText)
	case isMedium(p):
		return nil
	case isVHD(path) && v.config.generation() == 2:
		return refuse(unknownText)
	case isSet(path):
		return nil // several VMs share it
	}
	for _, q := range v.config.parts {
		if q != p && isHardDisk(q) && !q.Ref().Equal(p.Ref()) && strings.EqualFold(q.Get("HostResource").String(), path) {
			return refuse(inUseText)
		}
	}
	if slices.ContainsFunc(h.vms, func(w *vm) bool { return w != v && w.holds(path) }) {
		return refuse(inUseText)
	}
	img, _, err := h.openChain(path)
	if err != nil {
		return refuse(err.Error())
	}
	img.Close()
	return nil
}

// holds says whether a file is among those that v's disks are made of.
func (v *vm) holds(path string) bool {
	for _, d := range v.list {
		if slices.ContainsFunc(d.layers, func(l *layer) bool { return strings.EqualFold(l.path, path) }) ||
			slices.ContainsFunc(d.under, func(p string) bool { return strings.EqualFold(p, path) }) {
			return true
		}
	}
	return false
}

// Texts of what is wrong with a disk's files.
const (
	noDiskText   = "The file or directory is corrupted and unreadable. (0x80070570)"
	unknownText  = "The file is not a supported type of virtual hard disk. (0xC03A0004)"
	noParentText = "The chain of virtual hard disks is inaccessible: the parent of the differencing disk was not found. (0xC03A000D)"
	mismatchText = "The chain of virtual hard disks is corrupted: there is a mismatch in the identifiers of the parent and the differencing disk. (0xC03A000E)"
)

// openChain opens a disk with its parents, and gives their paths, the nearest
// first. The error's text is what a host says.
func (h *Host) openChain(path string) (image.Image, []string, error) {
	var parents []string
	found := map[string]bool{} // what the parents of a file are called led somewhere
	var open func(path string) (image.Image, error)
	open = func(path string) (image.Image, error) {
		f, err := image.OpenFile(h.local(path))
		if err != nil {
			return nil, err
		}
		parentOf := func(name string, _ image.Format) (image.Image, error) {
			parent := besides(path, name)
			if len(parents) > image.MaxDepth || parent == "" || !h.exists(parent) {
				return nil, os.ErrNotExist
			}
			found[path] = true
			before := len(parents)
			parents = append(parents, parent)
			img, err := open(parent)
			if err != nil {
				parents = parents[:before]
			}
			return img, err
		}
		var img image.Image
		if isVHD(path) {
			img, err = vhd.Open(f, parentOf)
		} else {
			img, err = vhdx.Open(f, parentOf)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		return img, nil
	}
	switch strings.ToLower(gopath.Ext(path)) {
	case ".vhdx", ".avhdx", ".vhd", ".avhd":
	default:
		return nil, nil, problem{text: unknownText}
	}
	img, err := open(path)
	if err == nil {
		return img, slices.Compact(parents), nil
	}
	if layer, e := openLayer(h.local(path)); e == nil {
		differencing := layer.Info().Variant == "differencing"
		layer.Close()
		switch {
		case differencing && !found[path]:
			return nil, nil, problem{text: noParentText}
		case differencing:
			return nil, nil, problem{text: mismatchText}
		}
	}
	return nil, nil, problem{text: noDiskText}
}

// besides is the path of the file that the one at path calls name.
func besides(path, name string) string {
	name = strings.ReplaceAll(strings.TrimPrefix(name, `\\?\`), "/", `\`)
	if fullPath(name) {
		return name
	}
	if strings.HasPrefix(name, `\`) || strings.Contains(name, ":") || len(path) < 3 {
		return ""
	}
	folder := strings.ReplaceAll(path[2:strings.LastIndexByte(path, '\\')+1], `\`, "/")
	return path[:2] + strings.ReplaceAll(gopath.Clean(folder+strings.ReplaceAll(name, `\`, "/")), "/", `\`)
}

// attach makes the file at path a disk of a VM, with what it holds already.
func (h *Host) attach(id, path string) (*disk, error) {
	img, parents, err := h.openChain(path)
	if err != nil {
		return nil, problem{messageAttachment, fmt.Sprintf("Failed to open attachment '%s'. Error: '%v'", path, err)}
	}
	defer img.Close()
	d, err := h.openDisk(id, path)
	if err != nil {
		return nil, err
	}
	d.under = parents
	if err := h.keepBaseline(d, img); err != nil {
		return nil, errors.Join(err, h.detach(d))
	}
	return d, nil
}

// keepBaseline copies what a disk holds, so that what it must hold later does
// not rest on the files that are written to.
func (h *Host) keepBaseline(d *disk, img image.Image) error {
	all := extent.Extent{Len: img.Size()}
	var data int64
	for e, err := range img.Extents(context.Background(), all) {
		if err != nil {
			return err
		}
		if e.Kind == image.Data {
			data += e.Len
		}
	}
	if data == 0 {
		return nil
	}
	if data > maxBaseline {
		d.unknown = true
		return nil
	}
	f, err := os.CreateTemp(h.o.Dir, ".baseline-*")
	if err != nil {
		return err
	}
	d.baseline = f
	buf := make([]byte, mib)
	for e, err := range img.Extents(context.Background(), all) {
		if err != nil {
			return err
		}
		for off := e.Off; e.Kind == image.Data && off < e.End(); {
			p := buf[:min(int64(len(buf)), e.End()-off)]
			if _, err := img.ReadAt(p, off); err != nil && err != io.EOF {
				return err
			}
			if _, err := f.WriteAt(p, off); err != nil {
				return err
			}
			off += int64(len(p))
		}
	}
	return nil
}

// detach ends the use of a disk's files.
func (h *Host) detach(d *disk) error {
	var all error
	for _, l := range d.layers {
		all = errors.Join(all, l.file.close())
	}
	if d.baseline != nil {
		all = errors.Join(all, d.baseline.Close(), os.Remove(d.baseline.Name()))
	}
	return all
}
