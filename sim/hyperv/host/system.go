package host

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// writable are the settings that ModifySystemSettings takes; others it accepts
// and ignores, as a host does.
var writable = []string{"ElementName", "Notes", "AutomaticStartupAction", "AutomaticShutdownAction", "AutomaticRecoveryAction", "ConfigurationDataRoot", "SnapshotDataRoot", "SwapFileDataRoot", "SuspendDataRoot",
	"GuestStateDataRoot", "SecureBootEnabled", "SecureBootTemplateId", "BootSourceOrder", "BootOrder", "UserSnapshotType", "IncrementalBackupEnabled", "BIOSGUID", "BIOSSerialNumber", "BaseBoardSerialNumber", "ChassisSerialNumber", "ChassisAssetTag"}

func parseSettings(text, class string) (*cim.Instance, uint32) {
	s, err := cim.ParseEmbedded(cim.Virtualization, text)
	switch {
	case errors.Is(err, cim.ErrType):
		return nil, codeFailed
	case err != nil || !s.Class.Is(class):
		return nil, codeParameter
	}
	return s, codeDone
}

// modifySystem is VSMS.ModifySystemSettings.
func (h *Host) modifySystem(args results) (results, uint32) {
	s, code := parseSettings(args["SystemSettings"].String(), "Msvm_VirtualSystemSettingData")
	if s == nil {
		return nil, code
	}
	v, c, _ := h.configOf(s.Get("InstanceID").String())
	if v == nil {
		return nil, codeParameter
	}
	return h.start(v, "ModifySystemSettings", func() ([]affected, error) {
		for _, name := range writable {
			if value := s.Get(name); value.Set {
				c.vssd.Put(name, value)
			}
		}
		if c == v.config {
			v.name = c.vssd.Get("ElementName").String()
		}
		return []affected{{settingsRef(c.id), effectUnknown}}, nil
	})
}

// changeState is Msvm_ComputerSystem.RequestStateChange.
func (h *Host) changeState(target cim.Ref, args results) (results, uint32) {
	v := h.vmOf(cim.To(target))
	state := map[uint64]int{2: stateRunning, 3: stateOff, 4: stateOff, 6: stateSaved, 9: statePaused, 11: stateRunning}[args["RequestedState"].Uint()]
	if v == nil || state == 0 {
		return nil, codeParameter
	}
	return h.start(v, "RequestStateChange", func() ([]affected, error) {
		v.state, v.changed = state, h.stamp()
		return []affected{{v.ref(), effectUnknown}}, nil
	})
}

// define is VSMS.DefineSystem.
func (h *Host) define(args results) (results, uint32) {
	s := cim.New(cim.Virtualization, "Msvm_VirtualSystemSettingData")
	if text := args["SystemSettings"].String(); text != "" {
		var code uint32
		if s, code = parseSettings(text, "Msvm_VirtualSystemSettingData"); s == nil {
			return nil, code
		}
	}
	v := &vm{id: newGUID(), name: s.Get("ElementName").String(), version: "10.0", state: stateOff, vss: true, changed: h.stamp(), moments: map[string]map[string]int{}}
	if v.name == "" {
		v.name = "New Virtual Machine"
	}
	generation := 1
	if strings.HasSuffix(s.Get("VirtualSystemSubType").String(), ":2") {
		generation = 2
	}
	v.config = h.newConfig(v, generation)
	for _, name := range writable {
		if value := s.Get(name); value.Set {
			v.config.vssd.Put(name, value)
		}
	}
	v.config.part("Msvm_MemorySettingData", "4764334d-e001-4176-82ee-5594ec9b530e", "4", "Microsoft:Hyper-V:Memory").Put("VirtualQuantity", cim.Text("1024")).Put("AllocationUnits", cim.Text("byte * 2^20"))
	v.config.part("Msvm_ProcessorSettingData", "b637f346-6a0e-4dec-af52-bd70cb80a21d", "3", "Microsoft:Hyper-V:Processor").Put("VirtualQuantity", cim.Text("1"))
	if generation == 1 {
		for n := range 2 {
			v.config.part("Msvm_ResourceAllocationSettingData", fmt.Sprintf(`83F8638B-8DCA-4152-9EDA-2CA8B33039B4\%d`, n), "5", "Microsoft:Hyper-V:Emulated IDE Controller").Put("Address", cim.Number(n))
		}
	}
	return h.start(nil, "DefineSystem", func() ([]affected, error) {
		h.vms = append(h.vms, v)
		return []affected{{v.ref(), effectCreated}}, h.writeFiles(v.config)
	})
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
			if err != nil || !slices.ContainsFunc(c.parts, func(i *cim.Instance) bool { return i.Ref().Equal(ref) }) {
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
		return rows, nil
	})
}

func (h *Host) addPart(v *vm, c *config, s *cim.Instance) (*cim.Instance, error) {
	suffix := newGUID() + `\0`
	parent := s.Get("Parent").String()
	if ref, err := cim.ParsePath(parent, cim.Virtualization); err == nil {
		_, base, _ := strings.Cut(ref.Keys["InstanceID"], `\`)
		switch s.Get("ResourceType").Uint() {
		case 17:
			suffix = strings.TrimSuffix(base, `\0`) + `\0\` + s.Get("AddressOnParent").String() + `\D`
		case 31:
			suffix = strings.TrimSuffix(base, `\D`) + `\L`
		case 33:
			suffix = base + `\C`
		}
	}
	i := s.Clone()
	i.Put("InstanceID", cim.Text("Microsoft:"+c.id+`\`+suffix))
	if slices.ContainsFunc(c.parts, func(p *cim.Instance) bool { return p.Ref().Equal(i.Ref()) }) {
		return nil, errors.New("the slot is taken")
	}
	if path := s.Get("HostResource").String(); s.Get("ResourceType").Uint() == 31 && path != "" {
		d, err := h.openDisk(suffix, path)
		if err != nil {
			return nil, fmt.Errorf("attachment '%s' not found or not usable: %w", path, err)
		}
		v.list = append(v.list, d)
	}
	c.parts = append(c.parts, i)
	return i, nil
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
		owner, _, _ := strings.Cut(s.Get("InstanceID").String(), `\`)
		m, c, _ := h.configOf(owner)
		if m == nil || c != m.config || v != nil && v != m {
			return nil, codeParameter
		}
		v = m
		list = append(list, s)
	}
	if v == nil {
		return nil, codeParameter
	}
	return h.start(v, "ModifyResourceSettings", func() ([]affected, error) {
		for _, s := range list {
			at := slices.IndexFunc(v.config.parts, func(p *cim.Instance) bool { return p.Ref().Equal(s.Ref()) })
			if at < 0 {
				return nil, fmt.Errorf("no resource %s", s.Get("InstanceID"))
			}
			for _, f := range s.Class.Properties {
				if value := s.Get(f.Name); value.Set && f.Name != "InstanceID" && f.Name != "HostResource" {
					v.config.parts[at].Put(f.Name, value)
				}
			}
		}
		return nil, nil
	})
}

// remove is VSMS.RemoveResourceSettings.
func (h *Host) remove(args results) (results, uint32) {
	var v *vm
	var refs []cim.Ref
	for _, path := range args["ResourceSettings"].Items {
		ref, err := cim.ParsePath(path, cim.Virtualization)
		owner, _, _ := strings.Cut(ref.Keys["InstanceID"], `\`)
		m, c, _ := h.configOf(owner)
		if err != nil || m == nil || c != m.config || v != nil && v != m {
			return nil, codeParameter
		}
		v = m
		refs = append(refs, ref)
	}
	if v == nil {
		return nil, codeParameter
	}
	return h.start(v, "RemoveResourceSettings", func() ([]affected, error) {
		for _, ref := range refs {
			_, suffix, _ := strings.Cut(ref.Keys["InstanceID"], `\`)
			v.config.parts = slices.DeleteFunc(v.config.parts, func(p *cim.Instance) bool { return p.Ref().Equal(ref) })
			for _, d := range v.list {
				if strings.EqualFold(d.id, suffix) {
					h.detach(d)
				}
			}
			v.list = slices.DeleteFunc(v.list, func(d *disk) bool { return strings.EqualFold(d.id, suffix) })
		}
		return nil, nil
	})
}

func (h *Host) detach(d *disk) {
	for _, l := range d.layers {
		_ = l.file.close() // the VM is done with it
	}
}

// destroy is VSMS.DestroySystem. The disks' files stay.
func (h *Host) destroy(args results) (results, uint32) {
	v := h.vmOf(args["AffectedSystem"])
	if v == nil {
		return nil, codeParameter
	}
	if v.state != stateOff && v.state != stateSaved {
		return nil, codeState
	}
	return h.start(v, "DestroySystem", func() ([]affected, error) {
		for _, d := range v.list {
			h.detach(d)
		}
		h.vms = slices.DeleteFunc(h.vms, func(m *vm) bool { return m == v })
		return nil, nil
	})
}
