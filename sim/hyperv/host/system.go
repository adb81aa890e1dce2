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
var writable = []string{"ElementName", "Notes", "AutomaticStartupAction", "AutomaticShutdownAction", "AutomaticRecoveryAction", "SnapshotDataRoot", "SwapFileDataRoot",
	"SecureBootEnabled", "SecureBootTemplateId", "BootSourceOrder", "BootOrder", "UserSnapshotType", "IncrementalBackupEnabled", "BIOSGUID", "BIOSSerialNumber", "BaseBoardSerialNumber",
	"ChassisSerialNumber", "ChassisAssetTag", "AutomaticSnapshotsEnabled", "PauseAfterBootFailure", "ConsoleMode", "LockOnDisconnect", "VirtualNumaEnabled"}

// writableBefore are those that only a system which is not there yet can have
// changed: where its files will be.
var writableBefore = []string{"ConfigurationDataRoot", "SuspendDataRoot", "GuestStateDataRoot"}

// writableOff are those that a VM can have changed only while it is off.
var writableOff = []string{"SecureBootEnabled", "SecureBootTemplateId", "BootSourceOrder", "BootOrder", "BIOSGUID", "BIOSSerialNumber", "BaseBoardSerialNumber", "ChassisSerialNumber", "ChassisAssetTag", "VirtualNumaEnabled"}

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
	v, c, snap := h.configOf(s.Get("InstanceID").String())
	if v == nil {
		return nil, codeParameter
	}
	return h.start(v, "ModifySystemSettings", func() ([]affected, error) {
		names := writable
		switch {
		case snap != nil:
			names = []string{"ElementName", "Notes"}
		case v.planned:
			names = slices.Concat(writable, writableBefore)
		}
		if err := v.settable(c, s, names); err != nil {
			return nil, err
		}
		for _, name := range names {
			if value := s.Get(name); value.Set {
				c.vssd.Put(name, value)
			}
		}
		if c == v.config {
			v.name = c.vssd.Get("ElementName").String()
		}
		rows := []affected{{settingsRef(c.id), effectUnknown}}
		if v.planned {
			return rows, nil
		}
		return rows, h.writeFiles(c)
	})
}

// settable says why s cannot be c's settings.
func (v *vm) settable(c *config, s *cim.Instance, names []string) error {
	for _, name := range names {
		value := s.Get(name)
		if !value.Set {
			continue
		}
		if v.state != stateOff && slices.Contains(writableOff, name) && !slices.Equal(value.Items, c.vssd.Get(name).Items) {
			return fmt.Errorf("cannot modify %s of '%s' while the virtual machine is in its current state", name, v.name)
		}
		wrong := ""
		switch name {
		case "ElementName":
			if len(value.String()) == 0 || len(value.String()) > 100 {
				wrong = "must have 1 to 100 characters"
			}
		case "SecureBootEnabled":
			if value.String() == "true" && c.generation() != 2 {
				wrong = "is for generation 2 alone"
			}
		case "BootOrder":
			if len(value.Items) == 0 && len(c.vssd.Get(name).Items) == 0 {
				break
			}
			if sorted := slices.Compact(slices.Sorted(slices.Values(value.Items))); len(value.Items) != 4 || len(sorted) != 4 || c.generation() != 1 {
				wrong = "must have four values, all different, of a generation 1 virtual machine"
			}
		case "ConfigurationDataRoot", "SnapshotDataRoot", "SwapFileDataRoot", "SuspendDataRoot", "GuestStateDataRoot":
			if !fullPath(value.String()) {
				wrong = "must be a full path"
			}
		}
		if wrong != "" {
			return fmt.Errorf("'%s' failed to modify settings: %s %s (0x80070057)", v.name, name, wrong)
		}
	}
	return nil
}

// generation is 1 or 2.
func (c *config) generation() int {
	if strings.HasSuffix(c.vssd.Get("VirtualSystemSubType").String(), ":2") {
		return 2
	}
	return 1
}

// transitions are the states that RequestStateChange leads to, and from which.
var transitions = map[uint64]struct {
	to   int
	from []int
}{
	2:  {stateRunning, []int{stateOff, stateSaved, statePaused}},
	3:  {stateOff, []int{stateRunning, stateSaved, statePaused}},
	4:  {stateOff, []int{stateRunning}},
	6:  {stateSaved, []int{stateRunning, statePaused}},
	9:  {statePaused, []int{stateRunning}},
	10: {stateRunning, []int{stateRunning}},
	11: {stateRunning, []int{stateRunning, statePaused}},
}

// changeState is Msvm_ComputerSystem.RequestStateChange.
func (h *Host) changeState(target cim.Ref, args results) (results, uint32) {
	v := h.vmOf(cim.To(target))
	change, ok := transitions[args["RequestedState"].Uint()]
	if v == nil || v.planned || !ok {
		return nil, codeParameter
	}
	if !slices.Contains(change.from, v.state) {
		return nil, codeState
	}
	return h.start(v, "RequestStateChange", func() ([]affected, error) {
		if change.to == stateRunning && v.state != stateRunning {
			if err := h.startable(v); err != nil {
				return nil, err
			}
			if h.addresses(v.config) {
				if err := h.writeFiles(v.config); err != nil {
					return nil, err
				}
			}
		}
		v.state, v.changed = change.to, h.stamp()
		return []affected{{v.ref(), effectUnknown}}, nil
	})
}

// startable says why a VM cannot be started.
func (h *Host) startable(v *vm) error {
	var wrong problems
	for _, d := range v.list {
		files := slices.Clone(d.under)
		for _, l := range d.layers {
			files = append(files, l.path)
		}
		for _, f := range files {
			if !h.exists(f) {
				wrong = append(wrong, problem{messageAttachment, fmt.Sprintf("'%s': Failed to open attachment '%s'. Error: '%s'", v.name, f, notFoundText)})
			}
		}
	}
	for _, p := range v.config.parts {
		if isMedium(p) && !h.exists(p.Get("HostResource").String()) {
			wrong = append(wrong, problem{messageAttachment, fmt.Sprintf("'%s': Failed to open attachment '%s'. Error: '%s'", v.name, p.Get("HostResource"), notFoundText)})
		}
	}
	if wrong != nil {
		return wrong
	}
	return nil
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
	if args["ReferenceConfiguration"].Ref != nil {
		return nil, codeUnsupported
	}
	var resources []*cim.Instance
	for _, text := range args["ResourceSettings"].Items {
		r, code := parseSettings(text, "CIM_ResourceAllocationSettingData")
		if r == nil {
			return nil, code
		}
		resources = append(resources, r)
	}
	v := &vm{id: newGUID(), name: s.Get("ElementName").String(), version: "10.0", state: stateOff, guest: guestOf(Spec{}), changed: h.stamp(), moments: map[string]map[string]int{}}
	if v.name == "" {
		v.name = "New Virtual Machine"
	}
	generation := 1
	switch sub := s.Get("VirtualSystemSubType").String(); sub {
	case "", "Microsoft:Hyper-V:SubType:1":
	case "Microsoft:Hyper-V:SubType:2":
		generation = 2
	default:
		return nil, codeParameter
	}
	v.config = h.newConfig(v, generation, h.o.DataRoot)
	names := slices.Concat(writable, writableBefore)
	v.config.part("Msvm_MemorySettingData", "4764334d-e001-4176-82ee-5594ec9b530e", "4", "Microsoft:Hyper-V:Memory").Put("VirtualQuantity", cim.Text("1024")).Put("AllocationUnits", cim.Text("byte * 2^20"))
	v.config.part("Msvm_ProcessorSettingData", "b637f346-6a0e-4dec-af52-bd70cb80a21d", "3", "Microsoft:Hyper-V:Processor").Put("VirtualQuantity", cim.Text("1"))
	v.config.services()
	if generation == 1 {
		v.config.ide()
	}
	return h.start(nil, "DefineSystem", func() ([]affected, error) {
		if err := v.settable(v.config, s, names); err != nil {
			return nil, err
		}
		for _, name := range names {
			if value := s.Get(name); value.Set {
				v.config.vssd.Put(name, value)
			}
		}
		for _, r := range resources {
			if _, err := h.addPart(v, v.config, r); err != nil {
				for _, d := range v.list {
					_ = h.detach(d) // it is given up
				}
				return nil, err
			}
		}
		h.vms = append(h.vms, v)
		return []affected{{v.ref(), effectCreated}}, h.writeFiles(v.config)
	})
}

// destroy is VSMS.DestroySystem. The disks' files stay, those of the definition
// go.
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
			_ = h.detach(d) // it is given up
		}
		h.vms = slices.DeleteFunc(h.vms, func(m *vm) bool { return m == v })
		if v.planned {
			return nil, nil // what was imported stays where it lies
		}
		err := h.removeFiles(v.config)
		for _, s := range v.snapshots {
			err = errors.Join(err, h.removeFiles(s.config))
		}
		return nil, err
	})
}
