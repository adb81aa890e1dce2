package host_test

import (
	"strings"
	"testing"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// What a guest's services are shows in their devices, and decides whether a
// checkpoint that the applications know of can be made.
func TestServicesOfAGuest(t *testing.T) {
	b := newBench(t, host.Options{}, host.Spec{Disks: []host.DiskSpec{{Bytes: mib}}})
	level := func(n string) args {
		return args{"AffectedSystem": cim.To(b.vm), "SnapshotType": cim.Text("32768"), "SnapshotSettings": cim.Text(cim.New(cim.Virtualization, "Msvm_VirtualSystemSnapshotSettingData").
			Put("ConsistencyLevel", cim.Text(n)).Put("GuestBackupType", cim.Text("2")).Embedded())}
	}
	device := func(class string) *cim.Instance { return one(b, b.related(b.vm, "Msvm_SystemDevice", class)) }
	for _, test := range []struct {
		name    string
		service host.Service
		status  string
		works   bool
	}{
		{"works", host.ServiceWorks, "2", true},
		{"another version", host.ServiceOlder, "3", true},
		{"absent", host.ServiceAbsent, "12", false},
		{"incompatible", host.ServiceIncompatible, "7", false},
		{"lost", host.ServiceLost, "13", false},
	} {
		if err := b.h.SetGuest("web01", func(g *host.Guest) { g.VSS, g.KVP = test.service, test.service }); err != nil {
			t.Fatal(err)
		}
		if got := device("Msvm_VssComponent").Get("OperationalStatus").String(); got != test.status {
			t.Errorf("%s: status %s", test.name, got)
		}
		told := strings.Join(device("Msvm_KvpExchangeComponent").Get("GuestIntrinsicExchangeItems").Items, "\n")
		if strings.Contains(told, "IntegrationServicesVersion") != test.works || strings.Contains(told, "OSPlatformId") != test.works {
			t.Errorf("%s: the guest tells %s", test.name, told)
		}
		made, job := b.job("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", level("1"))
		if (len(made) == 1) != test.works {
			t.Errorf("%s: made %v, job %s", test.name, made, job.Get("JobState"))
		}
		for _, cp := range made {
			b.job("Msvm_VirtualSystemSnapshotService", "DestroySnapshot", args{"AffectedSnapshot": cim.To(cp)})
		}
	}
	b.h.SetGuest("web01", func(g *host.Guest) { g.VSS, g.KVP = host.ServiceWorks, host.ServiceWorks })

	conf := settings(b.id)
	switched := one(b, b.parts(conf, "Msvm_VssComponentSettingData")).Put("EnabledState", cim.Text("3"))
	b.must(b.change("ModifyResourceSettings", "ResourceSettings", switched))
	if i := device("Msvm_VssComponent"); i.Get("EnabledState").String() != "3" {
		t.Errorf("switched off it is %s", i.Embedded())
	}
	if made, _ := b.job("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", level("1")); len(made) != 0 {
		t.Error("made a consistent checkpoint without the service")
	}
	if made, _ := b.job("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", level("2")); len(made) != 1 {
		t.Error("made no checkpoint")
	}
	asked := b.h.Requests("web01")
	if n := len(asked); n != 7 || asked[n-1] != (host.Request{SnapshotType: 32768, ConsistencyLevel: 2, GuestBackupType: 2}) {
		t.Errorf("asked for %+v", asked)
	}
	if _, code := b.call("Msvm_VirtualSystemSnapshotService", "CreateSnapshot", level("3")); code != 32773 {
		t.Errorf("a level that is none: %d", code)
	}
	b.state(b.vm, "3", 7)
	if left := b.related(b.vm, "Msvm_SystemDevice", "Msvm_VssComponent"); len(left) != 0 {
		t.Errorf("off, it has %v", left)
	}
}
