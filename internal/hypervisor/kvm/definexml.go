package kvm

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/vm"
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
	if len(x.Devices.TPMs) > 0 {
		dropped = append(dropped, "what the old VM's TPM holds: a guest that keeps its key there (BitLocker) asks for its recovery key")
	}
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
