package host

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// changeable are the properties of each class of resources that
// ModifyResourceSettings takes; others it accepts and ignores.
var changeable = map[string][]string{
	"Msvm_StorageAllocationSettingData":      {"HostResource", "ElementName", "PersistentReservationsSupported", "IOPSLimit", "IOPSReservation", "StorageQoSPolicyID", "CachingMode", "WriteHardeningMethod", "IgnoreFlushes"},
	"Msvm_ResourceAllocationSettingData":     {"HostResource", "ElementName", "VirtualSystemIdentifiers"},
	"Msvm_MemorySettingData":                 {"VirtualQuantity", "Reservation", "Limit", "Weight", "DynamicMemoryEnabled", "TargetMemoryBuffer", "MaxMemoryBlocksPerNumaNode"},
	"Msvm_ProcessorSettingData":              {"VirtualQuantity", "Reservation", "Limit", "Weight", "LimitCPUID", "LimitProcessorFeatures", "HwThreadsPerCore", "MaxProcessorsPerNumaNode", "MaxNumaNodesPerSocket", "EnableHostResourceProtection", "ExposeVirtualizationExtensions"},
	"Msvm_SyntheticEthernetPortSettingData":  {"Address", "StaticMacAddress", "ElementName", "VirtualSystemIdentifiers", "DeviceNamingEnabled", "ClusterMonitored", "AllowPacketDirect"},
	"Msvm_EmulatedEthernetPortSettingData":   {"Address", "StaticMacAddress", "ElementName", "ClusterMonitored"},
	"Msvm_EthernetPortAllocationSettingData": {"HostResource", "EnabledState", "PoolID", "RequiredFeatures", "TestReplicaPoolID", "TestReplicaSwitchName", "CompartmentGuid"},
	"Msvm_VssComponentSettingData":           {"EnabledState"},
	"Msvm_ShutdownComponentSettingData":      {"EnabledState"},
	"Msvm_KvpExchangeComponentSettingData":   {"EnabledState", "DisableHostKVPItems"},
}

// Bounds of what hangs on controllers.
const (
	ideSlots        = 2
	scsiSlots       = 64
	scsiControllers = 4
)

// idePrefix begins the device id of the two IDE controllers that every VM of
// generation 1 has.
const idePrefix = "83F8638B-8DCA-4152-9EDA-2CA8B33039B4"

// ide adds the IDE controllers.
func (c *config) ide() {
	for n := range 2 {
		c.part("Msvm_ResourceAllocationSettingData", fmt.Sprintf(`%s\%d`, idePrefix, n), "5", "Microsoft:Hyper-V:Emulated IDE Controller").Put("Address", cim.Number(n))
	}
}

// find is the resource of that path or reference.
func (c *config) find(ref cim.Ref) *cim.Instance {
	at := slices.IndexFunc(c.parts, func(i *cim.Instance) bool { return i.Ref().Equal(ref) })
	if at < 0 {
		return nil
	}
	return c.parts[at]
}

// add is VSMS.AddResourceSettings.
func (h *Host) add(args results) (results, uint32) {
	v, c, snap := (*vm)(nil), (*config)(nil), (*snapshot)(nil)
	if ref := args["AffectedConfiguration"].Ref; ref != nil {
		v, c, snap = h.configOf(ref.Keys["InstanceID"])
	}
	if v == nil || snap != nil {
		return nil, codeParameter
	}
	var list []*cim.Instance
	for _, text := range args["ResourceSettings"].Items {
		s, code := parseSettings(text, "CIM_ResourceAllocationSettingData")
		if s == nil {
			return nil, code
		}
		if p := s.Get("Parent"); p.Set && p.String() != "" {
			ref, err := cim.ParsePath(p.String(), cim.Virtualization)
			if err != nil || c.find(ref) == nil {
				return nil, codeParameter
			}
		}
		list = append(list, s)
	}
	return h.start(v, "AddResourceSettings", func() ([]affected, error) {
		var rows []affected
		for _, s := range list {
			i, err := h.addPart(v, c, s)
			if err != nil {
				return nil, err
			}
			rows = append(rows, affected{i.Ref(), effectCreated})
		}
		return rows, h.written(v)
	})
}

// written writes the definition of a VM that changed.
func (h *Host) written(v *vm) error {
	if v.planned {
		return nil
	}
	return h.writeFiles(v.config)
}

func (h *Host) addPart(v *vm, c *config, s *cim.Instance) (*cim.Instance, error) {
	suffix, err := v.place(c, s)
	if err != nil {
		return nil, err
	}
	i := s.Clone()
	i.Put("InstanceID", cim.Text("Microsoft:"+c.id+`\`+suffix))
	if c.find(i.Ref()) != nil {
		return nil, errors.New("the slot is taken")
	}
	switch {
	case isHardDisk(i) && !v.planned:
		if err := h.usable(v, i); err != nil {
			return nil, err
		}
		if isSet(i.Get("HostResource").String()) {
			break
		}
		d, err := h.attach(suffix, i.Get("HostResource").String())
		if err != nil {
			return nil, err
		}
		v.list = append(v.list, d)
	case i.Class.Is("Msvm_EthernetPortAllocationSettingData") && !v.planned:
		if err := h.connect(i); err != nil {
			return nil, err
		}
	}
	c.parts = append(c.parts, i)
	return i, nil
}

// place is the device id of a new resource, or says why it can't be.
func (v *vm) place(c *config, s *cim.Instance) (string, error) {
	refuse := func(format string, args ...any) (string, error) {
		return "", fmt.Errorf("'%s' failed to add device '%s': %s", v.name, s.Get("ResourceSubType"), fmt.Sprintf(format, args...))
	}
	kind := s.Get("ResourceType").Uint()
	var parent *cim.Instance
	base := ""
	if ref, err := cim.ParsePath(s.Get("Parent").String(), cim.Virtualization); err == nil {
		if parent = c.find(ref); parent == nil {
			return refuse("its parent is not there")
		}
		_, base, _ = strings.Cut(parent.Get("InstanceID").String(), `\`)
	}
	fixed := func() error {
		if v.state != stateOff {
			return fmt.Errorf("'%s': the operation cannot be performed while the virtual machine is in its current state", v.name)
		}
		return nil
	}
	switch {
	case kind == 5:
		return refuse("a virtual machine has its two IDE controllers or none")
	case kind == 6:
		n := 0
		for _, p := range c.parts {
			if p.Get("ResourceType").Uint() == 6 {
				n++
			}
		}
		if n >= scsiControllers {
			return refuse("there are %d SCSI controllers", n)
		}
		if err := fixed(); err != nil {
			return "", err
		}
		return newGUID() + `\0`, nil
	case kind == 10 && s.Class.Is("Msvm_EmulatedEthernetPortSettingData") && c.generation() == 2:
		return refuse("generation 2 has no emulated devices")
	case kind == 10 && c.generation() == 1:
		if err := fixed(); err != nil {
			return "", err
		}
		return newGUID(), nil
	case kind == 10:
		return newGUID(), nil
	case kind == 17 || kind == 16: // a drive of a disk, of a DVD
		slot, slots := s.Get("AddressOnParent"), uint64(scsiSlots)
		if parent == nil || parent.Get("ResourceType").Uint() != 5 && parent.Get("ResourceType").Uint() != 6 {
			return refuse("its parent is no controller")
		}
		if parent.Get("ResourceType").Uint() == 5 {
			slots = ideSlots
			if err := fixed(); err != nil {
				return "", err
			}
		}
		if !slot.Set || slot.Uint() >= slots || slot.String() != fmt.Sprint(slot.Uint()) {
			return refuse("the controller has no slot '%s'", slot)
		}
		return base + `\` + slot.String() + `\D`, nil
	case kind == 31:
		want := map[string]uint64{subDisk: 17, subMedium: 16}[s.Get("ResourceSubType").String()]
		if parent == nil || want == 0 || parent.Get("ResourceType").Uint() != want {
			return refuse("its parent is no drive for it")
		}
		return strings.TrimSuffix(base, `\D`) + `\L`, nil
	case kind == 33:
		if parent == nil || parent.Get("ResourceType").Uint() != 10 {
			return refuse("its parent is no network adapter")
		}
		return base + `\C`, nil
	case kind == 3 || kind == 4:
		return refuse("there is one already")
	}
	return newGUID() + `\0`, nil
}

// owned reads what settings or paths of resources of one VM are about.
func (h *Host) owned(v *vm, id string) *vm {
	owner, _, _ := strings.Cut(id, `\`)
	m, c, _ := h.configOf(owner)
	if m == nil || c != m.config || v != nil && v != m {
		return nil
	}
	return m
}

// modify is VSMS.ModifyResourceSettings.
func (h *Host) modify(args results) (results, uint32) {
	var v *vm
	var list []*cim.Instance
	for _, text := range args["ResourceSettings"].Items {
		s, code := parseSettings(text, "CIM_ResourceAllocationSettingData")
		if s == nil {
			return nil, code
		}
		if v = h.owned(v, s.Get("InstanceID").String()); v == nil {
			return nil, codeParameter
		}
		list = append(list, s)
	}
	if v == nil {
		return nil, codeParameter
	}
	return h.start(v, "ModifyResourceSettings", func() ([]affected, error) {
		for _, s := range list {
			if err := h.modifyPart(v, s); err != nil {
				return nil, err
			}
		}
		return nil, h.written(v)
	})
}

func (h *Host) modifyPart(v *vm, s *cim.Instance) error {
	p := v.config.find(s.Ref())
	if p == nil {
		return fmt.Errorf("no resource %s", s.Get("InstanceID"))
	}
	next := p.Clone()
	for _, name := range changeable[p.Class.Name] {
		if value := s.Get(name); value.Set && !(h.trouble.KeepAddresses && name == "Address") {
			next.Put(name, value)
		}
	}
	changed := func(name string) bool { return !slices.Equal(next.Get(name).Items, p.Get(name).Items) }
	switch {
	case v.planned:
	case isHardDisk(p) && changed("HostResource"):
		if err := h.swapDisk(v, next); err != nil {
			return err
		}
	case p.Class.Is("Msvm_EthernetPortAllocationSettingData"):
		if err := h.connect(next); err != nil {
			return err
		}
	case p.Class.Is("Msvm_ProcessorSettingData") && changed("VirtualQuantity"), p.Class.Is("Msvm_MemorySettingData") && changed("DynamicMemoryEnabled"),
		p.Class.Is("Msvm_SyntheticEthernetPortSettingData") && changed("Address"):
		if v.state != stateOff {
			return fmt.Errorf("'%s': the operation cannot be performed while the virtual machine is in its current state", v.name)
		}
	}
	*p = *next
	return nil
}

// swapDisk puts another file in a drive's place. Who tracked changes of the one
// that was there has lost them.
func (h *Host) swapDisk(v *vm, p *cim.Instance) error {
	switch {
	case v.state != stateOff:
		return fmt.Errorf("'%s': the operation cannot be performed while the virtual machine is in its current state", v.name)
	case len(v.snapshots) > 0:
		return fmt.Errorf("'%s': the disks of a virtual machine that has checkpoints cannot be changed", v.name)
	}
	if err := h.usable(v, p); err != nil {
		return err
	}
	_, suffix, _ := strings.Cut(p.Get("InstanceID").String(), `\`)
	d, err := h.attach(suffix, p.Get("HostResource").String())
	if err != nil {
		return err
	}
	for n, old := range v.list {
		if strings.EqualFold(old.id, suffix) {
			_ = h.detach(old) // it is given up
			v.list[n] = d
			return nil
		}
	}
	v.list = append(v.list, d)
	return nil
}

// remove is VSMS.RemoveResourceSettings. What hangs on a resource goes with it.
func (h *Host) remove(args results) (results, uint32) {
	var v *vm
	var refs []cim.Ref
	for _, path := range args["ResourceSettings"].Items {
		ref, err := cim.ParsePath(path, cim.Virtualization)
		if err != nil {
			return nil, codeParameter
		}
		if v = h.owned(v, ref.Keys["InstanceID"]); v == nil {
			return nil, codeParameter
		}
		refs = append(refs, ref)
	}
	if v == nil {
		return nil, codeParameter
	}
	return h.start(v, "RemoveResourceSettings", func() ([]affected, error) {
		for _, ref := range refs {
			if v.config.find(ref) == nil {
				return nil, fmt.Errorf("no resource %s", ref.Keys["InstanceID"])
			}
		}
		for _, ref := range refs {
			p := v.config.find(ref)
			if p == nil {
				continue // it went with its parent
			}
			if kind := p.Get("ResourceType").Uint(); kind == 5 || kind == 3 || kind == 4 {
				return nil, fmt.Errorf("'%s': device '%s' cannot be removed", v.name, p.Get("ResourceSubType"))
			}
			if isHardDisk(p) && len(v.snapshots) > 0 {
				return nil, fmt.Errorf("'%s': the disks of a virtual machine that has checkpoints cannot be changed", v.name)
			}
			h.removePart(v, p)
		}
		return nil, h.written(v)
	})
}

func (h *Host) removePart(v *vm, p *cim.Instance) {
	for _, child := range slices.Clone(v.config.parts) {
		if ref, err := cim.ParsePath(child.Get("Parent").String(), cim.Virtualization); err == nil && ref.Equal(p.Ref()) {
			h.removePart(v, child)
		}
	}
	_, suffix, _ := strings.Cut(p.Get("InstanceID").String(), `\`)
	v.config.parts = slices.DeleteFunc(v.config.parts, func(q *cim.Instance) bool { return q.Ref().Equal(p.Ref()) })
	v.list = slices.DeleteFunc(v.list, func(d *disk) bool {
		if strings.EqualFold(d.id, suffix) {
			_ = h.detach(d) // it is given up
			return true
		}
		return false
	})
}
