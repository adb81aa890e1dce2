package host

import (
	"context"
	"fmt"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/wsman"
)

var _ wsman.Provider = (*Host)(nil)

// Invoke carries out a method.
func (h *Host) Invoke(_ context.Context, target *cim.Instance, method cim.Method, args map[string]cim.Value) (map[string]cim.Value, uint32, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	do := map[string]func(results) (results, uint32){
		"Msvm_VirtualSystemSnapshotService.CreateSnapshot":              h.createSnapshot,
		"Msvm_VirtualSystemSnapshotService.DestroySnapshot":             h.destroySnapshot,
		"Msvm_VirtualSystemSnapshotService.DestroySnapshotTree":         h.destroyTree,
		"Msvm_VirtualSystemSnapshotService.ApplySnapshot":               h.applySnapshot,
		"Msvm_VirtualSystemSnapshotService.ClearSnapshotState":          h.clearState,
		"Msvm_ImageManagementService.ResizeVirtualHardDisk":             h.resize,
		"Msvm_VirtualSystemSnapshotService.ConvertToReferencePoint":     h.convert,
		"Msvm_VirtualSystemReferencePointService.DestroyReferencePoint": h.destroyPoint,
		"Msvm_ImageManagementService.GetVirtualDiskChanges":             h.changes,
		"Msvm_ImageManagementService.GetVirtualHardDiskSettingData":     h.diskSettings,
		"Msvm_ImageManagementService.GetVirtualHardDiskState":           h.diskState,
		"Msvm_ImageManagementService.CreateVirtualHardDisk":             h.newDisk,
		"Msvm_VirtualSystemManagementService.ModifySystemSettings":      h.modifySystem,
		"Msvm_VirtualSystemManagementService.ImportSystemDefinition":    h.importSystem,
		"Msvm_VirtualSystemManagementService.ImportSnapshotDefinitions": h.importSnapshots,
		"Msvm_VirtualSystemManagementService.ValidatePlannedSystem":     h.validateSystem,
		"Msvm_VirtualSystemManagementService.RealizePlannedSystem":      h.realize,
		"Msvm_VirtualSystemManagementService.DefineSystem":              h.define,
		"Msvm_VirtualSystemManagementService.AddResourceSettings":       h.add,
		"Msvm_VirtualSystemManagementService.ModifyResourceSettings":    h.modify,
		"Msvm_VirtualSystemManagementService.RemoveResourceSettings":    h.remove,
		"Msvm_VirtualSystemManagementService.DestroySystem":             h.destroy,
		"Msvm_ComputerSystem.RequestStateChange":                        func(a results) (results, uint32) { return h.changeState(target.Ref(), a) },
		"Msvm_ConcreteJob.GetErrorEx":                                   func(results) (results, uint32) { return h.errorsOf(target), codeDone },
		"Msvm_StorageJob.GetErrorEx":                                    func(results) (results, uint32) { return h.errorsOf(target), codeDone },
		"Msvm_ConcreteJob.GetError":                                     func(results) (results, uint32) { return h.errorOf(target), codeDone },
		"Msvm_StorageJob.GetError":                                      func(results) (results, uint32) { return h.errorOf(target), codeDone },
	}[target.Class.Name+"."+method.Name]
	if do == nil {
		return nil, 0, wsman.NotSupported(fmt.Sprintf("%s.%s is not simulated", target.Class.Name, method.Name))
	}
	out, code := do(args)
	return out, code, nil
}

func (h *Host) errorsOf(target *cim.Instance) results {
	for _, j := range h.jobs {
		if j.id == target.Get("InstanceID").String() {
			return results{"Errors": cim.List(j.errors()...)}
		}
	}
	return nil
}

// errorOf is the first of a job's errors.
func (h *Host) errorOf(target *cim.Instance) results {
	if list := h.errorsOf(target)["Errors"].Items; len(list) > 0 {
		return results{"Error": cim.Text(list[0])}
	}
	return nil
}

// Put changes nothing: Hyper-V's objects change by methods.
func (h *Host) Put(old, _ *cim.Instance) error {
	return wsman.NotSupported(old.Class.Name + " is changed by methods alone")
}

// Instances are those of a class and its subclasses.
func (h *Host) Instances(namespace, class string) []*cim.Instance {
	c := cim.Lookup(namespace, class)
	var out []*cim.Instance
	put := func(i *cim.Instance) {
		if c != nil && i.Class.Is(c.Name) {
			out = append(out, i)
		}
	}
	if strings.EqualFold(namespace, cim.MSCluster) {
		if h.cluster != nil {
			h.cluster.instances(put)
		}
		return out
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if namespace == cim.CIMV2 {
		h.system(put)
		return out
	}
	h.services(put)
	for _, v := range h.vms {
		h.machine(v, put)
	}
	for _, j := range h.jobs {
		put(h.jobInstance(j))
		class, name := "Msvm_AffectedJobElement", j.ref()
		if j.class == "Msvm_StorageJob" {
			class = "Msvm_AffectedStorageJobElement"
		}
		for _, a := range j.affected {
			put(cim.New(cim.Virtualization, class).Put("AffectedElement", cim.To(a.ref)).Put("AffectingElement", cim.To(name)).
				Put("ElementEffects", cim.List(fmt.Sprint(a.effect))))
		}
	}
	return out
}

func (h *Host) services(put func(*cim.Instance)) {
	put(cim.New(cim.Virtualization, "Msvm_ComputerSystem").Put("Name", cim.Text(h.o.Name)).Put("ElementName", cim.Text(h.o.Name)).
		Put("Caption", cim.Text("Hosting Computer System")).Put("Description", cim.Text("Microsoft Hosting Computer System")).Put("EnabledState", cim.Text("2")))
	for _, class := range []string{"Msvm_VirtualSystemManagementService", "Msvm_VirtualSystemSnapshotService", "Msvm_VirtualSystemReferencePointService", "Msvm_ImageManagementService"} {
		put(cim.New(cim.Virtualization, class).Put("SystemName", cim.Text(h.o.Name)).Put("SystemCreationClassName", cim.Text("Msvm_ComputerSystem")))
	}
	put(cim.New(cim.Virtualization, "Msvm_VirtualSystemManagementServiceSettingData").Put("InstanceID", cim.Text("Microsoft:"+h.o.Name)).
		Put("DefaultExternalDataRoot", cim.Text(h.o.DataRoot)).Put("DefaultVirtualHardDiskPath", cim.Text(h.o.DiskRoot)).
		Put("MinimumMacAddress", cim.Text(macPrefix+"00")).Put("MaximumMacAddress", cim.Text(macPrefix+"FF")))
	for _, s := range h.switches {
		put(s.instance())
	}
}

func (h *Host) machine(v *vm, put func(*cim.Instance)) {
	if v.planned {
		h.plannedMachine(v, put)
		return
	}
	vm := cim.New(cim.Virtualization, "Msvm_ComputerSystem").Put("Name", cim.Text(v.id)).Put("ElementName", cim.Text(v.name)).
		Put("Caption", cim.Text("Virtual Machine")).Put("Description", cim.Text("Microsoft Virtual Machine")).
		Put("EnabledState", cim.Number(v.state)).Put("RequestedState", cim.Text("12")).Put("OperationalStatus", cim.List("2")).Put("StatusDescriptions", cim.List("Operating normally")).
		Put("TimeOfLastStateChange", v.changed)
	if v.busy != nil {
		vm.Put("OperationalStatus", cim.List("2", "32769")).Put("StatusDescriptions", cim.List("In service", "Creating checkpoint"))
	}
	put(vm)
	associate := func(class, a string, from cim.Ref, b string, to cim.Ref) { put(association(class, a, from, b, to)) }
	configured := func(c *config) { c.put(put) }
	configured(v.config)
	associate("Msvm_SettingsDefineState", "ManagedElement", v.ref(), "SettingData", v.config.vssd.Ref())
	for n, s := range v.snapshots {
		configured(s.config)
		associate("Msvm_SnapshotOfVirtualSystem", "Antecedent", v.ref(), "Dependent", s.config.vssd.Ref())
		if s.config.id == v.applied {
			associate("Msvm_LastAppliedSnapshot", "Antecedent", s.config.vssd.Ref(), "Dependent", v.ref())
		}
		if n == len(v.snapshots)-1 {
			associate("Msvm_MostCurrentSnapshotInBranch", "Antecedent", v.ref(), "Dependent", s.config.vssd.Ref())
		}
	}
	for _, p := range v.points {
		i := cim.New(cim.Virtualization, "Msvm_VirtualSystemReferencePoint").Put("InstanceID", cim.Text(p.id)).Put("ReferencePointType", cim.Text("2")).Put("ConsistencyLevel", cim.Number(p.level)).
			Put("VirtualSystemIdentifier", cim.Text(v.id)).Put("HasAssociatedData", cim.Bool(false)).Put("VirtualDiskIdentifiers", cim.List(p.disks...)).Put("ResilientChangeTrackingIdentifiers", cim.List(p.rct...))
		put(i)
		associate("Msvm_ReferencePointOfVirtualSystem", "Antecedent", v.ref(), "Dependent", i.Ref())
	}
	if v.state == stateRunning {
		v.components(put)
	}
}

// plannedMachine is what there is of a planned system: it and its settings.
func (h *Host) plannedMachine(v *vm, put func(*cim.Instance)) {
	put(cim.New(cim.Virtualization, "Msvm_PlannedComputerSystem").Put("Name", cim.Text(v.id)).Put("ElementName", cim.Text(v.name)).Put("EnabledState", cim.Text("3")))
	v.config.put(put)
	put(association("Msvm_SettingsDefineState", "ManagedElement", v.ref(), "SettingData", v.config.vssd.Ref()))
	for _, s := range v.snapshots {
		s.config.put(put)
		put(association("Msvm_SnapshotOfVirtualSystem", "Antecedent", v.ref(), "Dependent", s.config.vssd.Ref()))
	}
}

func association(class, a string, from cim.Ref, b string, to cim.Ref) *cim.Instance {
	return cim.New(cim.Virtualization, class).Put(a, cim.To(from)).Put(b, cim.To(to))
}

// put gives the settings and those of all resources.
func (c *config) put(put func(*cim.Instance)) {
	put(c.vssd.Clone())
	for _, p := range c.parts {
		put(p.Clone())
		put(association("Msvm_VirtualSystemSettingDataComponent", "GroupComponent", c.vssd.Ref(), "PartComponent", p.Ref()))
	}
}

func (h *Host) system(put func(*cim.Instance)) {
	free := h.o.FreeBytes
	if free == 0 {
		free = h.o.VolumeBytes / 2
	}
	put(cim.New(cim.CIMV2, "Win32_OperatingSystem").Put("CSName", cim.Text(h.o.Name)).Put("Name", cim.Text(`Microsoft Windows Server 2022 Datacenter|C:\Windows|\Device\Harddisk0\Partition3`)).
		Put("Caption", cim.Text("Microsoft Windows Server 2022 Datacenter")).Put("Version", cim.Text("10.0.20348")).Put("BuildNumber", cim.Text("20348")).Put("ProductType", cim.Text("3")).Put("LocalDateTime", h.stamp()))
	put(cim.New(cim.CIMV2, "Win32_LogicalDisk").Put("DeviceID", cim.Text("C:")).Put("Caption", cim.Text("C:")).Put("Size", cim.Number(h.o.VolumeBytes)).Put("FreeSpace", cim.Number(free)).Put("SystemName", cim.Text(h.o.Name)))
	put(cim.New(cim.CIMV2, "Win32_Volume").Put("DeviceID", cim.Text(`\\?\Volume{5a3c1f0e-0000-0000-0000-100000000000}\`)).Put("Name", cim.Text(`C:\`)).Put("DriveLetter", cim.Text("C:")).
		Put("Capacity", cim.Number(h.o.VolumeBytes)).Put("FreeSpace", cim.Number(free)).Put("SystemName", cim.Text(h.o.Name)))
}
