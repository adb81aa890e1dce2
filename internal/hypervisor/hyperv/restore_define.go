package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// Kinds of devices that a VM is given.
const (
	subSCSI      = "Microsoft:Hyper-V:Synthetic SCSI Controller"
	subDrive     = "Microsoft:Hyper-V:Synthetic Disk Drive"
	subNIC       = "Microsoft:Hyper-V:Synthetic Ethernet Port"
	subLegacyNIC = "Microsoft:Hyper-V:Emulated Ethernet Port"
	subLink      = "Microsoft:Hyper-V:Ethernet Connection"

	typeNIC   = 10
	typeDrive = 17
	typeDisk  = 31
	typeLink  = 33
)

const (
	classDevice    = "Msvm_ResourceAllocationSettingData"
	classDisk      = "Msvm_StorageAllocationSettingData"
	classNIC       = "Msvm_SyntheticEthernetPortSettingData"
	classLegacyNIC = "Msvm_EmulatedEthernetPortSettingData"
	classLink      = "Msvm_EthernetPortAllocationSettingData"
	classFibre     = "Msvm_SyntheticFcPortSettingData"
)

// A NoSlotError names disks for which a VM has no room.
type NoSlotError struct{ Disks []vm.DiskID }

func (e *NoSlotError) Error() string { return fmt.Sprintf("no VM has room for its disks %v", e.Disks) }

// A making is a VM that comes to be. Until it is whole it has a name by which
// the next run knows it for ours.
type making struct {
	*Building
	o          NewVMOptions
	temporary  string // name
	generation int
	processors int
	memory     int64 // bytes
	secureBoot bool
	spots      []spot

	sys system
	now settings
	// known are the InstanceIDs of its settings, by class, that were seen.
	known map[string][]string
}

// define makes the VM of our neutral description.
func (m *making) define(ctx context.Context) error {
	if err := m.create(ctx); err != nil {
		return err
	}
	m.done.How = "definition"
	steps := []func(context.Context) error{m.setFirmware, m.setSize, m.addDisks, m.checkDisks, m.addNICs, m.giveName}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// create has the host make a VM without devices of ours.
func (m *making) create(ctx context.Context) error {
	how := wsman.NewInstance(classSettings).
		Set("ElementName", wsman.Of(m.temporary)).
		Set("VirtualSystemSubType", wsman.Of(fmt.Sprintf("Microsoft:Hyper-V:SubType:%d", m.generation)))
	for _, root := range []string{"ConfigurationDataRoot", "SnapshotDataRoot", "SwapFileDataRoot"} {
		how.Set(root, wsman.Of(m.folder))
	}
	if m.o.Definition.Notes != "" {
		how.Set("Notes", wsman.List(m.o.Definition.Notes))
	}
	e := m.entry(kindNewVM, m.temporary)
	if err := m.run.Note(e); err != nil {
		return err
	}
	out, job, err := m.d.start(ctx, familyMsvm, service(classManagement), "DefineSystem", wsman.Arg("SystemSettings", wsman.Of(how)))
	if err != nil {
		return err
	}
	if m.sys, err = m.made(ctx, e, "DefineSystem", out.ref("ResultingSystem"), job, classSystem); err != nil {
		return err
	}
	m.now, err = m.d.present(ctx, m.sys)
	return err
}

// made is the VM that a job makes, of which the entry then says the GUID.
func (m *making) made(ctx context.Context, e journal.Entry, method string, made, job wsman.Ref, class string) (s system, err error) {
	if job.Class != "" {
		e.Data[dataJob] = job.String()
		if err := m.run.Note(e); err != nil {
			return s, err
		}
		if err := m.d.wait(ctx, method, job); warned(err) {
			m.warn("%v", err)
		} else if err != nil {
			return s, err
		}
	}
	if made.Class == "" && job.Class != "" {
		all, err := m.d.client.made(ctx, job, class)
		if err != nil {
			return s, err
		}
		if len(all) == 1 {
			made = all[0]
		}
	}
	if guid, ok := guidOf(made.Key("Name")); ok {
		s = system{guid: guid, name: m.temporary, ref: made}
	} else if class == classSystem {
		_, list, err := m.d.systems(ctx)
		if err != nil {
			return s, err
		}
		if s, err = choose(list, m.temporary); err != nil {
			return s, fmt.Errorf("%s: what the host made: %w", method, err)
		}
	} else {
		return s, fmt.Errorf("%s: the host does not say what it made", method)
	}
	e.Data[dataID] = s.guid
	return s, m.run.Note(e)
}

// manage calls a method that changes the VM, again while the host is busy with
// it.
func (d *Driver) manage(ctx context.Context, method string, args ...wsman.Argument) (out object, err error) {
	until := time.Now().Add(d.busyTime)
	for {
		out, err := d.do(ctx, familyMsvm, service(classManagement), method, args...)
		if warned(err) {
			err = nil
		}
		if !errors.Is(err, errBusy) || time.Now().After(until) {
			return out, err
		}
		if e := sleep(ctx, d.poll); e != nil {
			return out, err
		}
	}
}

// hostSaid says whether err is the host's own refusal, and not that it could
// not be asked.
func hostSaid(err error) bool {
	var job *JobError
	var code *ReturnError
	return errors.As(err, &job) || errors.As(err, &code)
}

// modifySystem changes settings of the VM. Hosts may take them and do nothing,
// so whoever must know reads them back.
func (d *Driver) modifySystem(ctx context.Context, s settings, set func(*wsman.Instance)) (settings, error) {
	in := wsman.NewInstance(classSettings).Set("InstanceID", wsman.Of(s.id))
	set(in)
	if _, err := d.manage(ctx, "ModifySystemSettings", wsman.Arg("SystemSettings", wsman.Of(in))); err != nil {
		return s, err
	}
	out, err := d.Get(ctx, s.ref)
	if err != nil {
		return s, fmt.Errorf("read its settings back: %w", err)
	}
	return asSettings(object{out}), nil
}

// setFirmware sees to Secure Boot.
func (m *making) setFirmware(ctx context.Context) error {
	if m.generation != 2 {
		return nil
	}
	template := m.o.Definition.SecureBootTemplate
	same := func() bool {
		return m.now.truth("SecureBootEnabled") == m.secureBoot && (!m.secureBoot || template == "" || strings.EqualFold(m.now.text("SecureBootTemplateId"), template))
	}
	if same() {
		return nil
	}
	now, err := m.d.modifySystem(ctx, m.now, func(in *wsman.Instance) {
		in.Set("SecureBootEnabled", wsman.Of(m.secureBoot))
		if m.secureBoot && template != "" {
			in.Set("SecureBootTemplateId", wsman.Of(template))
		}
	})
	if err != nil && !hostSaid(err) {
		return err
	}
	if m.now = now; err != nil || !same() {
		m.warn("Secure Boot could not be set as it was: it is %s", map[bool]string{true: "on", false: "off"}[m.now.truth("SecureBootEnabled")])
	}
	return nil
}

// setSize gives the VM its processors and memory.
func (m *making) setSize(ctx context.Context) error {
	for _, part := range []struct {
		class, what string
		amount      int64
	}{
		{"Msvm_ProcessorSettingData", "processors", int64(m.processors)},
		{"Msvm_MemorySettingData", "MiB of memory", m.memory >> 20},
	} {
		list, err := m.settings(ctx, part.class)
		if err != nil {
			return err
		}
		if len(list) != 1 {
			return fmt.Errorf("the new VM has %d %s", len(list), part.class)
		}
		if n, _ := list[0].number("VirtualQuantity"); n == part.amount {
			continue
		}
		err = m.d.modifyResource(ctx, wsman.NewInstance(part.class).Set("InstanceID", wsman.Of(list[0].text("InstanceID"))).
			Set("VirtualQuantity", wsman.Of(uint64(part.amount))))
		if err != nil && !hostSaid(err) {
			return err
		}
		if list, err = m.settings(ctx, part.class); err != nil {
			return err
		}
		if n, _ := list[0].number("VirtualQuantity"); n != part.amount {
			m.warn("the VM had %d %s, and the host gives the new one %d", part.amount, part.what, n)
		}
	}
	return nil
}

func (d *Driver) modifyResource(ctx context.Context, in *wsman.Instance) error {
	_, err := d.manage(ctx, "ModifyResourceSettings", wsman.Arg("ResourceSettings", wsman.List(in)))
	return err
}

// settings are what hangs on the VM's settings, of one class.
func (m *making) settings(ctx context.Context, class string) ([]object, error) {
	list, err := m.d.query(ctx, associated(m.now.ref, "Msvm_VirtualSystemSettingDataComponent", class))
	if err != nil {
		return nil, fmt.Errorf("read its %s: %w", class, err)
	}
	return list, nil
}

// add gives the VM a device and finds it again: what the host calls it, only
// the host knows.
func (m *making) add(ctx context.Context, in *wsman.Instance) (object, error) {
	class := in.Class
	if m.known == nil {
		m.known = map[string][]string{}
	}
	if _, seen := m.known[class]; !seen {
		list, err := m.settings(ctx, class)
		if err != nil {
			return object{}, err
		}
		m.known[class] = []string{}
		for _, o := range list {
			m.known[class] = append(m.known[class], o.text("InstanceID"))
		}
	}
	if _, err := m.d.manage(ctx, "AddResourceSettings", wsman.Arg("AffectedConfiguration", wsman.Of(m.now.ref)), wsman.Arg("ResourceSettings", wsman.List(in))); err != nil {
		return object{}, err
	}
	list, err := m.settings(ctx, class)
	if err != nil {
		return object{}, err
	}
	var fresh []object
	for _, o := range list {
		if id := o.text("InstanceID"); !slices.Contains(m.known[class], id) {
			fresh = append(fresh, o)
			m.known[class] = append(m.known[class], id)
		}
	}
	if len(fresh) != 1 {
		return object{}, fmt.Errorf("AddResourceSettings: the VM has %d %s more, and should have 1", len(fresh), class)
	}
	return fresh[0], nil
}

// path names a setting as other settings hold it.
func path(o object) wsman.Value {
	r := instance(o.Class, o.text("InstanceID"))
	r.Namespace = "root/virtualization/v2"
	return wsman.Of(r.String())
}

// addDisks makes controllers, drives and disks.
func (m *making) addDisks(ctx context.Context) error {
	controllers := map[string]object{}
	devices, err := m.settings(ctx, classDevice)
	if err != nil {
		return err
	}
	for _, o := range devices {
		if n, _ := o.number("ResourceType"); n == typeIDE {
			at, _ := o.number("Address")
			controllers[fmt.Sprintf("ide%d", at)] = o
		}
	}
	for _, s := range m.spots {
		name := fmt.Sprintf("%s%d", s.bus, s.controller)
		on, has := controllers[name]
		if !has && s.bus == "ide" {
			return fmt.Errorf("the new VM has no IDE controller %d", s.controller)
		}
		if !has {
			if on, err = m.add(ctx, wsman.NewInstance(classDevice).Set("ResourceType", wsman.Of(uint16(typeSCSI))).Set("ResourceSubType", wsman.Of(subSCSI))); err != nil {
				return fmt.Errorf("a SCSI controller: %w", err)
			}
			controllers[name] = on
		}
		drive, err := m.add(ctx, wsman.NewInstance(classDevice).Set("ResourceType", wsman.Of(uint16(typeDrive))).Set("ResourceSubType", wsman.Of(subDrive)).
			Set("Parent", path(on)).Set("AddressOnParent", wsman.Of(fmt.Sprint(s.slot))))
		if err != nil {
			return fmt.Errorf("a drive for disk %s: %w", s.id, err)
		}
		if _, err = m.add(ctx, wsman.NewInstance(classDisk).Set("ResourceType", wsman.Of(uint16(typeDisk))).Set("ResourceSubType", wsman.Of(subDisk)).
			Set("Parent", path(drive)).Set("HostResource", wsman.List(m.names[s.id]))); err != nil {
			return fmt.Errorf("disk %s: %w", s.id, err)
		}
	}
	return nil
}

// checkDisks looks whether every disk hangs where it should, in its own file.
func (m *making) checkDisks(ctx context.Context) error {
	have, err := m.d.drives(ctx, m.now.ref)
	if err != nil {
		return err
	}
	for _, s := range m.spots {
		i := slices.IndexFunc(have, func(d drive) bool { return sameFile(d.Source, m.names[s.id]) })
		if i < 0 {
			return fmt.Errorf("disk %s: the host took %s and the VM has it not: %w", s.id, m.names[s.id], fault.ErrNotFound)
		}
		// Which of several SCSI controllers is the first, their ids decide.
		at := string(have[i].ID)
		if bus, slot := s.bus, fmt.Sprintf(":%d", s.slot); !strings.HasPrefix(at, bus) || !strings.HasSuffix(at, slot) {
			return fmt.Errorf("disk %s: it should hang at %s%d:%d, and the host has it at %s", s.id, s.bus, s.controller, s.slot, at)
		}
	}
	if len(have) != len(m.spots) {
		return fmt.Errorf("the new VM has %d disks, and should have %d", len(have), len(m.spots))
	}
	return nil
}

// giveName makes the VM what people look for.
func (m *making) giveName(ctx context.Context) error {
	_, list, err := m.d.systems(ctx)
	if err != nil {
		return err
	}
	if err := free(list, m.o.Name); err != nil {
		return err
	}
	now, err := m.d.modifySystem(ctx, m.now, func(in *wsman.Instance) { in.Set("ElementName", wsman.Of(m.o.Name)) })
	if err != nil {
		return err
	}
	if got := now.text("ElementName"); got != m.o.Name {
		return fmt.Errorf("the host does not take its name: the VM is called %q", got)
	}
	m.now, m.done.UUID = now, m.sys.guid
	return nil
}

// start powers the VM on, if that was asked for. A VM that does not start is
// restored all the same.
func (m *making) start(ctx context.Context) {
	if !m.o.Start {
		return
	}
	if err := m.d.setState(ctx, m.sys, stateRunning); err != nil {
		m.warn("the VM is whole, and could not be started: %v", err)
		return
	}
	m.done.Running = true
}

// setState switches a VM on or off and looks that it is.
func (d *Driver) setState(ctx context.Context, s system, state int64) error {
	_, err := d.do(ctx, familyCIM, s.ref, "RequestStateChange", wsman.Arg("RequestedState", wsman.Of(uint16(state))))
	if err != nil && !warned(err) {
		return err
	}
	until := time.Now().Add(d.settleTime)
	for {
		in, err := d.Get(ctx, s.ref)
		if err != nil {
			return err
		}
		now, _ := object{in}.number("EnabledState")
		if now == state {
			return nil
		}
		if time.Now().After(until) {
			return fmt.Errorf("the host took the order, and the VM is %s", stateName(now))
		}
		if err := sleep(ctx, d.poll); err != nil {
			return err
		}
	}
}
