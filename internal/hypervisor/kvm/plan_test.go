package kvm

import (
	"errors"
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

func TestParseSource(t *testing.T) {
	for source, want := range map[string][2]string{
		"kvm:///system":                         {"kvm:///system", ""},
		"kvm:///system/web01":                   {"kvm:///system", "web01"},
		"kvm:///system/a%2Fb":                   {"kvm:///system", "a/b"},
		"kvm:///system/100%25":                  {"kvm:///system", "100%"},
		"kvm:///session/web01?socket=/run/s":    {"kvm:///session?socket=/run/s", "web01"},
		"kvm+ssh://root@host:2222/system/web01": {"kvm+ssh://root@host:2222/system", "web01"},
	} {
		uri, name, err := ParseSource(source)
		if err != nil || uri.String() != want[0] || name != want[1] {
			t.Errorf("%s: %v, %q, %v", source, uri, name, err)
		}
	}
	for _, source := range []string{"hyperv://host/web01", "kvm:///", "kvm:///other/web01", "kvm:///system/a/b", "kvm+ssh://me:secret@host/system/web01", "web01"} {
		_, _, err := ParseSource(source)
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", source, err)
		}
	}
}

// Every way in which a bitmap can't be believed leads to a full read, and
// says so.
func TestDecide(t *testing.T) {
	const domain, prefix = "dom-1", "backstay-aaaaaaaa-"
	files := []string{"/i/a", "/i/base"}
	good := changeID{1, domain, "vda", prefix + "cp1", files}
	healthy := diskFacts{id: "vda", files: files, size: 100, format: "qcow2", bitmap: bitmapHealthy}
	with := func(edit func(*diskFacts)) diskFacts {
		f := healthy
		edit(&f)
		return f
	}
	prev := func(size int64, id string) map[vm.DiskID]hypervisor.PreviousDisk {
		return map[vm.DiskID]hypervisor.PreviousDisk{"vda": {SizeBytes: size, ChangeID: id}}
	}
	for name, c := range map[string]struct {
		facts  diskFacts
		prev   map[vm.DiskID]hypervisor.PreviousDisk
		mode   point.Mode
		reason string
	}{
		"first backup":       {healthy, nil, point.Full, reasonFirst},
		"first of a raw one": {with(func(f *diskFacts) { f.format = "raw" }), nil, point.Full, reasonFirst},
		"new disk":           {with(func(f *diskFacts) { f.id = "vdb" }), prev(100, good.String()), point.Full, reasonNewDisk},
		"healthy":            {healthy, prev(100, good.String()), point.Incremental, ""},
		"grown":              {healthy, prev(60, good.String()), point.Incremental, ""},
		"shrunk":             {healthy, prev(101, good.String()), point.Full, lost + "the disk shrank from 101 to 100 bytes"},
		"raw":                {with(func(f *diskFacts) { f.format = "raw" }), prev(100, ""), point.Compared, reasonRaw},
		"vmdk":               {with(func(f *diskFacts) { f.format = "vmdk" }), prev(100, ""), point.Compared, "vmdk disks keep no bitmaps: everything is read and compared"},
		"old qcow2":          {with(func(f *diskFacts) { f.oldQcow2 = true }), prev(100, ""), point.Compared, reasonOldQcow2},
		"read-only":          {with(func(f *diskFacts) { f.readOnly = true }), prev(100, ""), point.Compared, reasonReadOnly},
		"never tracked":      {healthy, prev(100, ""), point.Full, reasonNoTracking},
		"unreadable id":      {healthy, prev(100, "{"), point.Full, lost + "the previous point's change id can't be read"},
		"newer id":           {healthy, prev(100, `{"v":2,"checkpoint":"x"}`), point.Full, lost + "the previous point's change id can't be read"},
		"another VM":         {healthy, prev(100, changeID{1, "dom-2", "vda", good.Checkpoint, files}.String()), point.Full, lost + "the previous point is of another VM of that name"},
		"another disk":       {healthy, prev(100, changeID{1, domain, "vdb", good.Checkpoint, files}.String()), point.Full, lost + "the previous point is of disk vdb"},
		"another repository": {healthy, prev(100, changeID{1, domain, "vda", "backstay-bbbbbbbb-cp1", files}.String()), point.Full, lost + "the previous checkpoint is another repository's"},
		"checkpoint gone":    {healthy, prev(100, changeID{1, domain, "vda", prefix + "cp2", files}.String()), point.Full, lost + "libvirt no longer has the checkpoint"},
		"swapped":            {with(func(f *diskFacts) { f.files = []string{"/i/b", "/i/base"} }), prev(100, good.String()), point.Full, lost + "the disk was replaced, it was in /i/a"},
		"snapshot":           {with(func(f *diskFacts) { f.files = []string{"/i/c", "/i/a", "/i/base"} }), prev(100, good.String()), point.Incremental, ""},
		"committed":          {with(func(f *diskFacts) { f.files = []string{"/i/base"} }), prev(100, good.String()), point.Incremental, ""},
		"pulled":             {with(func(f *diskFacts) { f.files = []string{"/i/a"} }), prev(100, good.String()), point.Incremental, ""},
		"id without files":   {healthy, prev(100, changeID{1, domain, "vda", good.Checkpoint, nil}.String()), point.Full, lost + "the previous point does not say in which files the disk was"},
		"bitmap gone":        {with(func(f *diskFacts) { f.bitmap = bitmapMissing }), prev(100, good.String()), point.Full, lost + "the bitmap is missing from the disk"},
		"bitmap broken":      {with(func(f *diskFacts) { f.bitmap = bitmapInconsistent }), prev(100, good.String()), point.Full, lost + "the bitmap is inconsistent, because QEMU or the host went down"},
		"bitmap off":         {with(func(f *diskFacts) { f.bitmap = bitmapDisabled }), prev(100, good.String()), point.Full, lost + "the bitmap was not recording"},
	} {
		d := decide(c.facts, domain, prefix, c.prev, map[string]bool{prefix + "cp1": true})
		if d.mode != c.mode || d.reason != c.reason {
			t.Errorf("%s: %s (%s), want %s (%s)", name, d.mode, d.reason, c.mode, c.reason)
		}
		if (d.mode == point.Incremental) != (d.base != "") {
			t.Errorf("%s: base %q", name, d.base)
		}
	}
}

func TestBitmapState(t *testing.T) {
	layer := func(bits ...bitmap) node { return node{Bitmaps: bits} }
	fine := bitmap{Name: "cp", Recording: true, Persistent: true}
	for name, c := range map[string]struct {
		top, below node
		want       tracking
	}{
		"healthy":                      {layer(fine), layer(), bitmapHealthy},
		"none":                         {layer(), layer(), bitmapMissing},
		"other names":                  {layer(bitmap{Name: "cp2", Recording: true, Persistent: true}), layer(), bitmapMissing},
		"only below":                   {layer(), layer(fine), bitmapMissing},
		"in both layers":               {layer(fine), layer(bitmap{Name: "cp", Persistent: true}), bitmapHealthy},
		"broken":                       {layer(bitmap{Name: "cp", Persistent: true, Inconsistent: true}), layer(), bitmapInconsistent},
		"broken below":                 {layer(fine), layer(bitmap{Name: "cp", Persistent: true, Inconsistent: true}), bitmapInconsistent},
		"not recording":                {layer(bitmap{Name: "cp", Persistent: true}), layer(), bitmapDisabled},
		"would not survive a shutdown": {layer(bitmap{Name: "cp", Recording: true}), layer(), bitmapDisabled},
	} {
		nodes := map[string]node{"libvirt-2-format": c.top, "libvirt-1-format": c.below}
		if got := bitmapState(nodes, []string{"libvirt-2-format", "libvirt-1-format"}, "cp"); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	if got := bitmapState(nil, nil, "cp"); got != bitmapMissing {
		t.Errorf("a disk without nodes: %d", got)
	}
}

func TestAgentArgs(t *testing.T) {
	for line, want := range map[string]struct {
		hook   bool
		config string
	}{
		"/usr/sbin/qemu-ga":                               {false, "/etc/qemu/qemu-ga.conf"},
		"qemu-ga -F":                                      {true, ""},
		"qemu-ga -F/etc/qemu/fsfreeze-hook":               {true, ""},
		"qemu-ga -m virtio-serial -p /dev/F -t /F -d":     {false, "/etc/qemu/qemu-ga.conf"},
		"qemu-ga -dvF":                                    {true, ""},
		"qemu-ga -dp /dev/x -F":                           {true, ""},
		"qemu-ga --fsfreeze-hook=/x --method=isa-serial":  {true, ""},
		"qemu-ga --method=virtio-serial --config=/F.conf": {false, "/F.conf"},
		"qemu-ga -c /x.conf":                              {false, "/x.conf"},
		"qemu-ga -c/x.conf":                               {false, "/x.conf"},
		"":                                                {false, "/etc/qemu/qemu-ga.conf"},
	} {
		hook, config := agentArgs(strings.Split(line, " "))
		if hook != want.hook || !hook && config != want.config {
			t.Errorf("%q: hook %v, config %q", line, hook, config)
		}
	}
	if !configHasHook("[general]\nfsfreeze-hook = /etc/qemu/hook\n") || configHasHook("[general]\nfsfreeze-hook=\n#fsfreeze-hook=/x\nmethod=virtio-serial") {
		t.Error("qemu-ga.conf is misread")
	}
}

const manyDisks = `<domain type='kvm' id='3'><name>old</name><uuid>11111111-2222-3333-4444-555555555555</uuid><memory>1048576</memory>
<genid>11111111-2222-3333-4444-555555555556</genid>
<sysinfo type='smbios'><system><entry name='uuid'>11111111-2222-3333-4444-555555555555</entry><entry name='serial'>S1</entry></system></sysinfo>
<os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram template='/t'>/var/lib/libvirt/qemu/nvram/old_VARS.fd</nvram></os>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/i/a.qcow2' index='4'/><backingStore type='file' index='2'><format type='qcow2'/><source file='/i/base.qcow2'/></backingStore><target dev='vda' bus='virtio'/><serial>A1</serial></disk>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/b'/><target dev='vdb' bus='virtio'/></disk>
<disk type='block' device='lun'><driver name='qemu' type='raw'/><source dev='/dev/sdx'/><target dev='sda' bus='scsi'/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd' name='pool/x'/><target dev='vdc' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/i/ro.raw'/><target dev='vdd' bus='virtio'/><readonly/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/t.qcow2'/><target dev='vde' bus='virtio'/><transient/></disk>
<disk type='file' device='disk'><source file='/i/unsaid'/><target dev='vdf' bus='virtio'/></disk>
<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='default' volume='v.qcow2'/><target dev='vdg' bus='virtio'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/i/cd.iso'/><target dev='hda' bus='sata'/><readonly/></disk>
<disk type='file' device='cdrom'><target dev='hdb' bus='sata'/><readonly/></disk>
<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host0'/><address bus='0' target='0' unit='0'/></source><alias name='ua-tape'/></hostdev>
<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/><target dev='vnet3'/></interface>
<channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/3-old/agent'/><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
</devices>
<seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+107</label></seclabel></domain>`

func TestDisksNotProtectedSayWhy(t *testing.T) {
	var x libvirtxml.Domain
	if err := x.Unmarshal(manyDisks); err != nil {
		t.Fatal(err)
	}
	want := map[vm.DiskID]string{"vda": "", "vdb": "", "sda": "SCSI pass-through", "vdc": "network disk (rbd)", "vdd": "",
		"vde": "transient", "vdf": "", "vdg": "excluded by request", "hda": "CD-ROM", "ua-tape": "SCSI pass-through"}
	for _, d := range disks(&x, []vm.DiskID{"vdg"}) {
		w, ok := want[d.ID]
		if delete(want, d.ID); !ok || !strings.HasPrefix(d.Excluded, w) || (w == "") != (d.Excluded == "") {
			t.Errorf("disk %s: %q", d.ID, d.Excluded)
		}
		switch d.ID {
		case "vda":
			if len(d.layers) != 2 || d.layers[0] != "libvirt-4-format" || d.layers[1] != "libvirt-2-format" {
				t.Errorf("layers %v", d.layers)
			}
			if f := d.files(); len(f) != 2 || f[0] != "/i/a.qcow2" || f[1] != "/i/base.qcow2" {
				t.Errorf("files %v", f)
			}
		case "vdf":
			if d.Format != "raw" {
				t.Errorf("a disk without a format was taken for %s", d.Format)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("not listed: %v", want)
	}
	if uid, gid := qemuOwner(&x); uid != 64055 || gid != 107 {
		t.Errorf("owner %d:%d", uid, gid)
	}
}

func TestRedefine(t *testing.T) {
	o := DefineOptions{Name: "new", DomainXML: []byte(manyDisks), Disks: map[vm.DiskID]string{"vda": "/r/vda.raw", "vdb": "/r/vdb.qcow2"},
		DiskFormats: map[vm.DiskID]string{"vda": "raw", "vdb": "qcow2"}}
	x, dropped, err := redefine(o, "/r/new_VARS.fd")
	if err != nil {
		t.Fatal(err)
	}
	text, err := x.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{"old", "5555", "52:54", "vnet3", "/i/", "backingStore", "hostdev", "rbd", "/dev/", "64055", " id=", "index="} {
		if strings.Contains(text, gone) {
			t.Errorf("%q is still there:\n%s", gone, text)
		}
	}
	for _, kept := range []string{"<name>new</name>", `file="/r/vda.raw"`, `file="/r/vdb.qcow2"`, `type="qcow2"`, "/r/new_VARS.fd", "<serial>A1</serial>",
		`cache="none"`, "org.qemu.guest_agent.0", `network="default"`, "S1", x.UUID} {
		if !strings.Contains(text, kept) {
			t.Errorf("%q is missing:\n%s", kept, text)
		}
	}
	if len(dropped) != 9 || !strings.Contains(strings.Join(dropped, "\n"), "TPM holds") {
		t.Errorf("dropped %d: %q", len(dropped), dropped)
	}
	o.KeepMACs = true
	if x, _, err = redefine(o, ""); err != nil || x.Devices.Interfaces[0].MAC == nil || x.Devices.Interfaces[0].MAC.Address != "52:54:00:00:00:01" {
		t.Errorf("the MAC address was to be kept: %v", err)
	}
	o.Disks["vdz"] = "/r/z"
	if _, _, err = redefine(o, ""); err == nil || !strings.Contains(err.Error(), "vdz") {
		t.Errorf("a disk that the definition lacks: %v", err)
	}
	o.DomainXML = []byte("<domain><name>")
	if _, _, err = redefine(o, ""); err == nil {
		t.Error("half a definition was taken for one")
	}
}

func TestNeutral(t *testing.T) {
	x, told, err := neutral(DefineOptions{Name: "n", Disks: map[vm.DiskID]string{"os.vhdx": "/r/os", "a.vmdk": "/r/a"},
		Machine: &vm.Machine{Disks: []vm.Disk{{ID: "os.vhdx", Bus: "virtio"}, {ID: "cd"}, {ID: "a.vmdk", Bus: "ide"}}}}, platform{virt: "qemu"}, "")
	if err != nil || len(told.Notes) != 1 || !strings.Contains(told.Notes[0], "does not describe the VM") {
		t.Fatalf("%+v, %v", told, err)
	}
	d := x.Devices.Disks
	if len(d) != 2 || d[0].Source.File.File != "/r/os" || d[0].Target.Dev != "vda" || d[1].Target.Dev != "sda" || d[1].Target.Bus != "sata" {
		t.Errorf("disks %+v", d)
	}
	for n, want := range map[int]string{0: "a", 25: "z", 26: "aa", 27: "ab", 701: "zz", 702: "aaa"} {
		if got := letters(n); got != want {
			t.Errorf("letters(%d) = %s", n, got)
		}
	}
}

func TestCheckpointPrefix(t *testing.T) {
	if p, err := checkpointPrefix("0123456789abcdef"); err != nil || p != "backstay-01234567-" {
		t.Errorf("%q, %v", p, err)
	}
	for _, bad := range []string{"", "0123456", "../../..", "0123 567"} {
		if _, err := checkpointPrefix(bad); !errors.Is(err, fault.ErrUnsupported) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestUUID(t *testing.T) {
	for range 10 {
		want := newUUID()
		if u, err := parseUUID(want); err != nil || formatUUID(u) != want {
			t.Errorf("%s: %x, %v", want, u, err)
		}
	}
	for _, bad := range []string{"", "web01", "11111111-2222-3333-4444-5555555555", "11111111-2222-3333-4444-55555555555g", strings.Repeat("1", 36)} {
		if _, err := parseUUID(bad); err == nil {
			t.Errorf("%q was taken for a UUID", bad)
		}
	}
}
