package kvm

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/vm"
)

// What another hypervisor has to know of a VM is in its definition.
func TestDescribe(t *testing.T) {
	for _, c := range []struct {
		name, xml string
		want      vm.Definition
	}{
		{"bios, memory in KiB", `<domain type="kvm"><name>web01</name><memory>1048576</memory><vcpu>4</vcpu><os><type>hvm</type></os></domain>`,
			vm.Definition{Version: 1, Name: "web01", Hypervisor: "kvm", Processors: 4, MemoryBytes: 1 << 30, Firmware: "bios"}},
		{"uefi by its flash", `<domain type="kvm"><name>w</name><memory unit="GiB">2</memory><os><type>hvm</type><loader type="pflash" secure="yes">/x</loader></os></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", MemoryBytes: 2 << 30, Firmware: "uefi", SecureBoot: true}},
		{"uefi by name, an absurd memory", `<domain type="kvm"><name>w</name><memory unit="TiB">99999999999</memory><os firmware="efi"><type>hvm</type></os></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", Firmware: "uefi"}},
		{"disks and cards", `<domain type="kvm"><name>w</name><devices>
<disk type="file" device="disk"><source file="/v/a.qcow2"/><target dev="vda" bus="virtio"/></disk>
<disk type="file" device="cdrom"><target dev="sda" bus="sata"/></disk>
<disk type="block" device="disk"><source dev="/dev/x"/><target dev="sdb" bus="scsi"/></disk>
<interface type="bridge"><mac address="52:54:00:00:00:01"/><source bridge="br0"/><model type="virtio"/></interface>
<interface type="user"/><tpm model="tpm-crb"><backend type="emulator"/></tpm>
<hostdev mode="subsystem" type="usb"><source><vendor id="0x1"/><product id="0x2"/></source></hostdev></devices></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", Firmware: "bios", TPM: true, Beyond: []string{"a device of the host that was passed through"},
				Disks: []vm.DiskPlace{{ID: "vda", Bus: "virtio", Source: "/v/a.qcow2"}, {ID: "sdb", Bus: "scsi", Slot: 1}},
				NICs:  []vm.NIC{{MAC: "52:54:00:00:00:01", Network: "br0", Model: "virtio"}, {}}}},
		{"boots from its third disk, then from its second", `<domain type="kvm"><name>w</name><devices>
<disk type="file" device="disk"><target dev="vda" bus="virtio"/></disk>
<disk type="file" device="disk"><target dev="vdb" bus="virtio"/><boot order="3"/></disk>
<disk type="file" device="cdrom"><target dev="sda" bus="sata"/><boot order="2"/></disk>
<disk type="file" device="disk"><target dev="vdc" bus="virtio"/><boot order="1"/></disk></devices></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", Firmware: "bios",
				Disks: []vm.DiskPlace{{ID: "vdc", Bus: "virtio"}, {ID: "vdb", Bus: "virtio", Slot: 1}, {ID: "vda", Bus: "virtio", Slot: 2}}}},
		{"boots from a network, then from its first disk", `<domain type="kvm"><name>w</name><os><type>hvm</type><boot dev="network"/><boot dev="hd"/></os><devices>
<disk type="file" device="disk"><target dev="vda" bus="virtio"/></disk><disk type="file" device="disk"><target dev="vdb" bus="virtio"/></disk></devices></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", Firmware: "bios",
				Disks: []vm.DiskPlace{{ID: "vda", Bus: "virtio"}, {ID: "vdb", Bus: "virtio", Slot: 1}}}},
		{"sectors of 4 KiB", `<domain type="kvm"><name>w</name><devices><disk type="file" device="disk"><blockio logical_block_size="4096"/><target dev="vda" bus="virtio"/></disk></devices></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", Firmware: "bios", Disks: []vm.DiskPlace{{ID: "vda", Bus: "virtio", SectorBytes: 4096}}}},
	} {
		if got, err := Describe([]byte(c.xml)); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
	if _, err := Describe([]byte("<domain")); err == nil {
		t.Error("half a definition was read")
	}
}

// A VM of another hypervisor gets here what that said of it, on devices that
// its guest is likely to know, and no network; what it can't have is told.
func TestNeutralOfADescription(t *testing.T) {
	disks := map[vm.DiskID]string{"scsi0:1": "/d/1", "scsi0:0": "/d/0", "ide0:0": "/d/i"}
	places := []vm.DiskPlace{{ID: "scsi0:0", Bus: "scsi"}, {ID: "scsi0:1", Bus: "scsi", Slot: 1}, {ID: "ide0:0", Bus: "ide"}}
	four := []vm.DiskPlace{{ID: "ide0:0", Bus: "ide", SectorBytes: 4096}, {ID: "scsi0:0", Bus: "scsi"}, {ID: "scsi0:1", Bus: "scsi", Slot: 1}}
	for _, c := range []struct {
		name     string
		def      vm.Definition
		bus      string
		host     platform
		want     string // machine type, and the disks in the order in which it boots from them
		notes    []string
		warnings []string
	}{
		{"generation 1", vm.Definition{Firmware: "bios", Guest: vm.GuestLinux, Disks: places}, "", platform{virt: "kvm", pc: true},
			"pc /d/i=ide:hda /d/0=ide:hdb /d/1=ide:hdc", []string{"on ide (as generation 1 had them)"}, nil},
		{"generation 1 where there is no such machine", vm.Definition{Firmware: "bios", Disks: places}, "", platform{virt: "kvm"},
			"q35 /d/i=sata:sda /d/0=sata:sdb /d/1=sata:sdc", []string{"on sata"}, nil},
		{"generation 2, Linux", vm.Definition{Firmware: "uefi", Guest: vm.GuestLinux, Disks: four}, "", platform{virt: "kvm", pc: true},
			"q35 /d/i=scsi:sda/4096 /d/0=scsi:sdb /d/1=scsi:sdc", []string{"on scsi", "BOOTX64.EFI"}, nil},
		{"generation 2, Windows, all that it may have", vm.Definition{Firmware: "uefi", Guest: vm.GuestWindows, SecureBoot: true, TPM: true, MemoryBytes: 1 << 30, MemoryMaxBytes: 4 << 30,
			Disks: append(four, vm.DiskPlace{ID: "scsi0:7"}), NICs: []vm.NIC{{Network: "LAN"}, {}}, Beyond: []string{"a lamp"}}, "", platform{virt: "qemu", pc: true},
			"q35 /d/i=sata:sda /d/0=sata:sdb /d/1=sata:sdc", []string{"on sata", "BOOTX64.EFI", "could grow to 4096 MiB", "cards: 2, as e1000e, with new addresses and their links down (before: LAN)"},
			[]string{"Secure Boot is off", "TPM", "disk scsi0:7 is not in the restore point", "lacks a lamp", "disk ide0:0 had sectors of 4096 bytes"}},
		{"the bus that was asked for", vm.Definition{Firmware: "bios", Disks: four}, "virtio", platform{virt: "kvm", pc: true},
			"q35 /d/i=virtio:vda/4096 /d/0=virtio:vdb /d/1=virtio:vdc", []string{"on virtio (as asked for)"}, nil},
	} {
		c.def.Version, c.def.Hypervisor = 1, "hyperv"
		x, told, err := neutral(DefineOptions{Name: "web02", Definition: &c.def, Bus: c.bus, Disks: disks}, c.host, "")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := x.OS.Type.Machine
		for i, d := range x.Devices.Disks {
			got += fmt.Sprintf(" %s=%s:%s", d.Source.File.File, d.Target.Bus, d.Target.Dev)
			if d.BlockIO != nil {
				got += fmt.Sprintf("/%d", d.BlockIO.LogicalBlockSize)
			}
			if d.Boot.Order != uint(i+1) {
				t.Errorf("%s: it boots from disk %d as number %d", c.name, i, d.Boot.Order)
			}
		}
		if got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		for what, texts := range map[string][2][]string{"notes": {told.Notes, c.notes}, "warnings": {told.Warnings, c.warnings}} {
			all := strings.Join(texts[0], "\n")
			if len(texts[0]) != len(texts[1]) {
				t.Errorf("%s: %d %s, want %d: %s", c.name, len(texts[0]), what, len(texts[1]), all)
			}
			for _, want := range texts[1] {
				if !strings.Contains(all, want) {
					t.Errorf("%s: no %q among the %s: %s", c.name, want, what, all)
				}
			}
		}
	}
	ide := DefineOptions{Name: "web02", Definition: &vm.Definition{Disks: places}, Bus: "ide", Disks: disks}
	if _, _, err := neutral(ide, platform{virt: "kvm"}, ""); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("IDE where there is none: %v", err)
	}
}

// What libvirt is told of another's VM, another can be told again.
func TestNeutralIsDescribed(t *testing.T) {
	def := vm.Definition{Version: 1, Hypervisor: "hyperv", Processors: 3, MemoryBytes: 768 << 20, Firmware: "uefi", Notes: "the shop", NICs: []vm.NIC{{Network: "LAN"}, {}},
		Guest: vm.GuestLinux}
	disks := map[vm.DiskID]string{}
	for slot := range 15 {
		id := vm.DiskID(fmt.Sprintf("scsi0:%d", slot))
		disks[id] = "/d/" + string(id)
		def.Disks = append(def.Disks, vm.DiskPlace{ID: id, Bus: "scsi", Slot: slot})
	}
	x, _, err := neutral(DefineOptions{Name: "web02", Definition: &def, Disks: disks}, platform{virt: "qemu"}, "")
	if err != nil {
		t.Fatal(err)
	}
	text, err := x.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`<memory unit="KiB">786432</memory>`, `<vcpu>3</vcpu>`, `<description>the shop</description>`, `<os firmware="efi">`,
		`<feature enabled="no" name="secure-boot">`, `<cpu mode="maximum">`, `<target dev="sdo" bus="scsi">`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if down := strings.Count(text, `<link state="down">`); down != 2 {
		t.Errorf("%d network cards lead nowhere, want 2", down)
	}
	if n := strings.Count(text, `model="virtio-scsi"`); n != 3 {
		t.Errorf("15 disks hang on %d controllers that guests know, want 3", n)
	}
	again, err := Describe([]byte(text))
	if err != nil || again.Firmware != "uefi" || again.Processors != 3 || again.MemoryBytes != 768<<20 || len(again.Disks) != 15 || len(again.NICs) != 2 {
		t.Errorf("read back: %+v, %v", again, err)
	}
}
