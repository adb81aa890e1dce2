package host

import (
	"fmt"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// A Service is how an integration service of a guest does.
type Service int

// What a service may be. Whether it is switched on is among the VM's settings.
const (
	ServiceWorks        Service = iota
	ServiceAbsent               // not installed, or it has not called yet
	ServiceOlder                // of another version that works
	ServiceIncompatible         // of a version that does not
	ServiceLost                 // it worked and does not answer any more
)

// status is what OperationalStatus and its texts say.
func (s Service) status() (codes, texts []string) {
	switch s {
	case ServiceAbsent:
		return []string{"12"}, []string{"No Contact"}
	case ServiceOlder:
		return []string{"3", "32775"}, []string{"Degraded", "The protocol version of the component installed in the virtual machine does not match the version expected by the hosting system"}
	case ServiceIncompatible:
		return []string{"7", "32775"}, []string{"Non-Recoverable Error", "The protocol version of the component installed in the virtual machine does not match the version expected by the hosting system"}
	case ServiceLost:
		return []string{"13"}, []string{"Lost Communication"}
	}
	return []string{"2"}, []string{"OK"}
}

func (s Service) works() bool { return s == ServiceWorks || s == ServiceOlder }

// A Guest is what runs in a VM.
type Guest struct {
	OS          string // as it calls itself
	Version     string
	Windows     bool
	Integration string // version of its integration services
	VSS, KVP    Service
}

func guestOf(s Spec) Guest {
	g := Guest{OS: "Windows Server 2022 Datacenter", Version: "10.0.20348", Windows: true, Integration: "10.0.20348"}
	if s.Linux {
		g = Guest{OS: "Debian GNU/Linux", Version: "6.1.0", Integration: "3.1"}
	}
	if s.NoVSS {
		g.VSS = ServiceAbsent
	}
	return g
}

// SetGuest changes what runs in a VM.
func (h *Host) SetGuest(name string, change func(*Guest)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.byName(name)
	if v == nil {
		return fmt.Errorf("no VM %s", name)
	}
	change(&v.guest)
	return nil
}

// A Request is what somebody asked of a checkpoint.
type Request struct {
	SnapshotType, ConsistencyLevel, GuestBackupType uint64
}

// Requests are those for checkpoints of a VM, whether they were made or not.
func (h *Host) Requests(name string) []Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v := h.byName(name); v != nil {
		return append([]Request(nil), v.requests...)
	}
	return nil
}

// enabled says whether a service is switched on in the VM's settings.
func (c *config) enabled(class string) bool {
	for _, p := range c.parts {
		if p.Class.Is(class) {
			return p.Get("EnabledState").Uint() == 2
		}
	}
	return false
}

// freezes says whether the guest's backup service can be asked.
func (v *vm) freezes() bool {
	return v.config.enabled("Msvm_VssComponentSettingData") && v.guest.VSS.works()
}

// Ids of the devices that stand for services, the same in every VM.
const (
	idVSS      = "5CED1297-4598-4915-A5FC-AD21BB4D02A4"
	idKVP      = "2A34B1C2-FD73-4043-8A5B-DD2159BC743F"
	idShutdown = "9F8233AC-BE49-4C79-8EE3-E7E1985B2077"
)

// services adds the settings of the integration services.
func (c *config) services() {
	for _, s := range [][2]string{{"Msvm_VssComponentSettingData", idVSS}, {"Msvm_KvpExchangeComponentSettingData", idKVP}, {"Msvm_ShutdownComponentSettingData", idShutdown}} {
		c.part(s[0], s[1], "1", "").Put("EnabledState", cim.Text("2"))
	}
}

// components are the services of a VM that runs.
func (v *vm) components(put func(*cim.Instance)) {
	device := func(class, id string, s Service) *cim.Instance {
		i := cim.New(cim.Virtualization, class).Put("SystemName", cim.Text(v.id)).Put("DeviceID", cim.Text("Microsoft:"+v.id+`\`+id)).Put("EnabledState", cim.Text("2"))
		codes, texts := s.status()
		if !v.config.enabled(class + "SettingData") {
			i.Put("EnabledState", cim.Text("3"))
			codes, texts = []string{"12"}, []string{"No Contact"}
		}
		return i.Put("OperationalStatus", cim.List(codes...)).Put("StatusDescriptions", cim.List(texts...))
	}
	give := func(i *cim.Instance) {
		put(i)
		put(association("Msvm_SystemDevice", "GroupComponent", v.ref(), "PartComponent", i.Ref()))
	}
	give(device("Msvm_VssComponent", idVSS, v.guest.VSS))
	give(device("Msvm_ShutdownComponent", idShutdown, ServiceWorks))
	kvp := device("Msvm_KvpExchangeComponent", idKVP, v.guest.KVP)
	if v.guest.KVP.works() && v.config.enabled("Msvm_KvpExchangeComponentSettingData") {
		kvp.Put("GuestIntrinsicExchangeItems", cim.List(v.guest.items()...)).Put("GuestExchangeItems", cim.List())
	}
	give(kvp)
}

// items are what a guest tells of itself.
func (g Guest) items() []string {
	pairs := [][2]string{{"FullyQualifiedDomainName", "guest.example"}, {"IntegrationServicesVersion", g.Integration}, {"OSName", g.OS}, {"OSVersion", g.Version}, {"ProcessorArchitecture", "x86_64"}}
	if g.Windows {
		pairs[len(pairs)-1][1] = "9"
		pairs = append(pairs, [2]string{"OSPlatformId", "2"})
	}
	var out []string
	for _, p := range pairs {
		out = append(out, cim.New(cim.Virtualization, "Msvm_KvpExchangeDataItem").Put("Name", cim.Text(p[0])).Put("Data", cim.Text(p[1])).Put("Source", cim.Text("2")).Embedded())
	}
	return out
}
