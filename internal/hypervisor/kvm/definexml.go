package kvm

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/vm"
)

// Memory and processors of a VM of which no hypervisor told us, and that an
// administrator will want to look at anyway.
const (
	neutralMemoryMiB = 2048
	neutralVCPUs     = 2
)

// redefine turns the definition that a restore point keeps into that of a new
// VM. What only one VM can have, it gets anew or does without; files behind
// serial ports and fixed ports of consoles stay, so that two that have such
// can't run at once. dropped says in words what of the old one the new one
// lacks.
func redefine(o DefineOptions, nvram string) (x *libvirtxml.Domain, dropped []string, err error) {
	x = &libvirtxml.Domain{}
	if err := x.Unmarshal(string(o.DomainXML)); err != nil {
		return nil, nil, fmt.Errorf("the definition in the restore point: %w", err)
	}
	x.ID, x.Name, x.UUID = nil, o.Name, newUUID()
	if x.GenID != nil {
		x.GenID = &libvirtxml.DomainGenID{} // tells the guest that it is another machine now
	}
	for _, s := range x.SysInfo {
		if s.SMBIOS == nil || s.SMBIOS.System == nil {
			continue
		}
		for i, e := range s.SMBIOS.System.Entry {
			if e.Name == "uuid" { // libvirt wants the two equal
				s.SMBIOS.System.Entry[i].Value = x.UUID
			}
		}
	}
	x.SecLabel = slices.DeleteFunc(x.SecLabel, func(s libvirtxml.DomainSecLabel) bool { return s.Type == "dynamic" })
	if x.OS != nil && x.OS.NVRam != nil {
		x.OS.NVRam.NVRam, x.OS.NVRam.Source = nvram, nil
	}
	if x.Devices == nil {
		x.Devices = &libvirtxml.DomainDeviceList{}
	}
	if dropped, err = redefineDisks(x.Devices, o); err != nil {
		return nil, nil, err
	}
	for range x.Devices.Hostdevs {
		dropped = append(dropped, "a device of the host, which another VM may be using")
	}
	x.Devices.Hostdevs = nil
	for i := range x.Devices.Interfaces {
		n := &x.Devices.Interfaces[i]
		n.Target = nil
		if !o.KeepMACs {
			n.MAC = nil
		}
	}
	for i := range x.Devices.Channels {
		s := x.Devices.Channels[i].Source
		if s != nil && s.UNIX != nil && (strings.HasPrefix(s.UNIX.Path, "/var/lib/libvirt/") || strings.HasPrefix(s.UNIX.Path, "/run/libvirt/")) {
			s.UNIX.Path = "" // libvirt's own choice, made for the old VM
		}
	}
	return x, dropped, nil
}

// redefineDisks points the disks at the restored files.
func redefineDisks(devices *libvirtxml.DomainDeviceList, o DefineOptions) (dropped []string, err error) {
	left := maps.Clone(o.Disks)
	var keep []libvirtxml.DomainDisk
	for _, k := range devices.Disks {
		k.BackingStore, k.Mirror = nil, nil
		id := vm.DiskID("")
		if k.Target != nil {
			id = vm.DiskID(k.Target.Dev)
		}
		path, restored := left[id]
		switch {
		case restored:
			delete(left, id)
			k.Source = &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}}
			if k.Driver == nil {
				k.Driver = &libvirtxml.DomainDiskDriver{Name: "qemu"}
			}
			k.Driver.Type = diskFormat(o, id)
			k.Auth, k.Encryption, k.Snapshot = nil, nil, ""
		case k.Device == "cdrom", k.Device == "floppy":
			k.Source = nil // the medium was not backed up
		default:
			dropped = append(dropped, "disk "+string(id)+", which the restore point does not hold")
			continue
		}
		keep = append(keep, k)
	}
	if len(left) > 0 {
		return nil, fmt.Errorf("the definition in the restore point has no disk %s", slices.Sorted(maps.Keys(left))[0])
	}
	devices.Disks = keep
	return dropped, nil
}

func diskFormat(o DefineOptions, id vm.DiskID) string {
	if f := o.DiskFormats[id]; f != "" {
		return f
	}
	return "raw"
}

// neutral defines a VM for disks that came without a definition: from another
// hypervisor, or from image files. Its devices are those that every guest
// knows, unless the disks say more.
func neutral(o DefineOptions, virt, nvram string) *libvirtxml.Domain {
	d := &libvirtxml.DomainDeviceList{
		Channels: []libvirtxml.DomainChannel{{
			Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{}},
			Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: "org.qemu.guest_agent.0"}}}},
		Graphics: []libvirtxml.DomainGraphic{{VNC: &libvirtxml.DomainGraphicVNC{AutoPort: "yes", Listen: "127.0.0.1"}}},
	}
	bus := map[vm.DiskID]string{}
	order := slices.Sorted(maps.Keys(o.Disks))
	if o.Machine != nil { // the machine's own order, as far as it knows the disks
		var known []vm.DiskID
		for _, k := range o.Machine.Disks {
			if _, ok := o.Disks[k.ID]; ok {
				known = append(known, k.ID)
				bus[k.ID] = k.Bus
			}
		}
		order = append(known, slices.DeleteFunc(order, func(id vm.DiskID) bool { return slices.Contains(known, id) })...)
	}
	used := map[string]int{}
	for i, id := range order {
		b, prefix := "sata", "sd"
		switch {
		case o.Definition != nil: // its buses are not ours, and every guest knows this one
		case bus[id] == "virtio":
			b, prefix = "virtio", "vd"
		case bus[id] == "scsi", bus[id] == "usb":
			b = bus[id]
		}
		k := libvirtxml.DomainDisk{Device: "disk",
			Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: diskFormat(o, id)},
			Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: o.Disks[id]}},
			Target: &libvirtxml.DomainDiskTarget{Dev: prefix + letters(used[prefix]), Bus: b},
			Boot:   &libvirtxml.DomainDeviceBoot{Order: uint(i + 1)}}
		used[prefix]++
		d.Disks = append(d.Disks, k)
	}
	x := &libvirtxml.Domain{Type: virt, Name: o.Name, UUID: newUUID(),
		Memory:   &libvirtxml.DomainMemory{Value: neutralMemoryMiB, Unit: "MiB"},
		VCPU:     &libvirtxml.DomainVCPU{Value: neutralVCPUs},
		OS:       &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Type: "hvm", Arch: "x86_64", Machine: "q35"}},
		Features: &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}},
		Devices:  d}
	if nvram != "" {
		x.OS.Firmware = "efi"
		x.OS.NVRam = &libvirtxml.DomainNVRam{NVRam: nvram}
	}
	if o.Definition != nil {
		describe(x, *o.Definition)
	}
	return x
}

// describe gives a VM what another hypervisor said of it. Its network cards
// are there and lead nowhere: the networks are that one's.
func describe(x *libvirtxml.Domain, def vm.Definition) {
	if def.MemoryBytes > 0 {
		x.Memory = &libvirtxml.DomainMemory{Value: uint(def.MemoryBytes >> 10), Unit: "KiB"}
	}
	if def.Processors > 0 {
		x.VCPU = &libvirtxml.DomainVCPU{Value: uint(def.Processors)}
	}
	x.Description = def.Notes
	if def.Firmware == "uefi" {
		x.OS.Firmware = "efi"
		x.OS.FirmwareInfo = &libvirtxml.DomainOSFirmwareInfo{Features: []libvirtxml.DomainOSFirmwareFeature{{Name: "secure-boot", Enabled: "no"}}}
	}
	for range def.NICs {
		x.Devices.Interfaces = append(x.Devices.Interfaces, libvirtxml.DomainInterface{
			Source: &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}},
			Model:  &libvirtxml.DomainInterfaceModel{Type: "e1000e"},
			Link:   &libvirtxml.DomainInterfaceLink{State: "down"},
		})
	}
}

// letters numbers devices as Linux does: a, b, … z, aa, ab, …
func letters(n int) string {
	s := string(rune('a' + n%26))
	if n >= 26 {
		return letters(n/26-1) + s
	}
	return s
}
