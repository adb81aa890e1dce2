package host

import (
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// A problem is one Msvm_Error that a job tells of.
type problem struct {
	id   string // MessageID; "" for the code of a failure
	text string
}

func (p problem) Error() string { return p.text }

// problems are those of one job.
type problems []problem

func (p problems) Error() string {
	texts := make([]string, len(p))
	for i, x := range p {
		texts[i] = x.text
	}
	return strings.Join(texts, "\n")
}

// warnings end a job that did its work.
type warnings struct{ problems }

// Messages that people have seen.
const (
	messageSwitch     = "33012" // Compare-VM's page shows it
	messageAttachment = "40010"

	notFoundText = "The system cannot find the file specified. (0x80070002)"
	inUseText    = "The process cannot access the file because it is being used by another process. (0x80070020)"
)

func fullPath(path string) bool {
	return len(path) > 3 && path[1:3] == `:\` || strings.HasPrefix(path, `\\`) && strings.Count(path, `\`) > 3
}

// importSystem is VSMS.ImportSystemDefinition.
func (h *Host) importSystem(args results) (results, uint32) {
	file, folder := args["SystemDefinitionFile"].String(), args["SnapshotFolder"].String()
	if !fullPath(file) || folder != "" && !fullPath(folder) {
		return nil, codeParameter
	}
	if h.definitionInUse(file) {
		return nil, codeInUse
	}
	keep := h.trouble.KeepIdentity
	fresh := args["GenerateNewSystemIdentifier"].String() == "true" && !keep
	return h.start(nil, "ImportSystemDefinition", func() ([]affected, error) {
		c, err := h.readDefinition(file)
		if err != nil {
			return nil, err
		}
		id := strings.ToUpper(c.vssd.Get("VirtualSystemIdentifier").String())
		if fresh || id == "" {
			id = newGUID()
		}
		if !keep && slices.ContainsFunc(h.vms, func(v *vm) bool { return strings.EqualFold(v.id, id) }) {
			return nil, problem{text: "The operation failed because a virtual machine with the same identifier already exists. Select a new identifier and try the operation again."}
		}
		v := &vm{id: id, planned: true, from: file, guest: guestOf(Spec{}), state: stateOff, changed: h.stamp(), moments: map[string]map[string]int{}, config: c.copy(id)}
		v.adopt()
		h.findSwitches(v.config)
		h.vms = append(h.vms, v)
		v.missing(v.config.vssd)
		if folder != "" {
			h.findSnapshots(v, folder)
		}
		return []affected{{v.ref(), effectCreated}}, nil
	})
}

// definitionInUse says whether a definition file is that of a VM or checkpoint.
func (h *Host) definitionInUse(file string) bool {
	for _, v := range h.vms {
		if v.planned {
			continue
		}
		if strings.EqualFold(v.config.definition(), file) {
			return true
		}
		for _, s := range v.snapshots {
			if strings.EqualFold(s.config.definition(), file) {
				return true
			}
		}
	}
	return false
}

// adopt makes imported settings those of the planned system v.
func (v *vm) adopt() {
	s := v.config.vssd
	v.name, v.version = s.Get("ElementName").String(), s.Get("Version").String()
	for name, value := range map[string]string{"VirtualSystemType": systemPlanned, "VirtualSystemIdentifier": v.id, "ConfigurationID": v.id,
		"ConfigurationFile": `Virtual Machines\` + v.id + extDefinition, "GuestStateFile": `Virtual Machines\` + v.id + extGuest} {
		s.Put(name, cim.Text(value))
	}
}

// missing notes the checkpoint that imported settings are based on, under an id
// of its own: the VM that had it may be on this host, too.
func (v *vm) missing(child *cim.Instance) {
	ref, err := cim.ParsePath(child.Get("Parent").String(), cim.Virtualization)
	if err != nil {
		return
	}
	id := newGUID()
	child.Put("Parent", cim.Text(settingsRef(id).Path()))
	v.snapshots = append(v.snapshots, &snapshot{kind: snapshotMissing, origin: strings.TrimPrefix(ref.Keys["InstanceID"], "Microsoft:"),
		config: &config{id: id, vssd: cim.New(cim.Virtualization, "Msvm_VirtualSystemSettingData").
			Put("InstanceID", cim.Text("Microsoft:"+id)).Put("VirtualSystemIdentifier", cim.Text(v.id)).Put("VirtualSystemType", cim.Text(snapshotMissing)).Put("ConfigurationID", cim.Text(id))}})
}

// findSnapshots looks for the definitions of v's missing checkpoints.
func (h *Host) findSnapshots(v *vm, folder string) (rows []affected) {
	for i := 0; i < len(v.snapshots); i++ {
		s := v.snapshots[i]
		if s.kind != snapshotMissing {
			continue
		}
		c, err := h.readDefinition(strings.TrimSuffix(folder, `\`) + `\` + s.origin + extDefinition)
		if err != nil || !strings.EqualFold(c.id, s.origin) {
			continue
		}
		s.kind, s.config = snapshotPlanned, c.copy(s.config.id)
		s.config.vssd.Put("VirtualSystemType", cim.Text(snapshotPlanned)).Put("VirtualSystemIdentifier", cim.Text(v.id))
		rows = append(rows, affected{settingsRef(s.config.id), effectCreated})
		if len(v.snapshots) < maxSnapshots { // a loop of parents ends here
			v.missing(s.config.vssd)
		}
	}
	return rows
}

// importSnapshots is VSMS.ImportSnapshotDefinitions.
func (h *Host) importSnapshots(args results) (results, uint32) {
	v, folder := h.vmOf(args["PlannedSystem"]), args["SnapshotFolder"].String()
	if v == nil || !v.planned || !fullPath(folder) {
		return nil, codeParameter
	}
	return h.start(v, "ImportSnapshotDefinitions", func() ([]affected, error) { return h.findSnapshots(v, folder), nil })
}

// validateSystem is VSMS.ValidatePlannedSystem. Its job does its work and tells
// what is wrong by its errors, as those who made it show how to use it.
func (h *Host) validateSystem(args results) (results, uint32) {
	v := h.vmOf(args["PlannedSystem"])
	if v == nil || !v.planned {
		return nil, codeParameter
	}
	return h.start(v, "ValidatePlannedSystem", func() ([]affected, error) {
		if wrong := h.validate(v); wrong != nil {
			return nil, warnings{wrong}
		}
		return nil, nil
	})
}

// validate is all that keeps a planned system from being realized.
func (h *Host) validate(v *vm) (wrong problems) {
	add := func(id, format string, args ...any) {
		wrong = append(wrong, problem{id, fmt.Sprintf("'%s': ", v.name) + fmt.Sprintf(format, args...)})
	}
	for _, s := range v.snapshots {
		if s.kind == snapshotMissing {
			add("", "The checkpoint %s was not found: import or remove it.", s.origin)
		} else {
			add("", "The checkpoint %s cannot be imported by a simulated host: remove it.", s.origin)
		}
	}
	if name := v.config.vssd.Get("ElementName").String(); name == "" || len(name) > 100 {
		add("", "The name must have 1 to 100 characters.")
	}
	if !fullPath(v.config.vssd.Get("ConfigurationDataRoot").String()) {
		add("", "The configuration's folder '%s' is no full path.", v.config.vssd.Get("ConfigurationDataRoot"))
	} else if h.exists(v.config.definition()) && !strings.EqualFold(v.config.definition(), v.from) {
		add("", "The configuration's file '%s' is there already.", v.config.definition())
	}
	for _, p := range v.config.parts {
		switch {
		case isHardDisk(p) || isMedium(p):
			if err := h.usable(v, p); err != nil {
				add(messageAttachment, "%v", err)
			}
		case p.Class.Is("Msvm_EthernetPortAllocationSettingData"):
			if name, ok := h.connected(p); !ok {
				add(messageSwitch, "Could not find Ethernet switch '%s'.", name)
			}
		}
	}
	return wrong
}

// realize is VSMS.RealizePlannedSystem.
func (h *Host) realize(args results) (results, uint32) {
	v := h.vmOf(args["PlannedSystem"])
	if v == nil || !v.planned {
		return nil, codeParameter
	}
	return h.start(v, "RealizePlannedSystem", func() ([]affected, error) {
		if wrong := h.validate(v); wrong != nil {
			return nil, wrong
		}
		var list []*disk
		drop := func(err error) ([]affected, error) {
			for _, d := range list {
				_ = h.detach(d) // it is given up
			}
			return nil, err
		}
		for _, p := range v.config.parts {
			if !isHardDisk(p) || isSet(p.Get("HostResource").String()) {
				continue
			}
			_, suffix, _ := strings.Cut(p.Get("InstanceID").String(), `\`)
			d, err := h.attach(suffix, p.Get("HostResource").String())
			if err != nil {
				return drop(err)
			}
			list = append(list, d)
		}
		if err := h.adoptFiles(v.config, v.from); err != nil {
			return drop(err)
		}
		v.config.vssd.Put("VirtualSystemType", cim.Text(realized)).Put("CreationTime", h.stamp())
		if err := h.writeFiles(v.config); err != nil {
			return drop(err)
		}
		v.list, v.planned, v.from, v.changed = list, false, "", h.stamp()
		return []affected{{v.ref(), effectCreated}}, nil
	})
}
