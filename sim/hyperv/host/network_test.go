package host_test

import (
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// Adapters are added, connected to switches that are there, disconnected, and
// have an address of their own when their VM starts.
func TestNetworkAdapters(t *testing.T) {
	b := newBench(t, host.Options{Switches: []string{"LAN", "DMZ"}}, host.Spec{Off: true})
	conf := settings(b.id)
	add := func(i *cim.Instance) ([]cim.Ref, *cim.Instance) {
		t.Helper()
		return b.job(management, "AddResourceSettings", args{"AffectedConfiguration": cim.To(conf), "ResourceSettings": cim.List(i.Embedded())})
	}
	made, _ := add(cim.New(cim.Virtualization, "Msvm_SyntheticEthernetPortSettingData").Put("ElementName", cim.Text("second")))
	nic := one(b, made)
	made, _ = add(cim.New(cim.Virtualization, "Msvm_SyntheticEthernetPortSettingData").Put("StaticMacAddress", cim.Bool(true)).Put("Address", cim.Text("020000000001")))
	static := one(b, made)
	switches := map[string]string{}
	for _, s := range b.h.Instances(cim.Virtualization, "Msvm_VirtualEthernetSwitch") {
		switches[s.Get("ElementName").String()] = s.Ref().Path()
	}
	if len(switches) != 2 {
		t.Fatal(switches)
	}
	port := cim.New(cim.Virtualization, "Msvm_EthernetPortAllocationSettingData").Put("Parent", cim.Text(nic.Path())).Put("EnabledState", cim.Text("2"))
	if _, job := add(port.Clone().Put("HostResource", cim.List(strings.Replace(switches["DMZ"], `,Name="`, `,Name="0`, 1)))); job.Get("JobState").Uint() != 10 || !strings.Contains(job.Get("ErrorDescription").String(), "Ethernet switch") {
		t.Errorf("a switch that is not there: %s %s", job.Get("JobState"), job.Get("ErrorDescription"))
	}
	made, _ = add(port.Put("HostResource", cim.List(switches["DMZ"])))
	connection := b.instance(one(b, made))
	if got := connection.Get("LastKnownSwitchName").String(); got != "DMZ" {
		t.Errorf("connected to %q", got)
	}
	b.must(b.change("ModifyResourceSettings", "ResourceSettings", connection.Put("HostResource", cim.List(switches["LAN"])).Put("LastKnownSwitchName", cim.Text("mine"))))
	if got := b.instance(connection.Ref()).Get("LastKnownSwitchName").String(); got != "LAN" {
		t.Errorf("then connected to %q", got)
	}
	b.must(b.change("ModifyResourceSettings", "ResourceSettings", connection.Put("EnabledState", cim.Text("3"))))
	if got := b.instance(nic).Get("Address").String(); got != "" {
		t.Errorf("before it ran its address was %q", got)
	}
	b.state(b.vm, "2", 7)
	if got := b.instance(nic).Get("Address").String(); !strings.HasPrefix(got, "00155D0000") {
		t.Errorf("its address is %q", got)
	}
	if got := b.instance(static).Get("Address").String(); got != "020000000001" {
		t.Errorf("a static address became %q", got)
	}
	_, job := b.job(management, "RemoveResourceSettings", args{"ResourceSettings": cim.List(nic.Path())})
	b.must(job)
	if n := len(b.parts(conf, "Msvm_EthernetPortAllocationSettingData")); n != 1 {
		t.Errorf("%d connections are left", n)
	}
	if made, _ := add(cim.New(cim.Virtualization, "Msvm_EmulatedEthernetPortSettingData")); len(made) != 0 {
		t.Error("generation 2 got an emulated adapter")
	}
}

// What cannot be set says so, and what is not to be set is ignored.
func TestSettingsAreReadBack(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{Off: true})
	change := func(name string, v cim.Value) (state uint64, now cim.Value) {
		s := cim.New(cim.Virtualization, "Msvm_VirtualSystemSettingData").Put("InstanceID", cim.Text("Microsoft:"+b.id)).Put(name, v)
		job := b.change("ModifySystemSettings", "SystemSettings", s)
		return job.Get("JobState").Uint(), b.instance(settings(b.id)).Get(name)
	}
	for _, test := range []struct {
		name, value, want string
		state             uint64
	}{
		{"ElementName", "other", "other", 7},
		{"ElementName", strings.Repeat("x", 101), "other", 10},
		{"SecureBootEnabled", "false", "false", 7},
		{"VirtualSystemSubType", "Microsoft:Hyper-V:SubType:1", "Microsoft:Hyper-V:SubType:2", 7},
		{"ConfigurationDataRoot", `D:\else`, `C:\VMs\web01`, 7},
		{"BootOrder", "2", "", 10},
		{"SnapshotDataRoot", `else`, `C:\VMs\web01`, 10},
		{"Version", "5.0", "10.0", 7},
	} {
		if state, now := change(test.name, cim.List(test.value)); state != test.state || now.String() != test.want {
			t.Errorf("%s %s: state %d, it is %q", test.name, test.value, state, now)
		}
	}
	b.state(b.vm, "2", 7)
	if state, now := change("SecureBootEnabled", cim.Bool(true)); state != 10 || now.String() != "false" {
		t.Errorf("secure boot of a VM that runs: %d, %s", state, now)
	}
	processors := one(b, b.parts(settings(b.id), "Msvm_ProcessorSettingData"))
	if job := b.change("ModifyResourceSettings", "ResourceSettings", processors.Put("VirtualQuantity", cim.Text("4"))); job.Get("JobState").Uint() != 10 {
		t.Error("processors of a VM that runs changed")
	}
	m, _ := b.instance(b.vm).Class.Method("RequestStateChange")
	for _, state := range []string{"2", "99"} {
		if _, code, err := b.h.Invoke(t.Context(), b.instance(b.vm), m, args{"RequestedState": cim.Text(state)}); err != nil || code != map[string]uint32{"2": 32775, "99": 32773}[state] {
			t.Errorf("state %s of a VM that runs: %d %v", state, code, err)
		}
	}
	job := func() uint64 {
		b.state(b.vm, "3", 7)
		return b.change("ModifyResourceSettings", "ResourceSettings", processors).Get("JobState").Uint()
	}()
	if got := b.instance(processors.Ref()).Get("VirtualQuantity").String(); job != 7 || got != "4" {
		t.Errorf("off: state %d, %s processors", job, got)
	}
}
