package hyperv

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// linkOn is EnabledState of a network card's connection that works.
const linkOn = 2

// switches are the host's virtual switches by name.
func (d *Driver) switches(ctx context.Context) (map[string]wsman.Ref, error) {
	list, err := d.query(ctx, "SELECT * FROM Msvm_VirtualEthernetSwitch")
	if err != nil {
		return nil, fmt.Errorf("list the switches: %w", err)
	}
	out := map[string]wsman.Ref{}
	for _, o := range list {
		r := wsman.NewRef("Msvm_VirtualEthernetSwitch", "CreationClassName", "Msvm_VirtualEthernetSwitch", "Name", o.text("Name"))
		r.Namespace = "root/virtualization/v2"
		out[o.text("ElementName")] = r
	}
	return out, nil
}

// addNICs gives the VM its network cards: with addresses of their own, and
// connected to nothing, unless asked. A copy of a VM that is on the network
// beside the original does harm.
func (m *making) addNICs(ctx context.Context) error {
	nics := m.o.Definition.NICs
	if len(nics) == 0 {
		return nil
	}
	have := map[string]wsman.Ref{}
	if m.o.ConnectNICs {
		var err error
		if have, err = m.d.switches(ctx); err != nil {
			return err
		}
	}
	for _, n := range nics {
		card, err := m.addNIC(ctx, n)
		if err != nil {
			return err
		}
		to, found := have[n.Network]
		switch {
		case !m.o.ConnectNICs || n.Network == "":
			continue
		case !found:
			m.warn("the host has no switch %q: a network card is not connected", n.Network)
			continue
		}
		link := wsman.NewInstance(classLink).Set("ResourceType", wsman.Of(uint16(typeLink))).Set("ResourceSubType", wsman.Of(subLink)).
			Set("Parent", path(card)).Set("HostResource", wsman.List(to.String())).Set("EnabledState", wsman.Of(uint16(linkOn)))
		made, err := m.add(ctx, link)
		if err != nil && !hostSaid(err) {
			return fmt.Errorf("connect a network card to %q: %w", n.Network, err)
		}
		if err != nil {
			m.warn("a network card could not be connected to %q: %v", n.Network, err)
		} else if !parseRef(made.text("HostResource")).Equal(to) {
			m.warn("the host took the connection to %q and made another: look at the VM's network cards", n.Network)
		}
	}
	m.noteNICs(nics)
	return nil
}

// noteNICs says what is not connected.
func (m *making) noteNICs(nics []vm.NIC) {
	if m.o.ConnectNICs {
		return
	}
	var names []string
	for _, n := range nics {
		if n.Network != "" && !slices.Contains(names, n.Network) {
			names = append(names, n.Network)
		}
	}
	text := fmt.Sprintf("%d network cards are not connected", len(nics))
	if len(nics) == 1 {
		text = "the network card is not connected"
	}
	if len(names) > 0 {
		text += fmt.Sprintf(" (before: %s)", strings.Join(names, ", "))
	}
	m.note("%s; --connect-nics connects them", text)
}

func (m *making) addNIC(ctx context.Context, n vm.NIC) (object, error) {
	class, sub := classNIC, subNIC
	if n.Model == "emulated" && m.generation == 1 {
		class, sub = classLegacyNIC, subLegacyNIC
	}
	in := wsman.NewInstance(class).Set("ResourceType", wsman.Of(uint16(typeNIC))).Set("ResourceSubType", wsman.Of(sub)).Set("ElementName", wsman.Of("Network Adapter"))
	mac := strings.ToUpper(strings.NewReplacer(":", "", "-", "").Replace(n.MAC))
	keep := m.o.KeepMACs && len(mac) == 12
	if keep {
		in.Set("StaticMacAddress", wsman.Of(true)).Set("Address", wsman.Of(mac))
	} else {
		in.Set("StaticMacAddress", wsman.Of(false))
	}
	card, err := m.add(ctx, in)
	if err != nil {
		return object{}, fmt.Errorf("a network card: %w", err)
	}
	if keep && !strings.EqualFold(card.text("Address"), mac) {
		m.warn("the host gives a network card the address %s instead of %s", macText(card.text("Address")), n.MAC)
	}
	return card, nil
}
