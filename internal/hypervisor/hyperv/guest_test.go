package hyperv

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// Applications truncate their logs only where that was asked for and they hold
// still; whoever counted on it is told where they did not.
func TestTruncateLogs(t *testing.T) {
	for _, c := range []struct {
		name  string
		asked bool
		host  func(*fakeHost)
		kinds []uint8 // of the checkpoints that were asked for, in order
		warns bool
	}{
		{"not asked for", false, func(*fakeHost) {}, []uint8{backupCopy}, false},
		{"asked for", true, func(*fakeHost) {}, []uint8{backupFull}, false},
		{"of Linux", true, func(h *fakeHost) { h.osName = "Debian" }, []uint8{backupCopy}, true},
		{"of a guest that is off", true, func(h *fakeHost) { h.state = stateOff }, []uint8{backupCopy}, true},
		{"a disk is shared", true, func(h *fakeHost) { h.extra = []*wsman.Instance{furtherDisk("scsi0-1", `C:\VMs\quorum.vhdx`, true)} }, []uint8{backupCopy}, true},
		{"the host leaves a disk out", true, leavesOut, []uint8{backupFull}, true},
		{"the writers fail", true, func(h *fakeHost) { failJobs(h, "CreateSnapshot", asksApplication) }, []uint8{backupFull, backupCopy}, true},
	} {
		h := newFakeHost(t)
		c.host(h)
		var kinds []uint8
		fail := h.invoke
		h.invoke = func(m string, args map[string]wsman.Value) (*wsman.Instance, error) {
			if how, err := wsman.Prop[*wsman.Instance](wsman.NewInstance("").Set("x", args["SnapshotSettings"]), "x"); m == "CreateSnapshot" && err == nil {
				kind, _ := wsman.Prop[uint8](how, "GuestBackupType")
				kinds = append(kinds, kind)
			}
			if fail != nil {
				return fail(m, args)
			}
			return nil, nil
		}
		s := mustBegin(t, h.driver(imagetest.MemoryDir(t), Options{TruncateLogs: c.asked}), hypervisor.Options{})
		if warns := strings.Contains(strings.Join(s.Warnings(), "\n"), "logs"); warns != c.warns || !slices.Equal(kinds, c.kinds) {
			t.Errorf("%s: kinds %v, want %v; warnings %q", c.name, kinds, c.kinds, s.Warnings())
		}
		mustAbort(t, s)
	}
}

// furtherDisk is a disk that several VMs share, or not.
func furtherDisk(device, file string, shared bool) *wsman.Instance {
	return wsman.NewInstance("Msvm_StorageAllocationSettingData").Set("InstanceID", wsman.Of("Microsoft:"+vmGUID+`\`+device)).
		Set("ResourceSubType", wsman.Of(subDisk)).Set("HostResource", wsman.List(file)).Set("PersistentReservationsSupported", wsman.Of(shared))
}

// leavesOut has the host make checkpoints without one of the VM's disks.
func leavesOut(h *fakeHost) {
	h.extra = []*wsman.Instance{furtherDisk("left-out", `C:\VMs\web01\more.vhdx`, false)}
	h.invoke = func(method string, _ map[string]wsman.Value) (*wsman.Instance, error) {
		if method == "CreateSnapshot" {
			h.extra = nil
		}
		return nil, nil
	}
}

// What keeps a guest from holding still says what to do, in the summary and in
// the error alike.
func TestIntegrationServicesSayWhatToDo(t *testing.T) {
	for name, c := range map[string]struct {
		host  func(*fakeHost)
		grade vm.Grade
		want  string
	}{
		"switched off":    {func(h *fakeHost) { h.vss = nil }, vm.GradeCrash, `switch on "Backup (volume shadow copy)"`},
		"no contact":      {func(h *fakeHost) { h.vss = []uint16{12} }, vm.GradeCrash, `"Hyper-V Volume Shadow Copy Requestor"`},
		"older":           {func(h *fakeHost) { h.vss = []uint16{3, 32775} }, vm.GradeApplication, "update the integration services"},
		"no data":         {func(h *fakeHost) { h.osName = "" }, vm.GradeFilesystem, `switch on "Data Exchange"`},
		"a guest of Unix": {func(h *fakeHost) { h.osName = "FreeBSD" }, vm.GradeFilesystem, "not Windows"},
	} {
		h := newFakeHost(t)
		c.host(h)
		d := h.driver(imagetest.MemoryDir(t), Options{})
		s := mustBegin(t, d, hypervisor.Options{})
		if w := strings.Join(s.Warnings(), "\n"); s.Grade() != c.grade || !strings.Contains(w, c.want) {
			t.Errorf("%s: grade %s, %q", name, s.Grade(), w)
		}
		mustAbort(t, s)
		if c.grade == vm.GradeApplication {
			continue
		}
		_, err := d.Begin(t.Context(), "web01", hypervisor.Options{RepoID: ourRepo, Consistency: vm.RequireApplication})
		var low *GradeError
		if !errors.As(err, &low) || !errors.Is(err, fault.ErrConsistency) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
