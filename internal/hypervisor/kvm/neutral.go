package kvm

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/vm"
)

// Memory and processors of a VM of which no hypervisor told us, and that an
// administrator will want to look at anyway.
const (
	neutralMemoryMiB = 2048
	neutralVCPUs     = 2
)

// Buses that disks of a VM without a definition of libvirt's may hang on.
const (
	busSATA   = "sata"
	busSCSI   = "scsi" // virtio-scsi
	busVirtIO = "virtio"
	busIDE    = "ide"
)

// Buses are those words, for whoever asks for one.
var Buses = []string{busSATA, busSCSI, busVirtIO, busIDE}

const (
	ideDisks  = 4 // as many as a VM can have on IDE
	scsiUnits = 7 // disks that libvirt puts on one SCSI controller
)

// A platform is what libvirt has to offer.
type platform struct {
	virt string // "kvm", or "qemu" for emulation
	pc   bool   // the machine type with an IDE controller
}

// platformOf reads libvirt's capabilities.
func platformOf(capabilities string) platform {
	p := platform{virt: "qemu", pc: strings.Contains(capabilities, ">pc</machine>")}
	if strings.Contains(capabilities, "<domain type='kvm'") {
		p.virt = "kvm"
	}
	return p
}

// neutral defines a VM for disks that came without a definition of libvirt's:
// from another hypervisor, or from image files.
func neutral(o DefineOptions, host platform, nvram string) (*libvirtxml.Domain, hypervisor.Built, error) {
	var told hypervisor.Built
	x := &libvirtxml.Domain{Type: host.virt, Name: o.Name, UUID: newUUID(),
		Memory:   &libvirtxml.DomainMemory{Value: neutralMemoryMiB, Unit: "MiB"},
		VCPU:     &libvirtxml.DomainVCPU{Value: neutralVCPUs},
		OS:       &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Type: "hvm", Arch: "x86_64", Machine: "q35"}},
		Features: &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}},
		// QEMU's own choice is a processor that guests of today refuse.
		CPU: &libvirtxml.DomainCPU{Mode: "host-model"},
		Devices: &libvirtxml.DomainDeviceList{
			Serials: []libvirtxml.DomainSerial{{Source: &libvirtxml.DomainChardevSource{Pty: &libvirtxml.DomainChardevSourcePty{}}}},
			Channels: []libvirtxml.DomainChannel{{
				Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{}},
				Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: "org.qemu.guest_agent.0"}}}},
			Graphics: []libvirtxml.DomainGraphic{{VNC: &libvirtxml.DomainGraphicVNC{AutoPort: "yes", Listen: "127.0.0.1"}}},
		}}
	if host.virt == "qemu" {
		x.CPU.Mode = "maximum"
	}
	if nvram != "" {
		x.OS.Firmware = "efi"
		x.OS.NVRam = &libvirtxml.DomainNVRam{NVRam: nvram}
	}
	if o.Definition != nil {
		describe(x, *o.Definition, o.Disks, &told)
	} else {
		told.Notes = append(told.Notes, fmt.Sprintf("the restore point does not describe the VM: it gets %d processors, %d MiB of memory and no network card", neutralVCPUs, neutralMemoryMiB))
	}
	err := attach(x, o, host, &told)
	return x, told, err
}

// describe gives a VM what another hypervisor said of it, and tells what it
// can't give it. Its network cards are there and lead nowhere: the networks
// are that one's.
func describe(x *libvirtxml.Domain, def vm.Definition, disks map[vm.DiskID]string, told *hypervisor.Built) {
	note := func(format string, args ...any) { told.Notes = append(told.Notes, fmt.Sprintf(format, args...)) }
	warn := func(format string, args ...any) { told.Warnings = append(told.Warnings, fmt.Sprintf(format, args...)) }
	if def.MemoryBytes > 0 {
		x.Memory = &libvirtxml.DomainMemory{Value: uint(def.MemoryBytes >> 10), Unit: "KiB"}
	}
	if def.MemoryMaxBytes > def.MemoryBytes {
		note("its memory is the %d MiB that it started with; it could grow to %d MiB", def.MemoryBytes>>20, def.MemoryMaxBytes>>20)
	}
	if def.Processors > 0 {
		x.VCPU = &libvirtxml.DomainVCPU{Value: uint(def.Processors)}
	}
	x.Description = def.Notes
	if def.Guest == vm.GuestWindows {
		x.Clock = &libvirtxml.DomainClock{Offset: "localtime"} // as Windows takes it to be
	}
	if def.Firmware == "uefi" {
		x.OS.Firmware = "efi"
		x.OS.FirmwareInfo = &libvirtxml.DomainOSFirmwareInfo{Features: []libvirtxml.DomainOSFirmwareFeature{{Name: "secure-boot", Enabled: "no"}}}
		note(`its UEFI has no boot entries of the old one: it starts \EFI\BOOT\BOOTX64.EFI of the first disk that has it`)
	}
	if def.SecureBoot {
		warn("Secure Boot is off: whether the guest's boot loader passes here is not known; switch it on once it does")
	}
	if def.TPM {
		warn("the VM had a virtual TPM, whose secrets stay with the old VM, and gets none: a guest that keeps its key there (BitLocker) asks for its recovery key")
	}
	for _, what := range def.Beyond {
		warn("the new VM lacks %s", what)
	}
	for _, p := range def.Disks {
		if _, has := disks[p.ID]; !has {
			warn("disk %s is not in the restore point, and the new VM lacks it", p.ID)
		}
	}
	var networks []string
	for _, n := range def.NICs {
		x.Devices.Interfaces = append(x.Devices.Interfaces, libvirtxml.DomainInterface{
			Source: &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}},
			Model:  &libvirtxml.DomainInterfaceModel{Type: "e1000e"},
			Link:   &libvirtxml.DomainInterfaceLink{State: "down"},
		})
		if n.Network != "" && !slices.Contains(networks, n.Network) {
			networks = append(networks, n.Network)
		}
	}
	if len(def.NICs) > 0 {
		before := ""
		if len(networks) > 0 {
			before = " (before: " + strings.Join(networks, ", ") + ")"
		}
		note("network cards: %d, as e1000e, with new addresses and their links down%s; lead them to a network and set the links up with \"virsh edit\"", len(def.NICs), before)
	}
}

// order is how the disks follow each other, those first that the VM boots
// from.
func (o DefineOptions) order() []vm.DiskID {
	var known []vm.DiskID
	if o.Definition != nil {
		places := slices.Clone(o.Definition.Disks)
		if o.Definition.Hypervisor == "hyperv" { // generation 1 boots from IDE alone
			slices.SortStableFunc(places, func(a, b vm.DiskPlace) int {
				return cmp.Or(cmp.Compare(a.Bus, b.Bus), cmp.Compare(a.Controller, b.Controller), cmp.Compare(a.Slot, b.Slot))
			})
		}
		for _, p := range places {
			known = append(known, p.ID)
		}
	} else if o.Machine != nil {
		for _, k := range o.Machine.Disks {
			known = append(known, k.ID)
		}
	}
	known = slices.DeleteFunc(known, func(id vm.DiskID) bool { _, ok := o.Disks[id]; return !ok })
	rest := slices.DeleteFunc(slices.Sorted(maps.Keys(o.Disks)), func(id vm.DiskID) bool { return slices.Contains(known, id) })
	return append(known, rest...)
}

// chooseBus says which bus the guest is likeliest to boot from, and why. What
// it ran on before is here only where Hyper-V pretended to be a PC, too.
func chooseBus(o DefineOptions, host platform) (bus, why string) {
	def := o.Definition
	switch {
	case o.Bus != "":
		return o.Bus, "as asked for"
	case def == nil:
		return "", ""
	case def.Hypervisor == "hyperv" && def.Firmware == "bios" && host.pc:
		return busIDE, "as generation 1 had them"
	case def.Guest == vm.GuestLinux:
		return busSCSI, "by virtio, which Linux knows"
	}
	return busSATA, "which all but some kernels made for clouds know"
}

// attach gives a VM its disks.
func attach(x *libvirtxml.Domain, o DefineOptions, host platform, told *hypervisor.Built) error {
	bus, why := chooseBus(o, host)
	switch {
	case bus == busIDE && !host.pc:
		return fmt.Errorf("this libvirt has no machine type with IDE: %w", fault.ErrUnsupported)
	case bus == busIDE:
		x.OS.Type.Machine = "pc"
	case bus != "" && !slices.Contains(Buses, bus):
		return fmt.Errorf("bus %q: %w", bus, fault.ErrUnsupported)
	}
	own := map[vm.DiskID]string{} // what image files say
	if o.Machine != nil {
		for _, k := range o.Machine.Disks {
			own[k.ID] = k.Bus
		}
	}
	used := map[string]int{} // by prefix of the names
	scsi := 0
	order := o.order()
	for i, id := range order {
		b := bus
		switch {
		case b == "" && slices.Contains([]string{busVirtIO, busSCSI, "usb"}, own[id]):
			b = own[id]
		case b == "", b == busIDE && i >= ideDisks:
			b = busSATA
		}
		prefix := map[string]string{busVirtIO: "vd", busIDE: "hd"}[b]
		if prefix == "" {
			prefix = "sd"
		}
		k := libvirtxml.DomainDisk{Device: "disk",
			Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: diskFormat(o, id)},
			Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: o.Disks[id]}},
			Target: &libvirtxml.DomainDiskTarget{Dev: prefix + letters(used[prefix]), Bus: b},
			Boot:   &libvirtxml.DomainDeviceBoot{Order: uint(i + 1)}}
		used[prefix]++
		if b == busSCSI {
			scsi = used[prefix] // libvirt numbers by the name
		}
		if n := o.sectorBytes(id); n > 512 && (b == busSCSI || b == busVirtIO) {
			k.BlockIO = &libvirtxml.DomainDiskBlockIO{LogicalBlockSize: uint(n), PhysicalBlockSize: uint(n)}
		} else if n > 512 {
			told.Warnings = append(told.Warnings, fmt.Sprintf("disk %s had sectors of %d bytes, which %s has not: a guest that is shown sectors of 512 bytes finds no partitions on it; --bus %s and --bus %s keep them, for guests that have their driver", id, n, b, busSCSI, busVirtIO))
		}
		x.Devices.Disks = append(x.Devices.Disks, k)
	}
	for n := 0; n*scsiUnits < scsi; n++ { // else libvirt takes a model that few guests know
		index := uint(n)
		x.Devices.Controllers = append(x.Devices.Controllers, libvirtxml.DomainController{Type: "scsi", Index: &index, Model: "virtio-scsi"})
	}
	if why != "" && len(order) > 0 {
		told.Notes = append(told.Notes, fmt.Sprintf("its disks are on %s (%s); if it does not find them, --bus chooses another bus", bus, why))
	}
	return nil
}

// sectorBytes is what another hypervisor said of a disk's sectors, 0 for
// nothing.
func (o DefineOptions) sectorBytes(id vm.DiskID) int {
	if o.Definition != nil {
		for _, p := range o.Definition.Disks {
			if p.ID == id && p.SectorBytes == 4096 {
				return p.SectorBytes
			}
		}
	}
	return 0
}

// letters numbers devices as Linux does: a, b, … z, aa, ab, …
func letters(n int) string {
	s := string(rune('a' + n%26))
	if n >= 26 {
		return letters(n/26-1) + s
	}
	return s
}
