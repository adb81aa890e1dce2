package hyperv

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/kvm"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// Whatever is in doubt is read whole, and says why.
func TestDecide(t *testing.T) {
	const device = `ctl-1\0\0\l`
	id := changeID{1, vmGUID, "run1", device, "identity", `C:\VMs\web01.vhdx`}
	disk := diskFacts{id: "scsi0:0", device: device, format: "vhdx", size: 100, identity: "identity", chain: []string{`C:\VMs\web01_new.avhdx`, `c:\vms\WEB01.vhdx`}}
	good := reference{id: "RP", disks: []string{`Microsoft:OTHER\x`, `Microsoft:VM\` + strings.ToUpper(device)}, tracking: []string{"a", "b"}}
	type given struct {
		disk diskFacts
		of   vmFacts
		prev map[vm.DiskID]hypervisor.PreviousDisk
	}
	for _, c := range []struct {
		name   string
		mode   point.Mode
		reason string
		change func(*given)
	}{
		{"all is well", point.Incremental, "", func(*given) {}},
		{"the first time", point.Full, "first backup", func(g *given) { g.prev = nil }},
		{"a disk more", point.Full, "new disk", func(g *given) { g.disk.id = "scsi0:1" }},
		{"a VHD", point.Compared, "VHD disks", func(g *given) { g.disk.format = "vhd" }},
		{"an old VM", point.Compared, "below 6.2", func(g *given) { g.of.old = true }},
		{"saved state", point.Compared, "saved state", func(g *given) { g.of.saved = true }},
		{"no change id", point.Full, "no change id", func(g *given) { g.prev["scsi0:0"] = hypervisor.PreviousDisk{SizeBytes: 100} }},
		{"nonsense", point.Full, "can't be read", func(g *given) { g.prev["scsi0:0"] = hypervisor.PreviousDisk{SizeBytes: 100, ChangeID: "{"} }},
		{"a newer change id", point.Full, "can't be read", func(g *given) {
			g.prev["scsi0:0"] = hypervisor.PreviousDisk{SizeBytes: 100, ChangeID: `{"v":2,"run":"run1"}`}
		}},
		{"another VM", point.Full, "another VM", func(g *given) { g.of.guid = "other" }},
		{"a replaced disk", point.Full, `it was in C:\VMs\web01.vhdx`, func(g *given) { g.disk.identity = "new" }},
		{"a disk without identity", point.Full, "replaced", func(g *given) { g.disk.identity = "" }},
		{"moved to another slot", point.Full, "another device", func(g *given) { g.disk.device = `ctl-1\0\1\l` }},
		{"grown", point.Full, "from 100 to 101 bytes", func(g *given) { g.disk.size = 101 }},
		{"shrunk", point.Full, "from 100 to 99 bytes", func(g *given) { g.disk.size = 99 }},
		{"a checkpoint was applied", point.Full, `no longer made of C:\VMs\web01.vhdx`, func(g *given) {
			g.disk.chain = []string{`C:\VMs\web01_applied.avhdx`, `C:\VMs\web01_before.vhdx`}
		}},
		{"another server's journal", point.Full, "is known here", func(g *given) { g.of.bases = nil }},
		{"the reference point is gone", point.Full, "no longer has", func(g *given) { g.of.bases["run1"] = reference{missing: true} }},
		{"arrays of different length", point.Full, "2 disks and 1 change tracking ids", func(g *given) {
			g.of.bases["run1"] = reference{disks: good.disks, tracking: good.tracking[:1]}
		}},
		{"the reference point lacks the disk", point.Full, "does not have the disk", func(g *given) {
			g.of.bases["run1"] = reference{disks: good.disks[:1], tracking: good.tracking[:1]}
		}},
		{"an empty tracking id", point.Full, "does not have the disk", func(g *given) {
			g.of.bases["run1"] = reference{disks: good.disks, tracking: []string{"a", ""}}
		}},
	} {
		g := given{disk, vmFacts{guid: strings.ToUpper(vmGUID), bases: map[string]reference{"run1": good}},
			map[vm.DiskID]hypervisor.PreviousDisk{"scsi0:0": {SizeBytes: 100, ChangeID: id.String()}}}
		c.change(&g)
		d := decide(g.disk, g.of, g.prev)
		if d.mode != c.mode || !strings.Contains(d.reason, c.reason) || (c.reason == "") != (d.reason == "") {
			t.Errorf("%s: %s, %q; want %s, %q", c.name, d.mode, d.reason, c.mode, c.reason)
		}
		if c.mode == point.Incremental && d.since != "b" {
			t.Errorf("%s: it counts from %q", c.name, d.since)
		}
	}
}

// One number means different things from different methods.
func TestReturnCodes(t *testing.T) {
	for _, c := range []struct {
		family family
		code   int64
		text   string
		class  error
	}{
		{familyCIM, 4, "invalid parameter", nil},
		{familyCIM, 5, "invalid state", fault.ErrLocked},
		{familyCIM, 6, "invalid type", fault.ErrUnsupported},
		{familyCIM, 32775, "invalid state", fault.ErrLocked},
		{familyMsvm, 32769, "access denied", fault.ErrDenied},
		{familyMsvm, 32779, "the file is in use", fault.ErrLocked},
		{familyImage, 32779, "file not found", fault.ErrNotFound},
		{familyMsvm, 40000, "unknown reason", nil},
	} {
		err := error(&ReturnError{"Method", c.code, c.family})
		if !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v, want %q", err, c.text)
		}
		for _, class := range []error{fault.ErrLocked, fault.ErrUnsupported, fault.ErrDenied, fault.ErrNotFound} {
			if errors.Is(err, class) != (class == c.class) {
				t.Errorf("%v: class %v is %v", err, class, errors.Is(err, class))
			}
		}
	}
}

func TestVersionsThatTrack(t *testing.T) {
	for version, want := range map[string]bool{"5.0": false, "6.1": false, "6.2": true, "8.0": true, "10.0": true, "254.0": true, "": false, "x": false, "6": false} {
		if tracks(version) != want {
			t.Errorf("%q: %v", version, !want)
		}
	}
}

// A VM of KVM boots from the disk that it booted from, be that its second.
func TestBootDiskComesFirst(t *testing.T) {
	def, err := kvm.Describe([]byte(`<domain type="kvm"><name>w</name><devices><disk type="file" device="disk"><target dev="vda" bus="virtio"/><boot order="2"/></disk>
<disk type="file" device="disk"><target dev="vdb" bus="virtio"/><boot order="1"/></disk></devices></domain>`))
	if err != nil {
		t.Fatal(err)
	}
	for generation, want := range map[int][]spot{1: {{"vdb", "ide", 0, 0}, {"vda", "scsi", 0, 0}}, 2: {{"vdb", "scsi", 0, 0}, {"vda", "scsi", 0, 1}}} {
		if got, left := arrangeNew(def, []vm.DiskID{"vda", "vdb"}, generation); !slices.Equal(got, want) || len(left) > 0 {
			t.Errorf("generation %d: %+v, left %v; want %+v", generation, got, left, want)
		}
	}
}

// Disks are named by where they hang, however the host lists them, and those
// that can't be protected say why.
func TestArrange(t *testing.T) {
	vmOf := func(device string) string { return "Microsoft:VM1" + `\` + device }
	device := func(id string, kind uint16, sub, parent, slot, address string) object {
		in := wsman.NewInstance("Msvm_ResourceAllocationSettingData").Set("InstanceID", wsman.Of(vmOf(id))).Set("ResourceType", wsman.Of(kind)).Set("ResourceSubType", wsman.Of(sub))
		if parent != "" {
			in.Set("Parent", wsman.Of(instance("Msvm_ResourceAllocationSettingData", vmOf(parent)).String())).Set("AddressOnParent", wsman.Of(slot))
		}
		if address != "" {
			in.Set("Address", wsman.Of(address))
		}
		return object{in}
	}
	disk := func(id, sub, parent, file string) object {
		return object{wsman.NewInstance("Msvm_StorageAllocationSettingData").Set("InstanceID", wsman.Of(vmOf(id))).Set("ResourceSubType", wsman.Of(sub)).
			Set("Parent", wsman.Of(instance("Msvm_ResourceAllocationSettingData", vmOf(parent)).String())).Set("HostResource", wsman.List(file))}
	}
	const drive = "Microsoft:Hyper-V:Synthetic Disk Drive"
	direct := device("b1", 17, subDirect, "b", "1", "")
	direct.Set("HostResource", wsman.List(`\\HV01\root\virtualization\v2:Msvm_DiskDrive.DeviceID="1"`))
	shared := disk("a2L", subDisk, "a2", `C:\q.vhdx`)
	shared.Set("PersistentReservationsSupported", wsman.Of(true))
	list := arrange([]object{
		disk("b0L", subDisk, "b0", `C:\b0.vhdx`), disk("a10L", subDisk, "a10", `C:\a10.VHD`), shared, disk("i0L", subDisk, "i0", `C:\i0.avhdx`),
		disk("dvd", "Microsoft:Hyper-V:Virtual CD/DVD Disk", "a9", `C:\x.iso`), disk("a3L", subDisk, "a3", `C:\set.vhds`), disk("a4L", subDisk, "a4", `C:\odd.img`),
	}, []object{
		device("b", typeSCSI, "", "", "", ""), device("a", typeSCSI, "", "", "", ""), device("i", typeIDE, "", "", "", "1"),
		device("b0", 17, drive, "b", "0", ""), direct, device("a10", 17, drive, "a", "10", ""), device("a2", 17, drive, "a", "2", ""),
		device("a3", 17, drive, "a", "3", ""), device("a4", 17, drive, "a", "4", ""), device("a9", 16, "", "a", "9", ""), device("i0", 17, drive, "i", "0", ""),
	})
	want := []struct {
		id       vm.DiskID
		format   string
		excluded string
	}{
		{"ide1:0", "vhdx", ""}, {"scsi0:2", "vhdx", reasonShared}, {"scsi0:3", "vhdx", reasonSet}, {"scsi0:4", "", reasonFormat},
		{"scsi0:10", "vhd", ""}, {"scsi1:0", "vhdx", ""}, {"scsi1:1", "raw", reasonDirect},
	}
	if len(list) != len(want) {
		t.Fatalf("%d disks: %+v", len(list), list)
	}
	for i, w := range want {
		if d := list[i]; d.ID != w.id || d.Format != w.format || d.Excluded != w.excluded {
			t.Errorf("disk %d is %s, %q, %q; want %+v", i, d.ID, d.Format, d.Excluded, w)
		}
	}
}
