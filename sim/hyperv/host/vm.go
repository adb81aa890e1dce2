package host

import (
	"cmp"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// What EnabledState says of a VM.
const (
	stateRunning = 2
	stateOff     = 3
	stateSaved   = 6
	statePaused  = 9
)

// Kinds of settings.
const (
	realized = "Microsoft:Hyper-V:System:Realized"
	recovery = "Microsoft:Hyper-V:Snapshot:Recovery"
	userMade = "Microsoft:Hyper-V:Snapshot:Realized"

	systemPlanned   = "Microsoft:Hyper-V:System:Planned"
	snapshotPlanned = "Microsoft:Hyper-V:Snapshot:Planned"
	snapshotMissing = "Microsoft:Hyper-V:Snapshot:Missing"
)

// A Spec says what VM to make.
type Spec struct {
	Name    string
	ID      string // a GUID; new if empty
	Version string // of the configuration: "10.0"
	Off     bool
	NoVSS   bool   // the guest has no backup service; SetGuest says more
	Linux   bool   // the guest is not Windows
	IDE     bool   // generation 1, the first disk on IDE
	Root    string // the folder of all its files; "C:\VMs\" and its name if empty
	Disks   []DiskSpec
	// PassThrough is how many disks of the host the VM has for itself.
	PassThrough int
	// Fibre gives the VM a Fibre Channel adapter.
	Fibre bool
}

// A DiskSpec says what disk to make.
type DiskSpec struct {
	Path  string // "C:\VMs\web01\web01.vhdx"; made of the VM's name if empty
	Bytes int64
	Fixed bool
	// SectorBytes is that of the guest's sectors, 512 or 4096; 0 for 512.
	SectorBytes int
	// Set makes a VHD set, which only says whose disk it is.
	Set bool
	// Exists says that the file is there already, a VHDX without a parent. Of
	// what it holds Expected knows nothing.
	Exists bool
}

// userSnapshotTest is the UserSnapshotType of checkpoints with the guest's memory.
const userSnapshotTest = 5

// maxSnapshots is how many checkpoints a VM may have, as the product's limits say.
const maxSnapshots = 50

// A vm is a virtual machine, or a planned one.
type vm struct {
	id, name  string
	version   string
	planned   bool
	from      string // the definition file that a planned one was imported from
	state     int
	guest     Guest
	requests  []Request
	applied   string    // the id of the checkpoint that was applied last
	changed   cim.Value // when state last did
	config    *config
	snapshots []*snapshot
	points    []*point
	list      []*disk
	busy      *job
	// moments are where each disk's log was at each checkpoint or reference
	// point that ever was.
	moments map[string]map[string]int
}

// A config is a VM's settings and what hangs on them.
type config struct {
	id    string // of the settings, without "Microsoft:"
	vssd  *cim.Instance
	parts []*cim.Instance
}

// A snapshot is a checkpoint.
type snapshot struct {
	config  *config
	kind    string
	origin  string                       // the id that a planned one had before
	frozen  map[string]*layer            // by disk
	rct     map[string]string            // the id that begins here, by disk
	changes map[string]map[string]*track // by disk and RCT id, up to here
	level   uint64                       // of consistency
}

// A point is a reference point.
type point struct {
	id    string
	level uint64
	disks []string // InstanceIDs of allocations
	rct   []string
	// of is the disk of each id.
	of []*disk
}

func (v *vm) disks() []*disk { return v.list }

func (v *vm) ref() cim.Ref {
	class := "Msvm_ComputerSystem"
	if v.planned {
		class = "Msvm_PlannedComputerSystem"
	}
	return cim.Ref{Namespace: cim.Virtualization, Class: class, Keys: map[string]string{"CreationClassName": class, "Name": v.id}}
}

// tracks says whether the VM's configuration is new enough for change tracking.
func (v *vm) tracks() bool {
	n, err := strconv.ParseFloat(v.version, 64)
	return err == nil && n >= 6.2
}

func settingsRef(id string) cim.Ref {
	return cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_VirtualSystemSettingData", Keys: map[string]string{"InstanceID": "Microsoft:" + id}}
}

// newConfig makes the settings of a VM whose files are in root.
func (h *Host) newConfig(v *vm, generation int, root string) *config {
	vssd := cim.New(cim.Virtualization, "Msvm_VirtualSystemSettingData")
	for name, value := range map[string]string{
		"InstanceID": "Microsoft:" + v.id, "ElementName": v.name, "VirtualSystemIdentifier": v.id, "ConfigurationID": v.id, "VirtualSystemType": realized,
		"VirtualSystemSubType": fmt.Sprintf("Microsoft:Hyper-V:SubType:%d", generation), "Version": v.version,
		"ConfigurationDataRoot": root, "ConfigurationFile": `Virtual Machines\` + v.id + ".vmcx", "SnapshotDataRoot": root, "SuspendDataRoot": root, "SwapFileDataRoot": root, "LogDataRoot": root,
		"GuestStateDataRoot": root, "GuestStateFile": `Virtual Machines\` + v.id + ".vmgs",
		"IncrementalBackupEnabled": strconv.FormatBool(v.tracks()), "SecureBootEnabled": strconv.FormatBool(generation == 2), "UserSnapshotType": "3", "AutomaticStartupAction": "4", "AutomaticShutdownAction": "3",
	} {
		vssd.Put(name, cim.Text(value))
	}
	if generation == 1 {
		vssd.Put("BootOrder", cim.List("1", "2", "3", "0"))
	}
	return &config{id: v.id, vssd: vssd.Put("CreationTime", h.stamp()).Put("Notes", cim.List())}
}

// part adds a resource to c, with a new id or that of its slot.
func (c *config) part(class, suffix, resourceType, subtype string) *cim.Instance {
	i := cim.New(cim.Virtualization, class).Put("InstanceID", cim.Text("Microsoft:"+c.id+`\`+suffix)).Put("ResourceType", cim.Text(resourceType))
	if subtype != "" {
		i.Put("ResourceSubType", cim.Text(subtype))
	}
	c.parts = append(c.parts, i)
	return i
}

// AddVM makes a VM with its files, and gives its GUID.
func (h *Host) AddVM(s Spec) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := &vm{id: strings.ToUpper(s.ID), name: s.Name, version: s.Version, state: stateRunning, guest: guestOf(s), changed: h.stamp(), moments: map[string]map[string]int{}}
	if v.id == "" {
		v.id = newGUID()
	}
	if v.version == "" {
		v.version = "10.0"
	}
	if s.Off {
		v.state = stateOff
	}
	generation, controller := 2, "scsi"
	if s.IDE {
		generation, controller = 1, "ide"
	}
	c := h.newConfig(v, generation, cmp.Or(s.Root, `C:\VMs\`+v.name))
	v.config = c
	c.part("Msvm_MemorySettingData", "4764334d-e001-4176-82ee-5594ec9b530e", "4", "Microsoft:Hyper-V:Memory").Put("VirtualQuantity", cim.Text("1024")).Put("AllocationUnits", cim.Text("byte * 2^20"))
	c.part("Msvm_ProcessorSettingData", "b637f346-6a0e-4dec-af52-bd70cb80a21d", "3", "Microsoft:Hyper-V:Processor").Put("VirtualQuantity", cim.Text("2"))
	c.services()
	nic := c.part("Msvm_SyntheticEthernetPortSettingData", newGUID(), "10", "Microsoft:Hyper-V:Synthetic Ethernet Port").Put("ElementName", cim.Text("Network Adapter")).Put("Address", cim.Text("00155D010203"))
	_, nicID, _ := strings.Cut(nic.Get("InstanceID").String(), `\`)
	c.part("Msvm_EthernetPortAllocationSettingData", nicID+`\C`, "33", "Microsoft:Hyper-V:Ethernet Connection").Put("Parent", cim.Text(nic.Ref().Path())).Put("EnabledState", cim.Text("2")).
		Put("HostResource", cim.List(h.switches[0].instance().Ref().Path())).Put("LastKnownSwitchName", cim.Text(h.switches[0].name))
	if s.Fibre {
		c.part("Msvm_SyntheticFcPortSettingData", newGUID(), "7", "Microsoft:Hyper-V:Synthetic FibreChannel Port").Put("VirtualPortWWPN", cim.Text("C003FF0000000000"))
	}
	controllers := map[string]*cim.Instance{}
	if s.IDE {
		c.ide()
		controllers["ide"] = c.parts[len(c.parts)-2]
	}
	for n, d := range s.Disks {
		slot := n
		if controllers[controller] == nil {
			controllers[controller] = c.part("Msvm_ResourceAllocationSettingData", newGUID()+`\0`, "6", "Microsoft:Hyper-V:Synthetic SCSI Controller")
		}
		parent := controllers[controller]
		_, base, _ := strings.Cut(parent.Get("InstanceID").String(), `\`)
		base += fmt.Sprintf(`\%d`, slot)
		if controller == "ide" {
			controller = "scsi" // only the first disk
		}
		drive := c.part("Msvm_ResourceAllocationSettingData", base+`\D`, "17", "Microsoft:Hyper-V:Synthetic Disk Drive").Put("Parent", cim.Text(parent.Ref().Path())).Put("AddressOnParent", cim.Text(fmt.Sprint(slot)))
		path := d.Path
		if path == "" {
			path = fmt.Sprintf(`%s\Virtual Hard Disks\%s-%d.vhdx`, c.vssd.Get("ConfigurationDataRoot").String(), s.Name, n)
			if d.Set {
				path = strings.TrimSuffix(path, "x") + "s"
			}
		}
		allocation := c.part("Msvm_StorageAllocationSettingData", base+`\L`, "31", subDisk).Put("Parent", cim.Text(drive.Ref().Path())).Put("HostResource", cim.List(path))
		if d.Set {
			allocation.Put("PersistentReservationsSupported", cim.Bool(true))
			if err := h.createSet(path, d.Bytes); err != nil {
				return "", err
			}
			continue
		}
		if !d.Exists {
			if err := h.createDisk(path, d.Bytes, d.Fixed, d.SectorBytes); err != nil {
				return "", err
			}
		}
		disk, err := h.openDisk(base+`\L`, path)
		if err != nil {
			return "", err
		}
		v.list = append(v.list, disk)
	}
	for n := range s.PassThrough {
		slot := len(s.Disks) + n
		if controllers[controller] == nil {
			controllers[controller] = c.part("Msvm_ResourceAllocationSettingData", newGUID()+`\0`, "6", "Microsoft:Hyper-V:Synthetic SCSI Controller")
		}
		parent := controllers[controller]
		_, base, _ := strings.Cut(parent.Get("InstanceID").String(), `\`)
		c.part("Msvm_ResourceAllocationSettingData", fmt.Sprintf(`%s\%d\D`, base, slot), "17", subDirect).Put("Parent", cim.Text(parent.Ref().Path())).Put("AddressOnParent", cim.Number(slot)).
			Put("HostResource", cim.List(fmt.Sprintf(`\\%s\root\virtualization\v2:Msvm_DiskDrive.CreationClassName="Msvm_DiskDrive",DeviceID="Microsoft:%s\\%d",SystemCreationClassName="Msvm_ComputerSystem",SystemName="%s"`, h.o.Name, newGUID(), n, h.o.Name)))
	}
	h.vms = append(h.vms, v)
	return v.id, h.writeFiles(c)
}

// copy makes a checkpoint's settings of c, with another id everywhere.
func (c *config) copy(id string) *config {
	rename := func(i *cim.Instance) *cim.Instance {
		i = i.Clone()
		for _, name := range []string{"InstanceID", "Parent", "BootSourceOrder"} {
			v := i.Get(name)
			if !v.Set {
				continue
			}
			items := make([]string, len(v.Items))
			for n, text := range v.Items {
				items[n] = strings.ReplaceAll(text, "Microsoft:"+c.id, "Microsoft:"+id)
			}
			i.Put(name, cim.List(items...))
		}
		return i
	}
	out := &config{id: id, vssd: rename(c.vssd)}
	for _, p := range c.parts {
		out.parts = append(out.parts, rename(p))
	}
	return out
}

// point the allocations of c at the files that its disks have.
func (c *config) place(files map[string]*layer) {
	for _, p := range c.parts {
		_, suffix, _ := strings.Cut(p.Get("InstanceID").String(), `\`)
		if l := files[suffix]; l != nil {
			p.Put("HostResource", cim.List(l.path))
		}
	}
}

// placeAll follows what was frozen and merged.
func (v *vm) placeAll() {
	tops := map[string]*layer{}
	for _, d := range v.list {
		tops[d.id] = d.top()
	}
	v.config.place(tops)
	for _, s := range v.snapshots {
		s.config.place(s.frozen)
	}
}

func (v *vm) remember(moment string) {
	at := map[string]int{}
	for _, d := range v.list {
		at[d.id] = len(d.log)
	}
	v.moments[moment] = at
}

func (v *vm) sameMoment(moment, as string) { v.moments[moment] = maps.Clone(v.moments[as]) }

// configOf finds settings by their InstanceID.
func (h *Host) configOf(id string) (*vm, *config, *snapshot) {
	id = strings.TrimPrefix(id, "Microsoft:")
	for _, v := range h.vms {
		if strings.EqualFold(v.config.id, id) {
			return v, v.config, nil
		}
		for _, s := range v.snapshots {
			if strings.EqualFold(s.config.id, id) {
				return v, s.config, s
			}
		}
	}
	return nil, nil, nil
}
