package kvm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/vm"
)

// A diskDef is what the domain's XML says of one disk.
type diskDef struct {
	vm.Disk
	path     string // file or device on the host; "" for a volume
	pool     string // of a disk that is a volume: its path is asked of libvirt
	volume   string
	readOnly bool
	medium   bool     // a CD or floppy in its drive: no part of the machine
	hostdev  bool     // a device of the host: no disk to libvirt
	layers   []string // QEMU's node names, top first; only of a running VM
	below    []string // files of the layers under the top one; only of a running VM
}

// disks lists what a domain has that may hold data, in its own order. Those
// that can't be protected say why in Excluded.
func disks(d *libvirtxml.Domain, exclude []vm.DiskID) []diskDef {
	var out []diskDef
	if d.Devices == nil {
		return nil
	}
	for i := range d.Devices.Disks {
		x := &d.Devices.Disks[i]
		if x.Target == nil {
			continue
		}
		e := diskDef{Disk: vm.Disk{ID: vm.DiskID(x.Target.Dev), Bus: x.Target.Bus}}
		if x.Driver != nil {
			e.Format = x.Driver.Type
		}
		if e.Format == "" {
			e.Format = "raw" // libvirt's own default; probing would trust the guest
		}
		e.readOnly = x.ReadOnly != nil
		e.place(x.Source)
		e.Excluded = unprotected(x)
		if e.Excluded == "" && slices.Contains(exclude, e.ID) {
			e.Excluded = "excluded by request"
		}
		if e.medium = x.Device == "cdrom" || x.Device == "floppy"; e.medium && e.Source == "" {
			continue // an empty drive
		}
		e.nodes(x)
		out = append(out, e)
	}
	for i := range d.Devices.Hostdevs {
		if e, ok := passedThrough(&d.Devices.Hostdevs[i], i); ok {
			out = append(out, e)
		}
	}
	return out
}

// place fills in where the disk's bytes are.
func (e *diskDef) place(s *libvirtxml.DomainDiskSource) {
	switch {
	case s == nil:
	case s.File != nil:
		e.path, e.Source = s.File.File, s.File.File
	case s.Block != nil:
		e.path, e.Source = s.Block.Dev, s.Block.Dev
	case s.Volume != nil:
		e.pool, e.volume, e.Source = s.Volume.Pool, s.Volume.Volume, s.Volume.Pool+"/"+s.Volume.Volume
	case s.Network != nil:
		e.Source = s.Network.Protocol + ":" + s.Network.Name
	case s.Dir != nil:
		e.Source = s.Dir.Dir
	}
}

// files are the disk's layers, top first, as the definition of a running VM
// names them.
func (e *diskDef) files() []string {
	return append([]string{e.path}, e.below...)
}

// nodes fills in the layers: libvirt names QEMU's nodes by the index that it
// puts into a running domain's XML.
func (e *diskDef) nodes(x *libvirtxml.DomainDisk) {
	add := func(index uint) {
		if index > 0 {
			e.layers = append(e.layers, "libvirt-"+strconv.FormatUint(uint64(index), 10)+"-format")
		}
	}
	if x.Source != nil {
		add(x.Source.Index)
	}
	for b := x.BackingStore; b != nil && b.Source != nil; b = b.BackingStore {
		add(max(b.Index, b.Source.Index))
		var under diskDef
		under.place(b.Source)
		e.below = append(e.below, under.Source)
	}
}

// unprotected says why a disk can't be backed up, or nothing.
func unprotected(x *libvirtxml.DomainDisk) string {
	switch x.Device {
	case "cdrom":
		return "CD-ROM"
	case "floppy":
		return "floppy disk"
	case "lun":
		return "SCSI pass-through: the guest writes past QEMU"
	}
	s := x.Source
	switch {
	case x.Transient != nil:
		return "transient: its changes are thrown away"
	case s == nil:
		return "no medium"
	case s.Network != nil:
		return "network disk (" + s.Network.Protocol + "): not supported"
	case s.Dir != nil:
		return "a directory shown as a disk"
	case s.VHostUser != nil || s.VHostVDPA != nil || s.NVME != nil:
		return "pass-through: the guest writes past QEMU"
	case s.Encryption != nil || x.Encryption != nil:
		return "encrypted by QEMU: not supported"
	case s.File == nil && s.Block == nil && s.Volume == nil:
		return "unknown kind of source"
	}
	return ""
}

// passedThrough shows a host device as a disk if it may hold data.
func passedThrough(h *libvirtxml.DomainHostdev, n int) (diskDef, bool) {
	e := diskDef{hostdev: true, Disk: vm.Disk{ID: vm.DiskID("hostdev" + strconv.Itoa(n)), Format: "raw"}}
	if h.Alias != nil && h.Alias.Name != "" {
		e.ID = vm.DiskID(h.Alias.Name)
	}
	switch {
	case h.SubsysSCSI != nil:
		e.Excluded, e.Bus = "SCSI pass-through: the guest writes past QEMU", "scsi"
		if s := h.SubsysSCSI.Source; s != nil && s.Host != nil && s.Host.Adapter != nil {
			e.Source = s.Host.Adapter.Name
		}
	case h.SubsysSCSIHost != nil:
		e.Excluded, e.Bus = "SCSI host pass-through: the guest writes past QEMU", "scsi"
	case h.SubsysPCI != nil && h.SubsysPCI.Source != nil && h.SubsysPCI.Source.Address != nil:
		a := h.SubsysPCI.Source.Address
		if a.Domain == nil || a.Bus == nil || a.Slot == nil || a.Function == nil {
			return e, false
		}
		e.Source = fmt.Sprintf("%04x:%02x:%02x.%x", *a.Domain, *a.Bus, *a.Slot, *a.Function)
		e.Excluded, e.Bus = "PCI pass-through of a storage device: the guest writes past QEMU", "pci"
		return e, pciIsStorage(e.Source)
	default:
		return e, false
	}
	return e, true
}

// agentState is what the XML says of the guest agent's channel: whether there
// is one, and whether somebody in the guest holds its other end.
func agentState(d *libvirtxml.Domain) (configured, connected bool) {
	if d.Devices == nil {
		return false, false
	}
	for _, c := range d.Devices.Channels {
		if c.Target != nil && c.Target.VirtIO != nil && c.Target.VirtIO.Name == "org.qemu.guest_agent.0" {
			return true, c.Target.VirtIO.State == "connected"
		}
	}
	return false, false
}

// qemuOwner is the uid and gid that a running domain's QEMU has, -1 if the XML
// does not say.
func qemuOwner(d *libvirtxml.Domain) (uid, gid int) {
	for _, s := range d.SecLabel {
		if s.Model != "dac" {
			continue
		}
		u, g, ok := strings.Cut(s.Label, ":")
		uid, err1 := strconv.Atoi(strings.TrimPrefix(u, "+"))
		gid, err2 := strconv.Atoi(strings.TrimPrefix(g, "+"))
		if ok && err1 == nil && err2 == nil {
			return uid, gid
		}
	}
	return -1, -1
}

// nvramPath is the file of UEFI variables, "" for none.
func nvramPath(d *libvirtxml.Domain) string {
	if d.OS == nil || d.OS.NVRam == nil {
		return ""
	}
	if s := d.OS.NVRam.Source; s != nil && s.File != nil {
		return s.File.File
	}
	return strings.TrimSpace(d.OS.NVRam.NVRam)
}
