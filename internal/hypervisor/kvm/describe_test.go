package kvm

import (
	"reflect"
	"strings"
	"testing"

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
<interface type="user"/><tpm model="tpm-crb"><backend type="emulator"/></tpm></devices></domain>`,
			vm.Definition{Version: 1, Name: "w", Hypervisor: "kvm", Firmware: "bios", TPM: true,
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
// every guest knows, and no network.
func TestNeutralOfADescription(t *testing.T) {
	def := vm.Definition{Version: 1, Hypervisor: "hyperv", Processors: 3, MemoryBytes: 768 << 20, Firmware: "uefi", Notes: "the shop", NICs: []vm.NIC{{Network: "LAN"}, {}}}
	m := vm.Machine{Disks: []vm.Disk{{ID: "scsi0:0", Bus: "scsi"}, {ID: "scsi0:1", Bus: "scsi"}}}
	x := neutral(DefineOptions{Name: "web02", Machine: &m, Definition: &def, Disks: map[vm.DiskID]string{"scsi0:1": "/d/1", "scsi0:0": "/d/0"}}, "qemu", "")
	text, err := x.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`<memory unit="KiB">786432</memory>`, `<vcpu>3</vcpu>`, `<description>the shop</description>`, `<os firmware="efi">`,
		`<feature enabled="no" name="secure-boot">`, `<source file="/d/0">`, `<target dev="sda" bus="sata">`, `<target dev="sdb" bus="sata">`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if down := strings.Count(text, `<link state="down">`); down != 2 {
		t.Errorf("%d network cards lead nowhere, want 2", down)
	}
	if again, err := Describe([]byte(text)); err != nil || again.Firmware != "uefi" || again.Processors != 3 || again.MemoryBytes != 768<<20 || len(again.Disks) != 2 || len(again.NICs) != 2 {
		t.Errorf("read back: %+v, %v", again, err)
	}
}
