package kvm

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/vm"
)

// Describe reads what a stored domain.xml says that a VM on any hypervisor can
// have. Its disks are called as the restore point calls them, and come in the
// order in which it boots from them.
func Describe(domainXML []byte) (vm.Definition, error) {
	x := &libvirtxml.Domain{}
	if err := x.Unmarshal(string(domainXML)); err != nil {
		return vm.Definition{}, fmt.Errorf("the definition in the restore point: %w", err)
	}
	def := vm.Definition{Version: 1, Name: x.Name, UUID: x.UUID, Hypervisor: "kvm", Firmware: "bios", Notes: x.Description}
	if x.VCPU != nil {
		def.Processors = int(min(x.VCPU.Value, 1<<16))
	}
	if m := x.Memory; m != nil {
		def.MemoryBytes = memoryBytes(uint64(m.Value), m.Unit)
	}
	if os := x.OS; os != nil {
		if os.Firmware == "efi" || os.NVRam != nil || os.Loader != nil && os.Loader.Type == "pflash" {
			def.Firmware = "uefi"
		}
		def.SecureBoot = os.Loader != nil && os.Loader.Secure == "yes"
	}
	if x.Devices == nil {
		return def, nil
	}
	def.TPM = len(x.Devices.TPMs) > 0
	for range x.Devices.Hostdevs {
		def.Beyond = append(def.Beyond, "a device of the host that was passed through")
	}
	for range x.Devices.Filesystems {
		def.Beyond = append(def.Beyond, "a directory of the host that was shared with the guest")
	}
	for _, k := range inBootOrder(x) {
		p := vm.DiskPlace{ID: vm.DiskID(k.Target.Dev), Bus: k.Target.Bus, Slot: len(def.Disks)}
		if k.Source != nil && k.Source.File != nil {
			p.Source = k.Source.File.File
		}
		if k.BlockIO != nil && k.BlockIO.LogicalBlockSize == 4096 {
			p.SectorBytes = 4096
		}
		def.Disks = append(def.Disks, p)
	}
	for _, n := range x.Devices.Interfaces {
		out := vm.NIC{}
		if n.MAC != nil {
			out.MAC = n.MAC.Address
		}
		if n.Model != nil {
			out.Model = n.Model.Type
		}
		switch s := n.Source; {
		case s == nil:
		case s.Network != nil:
			out.Network = s.Network.Network
		case s.Bridge != nil:
			out.Network = s.Bridge.Bridge
		case s.Direct != nil:
			out.Network = s.Direct.Dev
		}
		def.NICs = append(def.NICs, out)
	}
	return def, nil
}

// inBootOrder are the disks of a VM, those first that it boots from. Where
// disks have no order of their own, <os> can only ask for the first of them,
// which is the first already.
func inBootOrder(x *libvirtxml.Domain) []libvirtxml.DomainDisk {
	var disks []libvirtxml.DomainDisk
	for _, k := range x.Devices.Disks {
		if k.Target != nil && k.Device != "cdrom" && k.Device != "floppy" {
			disks = append(disks, k)
		}
	}
	order := func(k libvirtxml.DomainDisk) uint {
		if k.Boot == nil || k.Boot.Order == 0 {
			return math.MaxUint
		}
		return k.Boot.Order
	}
	slices.SortStableFunc(disks, func(a, b libvirtxml.DomainDisk) int { return cmp.Compare(order(a), order(b)) })
	return disks
}

// memoryBytes is an amount in libvirt's units, 0 for one that is none; without
// a unit it is KiB.
func memoryBytes(n uint64, unit string) int64 {
	scale := map[string]uint64{"": 1 << 10, "b": 1, "bytes": 1, "kb": 1000, "k": 1 << 10, "kib": 1 << 10, "mb": 1e6, "m": 1 << 20, "mib": 1 << 20,
		"gb": 1e9, "g": 1 << 30, "gib": 1 << 30, "tb": 1e12, "t": 1 << 40, "tib": 1 << 40}[strings.ToLower(unit)]
	if scale == 0 || n > 1<<50/scale {
		return 0
	}
	return int64(n * scale)
}
