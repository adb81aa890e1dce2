package host

import (
	"fmt"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// A netswitch is a virtual switch of the host.
type netswitch struct {
	id, name string
}

func (s netswitch) instance() *cim.Instance {
	return cim.New(cim.Virtualization, "Msvm_VirtualEthernetSwitch").Put("Name", cim.Text(s.id)).Put("ElementName", cim.Text(s.name)).
		Put("OperationalStatus", cim.List("2")).Put("StatusDescriptions", cim.List("OK"))
}

// switchOf is the switch that a connection's HostResource names.
func (h *Host) switchOf(resource string) (netswitch, bool) {
	ref, err := cim.ParsePath(resource, cim.Virtualization)
	if err == nil && strings.EqualFold(ref.Class, "Msvm_VirtualEthernetSwitch") {
		for _, s := range h.switches {
			if strings.EqualFold(s.id, ref.Keys["Name"]) {
				return s, true
			}
		}
	}
	return netswitch{}, false
}

// connected says whether the switch of a connection is there, and how it was
// called. A connection that is disabled or asks for none needs none.
func (h *Host) connected(port *cim.Instance) (name string, ok bool) {
	resource := port.Get("HostResource").String()
	if port.Get("EnabledState").Uint() != 2 || resource == "" {
		return "", true
	}
	_, ok = h.switchOf(resource)
	return port.Get("LastKnownSwitchName").String(), ok
}

// findSwitches leads imported connections to this host's switches of the same
// names.
func (h *Host) findSwitches(c *config) {
	for _, p := range c.parts {
		if !p.Class.Is("Msvm_EthernetPortAllocationSettingData") || p.Get("HostResource").String() == "" {
			continue
		}
		if _, ok := h.switchOf(p.Get("HostResource").String()); ok {
			continue
		}
		for _, s := range h.switches {
			if s.name == p.Get("LastKnownSwitchName").String() {
				p.Put("HostResource", cim.List(s.instance().Ref().Path()))
			}
		}
	}
}

// The range that MAC addresses are taken from: its beginning, and how many.
const (
	macPrefix = "00155D0000"
	macCount  = 256
)

// addresses gives network adapters without a MAC address one that nobody here
// has, and says whether there were any. When none is left they stay without.
func (h *Host) addresses(c *config) (changed bool) {
	taken := map[string]bool{}
	for _, v := range h.vms {
		for _, p := range v.config.parts {
			taken[strings.ToUpper(p.Get("Address").String())] = true
		}
	}
	next := 0
	for _, p := range c.parts {
		if p.Get("ResourceType").Uint() != 10 || p.Get("StaticMacAddress").String() == "true" || strings.Trim(p.Get("Address").String(), "0") != "" {
			continue
		}
		for ; next < macCount; next++ {
			if mac := fmt.Sprintf("%s%02X", macPrefix, next); !taken[mac] {
				p.Put("Address", cim.Text(mac))
				taken[mac], changed = true, true
				break
			}
		}
	}
	return changed
}

// connect notes the name of the switch that a connection leads to.
func (h *Host) connect(port *cim.Instance) error {
	if name, ok := h.connected(port); !ok {
		return problem{messageSwitch, "Could not find Ethernet switch '" + name + "'."}
	}
	if s, ok := h.switchOf(port.Get("HostResource").String()); ok {
		port.Put("LastKnownSwitchName", cim.Text(s.name))
	}
	return nil
}
