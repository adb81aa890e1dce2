package hyperv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

// dataState is when the VM's state had last changed, and dataPulled says that
// it was switched off for the swap.
const (
	dataState  = "state"
	dataPulled = "pulled"
)

// stateChanged is when a VM was last switched on or off, as its host writes it;
// empty where the host does not say.
func stateChanged(o object) string { return o.text("TimeOfLastStateChange") }

// inUse says why what a dead restore left is nobody's to take away any more:
// its VM was whole, or was used since. Then what it holds by now exists nowhere
// else. It is empty where everything is as the dead run left it. A new VM on
// another node was moved there by somebody. Error:
// errElsewhere for disks of a VM that is not on this host, and may be on another
// with the restored ones.
func (d *Driver) inUse(ctx context.Context, open []journal.Entry) (string, error) {
	_, live, err := d.systems(ctx)
	if err != nil {
		return "", err
	}
	for _, e := range open {
		i := slices.IndexFunc(live, func(s system) bool { return s.guid == e.Data[dataID] || s.name == e.Name })
		switch e.Kind {
		case kindNewVM:
			if i >= 0 && live[i].name != e.Name && !(rehearsed(e) && strings.HasPrefix(live[i].name, rehearsal)) {
				return fmt.Sprintf("VM %q was whole by then", live[i].name), nil
			}
			if i >= 0 && live[i].state != stateOff {
				return fmt.Sprintf("VM %q is %s", live[i].name, stateName(live[i].state)), nil
			}
			if i < 0 {
				s, node, err := d.onAnotherNode(ctx, e)
				if err != nil {
					return "", err
				}
				if node != "" {
					return fmt.Sprintf("VM %q is on node %s by now", s.name, node), nil
				}
			}
		case kindSwap:
			if rehearsed(e) {
				continue // of its VM's own disks, of which the entry of the VM is told
			}
			if i < 0 {
				return "", errElsewhere
			}
			why, err := d.swapUsed(ctx, e, live[i])
			if why != "" || err != nil {
				return why, err
			}
		}
	}
	return "", nil
}

// swapUsed says why a disk that may have been swapped is not to be swapped back.
func (d *Driver) swapUsed(ctx context.Context, e journal.Entry, s system) (string, error) {
	in, err := d.Get(ctx, instance(classDisk, e.Name))
	if errors.Is(err, fault.ErrNotFound) {
		return fmt.Sprintf("VM %q has no such disk any more", s.name), nil
	}
	if err != nil {
		return "", err
	}
	file := object{in}.text("HostResource")
	if sameFile(file, e.Data[dataOld]) {
		return "", nil
	}
	if !sameFile(file, e.Data[dataNew]) {
		return fmt.Sprintf("VM %q has its disk in %s by now", s.name, file), nil
	}
	if s.state != stateOff {
		return fmt.Sprintf("VM %q has the restored disk %s and is %s", s.name, file, stateName(s.state)), nil
	}
	in, err = d.Get(ctx, s.ref)
	if err != nil {
		return "", err
	}
	if now := stateChanged(object{in}); now == "" || now != e.Data[dataState] {
		return fmt.Sprintf("VM %q may have run with the restored disk %s since", s.name, file), nil
	}
	return "", nil
}

// leave forgets a dead restore whose VM is in use, and says what is where.
func leave(r *journal.Run, open []journal.Entry, why string) string {
	var names []string
	for _, e := range open {
		switch e.Kind {
		case kindSwap:
			names = append(names, fmt.Sprintf("%s (restored) and %s (before)", e.Data[dataNew], e.Data[dataOld]))
		case kindFolder:
			names = append(names, e.Name)
		}
	}
	text := "a restore was interrupted, and nothing of it is taken back: " + why
	if len(names) > 0 {
		text += "; look whether all of this is needed: " + strings.Join(names, ", ")
	}
	if err := r.Clear(); err != nil {
		text += fmt.Sprintf(" (%v)", err)
	}
	return text
}
