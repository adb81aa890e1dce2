package hyperv

import (
	"context"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/vm"
)

// readiness is how still a guest can be held.
type readiness struct {
	best vm.Grade
	why  string // it is not application
	// outdated says what is odd about the integration services that work.
	outdated string
	// guest is what runs in the VM, as vm.Definition says it; empty where
	// nobody told.
	guest string
}

const switchedOff = "its integration service for backups is switched off: switch on \"Backup (volume shadow copy)\" among the VM's integration services"

// States of an integration service: the first says whether it works at all.
const (
	serviceEnabled  = 2 // EnabledState
	serviceOK       = 2
	serviceDegraded = 3
)

// guest asks what the guest's integration services allow. What can't be asked
// is not there.
func (c *client) guest(ctx context.Context, s system) readiness {
	runs, known := "", false
	crash := func(format string, args ...any) readiness {
		return readiness{best: vm.GradeCrash, why: fmt.Sprintf(format, args...), guest: runs}
	}
	switch s.state {
	case stateRunning:
	case stateOff:
		return crash("the VM is shut off, and the host does not tell whether it was shut down cleanly")
	default:
		return crash("the VM is %s", stateName(s.state))
	}
	runs, known = c.runs(ctx, s)
	list, err := c.query(ctx, associated(s.ref, "Msvm_SystemDevice", "Msvm_VssComponent"))
	switch {
	case err != nil:
		return crash("the host does not say whether its backup integration service runs: %v", err)
	case len(list) == 0:
		return crash(switchedOff)
	}
	status, _ := list[0].numbers("OperationalStatus")
	said := strings.Join(list[0].list("StatusDescriptions"), ", ")
	r := readiness{best: vm.GradeFilesystem, guest: runs}
	switch enabled, ok := list[0].number("EnabledState"); {
	case ok && enabled != serviceEnabled:
		return crash(switchedOff)
	case len(status) > 0 && status[0] == serviceOK:
	case len(status) > 0 && status[0] == serviceDegraded:
		r.outdated = "the guest's integration service for backups is degraded, mostly because it is older than the host (" + said + "): update the integration services in the guest"
	default:
		return crash("the guest's integration service for backups does not answer (%s): see in the guest that its service runs, \"Hyper-V Volume Shadow Copy Requestor\" in Windows and hv_vss_daemon in Linux", said)
	}
	switch {
	case runs == vm.GuestWindows:
		r.best = vm.GradeApplication
	case known:
		r.why = "the guest is not Windows: its file systems are frozen, and nothing tells its applications"
	default:
		r.why = "whether the guest is Windows is not known, because its data exchange service does not say: switch on \"Data Exchange\" among the VM's integration services"
	}
	return r
}

func stateName(state int64) string {
	if s := stateNames[state]; s != "" {
		return s
	}
	return fmt.Sprintf("in state %d", state)
}

// runs asks the guest's data exchange service what the guest is, as
// vm.Definition says it. Windows gives its platform, Linux its distribution's
// name. It is empty for others, and where known is false for all.
func (c *client) runs(ctx context.Context, s system) (guest string, known bool) {
	list, err := c.query(ctx, associated(s.ref, "Msvm_SystemDevice", "Msvm_KvpExchangeComponent"))
	if err != nil || len(list) == 0 {
		return "", false
	}
	name, windows := "", false
	for _, o := range list[0].embedded("GuestIntrinsicExchangeItems") {
		switch data := o.text("Data"); o.text("Name") {
		case "OSPlatformId":
			windows = windows || data == "2"
		case "OSName":
			name = strings.ToLower(data)
		}
	}
	switch {
	case windows || strings.Contains(name, "windows"):
		return vm.GuestWindows, true
	case strings.Contains(name, "bsd"):
		return "", true
	case name != "":
		return vm.GuestLinux, true
	}
	return "", false
}
