package hyperv

import (
	"io"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// What runs in the guest makes the grade, over WinRM from its services to the
// restore point.
func TestGradesOfGuests(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for many jobs")
	}
	s := newSite(t)
	windows := host.Guest{OS: "Windows Server 2019", Version: "10.0.17763", Windows: true, Integration: "10.0.17763"}
	with := func(change func(*host.Guest)) host.Guest { g := windows; change(&g); return g }
	for _, c := range []struct {
		name     string
		guest    host.Guest
		truncate bool
		grade    vm.Grade
		warns    string
		level    uint64 // that the host was asked for, 0 for no checkpoint
		kind     uint64 // of backup, to the guest's applications
	}{
		{"Windows", windows, false, vm.GradeApplication, "", levelApplication, backupCopy},
		{"Windows, logs", windows, true, vm.GradeApplication, "", levelApplication, backupFull},
		{"Linux", with(func(g *host.Guest) { g.OS, g.Windows = "Debian GNU/Linux", false }), false, vm.GradeFilesystem, "not Windows", levelApplication, backupCopy},
		{"an older service", with(func(g *host.Guest) { g.VSS = host.ServiceOlder }), false, vm.GradeApplication, "update the integration services", levelApplication, backupCopy},
		{"a service of another version", with(func(g *host.Guest) { g.VSS = host.ServiceIncompatible }), false, vm.GradeCrash, "does not answer", levelCrash, backupCopy},
		{"no service", with(func(g *host.Guest) { g.VSS = host.ServiceAbsent }), true, vm.GradeCrash, "Volume Shadow Copy Requestor", levelCrash, backupCopy},
		{"a service that was lost", with(func(g *host.Guest) { g.VSS = host.ServiceLost }), false, vm.GradeCrash, "Lost Communication", levelCrash, backupCopy},
		{"no data exchange", with(func(g *host.Guest) { g.KVP = host.ServiceAbsent }), false, vm.GradeFilesystem, "Data Exchange", levelApplication, backupCopy},
	} {
		if err := s.host.SetGuest(s.name, func(g *host.Guest) { *g = c.guest }); err != nil {
			t.Fatal(err)
		}
		d := s.driver(Options{TruncateLogs: c.truncate})
		res := backup.Run(t.Context(), backup.Options{Repo: s.repo, Audit: -1}, []backup.Job{{Driver: d, Name: s.name}})[0]
		d.Close()
		if res.Err != nil {
			t.Errorf("%s: %v", c.name, res.Err)
			continue
		}
		if w := strings.Join(res.Warnings, "\n"); res.Point.Grade != c.grade || !strings.Contains(w, c.warns) || (c.warns == "") != (w == "") {
			t.Errorf("%s: grade %s, want %s; %q", c.name, res.Point.Grade, c.grade, res.Warnings)
		}
		asked := s.host.Requests(s.name)
		if last := asked[len(asked)-1]; last.ConsistencyLevel != c.level || last.GuestBackupType != c.kind {
			t.Errorf("%s: the host was asked for %+v, want level %d and kind %d", c.name, last, c.level, c.kind)
		}
	}
	s.wantTidy(1)
}

// Disks of every kind in one VM: what can be read is, at its second backup, too,
// and what can't is named.
func TestDisksOfEveryKind(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for many jobs")
	}
	s := newSite(t)
	const name, bytes = "kinds", 4 << 20
	_, err := s.host.AddVM(host.Spec{Name: name, PassThrough: 1, Fibre: true, Disks: []host.DiskSpec{
		{Bytes: bytes}, {Bytes: bytes, SectorBytes: 4096}, {Bytes: bytes, Path: `C:\VMs\kinds\old.vhd`}, {Bytes: bytes, Path: `C:\VMs\kinds\shared.vhds`, Set: true}, {Bytes: bytes, Fixed: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	d := s.driver(Options{})
	defer d.Close()
	kinds := map[vm.DiskID]point.Mode{"scsi0:0": point.Incremental, "scsi0:1": point.Incremental, "scsi0:2": point.Compared, "scsi0:4": point.Incremental}
	for round := range 2 {
		text := strings.Repeat([]string{"the first ", "the second"}[round], 4096)
		for disk := range 4 { // the simulator does not write to sets
			if err := s.host.WriteBytes(name, disk, int64(round)*(1<<20), []byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		res := backup.Run(t.Context(), backup.Options{Repo: s.repo, Audit: -1}, []backup.Job{{Driver: d, Name: name, Consistency: vm.Crash}})[0]
		if res.Err != nil {
			t.Fatal(res.Err)
		}
		unprotected := ""
		for _, d := range res.Point.Unprotected {
			unprotected += string(d.ID) + ": " + d.Excluded + "\n"
		}
		if len(res.Point.Unprotected) != 2 || !strings.Contains(unprotected, "VHD set") || !strings.Contains(unprotected, "passed through") {
			t.Errorf("not protected: %q", unprotected)
		}
		if !strings.Contains(strings.Join(res.Warnings, "\n"), "Fibre Channel adapter of its own") {
			t.Errorf("warnings: %q", res.Warnings)
		}
		if len(res.Point.Disks) != len(kinds) {
			t.Errorf("%d disks, want %d", len(res.Point.Disks), len(kinds))
		}
		for _, d := range res.Point.Disks {
			if round == 1 && d.Mode != kinds[d.ID] {
				t.Errorf("%s: %s, %s; want %s", d.ID, d.Mode, d.Reason, kinds[d.ID])
			}
			disk, err := s.repo.OpenDisk(t.Context(), d.Manifest)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(text))
			if _, err := disk.ReadAt(got, int64(round)*(1<<20)); err != nil && err != io.EOF || string(got) != text {
				t.Errorf("%s: %.20q, %v", d.ID, got, err)
			}
			disk.Close()
		}
	}
}
